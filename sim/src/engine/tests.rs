use super::*;
use crate::cost::{CostModel, Exchange, Pauses, Round};
use crate::program::{
    Arrangement, Buffer, Collective, Coordinates, Crossing, Device, Direction, Element, Group, Link, MemoryClass,
    Message, NetworkLevel, Op, OpKind, PROGRAM_FORMAT, Pass, Payload, RankProgram, Stage, Stream, Tensor, Unit,
    Workload,
};
use crate::trace::WaitReason;
use crate::units::{BufferId, DeviceId, GroupId, MicrobatchId, Nanos, OpId, RankId, StageId};
use smallvec::{SmallVec, smallvec};

/// Times by pass; every message and every round the same.
#[derive(Default)]
struct Given {
    f: u64,
    bw: u64,
    message: Round,
    rounds: SmallVec<[Round; 2]>,
    pauses: Pauses,
}

impl CostModel for Given {
    fn pauses(&self, _: &Program, _: RankId) -> Pauses {
        self.pauses
    }

    fn compute(&self, _: &Program, _: RankId, op: &Op) -> Nanos {
        match op.kind {
            OpKind::Compute { pass: Pass::F, .. } => Nanos(self.f),
            OpKind::Compute { .. } => Nanos(self.bw),
            _ => Nanos(0),
        }
    }

    fn transfer(&self, _: &Program, _: RankId, _: RankId, _: u64) -> Round {
        self.message
    }

    fn collective(&self, _: &Program, _: Exchange, _: &Group) -> SmallVec<[Round; 2]> {
        self.rounds.clone()
    }
}

fn op(stream: u8, kind: OpKind, waits: &[u32]) -> Op {
    Op::bare(Stream(stream), kind, waits)
}

fn compute(pass: Pass, stage: u16, microbatch: u32) -> OpKind {
    OpKind::Compute { pass, stage: StageId(stage), microbatch: MicrobatchId(microbatch), first: 0, end: 1 }
}

fn message(stage: u16, microbatch: u32) -> Message {
    let direction = if stage == 1 { Direction::Forward } else { Direction::Backward };
    Message { direction, stage: StageId(stage), microbatch: MicrobatchId(microbatch) }
}

fn send(peer: u32, stage: u16, microbatch: u32) -> OpKind {
    OpKind::Send { peer: RankId(peer), message: message(stage, microbatch), buffer: BufferId(0) }
}

fn receive(peer: u32, stage: u16, microbatch: u32) -> OpKind {
    OpKind::Recv { peer: RankId(peer), message: message(stage, microbatch), buffer: BufferId(0) }
}

fn all_reduce(unit: u16) -> OpKind {
    let payload = Payload::Gradients { stage: StageId(0), unit };
    OpKind::Collective {
        collective: Collective::AllReduce,
        group: GroupId(0),
        payload,
        buffer: BufferId(0),
        bytes: 64,
        arrangement: Arrangement::default(),
    }
}

/// Ranks with their devices; all of them are one group.
fn program(devices: u32, ranks: Vec<(u32, Vec<Op>)>) -> Program {
    let tensor = Tensor::StageInput { stage: StageId(0), microbatch: MicrobatchId(0) };
    let all = (0..ranks.len() as u32).map(RankId).collect();
    Program {
        format: PROGRAM_FORMAT.into(),
        workload: Workload::Abstract,
        microbatches: 2,
        devices: (0..devices).map(|n| Device { name: format!("d{n}"), node: 0 }).collect(),
        groups: vec![Group {
            name: "all".into(),
            size: ranks.len() as u32,
            ranks: all,
            level: NetworkLevel::Intra,
            crossing: None,
        }],
        stages: vec![Stage { units: vec![Unit { layers: vec![] }] }; 2],
        ranks: ranks
            .into_iter()
            .map(|(device, ops)| RankProgram {
                device: DeviceId(device),
                coordinates: Coordinates::default(),
                stages: vec![],
                buffers: vec![Buffer {
                    class: MemoryClass::Activation,
                    bytes: 64,
                    tensor,
                    start: 0,
                    element: Element::F32,
                }],
                persistent: vec![BufferId(0)],
                ops,
            })
            .collect(),
    }
}

