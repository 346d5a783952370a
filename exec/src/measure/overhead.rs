//! What the executor itself costs: small programs run through the real interpreter and fabric, with ops that last by
//! the clock and compute nothing. What their steps take beyond that is overhead.

use super::samples::Summary;
use super::{MeasureError, Measured, Phase};
use crate::bind::Bound;
use crate::crew::{Clock, with_crew};
use crate::effects::HostRange;
use crate::error::ExecError;
use crate::fabric::Fabric;
use crate::host_effects::HostEffects;
use crate::interpreter::Hands;
use crate::kernel_times::KernelTally;
use crate::run::SPINS;
use paceline_kernels::{Block, Call, DType};
use paceline_profiles::{Overhead, Subject};
use paceline_sim::program::{
    Arrangement, Buffer, Collective, Coordinates, Device, Direction, Element, Group, MemoryClass, Message,
    NetworkLevel, Op, OpKind, PROGRAM_FORMAT, Pass, Payload, Program, RankProgram, Stage, Stream, Tensor, Unit,
    Workload,
};
use paceline_sim::units::{BufferId, DeviceId, GroupId, MicrobatchId, OpId, RankId, StageId};
use smallvec::{SmallVec, smallvec};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Compute ops of a step without messages.
const OPS: u32 = 200;
/// Messages of a step, there and back.
const HOPS: u32 = 40;
/// Rounds of an all-reduce of two by the direct algorithm.
const ROUNDS: u32 = 2;
/// How long an op lasts between two messages: as kernels do, so that a thread that waits falls asleep as in a run.
const OP_NANOSECONDS: u64 = 300_000;
/// How long an op lasts where two ranks take turns: longer than a thread takes to wake up.
const TURN_NANOSECONDS: u64 = 100_000;
/// Calls timed together.
const CALLS: u32 = 1000;
/// Repetitions, even if the time is up; and at most.
const LEAST: usize = 3;
const MOST: usize = 200;

/// Measures all overheads that can occur on so many devices.
pub(super) fn measure(phase: &mut Phase) -> Result<Vec<Measured>, MeasureError> {
    let left = phase.deadline.saturating_duration_since(Instant::now());
    let two_devices = phase.settings.devices > 1;
    let share = left / if two_devices { 6 } else { 4 };
    let mut results = Vec::new();
    let mut record = |overhead, summary, busy_devices| {
        results.push(Measured { subject: Subject::Overhead(overhead), busy_devices, summary });
    };
    let op = steps(phase, &chain(1), 0, share)?;
    let per_op = op.per(f64::from(OPS));
    record(Overhead::Op, per_op, 1);
    // Ops that last: where none does, a rank is through its list before the other has woken up, and they never take turns.
    let turns = steps(phase, &chain(2), TURN_NANOSECONDS, share)?.per(f64::from(2 * OPS));
    let beyond = (turns.median - TURN_NANOSECONDS as f64 * 1e-9).max(per_op.median);
    record(Overhead::SharedOp, Summary { median: beyond, ..turns }, 1);
    record(Overhead::Call, calls(phase, share), 1);
    // Each op and what follows it, less the op.
    let hop = |phase: &mut Phase, program: &Program| -> Result<Summary, MeasureError> {
        let step = steps(phase, program, OP_NANOSECONDS, share)?.per(f64::from(HOPS));
        let rest = step.median - OP_NANOSECONDS as f64 * 1e-9 - per_op.median;
        Ok(Summary { median: rest.max(1e-9), ..step })
    };
    record(Overhead::SharedMessage, hop(phase, &ping_pong(1))?, 1);
    if two_devices {
        record(Overhead::Message, hop(phase, &ping_pong(2))?, 2);
        // Both come at once, so that nobody falls asleep before the last round.
        record(Overhead::Round, hop(phase, &meetings())?.per(f64::from(ROUNDS)), 2);
    }
    Ok(results)
}

impl Summary {
    /// Of one of `parts` equal parts of what was timed.
    fn per(self, parts: f64) -> Summary {
        Summary { median: self.median / parts, spread: self.spread / parts, count: self.count }
    }
}

