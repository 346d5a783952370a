use super::*;
use crate::program::{
    Arrangement, Buffer, Coordinates, Device, Direction, Element, MemoryClass, Message, NetworkLevel, PROGRAM_FORMAT,
    Pass, Payload, RankProgram, Stage, Stream, Tensor, Unit, Workload,
};
use crate::units::{BufferId, DeviceId, GroupId, StageId};
use proptest::prelude::*;
use smallvec::smallvec;

/// Times of ops by rank and microbatch, of messages and of collectives.
#[derive(Debug, Clone, Default)]
struct Given {
    forwards: [[u64; 2]; 2],
    message: (u64, u64),
    collective: (u64, u64),
}

impl CostModel for Given {
    fn compute(&self, _: &Program, rank: RankId, op: &Op) -> Nanos {
        match op.kind {
            OpKind::Compute { microbatch, .. } => Nanos(self.forwards[rank.index()][microbatch.index()]),
            _ => Nanos(0),
        }
    }

    fn transfer(&self, _: &Program, _: RankId, _: RankId, _: u64) -> Round {
        Round { wire: Nanos(self.message.0), work: Nanos(self.message.1), ..Round::default() }
    }

    fn collective(&self, _: &Program, _: Exchange, _: &Group) -> SmallVec<[Round; 2]> {
        let round = Round { wire: Nanos(self.collective.0), work: Nanos(self.collective.1), ..Round::default() };
        smallvec![round]
    }
}

fn op(stream: u8, kind: OpKind, waits: &[u32]) -> Op {
    Op::bare(Stream(stream), kind, waits)
}

/// Two ranks: the first computes two microbatches and sends each to the second, which computes them too; then they meet.
fn program() -> Program {
    let forward = |stage, microbatch| OpKind::Compute {
        pass: Pass::F,
        stage: StageId(stage),
        microbatch: MicrobatchId(microbatch),
        first: 0,
        end: 1,
    };
    let message = |m| Message { direction: Direction::Forward, stage: StageId(1), microbatch: MicrobatchId(m) };
    let send = |m| OpKind::Send { peer: RankId(1), message: message(m), buffer: BufferId(0) };
    let receive = |m| OpKind::Recv { peer: RankId(0), message: message(m), buffer: BufferId(0) };
    let meet = OpKind::Collective {
        collective: Collective::AllReduce,
        group: GroupId(0),
        payload: Payload::GradientNorm,
        buffer: BufferId(0),
        bytes: 64,
        arrangement: Arrangement::default(),
    };
    let first = vec![
        op(0, forward(0, 0), &[]),
        op(2, send(0), &[0]),
        op(0, forward(0, 1), &[]),
        op(2, send(1), &[2]),
        op(1, meet, &[2]),
    ];
    let second = vec![
        op(2, receive(0), &[]),
        op(2, receive(1), &[]),
        op(0, forward(1, 0), &[0]),
        op(0, forward(1, 1), &[1]),
        op(1, meet, &[3]),
    ];
    let tensor = Tensor::StageInput { stage: StageId(0), microbatch: MicrobatchId(0) };
    let buffer = Buffer { class: MemoryClass::Activation, bytes: 64, tensor, start: 0, element: Element::F32 };
    let rank = |(device, ops): (u32, Vec<Op>)| RankProgram {
        device: DeviceId(device),
        coordinates: Coordinates::default(),
        stages: vec![StageId(device as u16)],
        buffers: vec![buffer.clone()],
        persistent: vec![BufferId(0)],
        ops,
    };
    let ranks = vec![RankId(0), RankId(1)];
    Program {
        format: PROGRAM_FORMAT.into(),
        workload: Workload::Abstract,
        microbatches: 2,
        devices: (0..2).map(|n| Device { name: format!("d{n}"), node: 0 }).collect(),
        groups: vec![Group { name: "all".into(), ranks, size: 2, level: NetworkLevel::Intra, crossing: None }],
        stages: vec![Stage { units: vec![Unit { layers: vec![] }] }; 2],
        ranks: (0..).zip([first, second]).map(rank).collect(),
    }
}

const USUAL: Given = Given { forwards: [[1000; 2]; 2], message: (10, 50), collective: (20, 30) };

fn parts(measured: &Given) -> BTreeMap<Cause, i64> {
    let program = program();
    let trace = simulate(&program, measured).unwrap();
    let found = Attribution::of(&program, &USUAL, &trace).unwrap();
    found.parts.into_iter().map(|part| (part.cause, (part.seconds * 1e9).round() as i64)).collect()
}

fn only(cause: Cause, nanoseconds: i64, found: &BTreeMap<Cause, i64>) {
    for (of, &part) in found {
        assert_eq!(part, if *of == cause { nanoseconds } else { 0 }, "{of:?} of {found:?}");
    }
    assert!(found.contains_key(&cause), "{cause:?} of {found:?}");
}

#[test]
fn each_cause_is_told_by_itself() {
    only(Cause::HandOver, 0, &parts(&USUAL));
    // The path goes through three forwards: two of the first rank, one of the second.
    only(Cause::Ops("F".into()), 300, &parts(&Given { forwards: [[1100; 2]; 2], ..USUAL }));
    // Both copies are on the path: the second waits for its device until the first microbatch is done.
    only(Cause::Messages, 14, &parts(&Given { message: (10, 57), ..USUAL }));
    only(Cause::HandOver, 5, &parts(&Given { message: (15, 50), ..USUAL }));
    only(Cause::Collectives, 9, &parts(&Given { collective: (20, 39), ..USUAL }));
    // The same mean, but nothing hides the long one. The second message is copied 50 earlier, at
    // its arrival, and the long one ends 200 after that.
    only(Cause::Unevenness, 150, &parts(&Given { forwards: [[1000; 2], [800, 1200]], ..USUAL }));
}

#[test]
fn an_op_that_nobody_waits_for_is_no_cause() {
    // The second rank has its first microbatch done long before the next arrives.
    let idle = Given { forwards: [[1000; 2], [400, 400]], ..USUAL };
    let trace = simulate(&program(), &Given { forwards: [[1000; 2], [500, 300]], ..USUAL }).unwrap();
    let found = Attribution::of(&program(), &idle, &trace).unwrap();
    let mean = found.parts.iter().find(|part| part.cause == Cause::Ops("F".into())).unwrap();
    assert_eq!(mean.seconds, 0.0);
}

#[test]
fn other_programs_are_refused() {
    let mut other = program();
    other.ranks[0].ops.pop();
    other.ranks[1].ops.pop();
    let trace = simulate(&other, &USUAL).unwrap();
    let refused = Attribution::of(&program(), &USUAL, &trace).unwrap_err();
    assert!(matches!(refused, AttributionError::Compare(CompareError::Op { .. })), "{refused}");
}

proptest! {
    #[test]
    fn parts_sum_to_the_whole(
        forwards in prop::array::uniform2(prop::array::uniform2(1u64..3000)),
        message in (0u64..500, 1u64..500),
        collective in (0u64..500, 1u64..500),
    ) {
        let measured = Given { forwards, message, collective };
        let trace = simulate(&program(), &measured).unwrap();
        let found = Attribution::of(&program(), &USUAL, &trace).unwrap();
        let sum: f64 = found.parts.iter().map(|part| part.seconds).sum();
        prop_assert!((sum - (found.measured_seconds - found.predicted_seconds)).abs() < 1e-12, "{found:?}");
    }
}
