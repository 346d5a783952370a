//! Costs from a profile: an op is the sum of its kernels, as measured, and of what the executor adds.

use super::{CostModel, Exchange, Pauses, Round};
use crate::model::ModelPass;
use crate::model::parameters::{decay_groups, tied_matrix, unit_layout};
use crate::program::{
    Arrangement, Element, Group, Op, OpKind, Pass, Piece, Program, RankProgram, Recompute, Shares, SharesError, Step,
    Tensor, TransformerWorkload, Workload, begun_gradients, gradient_sources, rounds, shares, tree_parts, update,
};
use crate::units::{BufferId, Nanos, RankId, StageId};
use paceline_profiles::{
    CollectiveRound, Conditions, Context, DType, Estimate, KernelKey, KernelOp, Overhead, Predictor, Provenance,
    Recomputed, Shares as Parts,
};
use smallvec::{SmallVec, smallvec};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;
use thiserror::Error;

/// Costs of the ops of one program on devices like those of a profile.
///
/// A pass costs its kernels ([`ModelPass`]) at the times that they take while all devices of the program work, the
/// optimizer and the gradient norm likewise; every call and every op adds the executor's overhead. A message is copied
/// by its receiver, a collective runs in the rounds of the direct algorithm, each on the devices of its members.
///
/// The same pass of another microbatch, a message or collective of the same size cost the same: each is looked up once,
/// when the model is built, and a question of the engine is answered from a table.
#[derive(Debug)]
pub struct ProfileCost {
    overheads: Overheads,
    /// By device: several ranks take turns.
    shared: Vec<bool>,
    passes: HashMap<PassKey, Parts>,
    /// By rank: norm, and optimizer by stage and unit.
    state: Vec<StateCosts>,
    /// Copies, by bytes.
    copies: HashMap<u64, Estimate>,
    /// A member's work in each round, by collective and members.
    rounds: HashMap<Meeting, SmallVec<[Estimate; 2]>>,
}

/// What the executor itself takes.
#[derive(Debug, Clone, Copy)]
struct Overheads {
    op: Estimate,
    shared_op: Estimate,
    message: Estimate,
    shared_message: Estimate,
    round: Estimate,
    turn: Estimate,
    wake: Estimate,
}

/// Passes that cost the same: the microbatch does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PassKey {
    pass: Pass,
    stage: StageId,
    first: u16,
    end: u16,
}

#[derive(Debug, Default)]
struct StateCosts {
    norm: Parts,
    optimizer: BTreeMap<(StageId, u16), Parts>,
    ahead: BTreeMap<(StageId, u16), Parts>,
    validation: BTreeMap<(StageId, u16), Parts>,
}

/// Why a profile cannot tell the costs of a program.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum CostError {
    /// Its passes compute nothing.
    #[error("an abstract program has no kernels to look up in a profile; give its stages times instead")]
    Abstract,
    /// Its collectives contradict each other.
    #[error(transparent)]
    Shares(#[from] SharesError),
}