/// Times steps of a program whose ops last `nanoseconds`.
fn steps(phase: &mut Phase, program: &Program, nanoseconds: u64, share: Duration) -> Result<Summary, MeasureError> {
    let clock = Clock::start();
    let bound = Bound::new(program)?;
    let fabric = Fabric::new(&bound, HostEffects::new(&bound, clock, phase.device, None), SPINS);
    let message = |_| phase.device.allocate(MESSAGE_BYTES as usize).map_err(MeasureError::Memory);
    let blocks: Vec<Box<dyn Block>> = (0..2 * program.ranks.len()).map(message).collect::<Result<_, _>>()?;
    let hands: Vec<Mutex<Idle>> = program
        .ranks
        .iter()
        .zip(blocks.chunks(2))
        .map(|(rank, blocks)| {
            let range = |n: usize| HostRange { address: blocks[n].address(), bytes: MESSAGE_BYTES, shard: 0 };
            Mutex::new(Idle { rank, clock, nanoseconds, ranges: [range(0), range(1)] })
        })
        .collect();
    let until = Instant::now() + share;
    let pin = program.ranks.len() > program.devices.len();
    let mut seconds = Vec::new();
    with_crew(&fabric, clock, &hands, pin, |lead| {
        // The first step warms up.
        for n in 0.. {
            if (phase.stop)() || n > MOST || (n > LEAST && Instant::now() >= until) {
                break;
            }
            let step = lead.step()?.seconds();
            if n > 0 {
                seconds.push(step);
            }
            (phase.tick)();
        }
        Ok(())
    })?;
    Summary::of(seconds).ok_or(MeasureError::Stopped)
}

/// What surrounds a kernel call in the executor: two looks at the clock, and noting the time.
fn calls(phase: &mut Phase, share: Duration) -> Summary {
    let until = Instant::now() + share.min(Duration::from_millis(200));
    let clock = Clock::start();
    let mut tally = KernelTally::default();
    let nothing: &dyn Block = &Nothing;
    let call = Call::Zero { x: nothing.view(0, 1, DType::F32) };
    let mut seconds = Vec::new();
    while seconds.len() < LEAST || (seconds.len() < MOST && Instant::now() < until) {
        let start = Instant::now();
        for _ in 0..CALLS {
            let start = clock.now();
            tally.add(&call, std::hint::black_box(clock.now() - start));
        }
        seconds.push(start.elapsed().as_secs_f64() / f64::from(CALLS));
    }
    (phase.tick)();
    Summary::of(seconds).unwrap_or(Summary { median: 1e-9, spread: 0.0, count: 1 })
}

struct Nothing;

impl Block for Nothing {
    fn address(&self) -> u64 {
        0
    }

    fn bytes(&self) -> usize {
        64
    }
}

const MESSAGE_BYTES: u64 = 64;

/// A rank whose ops last and do nothing.
struct Idle<'p> {
    rank: &'p RankProgram,
    clock: Clock,
    nanoseconds: u64,
    /// By buffer.
    ranges: [HostRange; 2],
}

impl Hands for Idle<'_> {
    fn allocate(&mut self, _: u32, _: u64) -> Result<(), ExecError> {
        Ok(())
    }

    fn range(&self, op: u32) -> Result<HostRange, ExecError> {
        Ok(match self.rank.ops[op as usize].kind {
            OpKind::Send { buffer, .. } | OpKind::Recv { buffer, .. } | OpKind::Collective { buffer, .. } => {
                self.ranges[buffer.index()]
            }
            _ => HostRange::default(),
        })
    }

    fn compute(&mut self, _: u32, start: u64) -> Result<u64, ExecError> {
        let mut now = self.clock.now();
        while now < start + self.nanoseconds {
            std::hint::spin_loop();
            now = self.clock.now();
        }
        Ok(now)
    }

    fn free(&mut self, _: u32, _: u64) {}
}

/// Ranks on one device, each with a list of compute ops.
fn chain(ranks: u32) -> Program {
    let ops = (0..OPS).map(|n| op(Stream::COMPUTE, compute(n), None)).collect::<Vec<_>>();
    program(1, (0..ranks).map(|_| (DeviceId(0), ops.clone())))
}

