//! Ranks that really compute, on memory that all of them can reach.

mod compute;
mod launch;
mod optimizer;

use crate::bind::OpRef;
use crate::crew::Clock;
use crate::data::Sampler;
use crate::effects::HostRange;
use crate::error::ExecError;
use crate::interpreter::Hands;
use crate::kernel_times::KernelTally;
use crate::lines::Lines;
use crate::memory::RankMemory;
use crate::numbers::dtype;
use crate::processes::Mesh;
use crate::seam::Passes;
use crate::settings::OptimizerSettings;
use launch::{Graphs, Ticks};
use paceline_kernels::{AdamW, Call, Device, KernelError, View};
use paceline_sim::model::parameters::DecayRun;
use paceline_sim::program::{Collective, OpKind, Payload, Program, RankProgram, Shares, Tensor, shares};
use paceline_sim::units::{MicrobatchId, OpId, RankId, StageId};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// What all ranks of a run share.
pub(crate) struct Job<'a> {
    pub program: &'a Program,
    pub device: &'a dyn Device,
    /// Where the host runs ahead of it.
    pub lines: Option<&'a Lines<'a>>,
    pub clock: Clock,
    pub passes: &'a dyn Passes,
    pub sampler: &'a Sampler<'a>,
    pub optimizer: OptimizerSettings,
    pub poison: bool,
    /// Passes are kept and launched as one.
    pub graphs: bool,
    /// Steps of the program.
    pub steps: u32,
    /// The other processes, where every rank has its own.
    pub mesh: Option<&'a Mesh>,
}

impl Job<'_> {
    /// Whether this process runs a rank.
    pub fn hosts(&self, rank: usize) -> bool {
        self.mesh.is_none_or(|mesh| mesh.rank() as usize == rank)
    }

    /// The update of a step, `step` done before.
    fn adamw(&self, step: u64) -> AdamW {
        let settings = &self.optimizer;
        AdamW {
            lr: settings.learning_rate.at(step) as f32,
            beta1: settings.beta1,
            beta2: settings.beta2,
            epsilon: settings.epsilon,
            weight_decay: settings.weight_decay,
            step: step as u32 + 1,
            clip: settings.clip,
        }
    }
}

/// What changes from one run of the program to the next.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepOrders {
    /// Steps done before.
    pub step: u64,
    /// Steps to do, at most those of the program.
    pub steps: u32,
    pub capture_gradients: bool,
    /// Count the time of every kernel. Where calls run behind the host's back and without queues it then waits for each, which costs
    /// time.
    pub time_kernels: bool,
}

/// What a rank knows of a step that has ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct StepResult {
    /// Of the microbatches whose loss it computes.
    pub losses: Vec<f32>,
    /// Squared global gradient norm.
    pub squared_norm: Option<f64>,
}

/// A change of what lives.
#[derive(Debug, Clone, Copy)]
struct Change {
    /// When, by the host's clock.
    at: u64,
    /// Bytes afterwards.
    bytes: u64,
    /// The op that allocated (false) or freed (true).
    by: Option<(u32, bool)>,
}

/// A rank that computes.
pub(crate) struct CpuHands<'a> {
    job: &'a Job<'a>,
    id: RankId,
    rank: &'a RankProgram,
    pub memory: RankMemory<'a>,
    curve: Vec<Change>,
    pub kernels: KernelTally,
    ticks: Ticks,
    graphs: Graphs,
    pub orders: StepOrders,
    /// By stage and unit: what it updates and counts.
    shares: BTreeMap<(StageId, u16), Shares>,
    /// By stage and unit: its parameters in order, and whether weight decay applies to them.
    parameters: BTreeMap<(StageId, u16), Vec<DecayRun>>,
    /// By step of the program.
    pub results: Vec<StepResult>,
    loss_microbatches: Vec<MicrobatchId>,
    /// By buffer that holds a result: the step of the program.
    result_steps: HashMap<usize, usize>,
    /// The steps done when the rank ends the program before its end.
    leaving: Option<u32>,
    /// Its shares of the gradients of the last step, if asked for.
    pub gradients: BTreeMap<(StageId, u16), (Range<usize>, Vec<f32>)>,
    batch: Vec<u32>,
}

