//! What decides, beside the shapes, what kernels find in the caches during a run. A block that has just been computed again
//! finds its activations there; the same block of a run that kept them does not. Weights that have just been gathered are there, as is a
//! small buffer in which the gradients of one microbatch are collected. Times inside runs are told apart by it.

use crate::class::Class;
use crate::kernel_key::KernelOp;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The circumstances of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Context {
    /// What is computed again.
    pub recomputed: Recomputed,
    /// Ranks take turns on a device, and push each other out of its caches.
    pub shared: bool,
    /// Weights are partitioned: passes read what was gathered for them.
    #[serde(default)]
    pub gathered: bool,
    /// Gradients are partitioned: passes collect those of a microbatch apart, to be reduced.
    #[serde(default)]
    pub reduced: bool,
}

/// What a run computes again instead of keeping it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recomputed {
    /// Nothing.
    #[default]
    Nothing,
    /// Cheap, large intermediates.
    Some,
    /// Whole blocks.
    Blocks,
}

/// The circumstances under which a time is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conditions {
    /// How many devices work: they share caches and memory bandwidth.
    pub busy: u32,
    /// Of the run; `None` where any run is as good as another.
    pub context: Option<Context>,
}

impl From<u32> for Conditions {
    fn from(busy: u32) -> Conditions {
        Conditions { busy, context: None }
    }
}

impl Conditions {
    /// As far as they matter to a class.
    pub fn met_by(self, class: Class) -> Conditions {
        Conditions { context: self.context.map(|context| context.met_by(class)), ..self }
    }
}

impl Context {
    /// Every context.
    pub fn all() -> impl Iterator<Item = Context> {
        let flags = [false, true];
        [Recomputed::Nothing, Recomputed::Some, Recomputed::Blocks].into_iter().flat_map(move |recomputed| {
            flags.into_iter().flat_map(move |shared| {
                flags
                    .into_iter()
                    .flat_map(move |gathered| flags.map(|reduced| Context { recomputed, shared, gathered, reduced }))
            })
        })
    }

    /// As far as it matters to a class: where weights lie, to what reads them; where their gradients lie, to what adds to them.
    pub fn met_by(self, class: Class) -> Context {
        use KernelOp as Op;
        let (reads, adds) = match class {
            Class::Kernel(op, _) => match op {
                Op::MatmulNn | Op::MatmulNt | Op::Embedding | Op::HeadLoss | Op::HeadBackwardInput => (true, false),
                Op::ProjectBias | Op::ProjectBiasGelu | Op::ProjectBiasAdd => (true, false),
                Op::ProjectAdd | Op::ProjectBackGelu => (true, false),
                Op::MatmulTn | Op::EmbeddingBackward | Op::HeadBackwardWeight => (false, true),
                Op::BiasGradient | Op::RmsNormBackwardWeight | Op::LayerNormBackwardWeight => (false, true),
                Op::HeadBackward => (true, true),
                _ => (false, false),
            },
            _ => (false, false),
        };
        Context { gathered: self.gathered && reads, reduced: self.reduced && adds, ..self }
    }

    /// In how many respects, beside what is computed again, two contexts are the same.
    pub(crate) fn likeness(self, other: Context) -> usize {
        let same = [self.shared == other.shared, self.gathered == other.gathered, self.reduced == other.reduced];
        same.into_iter().filter(|&same| same).count()
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.recomputed {
            Recomputed::Nothing => "recompute=none",
            Recomputed::Some => "recompute=selective",
            Recomputed::Blocks => "recompute=full",
        })?;
        let flags = [(self.shared, ";shared"), (self.gathered, ";gathered"), (self.reduced, ";reduced")];
        flags.into_iter().filter(|(set, _)| *set).try_for_each(|(_, name)| f.write_str(name))
    }
}

impl FromStr for Context {
    type Err = String;

    fn from_str(text: &str) -> Result<Context, String> {
        let names = || Context::all().map(|context| context.to_string()).collect::<Vec<_>>().join(", ");
        Context::all().find(|context| context.to_string() == text).ok_or_else(|| format!("allowed: {}", names()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel_key::DType;

    #[test]
    fn names_lead_back() {
        assert_eq!(Context::all().collect::<std::collections::BTreeSet<_>>().len(), 24);
        for context in Context::all() {
            assert_eq!(context.to_string().parse(), Ok(context));
        }
        assert!("recompute=never".parse::<Context>().unwrap_err().contains("recompute=full;shared;gathered"));
    }

    #[test]
    fn a_context_matters_as_far_as_a_class_meets_it() {
        let all = Context { shared: true, gathered: true, reduced: true, ..Context::default() };
        let seen = |op| {
            let Context { shared, gathered, reduced, .. } = all.met_by(Class::Kernel(op, DType::F32));
            assert!(shared);
            (gathered, reduced)
        };
        assert_eq!(seen(KernelOp::MatmulNt), (true, false));
        assert_eq!(seen(KernelOp::MatmulTn), (false, true));
        assert_eq!(seen(KernelOp::HeadBackward), (true, true));
        assert_eq!(seen(KernelOp::Attention), (false, false));
        let [transfer, kept] = [all.met_by(Class::Transfer), Context { shared: true, ..Context::default() }];
        assert_eq!(transfer, kept);
    }
}
