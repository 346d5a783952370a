//! What is proved of a program before anything runs. A program that passes does not hang, does not touch memory that
//! does not live, and does not read what is still being written.
//!
//! Order within a rank is known from four rules: compute-stream ops end one before the next; a communication op is issued
//! when the compute-stream op before it has ended; a stream is first in, first out; waits. From these follows for each
//! op, stream by stream, how many ops have certainly ended when it starts (a vector clock), and an op may touch what
//! another one receives or reduces only when that one is among them.

use super::{Buffer, Op, OpKind, OpRef, Pass, Program, RankProgram, SharesError, Stream, Tensor, shares};
use crate::cost::FixedTimes;
use crate::engine::{Compiled, EngineError};
use crate::units::{BufferId, MicrobatchId, OpId, RankId, StageId};
use smallvec::SmallVec;
use std::collections::BTreeMap;
use thiserror::Error;

/// What is wrong with a program.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CheckError {
    /// Ops do not meet, or wait in a circle.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Collectives leave open who updates what.
    #[error(transparent)]
    Shares(#[from] SharesError),
    /// A buffer, stage or unit that is not there.
    #[error("{op} names {what} {index}, and there are {count}")]
    Unknown { op: OpRef, what: &'static str, index: usize, count: usize },
    /// An op allocates, frees or exchanges a buffer without declaring that it uses it.
    #[error("{op} {what} {tensor:?}, which its `uses` do not declare")]
    Undeclared { op: OpRef, what: &'static str, tensor: Tensor },
    /// A buffer is used before its life or after it.
    #[error("{op} uses {tensor:?}, which {state}")]
    NotAlive { op: OpRef, tensor: Tensor, state: String },
    /// A buffer begins its life twice.
    #[error("{op} allocates {tensor:?}, which lives since {first}")]
    AllocatedTwice { op: OpRef, tensor: Tensor, first: String },
    /// A buffer ends its life twice, or before it began.
    #[error("{op} frees {tensor:?}, which {state}")]
    FreedTwice { op: OpRef, tensor: Tensor, state: String },
    /// Persistent buffers live through all steps.
    #[error("{op} {what} {tensor:?}, which persists")]
    Persistent { op: OpRef, what: &'static str, tensor: Tensor },
    /// A communication op frees: its end is not known when the next op is issued.
    #[error(
        "{op} frees {tensor:?}; only ops of the compute stream free, when they have waited for the others that use it"
    )]
    FreedByCommunication { op: OpRef, tensor: Tensor },
    /// A buffer still lives when the step ends.
    #[error("{tensor:?} of {}, allocated by {op}, is never freed", op.rank)]
    Leaked { op: OpRef, tensor: Tensor },
    /// An op touches what another one may still be working on.
    #[error("{op} {what} {tensor:?} without waiting for {other}, which {does}")]
    MissingWait { op: OpRef, what: &'static str, tensor: Tensor, other: OpRef, does: &'static str },
    /// Passes of one microbatch out of order.
    #[error("{op} runs {pass} of {microbatch} on {stage} unit {unit}, {what}")]
    PassOrder { op: OpRef, pass: Pass, microbatch: MicrobatchId, stage: StageId, unit: u16, what: String },
    /// A step without gradients.
    #[error("{rank} runs F of {microbatch} on {stage} unit {unit} and never {missing}")]
    Unfinished { rank: RankId, microbatch: MicrobatchId, stage: StageId, unit: u16, missing: Pass },
}

/// Proves that a program can run.
///
/// # Errors
/// The first thing that is wrong, with the ops that it is about.
pub fn check(program: &Program) -> Result<(), CheckError> {
    for (number, rank) in (0..).zip(&program.ranks) {
        let rank = Rank { id: RankId(number), rank };
        rank.names(program)?;
        rank.lives()?;
        rank.passes()?;
    }
    // Times do not matter for who waits for whom.
    let compiled = Compiled::new(program)?;
    for (number, rank) in (0..).zip(&program.ranks) {
        Rank { id: RankId(number), rank }.hazards()?;
        shares(program, RankId(number))?;
    }
    compiled.run(&FixedTimes::default())?;
    Ok(())
}

struct Rank<'p> {
    id: RankId,
    rank: &'p RankProgram,
}

impl<'p> Rank<'p> {
    fn at(&self, op: usize) -> OpRef {
        OpRef { rank: self.id, op: OpId(op as u32) }
    }