impl<'a> CpuHands<'a> {
    /// Allocates the persistent buffers. Gradients, moments, losses and the norm are zero, parameters are not yet set.
    pub fn new(job: &'a Job<'a>, id: RankId) -> Result<Self, ExecError> {
        let rank = &job.program.ranks[id.index()];
        let shares = shares(job.program, id).map_err(|error| ExecError::Program(error.to_string()))?;
        let losses = rank.ops.iter().filter_map(|op| match op.kind {
            OpKind::Compute { pass: paceline_sim::program::Pass::F, stage, microbatch, end, .. }
                if job.passes.has_loss(stage) && usize::from(end) == job.program.stages[stage.index()].units.len() =>
            {
                Some(microbatch)
            }
            _ => None,
        });
        let decays = |&(stage, unit): &(StageId, u16)| {
            let all = job.passes.parameters(stage, unit).into_iter();
            ((stage, unit), all.map(|parameter| (parameter.range, parameter.decay)).collect())
        };
        let mut hands = CpuHands {
            parameters: shares.keys().map(decays).collect(),
            memory: RankMemory::planned(job.device, rank, job.poison).map_err(|source| ExecError::Kernel {
                rank: id,
                op: OpId(0),
                source,
            })?,
            curve: Vec::with_capacity(2 * rank.ops.len()),
            kernels: KernelTally::default(),
            ticks: Ticks::default(),
            graphs: Graphs::default(),
            orders: StepOrders::default(),
            shares,
            results: Vec::new(),
            loss_microbatches: losses.collect(),
            result_steps: result_steps(job.program, rank),
            leaving: None,
            gradients: BTreeMap::new(),
            batch: Vec::new(),
            job,
            id,
            rank,
        };
        for &buffer in &rank.persistent {
            hands.begin_life(buffer.index(), job.device).map_err(|source| hands.refused(0, source))?;
            if !is_weight(rank.buffers[buffer.index()].tensor) {
                hands.zero(buffer.index(), job.device).map_err(|source| hands.refused(0, source))?;
            }
        }
        hands.memory.settle();
        Ok(hands)
    }

    fn refused(&self, op: u32, source: KernelError) -> ExecError {
        ExecError::Kernel { rank: self.id, op: OpId(op), source }
    }