impl ProfileCost {
    /// Looks up everything that `program` does.
    ///
    /// # Errors
    /// When the program is abstract, or its collectives leave open who updates what.
    pub fn new(predictor: &Predictor, program: &Program) -> Result<ProfileCost, CostError> {
        let Workload::Transformer(workload) = &program.workload else { return Err(CostError::Abstract) };
        let busy = program.busy_devices();
        let mut ranks_of = vec![0u32; program.devices.len()];
        for rank in &program.ranks {
            ranks_of[rank.device.index()] += 1;
        }
        let under = Conditions { busy, context: context_of(program) };
        let overhead = |kind| predictor.overhead(kind, under);
        let mut costs = ProfileCost {
            overheads: Overheads {
                op: overhead(Overhead::Op),
                shared_op: overhead(Overhead::SharedOp),
                message: overhead(Overhead::Message),
                shared_message: overhead(Overhead::SharedMessage),
                round: overhead(Overhead::Round),
                turn: overhead(Overhead::Turn),
                wake: overhead(Overhead::Wake),
            },
            shared: ranks_of.into_iter().map(|ranks| ranks > 1).collect(),
            passes: HashMap::new(),
            state: Vec::with_capacity(program.ranks.len()),
            copies: HashMap::new(),
            rounds: HashMap::new(),
        };
        let mut lookup = Lookup { predictor, under, call: overhead(Overhead::Call), known: HashMap::new() };
        for (number, rank) in (0..).zip(&program.ranks) {
            let calls = Calls { program, workload, rank, shares: shares(program, RankId(number))? };
            let mut state = StateCosts::default();
            for op in &rank.ops {
                match op.kind {
                    OpKind::Compute { pass, stage, first, end, .. } => {
                        let cost = || lookup.sum(calls.of(op));
                        costs.passes.entry(PassKey { pass, stage, first, end }).or_insert_with(cost);
                    }
                    OpKind::GradientNorm => state.norm = lookup.sum(calls.of(op)),
                    OpKind::OptimizerAhead { stage, unit, .. } => {
                        state.ahead.insert((stage, unit), lookup.sum(calls.of(op)));
                    }
                    OpKind::Validate { stage, unit, .. } => {
                        state.validation.insert((stage, unit), lookup.sum(calls.of(op)));
                    }
                    OpKind::Optimizer { stage, unit } => {
                        state.optimizer.insert((stage, unit), lookup.sum(calls.of(op)));
                    }
                    OpKind::Recv { buffer, .. } => {
                        let bytes = rank.buffers[buffer.index()].bytes;
                        costs.copies.entry(bytes).or_insert_with(|| predictor.transfer(bytes, under));
                    }
                    OpKind::Collective { collective, group, buffer, bytes, arrangement, .. } => {
                        let group = &program.groups[group.index()];
                        let element = rank.buffers[buffer.index()].element;
                        let meeting = Meeting::new(Exchange { collective, bytes, element, arrangement }, group);
                        costs.rounds.entry(meeting).or_insert_with(|| meeting.work(predictor, under));
                    }
                    OpKind::Send { .. } | OpKind::Join => {}
                }
            }
            costs.state.push(state);
        }
        Ok(costs)
    }

    /// Seconds of work by where they come from: everything that all ranks do in a step.
    pub fn provenance(&self, program: &Program) -> Parts {
        let mut sum = Parts::default();
        for (number, rank) in (0..).zip(&program.ranks) {
            let id = RankId(number);
            for op in &rank.ops {
                match op.kind {
                    OpKind::Send { .. } => {}
                    OpKind::Recv { peer, buffer, .. } => {
                        let bytes = rank.buffers[buffer.index()].bytes;
                        sum.add(self.copy(bytes));
                        sum.add(self.latency(program, peer, id));
                    }
                    OpKind::Collective { collective, group, buffer, bytes, arrangement, .. } => {
                        let element = rank.buffers[buffer.index()].element;
                        let exchange = Exchange { collective, bytes, element, arrangement };
                        let group = &program.groups[group.index()];
                        let hand_over = self.hand_over(program, group);
                        for &round in self.work_by_round(exchange, group) {
                            sum.add(round);
                            sum.add(hand_over);
                        }
                    }
                    _ => sum.add_all(&self.parts(program, id, op), 1.0),
                }
            }
        }
        sum
    }

    /// A compute-stream op, the executor's share included.
    fn parts(&self, program: &Program, rank: RankId, op: &Op) -> Parts {
        let state = self.state.get(rank.index());
        let known = match op.kind {
            OpKind::Compute { pass, stage, first, end, .. } => self.passes.get(&PassKey { pass, stage, first, end }),
            OpKind::GradientNorm => state.map(|costs| &costs.norm),
            OpKind::Optimizer { stage, unit } => state.and_then(|costs| costs.optimizer.get(&(stage, unit))),
            OpKind::OptimizerAhead { stage, unit, .. } => state.and_then(|costs| costs.ahead.get(&(stage, unit))),
            OpKind::Validate { stage, unit, .. } => state.and_then(|costs| costs.validation.get(&(stage, unit))),
            OpKind::Send { .. } | OpKind::Recv { .. } | OpKind::Collective { .. } | OpKind::Join => None,
        };
        let mut parts = known.copied().unwrap_or_default();
        let shared = self.shared[program.ranks[rank.index()].device.index()];
        parts.add(if shared { self.overheads.shared_op } else { self.overheads.op });
        parts
    }

    fn copy(&self, bytes: u64) -> Estimate {
        self.copies.get(&bytes).copied().unwrap_or(NOTHING)
    }

    /// From the arrival of both sides of a message to the begin of its copy.
    fn latency(&self, program: &Program, from: RankId, to: RankId) -> Estimate {
        let device = |rank: RankId| program.ranks[rank.index()].device;
        if device(from) == device(to) { self.overheads.shared_message } else { self.overheads.message }
    }

