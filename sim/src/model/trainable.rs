//! Which parameters are trained: all of them, a share, or low-rank adapters beside frozen matrices (LoRA, Hu et al., arXiv
//! 2106.09685).
//!
//! The parameters of a unit lie in two flat arrays: those that are trained, which have gradients and moments, and frozen ones,
//! which have neither. A backward goes through frozen matrices to their inputs and makes no gradients of them.
//!
//! - A **share** trains whole parameters, chosen from the embedding to the head so that of any first part of the model about
//!   this share is trained: the work of training is even over stages. Weight and shift of a norm go together, as do the two
//!   tables of an embedding, because one kernel makes the gradients of both.
//! - **Adapters** of rank `r` stand beside matrices of every block: `y = W x + B A x` with `A` of `[r, in]` and `B` of `[out, r]`
//!   (the paper's scale alpha / r is 1). `A` starts normal with deviation `1 / sqrt(in)`, `B` with zeros. Queries, keys and values
//!   are one matrix here, gate and up projections another: an adapter of one of them fills its rows of the fused matrix.

use super::parameters::{Role, unit_parameters};
use super::{Activation, Layer, ModelConfig, ModelError};
use crate::program::{Precision, Recompute, Stage, TransformerWorkload, Unit};
use crate::units::StageId;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use thiserror::Error;

/// What of a model is trained. As text: `full`, `0.25` or `1/16`, `lora:8` or `lora:8:q,v`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Trainable {
    /// Everything.
    #[default]
    Full,
    /// About this share of the parameters, above 0 and at most 1.
    Share(f64),
    /// Adapters of this rank.
    Adapters {
        /// Rows of `A`, columns of `B`.
        rank: u32,
        /// Beside which matrices of each block; all of them when empty.
        beside: Vec<String>,
    },
}

/// A text that says nothing about training.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "trainable = {text:?}; allowed: full, a share above 0 and at most 1 (0.0625 or 1/16), lora:R with a rank R of at least 1 \
     (lora:8:q,v beside these matrices only)"
)]
pub struct TrainableError {
    /// What was given.
    pub text: String,
}

impl FromStr for Trainable {
    type Err = TrainableError;

    fn from_str(text: &str) -> Result<Trainable, TrainableError> {
        let wrong = || TrainableError { text: text.to_owned() };
        if text == "full" {
            return Ok(Trainable::Full);
        }
        if let Some(adapters) = text.strip_prefix("lora:") {
            let (rank, beside) = adapters.split_once(':').map_or((adapters, None), |(rank, list)| (rank, Some(list)));
            let rank = rank.parse().ok().filter(|rank| *rank > 0).ok_or_else(wrong)?;
            let names = beside.into_iter().flat_map(|list| list.split(','));
            return Ok(Trainable::Adapters { rank, beside: names.map(|name| name.trim().to_owned()).collect() });
        }
        let number = |text: &str| text.trim().parse::<f64>().ok();
        let share = match text.split_once('/') {
            Some((part, whole)) => number(part).zip(number(whole)).map(|(part, whole)| part / whole),
            None => number(text),
        };
        match share.filter(|share| *share > 0.0 && *share <= 1.0).ok_or_else(wrong)? {
            1.0 => Ok(Trainable::Full),
            share => Ok(Trainable::Share(share)),
        }
    }
}

impl fmt::Display for Trainable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trainable::Full => f.write_str("full"),
            Trainable::Share(share) => write!(f, "{share}"),
            Trainable::Adapters { rank, beside } if beside.is_empty() => write!(f, "lora:{rank}"),
            Trainable::Adapters { rank, beside } => write!(f, "lora:{rank}:{}", beside.join(",")),
        }
    }
}

impl TryFrom<String> for Trainable {
    type Error = TrainableError;

    fn try_from(text: String) -> Result<Trainable, TrainableError> {
        text.parse()
    }
}

impl From<Trainable> for String {
    fn from(trainable: Trainable) -> String {
        trainable.to_string()
    }
}