    /// Where the rank computes.
    fn device(&self) -> &'a dyn Device {
        self.job.lines.map_or(self.job.device, |lines| lines.compute(self.id.0))
    }

    fn at(&self, op: u32) -> OpRef {
        OpRef { rank: self.id.0, op }
    }

    fn begin_life(&mut self, buffer: usize, on: &dyn Device) -> Result<(), KernelError> {
        let held = &self.rank.buffers[buffer];
        self.memory.allocate(buffer, held.class, held.bytes, on)
    }

    fn zero(&self, buffer: usize, on: &dyn Device) -> Result<(), KernelError> {
        match self.view(buffer) {
            // SAFETY: the buffer lives, and this rank's thread alone knows it yet.
            Some(x) => unsafe { on.run(&Call::Zero { x }) },
            None => Ok(()),
        }
    }

    /// The whole of a living buffer.
    fn view(&self, buffer: usize) -> Option<View> {
        let dtype = dtype(self.rank.buffers[buffer].element);
        self.memory.block(buffer).map(|block| block.view(0, block.bytes() / dtype.bytes(), dtype))
    }

    /// The buffer of a persistent tensor, if this rank has it.
    pub fn persistent(&self, tensor: Tensor) -> Option<View> {
        let buffers = &self.rank.buffers;
        self.rank.persistent.iter().find(|b| buffers[b.index()].tensor == tensor).and_then(|b| self.view(b.index()))
    }

    /// What this rank updates of a unit.
    pub fn update_range(&self, stage: StageId, unit: u16) -> Option<Range<usize>> {
        self.shares.get(&(stage, unit)).map(|shares| shares.update.clone())
    }

    /// Prepares a run of the program.
    pub fn prepare(&mut self, orders: StepOrders) -> Result<(), KernelError> {
        self.orders = orders;
        self.results = vec![StepResult::default(); self.job.steps as usize];
        self.leaving = None;
        self.gradients.clear();
        for &buffer in &self.rank.persistent {
            if matches!(self.rank.buffers[buffer.index()].tensor, Tensor::Losses | Tensor::GradientNorm) {
                self.zero(buffer.index(), self.device())?;
            }
        }
        self.note_curve(0, None);
        Ok(())
    }

    /// Reads what a finished step leaves in persistent buffers, and drops what it has left behind where it was abandoned.
    pub fn conclude(&mut self) -> Result<(), KernelError> {
        if let Some(lines) = self.job.lines {
            self.ticks.count(lines, &mut self.kernels)?;
        }
        for &buffer in &self.rank.persistent {
            self.note_result(buffer.index())?;
        }
        if self.leaving.is_some() {
            let passing = |buffer: &usize| !self.rank.persistent.iter().any(|kept| kept.index() == *buffer);
            for buffer in (0..self.rank.buffers.len()).filter(passing) {
                if self.memory.block(buffer).is_some() {
                    self.memory.free(buffer);
                }
            }
            self.memory.settle();
        }
        Ok(())
    }

    fn note_curve(&mut self, at: u64, by: Option<(u32, bool)>) {
        let bytes = self.memory.settle();
        self.curve.push(Change { at, bytes, by });
    }

    /// Live bytes after each change since this was asked last. Where the host ran ahead, `times` of an op are its begin (from when on it
    /// could have run) and its end on the device.
    pub fn take_curve(&mut self, times: impl Fn(u32) -> (u64, u64)) -> Vec<(u64, u64)> {
        let mut latest = 0;
        let ahead = self.job.lines.is_some();
        let when = |change: &Change| match change.by {
            Some((op, freed)) if ahead => {
                let (begin, end) = times(op);
                if freed { end } else { begin }
            }
            _ => change.at,
        };
        let all = std::mem::take(&mut self.curve);
        all.iter()
            .map(|change| {
                latest = latest.max(when(change));
                (latest, change.bytes)
            })
            .collect()
    }

    /// Steps that the program has done since it was prepared.
    pub fn done(&self) -> u32 {
        self.leaving.unwrap_or(self.job.steps)
    }

    /// Keeps the contents of a buffer that holds a result of the step.
    fn note_result(&mut self, buffer: usize) -> Result<(), KernelError> {
        let tensor = self.rank.buffers[buffer].tensor;
        let Some(view) = self.view(buffer).filter(|_| matches!(tensor, Tensor::Losses | Tensor::GradientNorm)) else {
            return Ok(());
        };
        let mut bytes = vec![0; view.bytes()];
        // SAFETY: the op that frees the buffer, or the step, has ended: nobody writes to it.
        unsafe { self.device().download(view, &mut bytes) }?;
        let step = self.result_steps.get(&buffer).copied().unwrap_or(0);
        let result = &mut self.results[step];
        if tensor == Tensor::Losses {
            let all = bytes.as_chunks::<4>().0;
            let places = self.loss_microbatches.iter().map(|&m| place_in_step(self.job.program, m));
            let own = places.filter(|place| place.0 == step);
            result.losses = own.map(|(_, place)| f32::from_ne_bytes(all[place])).collect();
        } else {
            result.squared_norm = bytes.first_chunk().map(|&b| f64::from_ne_bytes(b));
        }
        Ok(())
    }

    /// Writes the tokens or targets of a microbatch of this rank's replica.
    fn load(
        &mut self,
        buffer: usize,
        microbatch: MicrobatchId,
        targets: bool,
        on: &dyn Device,
    ) -> Result<(), ExecError> {
        let (sequences, seq) = (self.job.passes.sequences() as usize, self.job.passes.seq() as usize);
        self.batch.resize(2 * sequences * seq, 0);
        let (tokens, following) = self.batch.split_at_mut(sequences * seq);
        let replica = u64::from(self.rank.coordinates.data);
        let (step, place) = place_in_step(self.job.program, microbatch);
        let first = (replica * u64::from(self.job.program.microbatches) + place as u64) * sequences as u64;
        for (n, (x, y)) in (0..).zip(tokens.chunks_mut(seq).zip(following.chunks_mut(seq))) {
            self.job.sampler.train(self.orders.step + step as u64, first + n, x, y)?;
        }
        let wanted = if targets { following } else { tokens };
        let bytes: Vec<u8> = wanted.iter().flat_map(|token| token.to_ne_bytes()).collect();
        let room = self.rank.buffers[buffer].bytes;
        if room != bytes.len() as u64 {
            let tensor = self.rank.buffers[buffer].tensor;
            return Err(ExecError::Program(format!("{tensor:?} has {room} bytes, a microbatch {}", bytes.len())));
        }
        let Some(view) = self.view(buffer) else { return Ok(()) };
        // SAFETY: the buffer was allocated just now.
        unsafe { on.upload(&bytes, view) }.map_err(|source| self.refused(0, source))
    }
}

