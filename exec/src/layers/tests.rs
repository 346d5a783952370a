mod reference;

use super::*;
use crate::data::mix;
use crate::kernel_times::kernel_key;
use paceline_kernels::{Block, Call, CpuDevice, DType, View};
use paceline_profiles::KernelKey;
use paceline_sim::model::{Activation, ModelConfig, Norm, Positions, trained_elements};
use paceline_sim::program::{Pass, Precision, Recompute, Unit};
use paceline_sim::units::{MicrobatchId, OpId, RankId};
use reference::Reference;
use std::cell::RefCell;
use std::collections::BTreeMap;

const STAGE: StageId = StageId(0);
const VOCAB: u32 = 11;

fn llama() -> ModelConfig {
    ModelConfig {
        name: "small llama".into(),
        layers: 2,
        hidden: 8,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        intermediate: 12,
        vocab: VOCAB,
        max_positions: 8,
        norm: Norm::RmsNorm,
        norm_epsilon: 1e-5,
        activation: Activation::SwiGlu,
        positions: Positions::Rotary { theta: 100.0 },
        qkv_bias: false,
        attention_output_bias: false,
        mlp_bias: false,
        tied_embeddings: false,
    }
}

fn gpt() -> ModelConfig {
    ModelConfig {
        name: "small gpt".into(),
        kv_heads: 2,
        norm: Norm::LayerNorm,
        activation: Activation::Gelu,
        positions: Positions::Learned,
        qkv_bias: true,
        attention_output_bias: true,
        mlp_bias: true,
        tied_embeddings: true,
        ..llama()
    }
}

/// A whole model in one stage, with all buffers that any of its passes touches.
struct Model {
    passes: TransformerPasses,
    blocks: BTreeMap<Tensor, Box<dyn Block>>,
    device: CpuDevice,
    calls: RefCell<Vec<KernelKey>>,
}

impl Launch for Model {
    fn launch(&self, call: Call) -> Result<(), ExecError> {
        self.calls.borrow_mut().push(kernel_key(&call));
        // SAFETY: the blocks live as long as the model, and one thread uses them.
        unsafe { self.device.run(&call) }.map_err(|source| ExecError::Kernel { rank: RankId(0), op: OpId(0), source })
    }
}

impl Operands for Model {
    fn view(&self, tensor: Tensor) -> Result<View, ExecError> {
        let block = self.blocks.get(&tensor).ok_or(ExecError::Undeclared { rank: RankId(0), op: OpId(0), tensor })?;
        let dtype = match tensor {
            Tensor::Tokens { .. } | Tensor::Targets { .. } => DType::U32,
            _ => DType::F32,
        };
        Ok(block.view(0, block.bytes() / 4, dtype))
    }

    fn has(&self, tensor: Tensor) -> bool {
        self.blocks.contains_key(&tensor)
    }
}

impl Model {
    fn new(model: ModelConfig, recompute: Recompute) -> Model {
        Model::training(model, recompute, Trainable::Full)
    }

    fn training(model: ModelConfig, recompute: Recompute, trainable: Trainable) -> Model {
        let workload = TransformerWorkload {
            model,
            micro_batch: 2,
            seq: 5,
            recompute,
            tied_on_one_rank: true,
            trainable,
            precision: Precision::Fp32,
        };
        let layers: Vec<Layer> = workload.model.all_layers().collect();
        let unit = |layers: &[Layer]| Unit { layers: layers.to_vec() };
        // A unit of two layers shows whether layers find their part of it.
        let stages = vec![Stage { units: vec![unit(&layers[..1]), unit(&layers[1..3]), unit(&layers[3..])] }];
        let tokens = 2.0 * 5.0;
        let passes =
            TransformerPasses { workload, stages, microbatches: 1, scale: 1.0 / tokens, ready: HashMap::new() };
        let device = CpuDevice::new();
        let mut model = Model { passes, blocks: BTreeMap::new(), device, calls: RefCell::default() };
        for pass in [Pass::F, Pass::R, Pass::B, Pass::W, Pass::BW] {
            for (tensor, _, bytes) in model.passes.operands(&model.kind(pass)) {
                let held = model.blocks.get(&tensor).map_or(0, |block| block.bytes());
                if held < bytes as usize {
                    model.blocks.insert(tensor, model.device.allocate(bytes as usize).unwrap());
                }
            }
        }
        let microbatch = MicrobatchId(0);
        for (tensor, ids) in [(Tensor::Tokens { microbatch }, ids(0)), (Tensor::Targets { microbatch }, ids(77))] {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
            // SAFETY: as for launching.
            unsafe { model.device.upload(&bytes, model.view(tensor).unwrap()) }.unwrap();
        }
        let mut salt = 1000;
        for (tensor, specs) in model.layout().into_iter().chain(model.frozen_layout()) {
            for spec in specs {
                let values: Vec<f32> = spec.range.clone().map(|n| random(salt + n as u64) * 0.6).collect();
                // Norm weights are around one.
                let one = if spec.start == Start::Constant(1.0) { 1.0 } else { 0.0 };
                model.write(tensor, spec.range.start, &values.iter().map(|v| v + one).collect::<Vec<_>>());
                salt += 7919;
            }
        }
        model
    }