    /// From the moment when all members of a collective stand before a round to the begin of its work. Members on several devices
    /// come from work of their own and are awake; on one device they wake each other, as the sender of a message wakes its receiver.
    fn hand_over(&self, program: &Program, group: &Group) -> Estimate {
        let mut devices = group.ranks.iter().map(|rank| program.ranks[rank.index()].device);
        let first = devices.next();
        if devices.all(|device| Some(device) == first) { self.overheads.shared_message } else { self.overheads.round }
    }

    fn work_by_round(&self, exchange: Exchange, group: &Group) -> &[Estimate] {
        self.rounds.get(&Meeting::new(exchange, group)).map_or(&[], |rounds| &rounds[..])
    }
}

/// What the program does not contain.
const NOTHING: Estimate = Estimate { seconds: 0.0, provenance: Provenance::Assumed };

impl CostModel for ProfileCost {
    fn compute(&self, program: &Program, rank: RankId, op: &Op) -> Nanos {
        Nanos::from_seconds(self.parts(program, rank, op).total())
    }

    fn transfer(&self, program: &Program, from: RankId, to: RankId, bytes: u64) -> Round {
        let (copy, latency) = (self.copy(bytes), self.latency(program, from, to));
        let link = program.link().filter(|_| program.crosses(from, to));
        let way = link.map_or(Nanos::ZERO, |link| link.latency);
        Round {
            link: link.map_or(Nanos::ZERO, |link| link.busy(bytes)),
            wire: way,
            work: Nanos::from_seconds(copy.seconds),
            late: Nanos::from_seconds(latency.seconds),
        }
    }

    fn collective(&self, program: &Program, exchange: Exchange, group: &Group) -> SmallVec<[Round; 2]> {
        let meeting = Meeting::new(exchange, group);
        let link = group.crossing.and_then(|crossing| crossing.link);
        let hand_over = Nanos::from_seconds(self.hand_over(program, group).seconds);
        let round = |(step, work): (Step, &Estimate)| {
            let bytes = step.crossing(meeting.members, meeting.groups, meeting.part().min(exchange.bytes));
            let link = link.filter(|_| bytes > 0);
            let way = link.map_or(Nanos::ZERO, |link| link.latency);
            Round {
                link: link.map_or(Nanos::ZERO, |link| link.busy(bytes)),
                wire: way,
                work: Nanos::from_seconds(work.seconds),
                late: hand_over,
            }
        };
        meeting.steps().into_iter().zip(self.work_by_round(exchange, group)).map(round).collect()
    }

    fn pauses(&self, _: &Program, _: RankId) -> Pauses {
        let Overheads { turn, wake, .. } = &self.overheads;
        Pauses { turn: Nanos::from_seconds(turn.seconds), wake: Nanos::from_seconds(wake.seconds) }
    }
}

/// What the price of a collective depends on: where arrays and shards lie does not matter, only whether shards lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Meeting {
    exchange: Exchange,
    members: u32,
    /// Fast groups over which they are spread.
    groups: u32,
}

impl Meeting {
    fn new(exchange: Exchange, group: &Group) -> Meeting {
        let shard = exchange.arrangement.shard.map(|_| BufferId(0));
        let arrangement = Arrangement { offset: 0, shard, ..exchange.arrangement };
        Meeting { exchange: Exchange { arrangement, ..exchange }, members: group.size, groups: group.fast_groups() }
    }

    fn steps(self) -> Vec<Step> {
        rounds(self.exchange.collective, self.exchange.arrangement.algorithm, self.members, self.groups)
    }

    /// Bytes of a member's part.
    fn part(self) -> u64 {
        self.exchange.arrangement.part_of(self.exchange.bytes, self.members, self.exchange.element.bytes())
    }