impl Hands for CpuHands<'_> {
    fn allocate(&mut self, op: u32, at: u64) -> Result<(), ExecError> {
        let rank = self.rank;
        let mut on = self.job.device;
        if let Some(lines) = self.job.lines {
            lines.await_memory(self.at(op)).map_err(|source| self.refused(op, source))?;
            on = &*lines.of(self.at(op)).queue;
        }
        for &buffer in &rank.ops[op as usize].alloc {
            self.begin_life(buffer.index(), on).map_err(|source| self.refused(op, source))?;
            match rank.buffers[buffer.index()].tensor {
                Tensor::Tokens { microbatch } => self.load(buffer.index(), microbatch, false, on)?,
                Tensor::Targets { microbatch } => self.load(buffer.index(), microbatch, true, on)?,
                // Sums that start from zero.
                Tensor::GradientNorm | Tensor::Losses => {
                    self.zero(buffer.index(), on).map_err(|source| self.refused(op, source))?;
                }
                _ => {}
            }
        }
        self.note_curve(at, Some((op, false)));
        Ok(())
    }

    fn range(&self, op: u32) -> Result<HostRange, ExecError> {
        let kind = self.rank.ops[op as usize].kind;
        let (OpKind::Send { buffer, .. } | OpKind::Recv { buffer, .. } | OpKind::Collective { buffer, .. }) = kind
        else {
            return Ok(HostRange::default());
        };
        let tensor = self.rank.buffers[buffer.index()].tensor;
        let Some(block) = self.memory.block(buffer.index()) else {
            return Err(ExecError::Program(format!("{} {} uses {tensor:?}, which does not live", self.id, OpId(op))));
        };
        let mut range = HostRange { address: block.address(), bytes: block.bytes() as u64, shard: 0 };
        if let OpKind::Collective { collective, payload, bytes, arrangement, .. } = kind {
            range.address += arrangement.offset;
            range.bytes = range.bytes.saturating_sub(arrangement.offset);
            if let Some(shard) = arrangement.shard {
                let held = self.memory.block(shard.index()).filter(|_| collective != Collective::AllReduce);
                let Some(block) = held else {
                    let tensor = self.rank.buffers[shard.index()].tensor;
                    return Err(ExecError::Program(format!(
                        "{} {} is {collective:?} with {tensor:?} as its shard: it must live, and an all-reduce has none",
                        self.id,
                        OpId(op)
                    )));
                };
                range.shard = block.address();
            }
            if payload == Payload::TiedEmbedding {
                let Tensor::Gradients { stage, unit } = tensor else {
                    return Err(ExecError::Program(format!("{tensor:?} holds no tied embedding matrix")));
                };
                let copy = self.job.passes.tied_copy(stage, unit).map(|copy| copy.range).unwrap_or_default();
                let width = self.rank.buffers[buffer.index()].element.bytes();
                range.address += width * copy.start as u64;
                range.bytes = width * copy.len() as u64;
            }
            if range.bytes < bytes {
                let bytes_there = range.bytes;
                return Err(ExecError::BufferSize {
                    rank: self.id,
                    op: OpId(op),
                    tensor,
                    bytes: bytes_there,
                    needed: bytes,
                });
            }
            range.bytes = bytes;
        }
        Ok(range)
    }

    fn compute(&mut self, op: u32, _: u64) -> Result<u64, ExecError> {
        let (job, at) = (self.job, self.at(op));
        if let Some(lines) = job.lines {
            lines.arrive(at).and_then(|()| lines.start(at)).map_err(|source| self.refused(op, source))?;
        }
        self.work(op)?;
        let done = match job.lines {
            Some(lines) => {
                self.ticks.pause();
                lines.end(at)
            }
            None => job.device.complete(),
        };
        done.map_err(|source| self.refused(op, source))?;
        Ok(job.clock.now())
    }

    fn free(&mut self, op: u32, at: u64) {
        let rank = self.rank;
        for &buffer in &rank.ops[op as usize].free {
            // A result that cannot be read shows as a missing loss.
            let _ = self.note_result(buffer.index());
            self.memory.free(buffer.index());
        }
        self.note_curve(at, Some((op, true)));
    }

    fn finish(&mut self) -> Result<(), ExecError> {
        self.job.lines.map_or(Ok(()), |lines| lines.finish(self.id.0).map_err(ExecError::Device))
    }

    fn leaves(&self, op: u32) -> bool {
        let follows = self.rank.ops.get(op as usize + 1);
        self.leaving.is_some() && follows.is_none_or(|op| !matches!(op.kind, OpKind::Validate { .. }))
    }
}

/// The step of a program that a microbatch belongs to, and its number in it.
fn place_in_step(program: &Program, microbatch: MicrobatchId) -> (usize, usize) {
    let each = program.microbatches.max(1) as usize;
    (microbatch.index() / each, microbatch.index() % each)
}

/// By buffer that holds losses or a norm: the step of the program that they are of.
fn result_steps(program: &Program, rank: &RankProgram) -> HashMap<usize, usize> {
    let mut steps = HashMap::new();
    let mut norms = 0;
    for op in &rank.ops {
        let step = match op.kind {
            OpKind::Compute { microbatch, .. } => place_in_step(program, microbatch).0,
            OpKind::GradientNorm => {
                norms += 1;
                norms - 1
            }
            _ => continue,
        };
        let results = op
            .uses
            .iter()
            .map(|buffer| buffer.index())
            .filter(|&buffer| matches!(rank.buffers[buffer].tensor, Tensor::Losses | Tensor::GradientNorm));
        for buffer in results {
            steps.entry(buffer).or_insert(step);
        }
    }
    steps
}

/// Whether a tensor holds weights, or a part of them.
pub(crate) fn is_weight(tensor: Tensor) -> bool {
    matches!(
        tensor,
        Tensor::Parameters { .. }
            | Tensor::ParameterShard { .. }
            | Tensor::Master { .. }
            | Tensor::Frozen { .. }
            | Tensor::FrozenShard { .. }
    )
}
