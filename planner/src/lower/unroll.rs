//! Several training steps without a barrier between them: the optimizer does not wait for the global gradient norm, which is
//! known only when the last rank has its gradients. It updates ahead, as if nothing had to be clipped, and the next step
//! begins; the norm is summed meanwhile, and a validation during the warm-up of the next step makes the true update (Qi et
//! al. 2024, arXiv 2401.10241, section 4: post-validation; their partial sums that travel from rank to rank are one
//! all-reduce here, which nobody waits for before that).
//!
//! A schedule without bubbles between its first and its last pass on every rank (ZB-H2, ZB-V) is without bubbles in
//! reality only so: with a barrier each step pays for the way of the first microbatch to the last rank.
//!
//! The pass works on lowered programs. Ops, buffers and microbatches of the steps are numbered on; persistent buffers are
//! shared. Where a guess proves wrong, the executor ends the program at the validations and begins it again from the next
//! step on. For that, nothing before a rank's validation may need anything behind another rank's: only forward
//! passes go before it, and only those whose inputs come from such.

use super::LowerError;
use paceline_sim::program::{
    Arrangement, Buffer, Element, Ids, MemoryClass, Message, Op, OpKind, Pass, Payload, Program, RankProgram, Stream,
    Tensor,
};
use paceline_sim::units::{BufferId, MicrobatchId, OpId, RankId, StageId};
use std::collections::{HashMap, HashSet};

/// Repeats a lowered step `steps` times with a barrier only at the end of the last one. The optimizer of the others is
/// validated during the step that follows.
///
/// # Errors
/// When optimizer states, gradients or parameters are partitioned: a corrected part would have to be gathered again.
pub fn unroll(step: Program, steps: u32) -> Result<Program, LowerError> {
    if steps <= 1 {
        return Ok(step);
    }
    let gathers = |op: &Op| matches!(op.kind, OpKind::Collective { payload: Payload::Parameters { .. }, .. });
    if step.ranks.iter().any(|rank| rank.ops.iter().any(gathers)) {
        return Err(LowerError::Barrier { steps });
    }
    let validations = validations(&step);
    let ranks = step
        .ranks
        .iter()
        .zip(validations)
        .map(|(rank, validation)| Unroller::new(rank, step.microbatches, validation).rank(steps));
    let ranks = ranks.collect();
    Ok(Program { ranks, ..step })
}

/// By rank: the op of a step before which the validation of the step before is put.
fn validations(step: &Program) -> Vec<usize> {
    let depth = step.ranks.iter().map(|rank| rank.coordinates.pipeline + 1).max().unwrap_or(1);
    let mut places: Vec<usize> = step.ranks.iter().map(|rank| warm_up(rank, depth)).collect();
    let sends: HashMap<(RankId, RankId, Message), usize> = (0..)
        .zip(&step.ranks)
        .flat_map(|(number, rank)| {
            rank.ops.iter().enumerate().filter_map(move |(index, op)| match op.kind {
                OpKind::Send { peer, message, .. } => Some(((RankId(number), peer, message), index)),
                _ => None,
            })
        })
        .collect();
    loop {
        let mut changed = false;
        for (number, rank) in (0..).zip(&step.ranks) {
            // A message that the sender sends only after its own validation.
            let late = |wait: &OpId| match rank.ops[wait.index()].kind {
                OpKind::Recv { peer, message, .. } => {
                    sends.get(&(peer, RankId(number), message)).is_none_or(|&sent| sent >= places[peer.index()])
                }
                _ => false,
            };
            let place = places[number as usize];
            let early = &rank.ops[..place];
            if let Some(first) = early.iter().position(|op| op.stream == Stream::COMPUTE && op.waits.iter().any(late)) {
                places[number as usize] = first;
                changed = true;
            }
        }
        if !changed {
            return places;
        }
    }
}