    /// A member's work in each round.
    fn work(self, predictor: &Predictor, under: Conditions) -> SmallVec<[Estimate; 2]> {
        let (part, members) = (self.part(), self.members);
        let apart = self.exchange.arrangement.shard.is_some();
        let places = members / self.groups.max(1);
        // Sums of narrow elements take at least as long as those of as many 32-bit ones, which are what is measured.
        let narrow = self.exchange.element == Element::Bf16;
        let reduce = |addends: u32, bytes: u64| {
            let found = predictor.collective(CollectiveRound::Reduce, addends, bytes << u32::from(narrow), under);
            if narrow { Estimate { provenance: Provenance::Assumed, ..found } } else { found }
        };
        let sum = |addends: u32, part: u64| reduce(addends, part * u64::from(addends));
        let copies = |members: u32, part: u64| {
            predictor.collective(CollectiveRound::Gather, members, part * u64::from(members), under)
        };
        // A shard that lies apart is one more addend of the sum, and one more part to copy.
        let last = |addends: u32| if apart { sum(addends + 1, part) } else { sum(addends, part) };
        let first = |others: Estimate| if apart { together(others, predictor.transfer(part, under)) } else { others };
        let work = |step| match step {
            Step::Reduce if !apart => reduce(members, self.exchange.bytes),
            Step::Reduce => last(members),
            Step::Gather => first(predictor.collective(CollectiveRound::Gather, members, self.exchange.bytes, under)),
            Step::RingReduce { turn } if turn + 2 == members => last(2),
            Step::RingReduce { .. } => sum(2, part),
            Step::RingGather { turn: 0 } => first(predictor.transfer(part, under)),
            Step::RingGather { .. } => predictor.transfer(part, under),
            Step::TreeReduce { turn } => {
                let parts = u64::from(tree_parts(members, turn));
                if parts == 1 && turn == (members - 1).ilog2() { last(2) } else { sum(2, part * parts) }
            }
            Step::TreeGather { turn } => {
                let all = predictor.transfer(part * u64::from(tree_parts(members, turn)), under);
                if turn == (members - 1).ilog2() { first(all) } else { all }
            }
            // Half of the pairs are a member's, and a swap writes both of its places.
            Step::Exchange => predictor.transfer(part * u64::from(members - 1), under),
            Step::ExchangeWithin => predictor.transfer(part * u64::from(self.groups * (places - 1)), under),
            Step::ExchangeAcross => predictor.transfer(part * u64::from(places * (self.groups - 1)), under),
            Step::ReduceWithin => sum(places, part * u64::from(self.groups)),
            Step::ReduceAcross => last(self.groups),
            Step::GatherAcross => first(copies(self.groups, part)),
            Step::GatherWithin => copies(places, part * u64::from(self.groups)),
        };
        self.steps().into_iter().map(work).collect()
    }
}

/// One after the other, as sure as the longer of them.
fn together(a: Estimate, b: Estimate) -> Estimate {
    let longer = if a.seconds >= b.seconds { a } else { b };
    Estimate { seconds: a.seconds + b.seconds, ..longer }
}

/// What a run of a program does to the caches; an abstract program has no runs.
pub fn context_of(program: &Program) -> Option<Context> {
    let Workload::Transformer(workload) = &program.workload else { return None };
    let recomputed = match workload.recompute {
        Recompute::None => Recomputed::Nothing,
        Recompute::Selective => Recomputed::Some,
        Recompute::Full => Recomputed::Blocks,
    };
    let mut context =
        Context { recomputed, shared: program.ranks.len() > program.busy_devices() as usize, ..Context::default() };
    for buffer in program.ranks.iter().flat_map(|rank| &rank.buffers) {
        context.gathered |= matches!(buffer.tensor, Tensor::ParameterShard { .. } | Tensor::FrozenShard { .. });
        context.reduced |= matches!(buffer.tensor, Tensor::GradientShard { .. });
    }
    Some(context)
}

/// All kernels that a program calls, each shape once: what a profile must know to foretell it from measurements alone.
///
/// # Errors
/// As for [`ProfileCost::new`].
pub fn kernels_of(program: &Program) -> Result<BTreeSet<KernelKey>, CostError> {
    let Workload::Transformer(workload) = &program.workload else { return Err(CostError::Abstract) };
    let mut all = BTreeSet::new();
    let mut seen = HashSet::new();
    for (number, rank) in (0..).zip(&program.ranks) {
        let calls = Calls { program, workload, rank, shares: shares(program, RankId(number))? };
        for op in &rank.ops {
            if let OpKind::Compute { pass, stage, first, end, .. } = op.kind
                && !seen.insert(PassKey { pass, stage, first, end })
            {
                continue;
            }
            all.extend(calls.of(op));
        }
    }
    Ok(all)
}

/// The kernel calls of one rank's ops.
struct Calls<'p> {
    program: &'p Program,
    workload: &'p TransformerWorkload,
    rank: &'p RankProgram,
    shares: BTreeMap<(StageId, u16), Shares>,
}

