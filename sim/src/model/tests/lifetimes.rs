//! Runs passes on flags instead of numbers: nothing is read before it was written or after it was freed, and nothing is kept
//! that no later pass reads.

use super::*;
use paceline_profiles::KernelOp as Op;
use std::collections::BTreeMap;
use std::ops::Range;

/// Which operands an operator reads, and which it writes.
fn access(op: Op, count: usize) -> (Vec<usize>, Range<usize>) {
    let last = count - 1;
    let (read, written) = match op {
        Op::MatmulNt
        | Op::MatmulNn
        | Op::ProjectBias
        | Op::ProjectBiasAdd
        | Op::ProjectAdd
        | Op::ProjectBackGelu
        | Op::SwiGlu
        | Op::Gelu
        | Op::SwiGluBackward
        | Op::GeluBackward
        | Op::Embedding
        | Op::Copy => (0..last, last..count),
        Op::RmsNorm | Op::LayerNorm | Op::ProjectBiasGelu => (0..count - 2, count - 2..count),
        Op::Attention => (0..1, 1..3),
        Op::AttentionBackward => (0..4, 4..6),
        Op::HeadLoss => (0..3, 3..6),
        Op::HeadBackward | Op::HeadBackwardInput | Op::HeadBackwardWeight => (0..4, 4..count),
        Op::Zero => (0..0, 0..1),
        Op::AddBias => (0..2, 0..1),
        Op::Rotary => (0..1, 0..1),
        // These add to what is there. Parameters' gradients are always there.
        Op::MatmulTn | Op::BiasGradient | Op::Add | Op::RmsNormBackwardInput | Op::LayerNormBackwardInput => {
            (0..count, last..count)
        }
        Op::RmsNormBackwardWeight | Op::LayerNormBackwardWeight => (0..count, 3..count),
        Op::EmbeddingBackward => (0..count, 2..count),
        other => panic!("no pass of a model calls {other:?}"),
    };
    (read.collect(), written)
}

/// Two bytes of a buffer: by which pass they were written, and by which they were last read.
#[derive(Clone, Copy, Default)]
struct Half {
    written: Option<usize>,
    read: Option<usize>,
}

#[derive(Default)]
struct Memory {
    buffers: BTreeMap<Tensor, Vec<Half>>,
    passes: usize,
}

impl Memory {
    fn buffer(&mut self, tensor: Tensor, end: usize) -> &mut Vec<Half> {
        let buffer = self.buffers.entry(tensor).or_default();
        buffer.resize(buffer.len().max(end), Half::default());
        buffer
    }

    fn touched(&mut self, slice: &Slice) -> &mut [Half] {
        let halves = (slice.element.bytes() / 2) as usize;
        let range = slice.range.start * halves..slice.range.end * halves;
        &mut self.buffer(slice.tensor, range.end)[range]
    }

    /// Runs a pass; workspace is lost after it.
    fn run(&mut self, what: &str, pass: &ModelPass) {
        self.passes += 1;
        let now = Some(self.passes);
        for step in &pass.steps {
            let (read, written) = access(step.key.op, step.operands.len());
            for slice in read.into_iter().map(|n| &step.operands[n]) {
                let given = matches!(
                    slice.tensor,
                    Tensor::Parameters { .. }
                        | Tensor::Gradients { .. }
                        | Tensor::Tokens { .. }
                        | Tensor::Targets { .. }
                );
                for element in self.touched(slice) {
                    assert!(
                        given || element.written.is_some(),
                        "{what}: {} reads {slice:?}, which nobody wrote",
                        step.key
                    );
                    element.read = now;
                }
            }
            for slice in &step.operands[written] {
                for element in self.touched(slice) {
                    element.written = now;
                }
            }
        }
        self.buffers.remove(&Tensor::Workspace { op: 0 });
    }

    /// Frees buffers, all of whose written elements must have been read by the pass just run.
    fn free(&mut self, what: &str, freed: impl Fn(&Tensor) -> bool) {
        for (tensor, elements) in self.buffers.extract_if(.., |tensor, _| freed(tensor)) {
            for (n, element) in elements.iter().enumerate().filter(|(_, element)| element.written.is_some()) {
                let needed = element.read == Some(self.passes) && element.written != element.read;
                assert!(needed, "{what}: element {n} of {tensor:?} could have been freed before");
            }
        }
    }
}