impl Trainable {
    /// Whether nothing is frozen.
    pub fn is_full(&self) -> bool {
        *self == Trainable::Full
    }

    /// Checks that a model has what is to be trained.
    ///
    /// # Errors
    /// When an adapter stands beside a matrix that does not exist, its rank is above the width of the model, or a share is so
    /// small that it trains nothing.
    pub fn validate(&self, model: &ModelConfig) -> Result<(), ModelError> {
        let refuse = |allowed| {
            let (model, value) = (model.name.clone(), self.to_string());
            Err(ModelError::Value { model, key: "trainable", value, allowed })
        };
        match self {
            Trainable::Full => Ok(()),
            Trainable::Share(_) if trained_elements(model, self) == 0 => {
                refuse("a share that reaches half of the smallest parameter".into())
            }
            Trainable::Share(_) => Ok(()),
            Trainable::Adapters { rank, .. } if *rank > model.hidden => {
                refuse(format!("a rank of at most {}, the width of the model", model.hidden))
            }
            Trainable::Adapters { beside, .. } => {
                let missing = beside.iter().find(|name| !model.adaptable().any(|known| known == *name));
                let Some(missing) = missing else { return Ok(()) };
                let known: Vec<&str> = model.adaptable().collect();
                refuse(format!("adapters beside {}; there is no matrix {missing:?}", known.join(", ")))
            }
        }
    }
}

/// A matrix of a block that an adapter can stand beside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Matrix {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Matrix {
    const ALL: [Matrix; 7] = [Matrix::Q, Matrix::K, Matrix::V, Matrix::O, Matrix::Gate, Matrix::Up, Matrix::Down];

    pub fn name(self) -> &'static str {
        match self {
            Matrix::Q => "q",
            Matrix::K => "k",
            Matrix::V => "v",
            Matrix::O => "o",
            Matrix::Gate => "gate",
            Matrix::Up => "up",
            Matrix::Down => "down",
        }
    }

    /// Where it is, in names of parameters.
    pub fn room(self) -> &'static str {
        match self {
            Matrix::Q | Matrix::K | Matrix::V | Matrix::O => "attention",
            Matrix::Gate | Matrix::Up | Matrix::Down => "mlp",
        }
    }

    /// The matrix as the block holds it, and which of its rows are this one.
    pub fn within(self, model: &ModelConfig) -> (Role, Range<usize>) {
        let (query, key) = (model.query_width(), model.kv_heads as usize * model.head_dim as usize);
        let (hidden, wide) = (model.hidden as usize, model.intermediate as usize);
        let gated = model.activation == Activation::SwiGlu;
        match self {
            Matrix::Q => (Role::QkvWeight, 0..query),
            Matrix::K => (Role::QkvWeight, query..query + key),
            Matrix::V => (Role::QkvWeight, query + key..query + 2 * key),
            Matrix::O => (Role::OutputWeight, 0..hidden),
            Matrix::Gate => (Role::UpWeight, 0..wide),
            Matrix::Up if gated => (Role::UpWeight, wide..2 * wide),
            Matrix::Up => (Role::UpWeight, 0..wide),
            Matrix::Down => (Role::DownWeight, 0..hidden),
        }
    }

    /// Columns of the matrix that holds it.
    pub fn inputs(self, model: &ModelConfig) -> usize {
        match self {
            Matrix::Q | Matrix::K | Matrix::V | Matrix::Gate | Matrix::Up => model.hidden as usize,
            Matrix::O => model.query_width(),
            Matrix::Down => model.intermediate as usize,
        }
    }
}

impl ModelConfig {
    /// The names of the matrices of a block that adapters can stand beside.
    pub fn adaptable(&self) -> impl Iterator<Item = &'static str> + use<> {
        matrices(self).map(Matrix::name)
    }
}

fn matrices(model: &ModelConfig) -> impl Iterator<Item = Matrix> + use<> {
    let gated = model.activation == Activation::SwiGlu;
    Matrix::ALL.into_iter().filter(move |&matrix| gated || matrix != Matrix::Gate)
}