/// (ready, start, end) of every op of a rank.
fn spans(trace: &Trace, rank: usize) -> Vec<(u64, u64, u64)> {
    trace.ranks[rank].events.iter().map(|event| (event.ready.0, event.start.0, event.end.0)).collect()
}

/// 1F1B over two stages and two microbatches.
fn pipeline(devices: u32) -> Program {
    let first = vec![
        op(0, compute(Pass::F, 0, 0), &[]),
        op(3, send(1, 1, 0), &[0]),
        op(0, compute(Pass::F, 0, 1), &[]),
        op(3, send(1, 1, 1), &[2]),
        op(4, receive(1, 0, 0), &[]),
        op(0, compute(Pass::BW, 0, 0), &[4]),
        op(4, receive(1, 0, 1), &[]),
        op(0, compute(Pass::BW, 0, 1), &[6]),
    ];
    let second = vec![
        op(2, receive(0, 1, 0), &[]),
        op(0, compute(Pass::F, 1, 0), &[0]),
        op(0, compute(Pass::BW, 1, 0), &[]),
        op(5, send(0, 0, 0), &[2]),
        op(2, receive(0, 1, 1), &[]),
        op(0, compute(Pass::F, 1, 1), &[4]),
        op(0, compute(Pass::BW, 1, 1), &[]),
        op(5, send(0, 0, 1), &[6]),
    ];
    program(devices, vec![(0, first), (devices - 1, second)])
}

#[test]
fn a_pipeline_by_hand() {
    let wire = Round { wire: Nanos(3), ..Round::default() };
    let trace = simulate(&pipeline(2), &Given { f: 10, bw: 20, message: wire, ..Given::default() }).unwrap();
    // The first microbatch arrives at 13, its gradient leaves at 43; the second was sent at 20 and received when the second
    // rank came to it, at 43.
    let first =
        [(0, 0, 10), (10, 10, 13), (10, 10, 20), (20, 43, 46), (20, 43, 46), (20, 46, 66), (66, 76, 79), (66, 79, 99)];
    let second =
        [(0, 10, 13), (0, 13, 23), (23, 23, 43), (43, 43, 46), (43, 43, 46), (43, 46, 56), (56, 56, 76), (76, 76, 79)];
    assert_eq!(spans(&trace, 0), first);
    assert_eq!(spans(&trace, 1), second);
    assert_eq!(trace.makespan, Nanos(99));
    let waits = |rank: usize| trace.ranks[rank].events.iter().map(|event| event.wait).collect::<Vec<_>>();
    let (peer, on) = (Some(WaitReason::Peer), |op| Some(WaitReason::Op(OpId(op))));
    assert_eq!(waits(0), [None, None, None, peer, peer, on(4), peer, on(6)]);
    assert_eq!(waits(1), [peer, on(0), None, None, None, on(4), None, None]);
}