fn of_unit(tensor: &Tensor, wanted: u16) -> bool {
    match *tensor {
        Tensor::SavedForB { unit, .. }
        | Tensor::SavedForW { unit, .. }
        | Tensor::DeltaForW { unit, .. }
        | Tensor::Checkpoint { unit, .. } => unit == wanted,
        _ => false,
    }
}

/// One microbatch through a stage, backwards unit by unit as lowered programs do.
fn through(workload: &TransformerWorkload, stages: &[Stage], stage: u16, split: bool) {
    let what =
        format!("{} {:?} {} stage {stage} split {split}", workload.model.name, workload.recompute, workload.precision);
    let at = |pass, first, end| {
        let kind = OpKind::Compute { pass, stage: StageId(stage), microbatch: MicrobatchId(0), first, end };
        ModelPass::new(workload, stages, 1, &kind)
    };
    let units = stages[usize::from(stage)].units.len() as u16;
    let elements = (workload.micro_batch * workload.seq) as usize * workload.model.hidden as usize;
    let rows = elements * workload.precision.values().bytes() as usize / 2;
    let mut memory = Memory::default();
    let (id, microbatch) = (StageId(stage), MicrobatchId(0));
    for entering in [Tensor::StageInput { stage: id, microbatch }, Tensor::OutputGradient { stage: id, microbatch }] {
        memory.buffer(entering, rows).fill(Half { written: Some(0), read: None });
    }
    memory.run(&what, &at(Pass::F, 0, units));
    for unit in (0..units).rev() {
        if workload.recompute == Recompute::Full {
            memory.run(&what, &at(Pass::R, unit, unit + 1));
        }
        let what = format!("{what} unit {unit}");
        if split {
            memory.run(&what, &at(Pass::B, unit, unit + 1));
            memory.free(&what, |tensor| {
                of_unit(tensor, unit) && matches!(tensor, Tensor::SavedForB { .. } | Tensor::Checkpoint { .. })
            });
        } else {
            memory.run(&what, &at(Pass::BW, unit, unit + 1));
            memory.free(&what, |tensor| of_unit(tensor, unit));
        }
    }
    if split {
        for unit in (0..units).rev() {
            memory.run(&what, &at(Pass::W, unit, unit + 1));
            memory.free(&what, |tensor| of_unit(tensor, unit));
        }
    }
    assert!(memory.buffers.keys().all(|tensor| (0..units).all(|unit| !of_unit(tensor, unit))), "{what}: all is freed");
    // The gradient that leaves the stage is whole.
    if stage > 0 {
        let leaving = memory.buffer(Tensor::InputGradient { stage: id, microbatch }, rows);
        assert!(leaving.iter().all(|element| element.written.is_some()), "{what}");
    }
}

#[test]
fn passes_keep_what_later_passes_read_and_nothing_else() {
    for preset in ["llama-3-8b", "gpt2", "qwen2-0.5b"] {
        let model = ModelConfig {
            layers: 5,
            hidden: 24,
            heads: 2,
            kv_heads: if preset == "gpt2" { 2 } else { 1 },
            head_dim: 12,
            intermediate: 20,
            vocab: 9,
            ..ModelConfig::preset(preset).unwrap()
        };
        let recomputes = [Recompute::None, Recompute::Selective, Recompute::Full];
        for (recompute, precision) in recomputes.into_iter().flat_map(|r| Precision::ALL.map(|p| (r, p))) {
            let workload = TransformerWorkload {
                model: model.clone(),
                micro_batch: 2,
                seq: 3,
                recompute,
                tied_on_one_rank: false,
                trainable: Trainable::Full,
                precision,
            };
            let each = stages(&model, &[2, 1, 2]);
            // The same layers, all of a stage in one unit.
            let joined = |stage: &Stage| {
                let layers = stage.units.iter().flat_map(|unit| unit.layers.clone()).collect();
                Stage { units: vec![Unit { layers }] }
            };
            let joined: Vec<Stage> = each.iter().map(joined).collect();
            for stages in [&each, &joined] {
                for (stage, split) in (0..3).flat_map(|stage| [(stage, false), (stage, true)]) {
                    through(&workload, stages, stage, split);
                }
            }
        }
    }
}