    fn kind(&self, pass: Pass) -> OpKind {
        let end = self.passes.stages[0].units.len() as u16;
        OpKind::Compute { pass, stage: STAGE, microbatch: MicrobatchId(0), first: 0, end }
    }

    fn run(&self, passes: &[Pass]) {
        for &pass in passes {
            let kind = self.kind(pass);
            self.calls.borrow_mut().clear();
            self.passes.run(&kind, self, self).unwrap();
            let promised: Vec<KernelKey> = self.passes.pass(&kind).kernel_calls().cloned().collect();
            assert_eq!(*self.calls.borrow(), promised, "{pass}: calls are those that the simulator costs");
        }
    }

    /// Parameters of every unit.
    fn layout(&self) -> Vec<(Tensor, Vec<Parameter>)> {
        let units = 0..self.passes.stages[0].units.len() as u16;
        let of = |unit| (Tensor::Parameters { stage: STAGE, unit }, self.passes.parameters(STAGE, unit));
        units.map(of).filter(|(_, all)| !all.is_empty()).collect()
    }

    /// Frozen parameters of every unit that has some.
    fn frozen_layout(&self) -> Vec<(Tensor, Vec<Parameter>)> {
        let units = 0..self.passes.stages[0].units.len() as u16;
        let of = |unit| (Tensor::Frozen { stage: STAGE, unit }, self.passes.frozen(STAGE, unit));
        units.map(of).filter(|(_, all)| !all.is_empty()).collect()
    }

    fn read(&self, tensor: Tensor) -> Vec<f32> {
        let view = self.view(tensor).unwrap();
        let mut bytes = vec![0; view.bytes()];
        // SAFETY: as for launching.
        unsafe { self.device.download(view, &mut bytes) }.unwrap();
        bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_ne_bytes(b)).collect()
    }

    fn write(&self, tensor: Tensor, start: usize, values: &[f32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let view = self.view(tensor).unwrap().slice(start, values.len());
        // SAFETY: as for launching.
        unsafe { self.device.upload(&bytes, view) }.unwrap();
    }

    fn loss(&self) -> f64 {
        self.run(&[Pass::F]);
        f64::from(self.read(Tensor::Losses)[0])
    }

    /// The gradients of all units after F and these passes, from zero.
    fn gradients(&self, backward: &[Pass]) -> Vec<Vec<f32>> {
        let tensors: Vec<Tensor> = self
            .layout()
            .into_iter()
            .filter_map(|(tensor, _)| match tensor {
                Tensor::Parameters { stage, unit } => Some(Tensor::Gradients { stage, unit }),
                _ => None,
            })
            .collect();
        for &tensor in &tensors {
            let len = self.view(tensor).unwrap().len();
            self.write(tensor, 0, &vec![0.0; len]);
        }
        self.run(&[Pass::F]);
        self.run(backward);
        tensors.into_iter().map(|tensor| self.read(tensor)).collect()
    }
}

/// Ids of the ten tokens of the microbatch.
fn ids(salt: u64) -> Vec<u32> {
    (0..10).map(|n| (mix(n + salt) % u64::from(VOCAB)) as u32).collect()
}