impl Calls<'_> {
    /// In order.
    fn of(&self, op: &Op) -> Vec<KernelKey> {
        let Program { stages, microbatches, .. } = self.program;
        let precision = self.workload.precision;
        let elements = |op, len| KernelKey { op, dims: smallvec![len as u32], dtype: DType::F32 };
        // On gradients of parameters.
        let gradients = |op, len| elements(op, len).with(precision.of_gradients_alone());
        // From 32-bit weights to what passes read.
        let copied = |to: &Piece, len| match to.element {
            Element::F32 => elements(KernelOp::Copy, len),
            _ => elements(KernelOp::Cast, len).with(DType::Bf16),
        };
        let mut calls = match op.kind {
            OpKind::Compute { .. } => {
                let begun = begun_gradients(self.rank, op);
                let zeroed = begun.map(|piece| gradients(KernelOp::Zero, piece.holds.len()));
                let pass = ModelPass::new(self.workload, stages, *microbatches, &op.kind);
                zeroed.chain(pass.kernel_calls().cloned()).collect()
            }
            OpKind::GradientNorm => {
                let counted = |((stage, unit), _)| {
                    let copy = tied_matrix(self.workload, stages, stage, unit).filter(|(_, counted)| !counted);
                    let copy = copy.map(|(range, _)| range).unwrap_or_default();
                    self.shares.get(&(stage, unit)).map(|own| own.counted(copy)).into_iter().flatten()
                };
                let parts = gradient_sources(self.rank, op).flat_map(counted);
                parts.map(|part| gradients(KernelOp::SumSquares, part.len())).collect()
            }
            OpKind::OptimizerAhead { stage, unit, .. } => match update(self.rank, op) {
                None => Vec::new(),
                Some(update) => {
                    let updates = self.updates(stage, unit, update.range);
                    let ahead = updates.map(|part| gradients(KernelOp::AdamWAhead, part.len()));
                    // The first of the copies is what the kernel itself writes.
                    let copies = update.copies.iter().skip(1);
                    ahead.chain(copies.map(|(to, both)| copied(to, both.len()))).collect()
                }
            },
            OpKind::Optimizer { stage, unit } | OpKind::Validate { stage, unit, .. } => match update(self.rank, op) {
                None => Vec::new(),
                Some(update) => {
                    // A guess that proves right is not replaced.
                    let guessed = matches!(op.kind, OpKind::Validate { .. });
                    let rounds = !guessed && update.rounded().is_some();
                    let updated = self.updates(stage, unit, update.range).map(|part| {
                        let key = gradients(KernelOp::AdamW, part.len());
                        // The narrow copy comes with the update.
                        let wide = rounds && key.dtype == DType::F32;
                        if wide { key.with(DType::Bf16F32) } else { key }
                    });
                    let zeroed = update.leftovers.1.into_iter().map(|part| gradients(KernelOp::Zero, part.len()));
                    let copies = update.copies.iter().skip(usize::from(rounds)).filter(|_| !guessed);
                    updated.chain(zeroed).chain(copies.map(|(to, both)| copied(to, both.len()))).collect()
                }
            },
            OpKind::Send { .. } | OpKind::Recv { .. } | OpKind::Collective { .. } | OpKind::Join => Vec::new(),
        };
        // A shard can be empty: its call is made, and does nothing.
        calls.retain(|key| key.dims.iter().all(|&dim| dim > 0));
        calls
    }

    /// Elements that a unit's optimizer updates in one call each.
    fn updates(&self, stage: StageId, unit: u16, updated: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let specs = unit_layout(self.workload, &self.program.stages, stage, unit).into_iter();
        decay_groups(specs.map(|spec| (spec.range, spec.decay)), updated).into_iter().map(|group| group.range)
    }
}

/// Looks kernels up, each shape once.
struct Lookup<'p> {
    predictor: &'p Predictor,
    under: Conditions,
    /// What the executor takes for a call.
    call: Estimate,
    known: HashMap<KernelKey, Estimate>,
}

impl Lookup<'_> {
    /// The time of all calls with what the executor takes to make them.
    fn sum(&mut self, calls: Vec<KernelKey>) -> Parts {
        let (predictor, under) = (self.predictor, self.under);
        let mut parts = Parts::default();
        for key in calls {
            let estimate = match self.known.get(&key) {
                Some(&known) => known,
                None => {
                    let estimate = predictor.kernel(&key, under);
                    self.known.insert(key, estimate);
                    estimate
                }
            };
            parts.add(estimate);
            parts.add(self.call);
        }
        parts
    }
}

#[cfg(test)]
mod tests;