    fn ops(&self) -> impl Iterator<Item = (usize, &'p Op)> + use<'p> {
        self.rank.ops.iter().enumerate()
    }

    fn tensor(&self, buffer: BufferId) -> Tensor {
        self.rank.buffers[buffer.index()].tensor
    }

    /// Everything that ops name exists.
    fn names(&self, program: &Program) -> Result<(), CheckError> {
        let buffers = self.rank.buffers.len();
        for (index, op) in self.ops() {
            let unknown = |what, index: usize, count| CheckError::Unknown { op: self.at(index), what, index, count };
            let exchanged = exchanged(&op.kind);
            let all = op.alloc.iter().chain(&op.uses).chain(&op.free).copied().chain(exchanged.clone());
            if let Some(buffer) = { all }.find(|buffer| buffer.index() >= buffers) {
                let error =
                    CheckError::Unknown { op: self.at(index), what: "buffer", index: buffer.index(), count: buffers };
                return Err(error);
            }
            if let OpKind::Compute { stage, end, .. } = op.kind {
                let Some(held) = program.stages.get(stage.index()) else {
                    return Err(unknown("stage", stage.index(), program.stages.len()));
                };
                if usize::from(end) > held.units.len() {
                    return Err(unknown("unit", usize::from(end) - 1, held.units.len()));
                }
            }
            for (what, list) in [("allocates", &op.alloc), ("frees", &op.free)] {
                if let Some(&buffer) = list.iter().find(|buffer| !op.uses.contains(buffer)) {
                    return Err(CheckError::Undeclared { op: self.at(index), what, tensor: self.tensor(buffer) });
                }
            }
            if let Some(buffer) = { exchanged }.find(|buffer| !op.uses.contains(buffer)) {
                let (op, tensor) = (self.at(index), self.tensor(buffer));
                return Err(CheckError::Undeclared { op, what: "exchanges", tensor });
            }
        }
        match self.rank.persistent.iter().find(|buffer| buffer.index() >= buffers) {
            Some(buffer) => {
                let (op, index) = (self.at(0), buffer.index());
                Err(CheckError::Unknown { op, what: "persistent buffer", index, count: buffers })
            }
            None => Ok(()),
        }
    }

    /// Buffers live once, and are used while they do.
    fn lives(&self) -> Result<(), CheckError> {
        let mut lives = vec![Life::Unborn; self.rank.buffers.len()];
        for &buffer in &self.rank.persistent {
            lives[buffer.index()] = Life::Persists;
        }
        for (index, op) in self.ops() {
            let here = self.at(index);
            for &buffer in &op.alloc {
                let (tensor, life) = (self.tensor(buffer), &mut lives[buffer.index()]);
                match *life {
                    Life::Unborn => *life = Life::Since(index),
                    Life::Persists => {
                        return Err(CheckError::Persistent { op: here, what: "allocates", tensor });
                    }
                    Life::Since(first) => {
                        let first = OpId(first as u32).to_string();
                        return Err(CheckError::AllocatedTwice { op: here, tensor, first });
                    }
                    Life::Until(_) => {
                        let first = "an earlier life; give it a buffer of its own".into();
                        return Err(CheckError::AllocatedTwice { op: here, tensor, first });
                    }
                }
            }
            for &buffer in &op.uses {
                if let Some(state) = lives[buffer.index()].absent() {
                    return Err(CheckError::NotAlive { op: here, tensor: self.tensor(buffer), state });
                }
            }
            for &buffer in &op.free {
                let (tensor, life) = (self.tensor(buffer), &mut lives[buffer.index()]);
                if op.stream != Stream::COMPUTE {
                    return Err(CheckError::FreedByCommunication { op: here, tensor });
                }
                match *life {
                    Life::Since(_) => *life = Life::Until(index),
                    Life::Persists => return Err(CheckError::Persistent { op: here, what: "frees", tensor }),
                    Life::Unborn | Life::Until(_) => {
                        let state = life.absent().unwrap_or_default();
                        return Err(CheckError::FreedTwice { op: here, tensor, state });
                    }
                }
            }
        }
        let leaked = lives.iter().zip(&self.rank.buffers).find_map(|(life, buffer)| match life {
            Life::Since(op) => Some((*op, buffer)),
            _ => None,
        });
        match leaked {
            Some((op, &Buffer { tensor, .. })) => Err(CheckError::Leaked { op: self.at(op), tensor }),
            None => Ok(()),
        }
    }

    /// F, then R where there is one, then B, then W, each once.
    fn passes(&self) -> Result<(), CheckError> {
        #[derive(Default)]
        struct Done {
            forward: bool,
            again: bool,
            input: bool,
            weight: bool,
        }
        let mut done: BTreeMap<(StageId, u16, MicrobatchId), Done> = BTreeMap::new();
        for (index, op) in self.ops() {
            let OpKind::Compute { pass, stage, microbatch, first, end } = op.kind else { continue };
            for unit in first..end {
                let this = done.entry((stage, unit, microbatch)).or_default();
                let (set, needs): (&[&str], &[&str]) = match pass {
                    Pass::F => (&["F"], &[]),
                    Pass::R => (&["R"], &["F"]),
                    Pass::B => (&["B"], &["F"]),
                    Pass::W => (&["W"], &["F", "B"]),
                    Pass::BW => (&["B", "W"], &["F"]),
                };
                let late = pass == Pass::R && this.input;
                let flag = |name: &str| -> bool {
                    match name {
                        "F" => this.forward,
                        "R" => this.again,
                        "B" => this.input,
                        _ => this.weight,
                    }
                };
                let what = if let Some(missing) = needs.iter().find(|name| !flag(name)) {
                    Some(format!("before {missing}"))
                } else if set.iter().any(|name| flag(name)) {
                    Some("for the second time".into())
                } else {
                    late.then(|| "after B has used what it rebuilds".into())
                };
                if let Some(what) = what {
                    return Err(CheckError::PassOrder { op: self.at(index), pass, microbatch, stage, unit, what });
                }
                match pass {
                    Pass::F => this.forward = true,
                    Pass::R => this.again = true,
                    Pass::B => this.input = true,
                    Pass::W => this.weight = true,
                    Pass::BW => (this.input, this.weight) = (true, true),
                }
            }
        }
        for ((stage, unit, microbatch), done) in done {
            let missing = match (done.input, done.weight) {
                (false, _) => Pass::B,
                (true, false) => Pass::W,
                (true, true) => continue,
            };
            return Err(CheckError::Unfinished { rank: self.id, microbatch, stage, unit, missing });
        }
        Ok(())
    }

    /// Nobody touches what communication may still be working on.
    fn hazards(&self) -> Result<(), CheckError> {
        let streams = self.rank.ops.iter().map(|op| usize::from(op.stream.0) + 1).max().unwrap_or(0);
        let mut order = Order::new(streams);
        // By buffer: the communication ops that touch it, since its life began.
        let mut touched: Vec<SmallVec<[usize; 2]>> = vec![SmallVec::new(); self.rank.buffers.len()];
        for (index, op) in self.ops() {
            order.enter(op);
            let here = self.at(index);
            for &buffer in &op.uses {
                for &other in &touched[buffer.index()] {
                    if order.has_ended(other) {
                        continue;
                    }
                    let does = match self.rank.ops[other].kind {
                        OpKind::Recv { .. } => "receives it",
                        OpKind::Collective { .. } => "reduces or gathers it",
                        _ => "sends it",
                    };
                    let sent = matches!(self.rank.ops[other].kind, OpKind::Send { .. });
                    let what = if op.free.contains(&buffer) {
                        "frees"
                    } else if !sent || matches!(op.kind, OpKind::Recv { .. } | OpKind::Collective { .. }) {
                        "touches"
                    } else {
                        // Two may read what is sent.
                        continue;
                    };
                    let (tensor, other) = (self.tensor(buffer), self.at(other));
                    return Err(CheckError::MissingWait { op: here, what, tensor, other, does });
                }
            }
            for &buffer in &op.alloc {
                touched[buffer.index()].clear();
            }
            for buffer in exchanged(&op.kind) {
                touched[buffer.index()].push(index);
            }
        }
        Ok(())
    }
}

/// The life of a buffer.
#[derive(Debug, Clone, Copy)]
enum Life {
    Unborn,
    Persists,
    Since(usize),
    Until(usize),
}

impl Life {
    /// Why it is not alive, if it is not.
    fn absent(self) -> Option<String> {
        match self {
            Life::Unborn => Some("nobody has allocated".into()),
            Life::Until(op) => Some(format!("op{op} has freed")),
            Life::Persists | Life::Since(_) => None,
        }
    }
}

/// The buffers that a communication op works on.
fn exchanged(kind: &OpKind) -> impl Iterator<Item = BufferId> + Clone + use<> {
    let (buffer, shard) = match *kind {
        OpKind::Send { buffer, .. } | OpKind::Recv { buffer, .. } => (Some(buffer), None),
        OpKind::Collective { buffer, arrangement, .. } => (Some(buffer), arrangement.shard),
        _ => (None, None),
    };
    buffer.into_iter().chain(shard)
}

/// By stream: how many of its ops have ended.
type Clock = SmallVec<[u32; 8]>;

/// What has certainly ended when an op starts.
struct Order {
    /// By op: its stream, its number in it, and what has ended when it has.
    ends: Vec<(usize, u32, Clock)>,
    /// By stream: its last op.
    last: Vec<Option<usize>>,
    counts: Vec<u32>,
    /// When the op that was entered last starts.
    now: Clock,
}

impl Order {
    fn new(streams: usize) -> Order {
        let zero: Clock = SmallVec::from_elem(0, streams);
        Order { ends: Vec::new(), last: vec![None; streams], counts: vec![0; streams], now: zero }
    }

    /// Enters the next op of the rank.
    fn enter(&mut self, op: &Op) {
        let stream = usize::from(op.stream.0);
        self.now.fill(0);
        let before = [self.last[0], self.last[stream]].into_iter().flatten();
        for earlier in before.chain(op.waits.iter().map(|wait| wait.index())) {
            for (now, &ended) in self.now.iter_mut().zip(&self.ends[earlier].2) {
                *now = (*now).max(ended);
            }
        }
        self.last[stream] = Some(self.ends.len());
        self.counts[stream] += 1;
        let mut end = self.now.clone();
        end[stream] = end[stream].max(self.counts[stream]);
        self.ends.push((stream, self.counts[stream], end));
    }

    /// Whether an earlier op has certainly ended when the last entered one starts.
    fn has_ended(&self, op: usize) -> bool {
        let (stream, number, _) = &self.ends[op];
        self.now[*stream] >= *number
    }
}

#[cfg(test)]
mod tests;