/// The op before which a validation is put if all inputs come in time: behind the forward passes that a rank has
/// time for while the last rank of the pipeline catches up, and no other passes.
fn warm_up(rank: &RankProgram, depth: u32) -> usize {
    let most = (depth - rank.coordinates.pipeline.min(depth - 1)) as usize + 1;
    let mut seen: HashSet<(StageId, MicrobatchId)> = HashSet::new();
    // A collective reduces gradients that the validation still has to read.
    let ends = |op: &Op| match op.kind {
        OpKind::Send { .. } | OpKind::Recv { .. } => false,
        OpKind::Compute { pass: Pass::F, stage, microbatch, .. } => {
            seen.insert((stage, microbatch));
            seen.len() > most
        }
        _ => true,
    };
    rank.ops.iter().position(ends).unwrap_or(rank.ops.len())
}

struct Unroller<'r> {
    rank: &'r RankProgram,
    microbatches: u32,
    /// The op of a step before which the step before is validated.
    validation: usize,
    persistent: HashSet<BufferId>,
    /// The sum of the norm over the ranks, if it takes any.
    norm_sum: Option<OpId>,
    norm: Option<BufferId>,
    buffers: Vec<Buffer>,
    ops: Vec<Op>,
}

impl<'r> Unroller<'r> {
    fn new(rank: &'r RankProgram, microbatches: u32, validation: usize) -> Self {
        let sum = |op: &Op| matches!(op.kind, OpKind::Collective { payload: Payload::GradientNorm, .. });
        let is_norm = |buffer: &Buffer| buffer.tensor == Tensor::GradientNorm;
        Unroller {
            rank,
            microbatches,
            validation,
            persistent: rank.persistent.iter().copied().collect(),
            norm_sum: rank.ops.iter().position(sum).map(|op| OpId(op as u32)),
            norm: rank.buffers.iter().position(is_norm).map(|buffer| BufferId(buffer as u32)),
            buffers: rank.buffers.clone(),
            ops: Vec::new(),
        }
    }

    fn rank(mut self, steps: u32) -> RankProgram {
        let mut due = Vec::new();
        for step in 0..steps {
            let numbers = self.numbers(step);
            let last = step + 1 == steps;
            let mut places = Vec::with_capacity(self.rank.ops.len());
            let mut validations = Vec::new();
            for (index, op) in self.rank.ops.iter().enumerate() {
                if index == self.validation {
                    self.ops.append(&mut due);
                }
                let mut repeated = self.repeated(op, step, &numbers, &places);
                if !last {
                    validations.extend(self.ahead(op, &mut repeated, step, &numbers, &places));
                }
                let id = OpId(self.ops.len() as u32);
                for buffer in &repeated.alloc {
                    if let Tensor::Workspace { op } = &mut self.buffers[buffer.index()].tensor {
                        *op = id.0;
                    }
                }
                places.push(id);
                self.ops.push(repeated);
            }
            self.ops.append(&mut due);
            if let (Some(validation), Some(norm)) = (validations.last_mut(), self.norm) {
                validation.free.push(numbers[norm.index()]);
            }
            due = validations;
        }
        RankProgram { buffers: self.buffers, ops: self.ops, ..self.rank.clone() }
    }

    /// The buffers of a step by their numbers in the first one.
    fn numbers(&mut self, step: u32) -> Vec<BufferId> {
        let shift = step * self.microbatches;
        let own = |(index, buffer): (usize, &Buffer)| {
            let id = BufferId(index as u32);
            if step == 0 || self.persistent.contains(&id) {
                return id;
            }
            self.buffers.push(Buffer { tensor: later(buffer.tensor, shift), ..buffer.clone() });
            BufferId(self.buffers.len() as u32 - 1)
        };
        self.rank.buffers.iter().enumerate().map(own).collect()
    }