/// Between -1 and 1.
fn random(n: u64) -> f32 {
    (mix(n) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// Models that differ in everything that changes a step: norms, activation, positions, biases, shared keys, tied matrix.
fn models() -> [ModelConfig; 4] {
    let biased = ModelConfig { qkv_bias: true, tied_embeddings: true, name: "biased tied llama".into(), ..llama() };
    let untied = ModelConfig { tied_embeddings: false, kv_heads: 1, name: "untied gpt".into(), ..gpt() };
    [llama(), gpt(), biased, untied]
}

#[test]
fn loss_and_every_gradient_are_those_of_a_reference_in_double_precision() {
    for config in models() {
        check_against_reference(config, Trainable::Full, 1e-5);
    }
}

/// What of a model is trained has the gradients that it has by central differences; the rest has none.
#[test]
fn gradients_of_a_part_of_the_parameters_and_of_adapters() {
    for config in models() {
        for trainable in ["lora:3", "lora:2:q,v", "lora:1:k,o,up", "lora:2:down", "0.5", "1/16"] {
            check_against_reference(config.clone(), trainable.parse().unwrap(), 5e-5);
        }
    }
    check_against_reference(llama(), "lora:2:gate".parse().unwrap(), 5e-5);
}

/// `tolerance` is relative to the largest element of a gradient: more where what is trained changes how weights are drawn.
fn check_against_reference(config: ModelConfig, trainable: Trainable, tolerance: f64) {
    let name = format!("{} {trainable}", config.name);
    let model = Model::training(config.clone(), Recompute::None, trainable.clone());
    let mut values = BTreeMap::new();
    for (tensor, specs) in model.layout().into_iter().chain(model.frozen_layout()) {
        let all = model.read(tensor);
        for spec in specs {
            let own = all[spec.range.clone()].iter().map(|&value| f64::from(value)).collect();
            assert!(values.insert(spec.name, own).is_none(), "{name}: every name once");
        }
    }
    let (tokens, targets) = (ids(0), ids(77));
    let mut reference = Reference { config, values, seq: 5, tokens, targets };
    let (found, expected) = (model.loss(), reference.loss());
    assert!((found / expected - 1.0).abs() < 1e-6, "{name}: loss {found} {expected}");
    let gradients = model.gradients(&[Pass::BW]);
    let mut checked = 0;
    for ((_, specs), gradient) in model.layout().into_iter().zip(&gradients) {
        for spec in specs {
            let own = &gradient[spec.range.clone()];
            let largest = own.iter().fold(0f32, |a, g| a.max(g.abs()));
            assert!(largest > 1e-4, "{name} {}: no gradient", spec.name);
            for (element, &found) in own.iter().enumerate() {
                let expected = reference.gradient(&spec.name, element);
                let allowed = tolerance * f64::from(largest) + 1e-8;
                let close = (f64::from(found) - expected).abs() <= allowed;
                assert!(close, "{name} {} element {element}: {found} {expected}", spec.name);
                checked += 1;
            }
        }
    }
    assert_eq!(checked, trained_elements(&reference.config, &trainable), "{name}");
}

#[test]
fn split_and_recomputed_backwards_give_the_same_gradients() {
    for (config, trainable) in models().into_iter().flat_map(|c| ["full", "lora:2", "1/3"].map(|t| (c.clone(), t))) {
        let model = |recompute| Model::training(config.clone(), recompute, trainable.parse().unwrap());
        let fused = model(Recompute::None).gradients(&[Pass::BW]);
        for (recompute, backward) in [
            (Recompute::None, &[Pass::B, Pass::W][..]),
            (Recompute::Selective, &[Pass::BW]),
            (Recompute::Selective, &[Pass::B, Pass::W]),
            (Recompute::Full, &[Pass::R, Pass::BW]),
            (Recompute::Full, &[Pass::R, Pass::B, Pass::W]),
        ] {
            let found = model(recompute).gradients(backward);
            for (unit, (found, fused)) in found.iter().zip(&fused).enumerate() {
                let largest = fused.iter().fold(0f32, |a, g| a.max(g.abs()));
                for (n, (a, b)) in found.iter().zip(fused).enumerate() {
                    let close = (a - b).abs() <= 1e-5 * largest;
                    assert!(close, "{} {recompute:?} {backward:?} unit {unit} element {n}: {a} {b}", config.name);
                }
            }
        }
    }
}

#[test]
fn other_programs_are_refused() {
    let model = Model::new(llama(), Recompute::None);
    let program = |workload, stages| Program {
        format: paceline_sim::program::PROGRAM_FORMAT.into(),
        workload,
        microbatches: 1,
        devices: vec![],
        groups: vec![],
        stages,
        ranks: vec![],
    };
    let refused = |program: &Program| TransformerPasses::new(program).err().unwrap().to_string();
    assert!(refused(&program(Workload::Abstract, vec![])).contains("no model to train"));
    let workload = Workload::Transformer(model.passes.workload.clone());
    let mut stages = model.passes.stages.clone();
    stages[0].units.pop();
    assert!(refused(&program(workload.clone(), stages)).contains("s0"));
    let whole = TransformerPasses::new(&program(workload, model.passes.stages.clone())).unwrap();
    assert!(whole.has_loss(STAGE) && whole.scale == 0.1);
    assert_ne!(whole.digest(), Model::new(gpt(), Recompute::None).passes.digest());
}