/// Two ranks that compute in turn, each waiting for the other's message.
fn ping_pong(devices: u32) -> Program {
    let lists = [0u32, 1].map(|own| {
        let mut ops: Vec<Op> = Vec::new();
        for hop in 0..HOPS {
            let message = Message { direction: Direction::Forward, stage: StageId(0), microbatch: MicrobatchId(hop) };
            let peer = RankId(1 - own);
            if own == hop % 2 {
                // Computes once the message before has come, then sends.
                let before = ops.len().checked_sub(1).map(|last| OpId(last as u32));
                ops.push(op(Stream::COMPUTE, compute(hop), before));
                let computed = OpId(ops.len() as u32 - 1);
                ops.push(op(Stream(2), OpKind::Send { peer, message, buffer: BufferId(0) }, Some(computed)));
            } else {
                ops.push(op(Stream(3), OpKind::Recv { peer, message, buffer: BufferId(1) }, None));
            }
        }
        ops
    });
    program(devices, (0u32..).zip(lists).map(|(rank, ops)| (DeviceId(rank % devices), ops)))
}

/// Two ranks on two devices that compute as long and meet after each op.
fn meetings() -> Program {
    let reduced = OpKind::Collective {
        collective: Collective::AllReduce,
        group: GroupId(0),
        payload: Payload::GradientNorm,
        buffer: BufferId(0),
        bytes: MESSAGE_BYTES,
        arrangement: Arrangement::default(),
    };
    let mut ops: Vec<Op> = Vec::new();
    for hop in 0..HOPS {
        let before = ops.len().checked_sub(1).map(|last| OpId(last as u32));
        ops.push(op(Stream::COMPUTE, compute(hop), before));
        ops.push(op(Stream(1), reduced, before.map(|last| OpId(last.0 + 1)).or(Some(OpId(0)))));
    }
    let ranks = vec![RankId(0), RankId(1)];
    let name = "both".to_string();
    let group = Group { name, ranks, size: 2, level: NetworkLevel::Intra, crossing: None };
    Program { groups: vec![group], ..program(2, [0, 1].map(|rank| (DeviceId(rank), ops.clone())).into_iter()) }
}

fn compute(n: u32) -> OpKind {
    OpKind::Compute { pass: Pass::F, stage: StageId(0), microbatch: MicrobatchId(n), first: 0, end: 1 }
}

fn op(stream: Stream, kind: OpKind, wait: Option<OpId>) -> Op {
    let none = SmallVec::new;
    let uses = match kind {
        OpKind::Send { buffer, .. } | OpKind::Recv { buffer, .. } | OpKind::Collective { buffer, .. } => {
            smallvec![buffer]
        }
        _ => smallvec![],
    };
    Op { stream, kind, waits: wait.into_iter().collect(), alloc: none(), uses, free: none() }
}

fn program(devices: u32, ranks: impl Iterator<Item = (DeviceId, Vec<Op>)>) -> Program {
    let buffer = |tensor| Buffer {
        class: MemoryClass::Activation,
        bytes: MESSAGE_BYTES,
        tensor,
        start: 0,
        element: Element::F32,
    };
    let (stage, microbatch) = (StageId(0), MicrobatchId(0));
    let rank = |(device, ops)| RankProgram {
        device,
        coordinates: Coordinates::default(),
        stages: vec![stage],
        buffers: vec![
            buffer(Tensor::StageOutput { stage, microbatch }),
            buffer(Tensor::StageInput { stage, microbatch }),
        ],
        persistent: vec![BufferId(0), BufferId(1)],
        ops,
    };
    Program {
        format: PROGRAM_FORMAT.into(),
        workload: Workload::Abstract,
        microbatches: 1,
        devices: (0..devices).map(|n| Device { name: format!("cpu:{n}"), node: 0 }).collect(),
        groups: vec![],
        stages: vec![Stage { units: vec![Unit { layers: vec![] }] }],
        ranks: ranks.map(rank).collect(),
    }
}