    /// An op of the step in a later one, `places` being those of the ops before it.
    fn repeated(&self, op: &Op, step: u32, numbers: &[BufferId], places: &[OpId]) -> Op {
        let shift = step * self.microbatches;
        let buffer = |buffer: BufferId| numbers[buffer.index()];
        let all = |list: &Ids<BufferId>| list.iter().map(|&id| buffer(id)).collect();
        let message = |message: Message| Message { microbatch: MicrobatchId(message.microbatch.0 + shift), ..message };
        let mut kind = op.kind;
        match &mut kind {
            OpKind::Compute { microbatch, .. } => microbatch.0 += shift,
            OpKind::Send { message: carried, buffer: held, .. }
            | OpKind::Recv { message: carried, buffer: held, .. } => {
                (*carried, *held) = (message(*carried), buffer(*held));
            }
            OpKind::Collective { buffer: held, arrangement: Arrangement { shard, .. }, .. } => {
                (*held, *shard) = (buffer(*held), shard.map(buffer));
            }
            OpKind::GradientNorm
            | OpKind::Optimizer { .. }
            | OpKind::OptimizerAhead { .. }
            | OpKind::Validate { .. }
            | OpKind::Join => {}
        }
        Op {
            stream: op.stream,
            kind,
            waits: op.waits.iter().map(|wait| places[wait.index()]).collect(),
            alloc: all(&op.alloc),
            uses: all(&op.uses),
            free: all(&op.free),
        }
    }

    /// Takes the wait for the norm out of an op's repetition, and makes an optimizer go ahead. Returns the validation.
    fn ahead(&mut self, op: &Op, repeated: &mut Op, step: u32, numbers: &[BufferId], places: &[OpId]) -> Option<Op> {
        let norm = self.norm.map(|norm| numbers[norm.index()]);
        // The validation frees it.
        repeated.free.retain(|buffer| Some(*buffer) != norm);
        let OpKind::Optimizer { stage, unit } = op.kind else { return None };
        let sum = self.norm_sum.map(|sum| places[sum.index()]);
        repeated.waits.retain(|wait| Some(*wait) != sum);
        let weights = repeated
            .uses
            .iter()
            .find(|buffer| matches!(self.buffers[buffer.index()].tensor, Tensor::Parameters { .. }))?;
        let bytes = Element::F32.bytes() * self.buffers[weights.index()].elements() as u64;
        let kept = BufferId(self.buffers.len() as u32);
        let tensor = Tensor::Kept { stage, unit };
        self.buffers.push(Buffer {
            class: MemoryClass::OptimizerState,
            bytes,
            tensor,
            start: 0,
            element: Element::F32,
        });
        let mut uses = repeated.uses.clone();
        uses.push(kept);
        let validation = Op {
            stream: Stream::COMPUTE,
            kind: OpKind::Validate { stage, unit, step },
            waits: sum.into_iter().collect(),
            alloc: Ids::new(),
            uses: uses.clone(),
            free: Ids::from_slice(&[kept]),
        };
        uses.retain(|buffer| Some(*buffer) != norm);
        repeated.kind = OpKind::OptimizerAhead { stage, unit, step };
        repeated.alloc.push(kept);
        repeated.uses = uses;
        Some(validation)
    }
}

/// A tensor of a step, `shift` microbatches later.
fn later(mut tensor: Tensor, shift: u32) -> Tensor {
    match &mut tensor {
        Tensor::Tokens { microbatch }
        | Tensor::Targets { microbatch }
        | Tensor::StageInput { microbatch, .. }
        | Tensor::StageOutput { microbatch, .. }
        | Tensor::OutputGradient { microbatch, .. }
        | Tensor::InputGradient { microbatch, .. }
        | Tensor::Checkpoint { microbatch, .. }
        | Tensor::SavedForB { microbatch, .. }
        | Tensor::SavedForW { microbatch, .. }
        | Tensor::DeltaForW { microbatch, .. } => microbatch.0 += shift,
        Tensor::Parameters { .. }
        | Tensor::Gradients { .. }
        | Tensor::Moments { .. }
        | Tensor::Losses
        | Tensor::GradientNorm
        | Tensor::Workspace { .. }
        | Tensor::ParameterShard { .. }
        | Tensor::GradientShard { .. }
        | Tensor::SyncedGradients { .. }
        | Tensor::Master { .. }
        | Tensor::Kept { .. }
        | Tensor::Frozen { .. }
        | Tensor::FrozenShard { .. } => {}
    }
    tensor
}

#[cfg(test)]
mod tests;