/// Parameters of a model that are trained, adapters included.
pub fn trained_elements(model: &ModelConfig, trainable: &Trainable) -> u64 {
    let one = vec![Stage { units: vec![Unit { layers: model.all_layers().collect() }] }];
    let workload = TransformerWorkload {
        model: model.clone(),
        micro_batch: 1,
        seq: 1,
        recompute: Recompute::None,
        tied_on_one_rank: true,
        trainable: trainable.clone(),
        precision: Precision::Fp32,
    };
    unit_parameters(&workload, &one, StageId(0), 0) as u64
}

/// The adapters of every block: matrices and rank.
pub(crate) fn adapters(model: &ModelConfig, trainable: &Trainable) -> SmallVec<[(Matrix, usize); 7]> {
    match trainable {
        Trainable::Adapters { rank, beside } => {
            let chosen = |matrix: &Matrix| beside.is_empty() || beside.iter().any(|name| name == matrix.name());
            matrices(model).filter(chosen).map(|matrix| (matrix, *rank as usize)).collect()
        }
        Trainable::Full | Trainable::Share(_) => SmallVec::new(),
    }
}

/// Which parameters of a model are trained, by layer.
#[derive(Debug, Clone)]
pub(crate) struct Selection {
    /// By layer in forward order, by place among its own parameters; empty where all or none are trained.
    chosen: Vec<SmallVec<[bool; 12]>>,
    all: bool,
}

impl Selection {
    /// `layers` are the parameters of every layer in forward order: their roles and sizes.
    pub fn new(trainable: &Trainable, layers: impl Iterator<Item = SmallVec<[(Role, usize); 12]>>) -> Selection {
        let &Trainable::Share(share) = trainable else {
            return Selection { chosen: Vec::new(), all: trainable.is_full() };
        };
        // What of the parameters so far should be trained and is not.
        let mut due = 0.0;
        let chosen = layers.map(|parameters| {
            let mut chosen: SmallVec<[bool; 12]> = SmallVec::from_elem(false, parameters.len());
            for (place, &(role, _)) in parameters.iter().enumerate() {
                if role.joined() != role {
                    continue;
                }
                let together = |(other, _): &(Role, usize)| other.joined() == role;
                let len: usize = parameters.iter().filter(|p| together(p)).map(|(_, len)| len).sum();
                due += share * len as f64;
                if due >= len as f64 / 2.0 {
                    due -= len as f64;
                    for other in place..parameters.len() {
                        chosen[other] |= together(&parameters[other]);
                    }
                }
            }
            chosen
        });
        Selection { chosen: chosen.collect(), all: false }
    }

    /// Whether parameter `place` of the model's own parameters of `layer` is trained; `blocks` are those of the model.
    pub fn trains(&self, layer: Layer, blocks: u32, place: usize) -> bool {
        let number = match layer {
            Layer::Embedding => 0,
            Layer::Block(block) => 1 + block as usize,
            Layer::Head => 1 + blocks as usize,
        };
        self.all || self.chosen.get(number).and_then(|layer| layer.get(place)).copied().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::parameters::{frozen_layout, unit_layout};
    use proptest::prelude::*;

    fn whole(model: &ModelConfig, trainable: &Trainable) -> (TransformerWorkload, Vec<Stage>) {
        let stages = vec![Stage { units: vec![Unit { layers: model.all_layers().collect() }] }];
        let workload = TransformerWorkload {
            model: model.clone(),
            micro_batch: 1,
            seq: 4,
            recompute: Recompute::None,
            tied_on_one_rank: true,
            trainable: trainable.clone(),
            precision: Precision::Fp32,
        };
        (workload, stages)
    }

    #[test]
    fn texts() {
        let of = |text: &str| text.parse::<Trainable>();
        assert_eq!(of("full"), Ok(Trainable::Full));
        assert_eq!(of("1/16"), Ok(Trainable::Share(0.0625)));
        assert_eq!(of("1"), Ok(Trainable::Full));
        assert_eq!(of("lora:8"), Ok(Trainable::Adapters { rank: 8, beside: vec![] }));
        assert_eq!(of("lora:4:q, v"), Ok(Trainable::Adapters { rank: 4, beside: vec!["q".into(), "v".into()] }));
        for wrong in ["", "0", "2", "-1", "nan", "lora", "lora:", "lora:0", "lora:x", "1/0", "full "] {
            let error = of(wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("{wrong:?}")) && error.contains("lora:8:q,v"), "{error}");
        }
        for text in ["full", "0.0625", "lora:8", "lora:4:q,v"] {
            assert_eq!(of(text).unwrap().to_string(), text);
        }
    }