#[test]
fn ranks_on_one_device_take_turns() {
    let trace = simulate(&pipeline(1), &Given { f: 10, bw: 20, ..Given::default() }).unwrap();
    // The first rank asks for its second forward at 10, before the message lets the second rank ask.
    let on_device: Vec<(u64, u64, u64)> =
        [spans(&trace, 0)[2], spans(&trace, 1)[1], spans(&trace, 1)[2], spans(&trace, 0)[5]].to_vec();
    assert_eq!(on_device, [(10, 10, 20), (0, 20, 30), (30, 30, 50), (20, 60, 80)]);
    // At 50 the second rank sends its gradient and goes on; only then is the first rank awake and asks.
    assert_eq!(trace.makespan, Nanos(2 * (10 + 10 + 20 + 20)), "one device never rests here");
    assert_eq!(trace.ranks[1].events[1].wait, Some(WaitReason::Op(OpId(0))));
    // What a device did never overlaps.
    let mut all: Vec<(u64, u64)> =
        trace.ranks.iter().flat_map(|r| &r.events).filter(|e| e.stream.0 == 0).map(|e| (e.start.0, e.end.0)).collect();
    all.sort_unstable();
    assert!(all.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{all:?}");
}

#[test]
fn what_had_to_wait_begins_after_a_pause() {
    // The second rank's forward waits for the message of 13, and begins 2 later; its backward follows at once.
    let wire = Round { wire: Nanos(3), ..Round::default() };
    let pauses = Pauses { turn: Nanos(1), wake: Nanos(2) };
    let trace = simulate(&pipeline(2), &Given { f: 10, bw: 20, message: wire, pauses, ..Given::default() }).unwrap();
    assert_eq!(spans(&trace, 1)[1..3], [(0, 15, 25), (25, 25, 45)]);
    assert_eq!(spans(&trace, 0)[2], (10, 10, 20));
    // On one device the first rank asks for its second forward at 10 and has it at once; the second rank's forward, which waits from then
    // on, has its turn at 20 and begins at 21.
    let trace = simulate(&pipeline(1), &Given { f: 10, bw: 20, pauses, ..Given::default() }).unwrap();
    assert_eq!(
        [spans(&trace, 0)[2], spans(&trace, 1)[1], spans(&trace, 1)[2]],
        [(10, 10, 20), (0, 21, 31), (31, 31, 51)]
    );
}

#[test]
fn a_copy_takes_the_receivers_device() {
    // Rank 1 computes from 0 to 30; the message is there at 10 and is copied when its device is free.
    let sender = vec![op(0, compute(Pass::F, 0, 0), &[]), op(3, send(1, 1, 0), &[0])];
    let receiver =
        vec![op(2, receive(0, 1, 0), &[]), op(0, compute(Pass::BW, 1, 7), &[]), op(0, compute(Pass::F, 1, 0), &[0])];
    let program = program(2, vec![(0, sender), (1, receiver)]);
    let message = Round { wire: Nanos(1), work: Nanos(5), ..Round::default() };
    let trace = simulate(&program, &Given { f: 10, bw: 30, message, ..Given::default() }).unwrap();
    assert_eq!(spans(&trace, 1), [(0, 30, 35), (0, 0, 30), (30, 35, 45)]);
    assert_eq!(spans(&trace, 0)[1], (10, 30, 35));
    assert_eq!(trace.ranks[1].events[0].wait, Some(WaitReason::Device));
    // On an idle device it begins when the wire is passed, and compute waits for it.
    let trace = simulate(&program, &Given { f: 10, bw: 8, message, ..Given::default() }).unwrap();
    assert_eq!(spans(&trace, 1), [(0, 11, 16), (0, 0, 8), (8, 16, 26)]);
    // There a thread has to wake up first; a busy device comes to it in its turn, and no later.
    let message = Round { late: Nanos(4), ..message };
    let begins = |bw| spans(&simulate(&program, &Given { f: 10, bw, message, ..Given::default() }).unwrap(), 1)[0];
    assert_eq!([begins(8), begins(30)], [(0, 15, 20), (0, 30, 35)]);
    // Unless another rank of the device wakes up before, here for a collective that ends at 13: it does what is there first.
    let mut three = program.clone();
    three.ranks.push(RankProgram { ops: vec![], ..three.ranks[1].clone() });
    three.ranks[1].ops.remove(1);
    three.ranks[1].ops[1].waits = [OpId(0)].into_iter().collect();
    three.ranks[2].ops.push(op(1, all_reduce(0), &[]));
    three.ranks[2].ops.push(op(0, compute(Pass::F, 1, 8), &[0]));
    // Issued before anything else.
    let meets = |ops: &mut Vec<Op>| {
        for op in ops.iter_mut() {
            op.waits.iter_mut().for_each(|wait| wait.0 += 1);
        }
        ops.insert(0, op(1, all_reduce(0), &[]));
    };
    meets(&mut three.ranks[0].ops);
    meets(&mut three.ranks[1].ops);
    three.groups[0].ranks = (0..3).map(RankId).collect();
    three.groups[0].size = 3;
    let rounds = smallvec![Round { wire: Nanos(13), ..Round::default() }];
    let trace = simulate(&three, &Given { f: 10, message, rounds, ..Given::default() }).unwrap();
    assert_eq!(spans(&trace, 2)[1], (0, 18, 28));
    assert_eq!(spans(&trace, 1)[1..], [(0, 13, 18), (0, 28, 38)]);
}

#[test]
fn a_collective_takes_its_rounds_on_the_devices_of_its_members() {
    let rank = |passes: &[Pass]| {
        let mut ops: Vec<Op> = (0..).zip(passes).map(|(n, &pass)| op(0, compute(pass, 0, n), &[])).collect();
        let last = ops.len() as u32 - 1;
        ops.push(op(1, all_reduce(0), &[last]));
        ops.push(op(0, compute(Pass::F, 0, 9), &[]));
        ops.push(op(0, OpKind::Join, &[last + 1]));
        ops
    };
    let rounds: SmallVec<[Round; 2]> = smallvec![
        Round { work: Nanos(4), ..Round::default() },
        Round { wire: Nanos(2), work: Nanos(3), ..Round::default() }
    ];
    let costs = Given { f: 10, bw: 20, rounds, ..Given::default() };
    let both = program(2, vec![(0, rank(&[Pass::F])), (1, rank(&[Pass::BW]))]);
    let trace = simulate(&both, &costs).unwrap();
    // Rank 0 arrives at 10 and rank 1 at 20. Both are free for the first round, until 24; then rank 1 begins its next op,
    // and its part of the second round has to wait until 34.
    assert_eq!(spans(&trace, 0)[1..], [(10, 20, 37), (10, 10, 20), (20, 37, 37)]);
    assert_eq!(spans(&trace, 1)[1..], [(20, 20, 37), (20, 24, 34), (34, 37, 37)]);

    // Two members on one device do their parts one after the other.
    let shared = program(1, vec![(0, rank(&[Pass::F])), (0, rank(&[Pass::F]))]);
    let trace = simulate(&shared, &costs).unwrap();
    // Both forwards, the next one of rank 0 (asked for at 10), the first round (met at 20), the next forward of rank 1, behind
    // which the wire is hidden, and the second round.
    assert_eq!(trace.makespan, Nanos(10 + 10 + 10 + 2 * 4 + 10 + 2 * 3));
}

/// Two fast groups whose links are slowed down; by how much, costs say.
const CROSSING: Crossing = Crossing { groups: 2, link: Some(Link { latency: Nanos::ZERO, bytes_per_second: 1 }) };

/// A message and a collective from one group to the other stand behind each other; a message the other way does not.
#[test]
fn messages_and_collectives_share_a_link() {
    let leaving = vec![
        op(0, compute(Pass::F, 0, 0), &[]),
        op(3, send(1, 1, 0), &[0]),
        op(4, receive(1, 0, 0), &[0]),
        op(1, all_reduce(0), &[0]),
    ];
    let entering = vec![
        op(0, compute(Pass::F, 1, 0), &[]),
        op(3, receive(0, 1, 0), &[0]),
        op(4, send(0, 0, 0), &[0]),
        op(1, all_reduce(0), &[0]),
    ];
    let mut two = program(2, vec![(0, leaving), (1, entering)]);
    two.groups[0].crossing = Some(CROSSING);
    two.ranks[1].coordinates.group = 1;
    let round = |link, wire| Round { link: Nanos(link), wire: Nanos(wire), ..Round::default() };
    let costs = Given { f: 4, message: round(20, 1), rounds: smallvec![round(10, 3)], ..Given::default() };
    let trace = simulate(&two, &costs).unwrap();
    // Both messages from 4 to 24, each in its direction, and one on the way; then the collective, which takes both.
    assert_eq!(spans(&trace, 0)[1..], [(4, 4, 25), (4, 4, 25), (4, 4, 37)]);
    // Within one group nothing is shared.
    two.ranks[1].coordinates.group = 0;
    two.groups[0].crossing = None;
    let trace = simulate(&two, &costs).unwrap();
    assert_eq!(spans(&trace, 0)[1..], [(4, 4, 25), (4, 4, 25), (4, 4, 17)]);
}

#[test]
fn the_link_between_groups_serves_one_exchange_after_the_other() {
    let reduce = |group: u32| match all_reduce(0) {
        OpKind::Collective { collective, payload, buffer, bytes, arrangement, .. } => {
            OpKind::Collective { collective, group: GroupId(group), payload, buffer, bytes, arrangement }
        }
        other => other,
    };
    let ops = |group| vec![op(0, compute(Pass::F, group as u16, 0), &[]), op(1, reduce(group), &[0])];
    let mut four = program(4, vec![(0, ops(0)), (1, ops(0)), (2, ops(1)), (3, ops(1))]);
    let pair = |first: u32| Group {
        ranks: vec![RankId(first), RankId(first + 1)],
        size: 2,
        crossing: Some(CROSSING),
        ..four.groups[0].clone()
    };
    four.groups = vec![pair(0), pair(2)];
    four.ranks[1].coordinates.group = 1;
    four.ranks[3].coordinates.group = 1;
    let round = |link, wire| smallvec![Round { link: Nanos(link), wire: Nanos(wire), ..Round::default() }];
    // All stand before their collective at 4. The link is busy with the first until 14 and with the second until 24; the way
    // takes 3 more and keeps nobody else waiting.
    let trace = simulate(&four, &Given { f: 4, rounds: round(10, 3), ..Given::default() }).unwrap();
    assert_eq!([spans(&trace, 0)[1], spans(&trace, 2)[1]], [(4, 4, 17), (4, 4, 27)]);
    // Without the link both pass at once.
    let trace = simulate(&four, &Given { f: 4, rounds: round(0, 13), ..Given::default() }).unwrap();
    assert_eq!([spans(&trace, 0)[1], spans(&trace, 2)[1]], [(4, 4, 17), (4, 4, 17)]);
}

#[test]
fn a_collective_of_one_rank_moves_nothing() {
    let alone = program(1, vec![(0, vec![op(0, compute(Pass::F, 0, 0), &[]), op(1, all_reduce(0), &[0])])]);
    let rounds = smallvec![Round { wire: Nanos(7), work: Nanos(7), ..Round::default() }];
    let trace = simulate(&alone, &Given { f: 10, rounds, ..Given::default() }).unwrap();
    assert_eq!(spans(&trace, 0), [(0, 0, 10), (10, 10, 10)]);
}

#[test]
fn circles_are_named() {
    // Each rank waits for the other's message before it sends.
    let rank = |other: u32, in_stage: u16, out_stage: u16| {
        vec![
            op(2, receive(other, in_stage, 0), &[]),
            op(0, compute(Pass::F, 0, 0), &[0]),
            op(3, send(other, out_stage, 0), &[1]),
        ]
    };
    let circle = program(2, vec![(0, rank(1, 0, 1)), (1, rank(0, 1, 0))]);
    let error = simulate(&circle, &Given::default()).unwrap_err().to_string();
    assert!(error.starts_with("deadlock: r0 op0 Recv") && error.contains("r1 op0 Recv"), "{error}");
    assert!(error.contains("r0 op1") && error.contains("waits for op0"), "{error}");

    let ops = vec![op(0, compute(Pass::F, 0, 0), &[1]), op(0, compute(Pass::F, 0, 1), &[])];
    let error = simulate(&program(1, vec![(0, ops)]), &Given::default()).unwrap_err();
    assert_eq!(error.to_string(), "r0 op0 waits for op1, which does not come before it");
}

#[test]
fn ops_that_do_not_meet_are_named() {
    let message = |ranks: Vec<(u32, Vec<Op>)>| simulate(&program(2, ranks), &Given::default()).unwrap_err().to_string();
    let alone = message(vec![(0, vec![op(3, send(1, 1, 0), &[])]), (1, vec![])]);
    assert!(alone.starts_with("r0 op0 sends") && alone.contains("r1 does not receive it"), "{alone}");
    let crossed = message(vec![
        (0, vec![op(1, all_reduce(0), &[]), op(1, all_reduce(1), &[])]),
        (1, vec![op(1, all_reduce(1), &[]), op(1, all_reduce(0), &[])]),
    ]);
    assert!(crossed.contains("collective number 0") && crossed.contains("r0 op0") && crossed.contains("r1 op0"));
    let absent = message(vec![(0, vec![op(1, all_reduce(0), &[])]), (1, vec![])]);
    assert!(absent.contains("r0 op0 waits for r1, which never joins"), "{absent}");
    let twice = message(vec![
        (0, vec![op(3, send(1, 1, 0), &[]), op(3, send(1, 1, 0), &[])]),
        (1, vec![op(2, receive(0, 1, 0), &[])]),
    ]);
    assert!(twice.starts_with("r0 op1 and r0 op0"), "{twice}");
    let astray = message(vec![(0, vec![op(1, compute(Pass::F, 0, 0), &[])]), (1, vec![])]);
    assert_eq!(astray, "r0 op0 computes on stream 1; only stream 0 computes");
}