    /// As PEFT counts them: 8 (4096 + 4096) for queries and values of 32 blocks; 19,988,480 beside all matrices.
    #[test]
    fn parameters_of_known_adapters() {
        let model = ModelConfig::preset("llama-2-7b").unwrap();
        let of = |text: &str| trained_elements(&model, &text.parse().unwrap());
        assert_eq!(of("lora:8:q,v"), 4_194_304);
        assert_eq!(of("lora:8"), 19_988_480);
        assert_eq!(of("full"), model.parameters());
    }

    #[test]
    fn what_is_not_there_is_named() {
        let model = ModelConfig::preset("gpt2").unwrap();
        let error = |text: &str| text.parse::<Trainable>().unwrap().validate(&model).unwrap_err().to_string();
        let text = error("lora:8:q,gate");
        assert!(text.contains("\"gate\"") && text.contains("q, k, v, o, up, down"), "{text}");
        assert!(error("lora:769").contains("at most 768"));
        assert!(error("1e-12").contains("share"));
    }

    proptest! {
        /// Trained and frozen arrays hold every parameter once, without gaps; the share is met to one matrix at the end, and to
        /// one matrix at every block on the way.
        #[test]
        fn shares_are_even(share in 0.001..1.0f64, name in prop::sample::select(vec!["demo-1m", "gpt2", "llama-3-8b"])) {
            let model = ModelConfig::preset(name).unwrap();
            let trainable = Trainable::Share(share);
            let (workload, stages) = whole(&model, &trainable);
            let trained = unit_layout(&workload, &stages, StageId(0), 0);
            let frozen = frozen_layout(&workload, &stages, StageId(0), 0);
            let full = whole(&model, &Trainable::Full);
            let mut names: Vec<String> = trained.iter().chain(&frozen).map(|spec| spec.name.clone()).collect();
            let mut expected: Vec<String> = unit_layout(&full.0, &full.1, StageId(0), 0).into_iter().map(|s| s.name).collect();
            names.sort();
            expected.sort();
            prop_assert_eq!(names, expected);
            for specs in [&trained, &frozen] {
                let mut end = 0;
                for spec in specs {
                    prop_assert_eq!(spec.range.start, end);
                    prop_assert_eq!(spec.range.len(), spec.shape.iter().product::<usize>());
                    end = spec.range.end;
                }
            }
            let sum = |specs: &[crate::model::ParameterSpec]| specs.iter().map(|spec| spec.range.len()).sum::<usize>() as f64;
            let all = sum(&trained) + sum(&frozen);
            let largest = trained.iter().chain(&frozen).map(|spec| spec.range.len()).max().unwrap() as f64;
            prop_assert!((sum(&trained) - share * all).abs() <= largest, "{} of {all}", sum(&trained));
            let block = |block: u32| {
                let of = |specs: &[crate::model::ParameterSpec]| {
                    let own = specs.iter().filter(|s| s.name.starts_with(&format!("blocks.{block}.")));
                    own.map(|s| s.range.len()).sum::<usize>() as f64
                };
                (of(&trained), of(&trained) + of(&frozen))
            };
            let (mut there, mut of) = (0.0, 0.0);
            for number in 0..model.layers {
                let (trained, both) = block(number);
                there += trained;
                of += both;
                prop_assert!((there - share * of).abs() <= 2.0 * largest, "{there} of {of} after block {number}");
            }
        }
    }
}
