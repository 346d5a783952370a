use super::*;
use crate::program::{
    Arrangement, Collective, Coordinates, Device, Direction, Element, Group, MemoryClass, Message, NetworkLevel,
    PROGRAM_FORMAT, Payload, Stage, Unit, Workload,
};
use crate::units::{DeviceId, GroupId};

const MICROBATCH: MicrobatchId = MicrobatchId(0);
const NORM: BufferId = BufferId(3);

fn op(stream: u8, kind: OpKind, waits: &[u32], [alloc, uses, free]: [&[u32]; 3]) -> Op {
    let buffers = |list: &[u32]| list.iter().map(|&buffer| BufferId(buffer)).collect();
    Op {
        stream: Stream(stream),
        kind,
        waits: waits.iter().map(|&wait| OpId(wait)).collect(),
        alloc: buffers(alloc),
        uses: buffers(uses),
        free: buffers(free),
    }
}

fn compute(pass: Pass, stage: u16) -> OpKind {
    OpKind::Compute { pass, stage: StageId(stage), microbatch: MICROBATCH, first: 0, end: 1 }
}

fn message(direction: Direction, stage: u16) -> Message {
    Message { direction, stage: StageId(stage), microbatch: MICROBATCH }
}

fn all_reduce(payload: Payload, buffer: BufferId, bytes: u64) -> OpKind {
    OpKind::Collective {
        collective: Collective::AllReduce,
        group: GroupId(0),
        payload,
        buffer,
        bytes,
        arrangement: Arrangement::default(),
    }
}

/// Two stages on two ranks, one microbatch, tied embeddings, the norm of the gradients.
fn valid() -> Program {
    let buffer = |class, bytes, tensor| Buffer { class, bytes, tensor, start: 0, element: Element::F32 };
    let buffers = |stage: u16| {
        let stage = StageId(stage);
        let (forward, backward) = if stage.0 == 0 {
            (
                Tensor::StageOutput { stage, microbatch: MICROBATCH },
                Tensor::OutputGradient { stage, microbatch: MICROBATCH },
            )
        } else {
            (
                Tensor::StageInput { stage, microbatch: MICROBATCH },
                Tensor::InputGradient { stage, microbatch: MICROBATCH },
            )
        };
        vec![
            buffer(MemoryClass::Gradient, 40, Tensor::Gradients { stage, unit: 0 }),
            buffer(MemoryClass::Activation, 64, forward),
            buffer(MemoryClass::Activation, 64, backward),
            buffer(MemoryClass::CommScratch, 8, Tensor::GradientNorm),
        ]
    };
    let tied = all_reduce(Payload::TiedEmbedding, BufferId(0), 40);
    let norm = all_reduce(Payload::GradientNorm, NORM, 8);
    let peer = RankId;
    let (forward, backward) = (message(Direction::Forward, 1), message(Direction::Backward, 0));
    let first = vec![
        op(0, compute(Pass::F, 0), &[], [&[1], &[1], &[]]),
        op(3, OpKind::Send { peer: peer(1), message: forward, buffer: BufferId(1) }, &[0], [&[], &[1], &[]]),
        op(4, OpKind::Recv { peer: peer(1), message: backward, buffer: BufferId(2) }, &[], [&[2], &[2], &[]]),
        op(0, compute(Pass::BW, 0), &[1, 2], [&[], &[0, 1, 2], &[1, 2]]),
        op(1, tied, &[3], [&[], &[0], &[]]),
        op(0, OpKind::GradientNorm, &[4], [&[3], &[0, 3], &[]]),
        op(1, norm, &[5], [&[], &[3], &[]]),
        op(0, OpKind::Join, &[6], [&[], &[3], &[3]]),
    ];
    let second = vec![
        op(2, OpKind::Recv { peer: peer(0), message: forward, buffer: BufferId(1) }, &[], [&[1], &[1], &[]]),
        op(0, compute(Pass::F, 1), &[0], [&[], &[1], &[]]),
        op(0, compute(Pass::BW, 1), &[], [&[2], &[0, 1, 2], &[1]]),
        op(5, OpKind::Send { peer: peer(0), message: backward, buffer: BufferId(2) }, &[2], [&[], &[2], &[]]),
        op(1, tied, &[2], [&[], &[0], &[]]),
        op(0, OpKind::GradientNorm, &[4], [&[3], &[0, 3], &[]]),
        op(1, norm, &[5], [&[], &[3], &[]]),
        op(0, OpKind::Join, &[6, 3], [&[], &[2, 3], &[2, 3]]),
    ];
    Program {
        format: PROGRAM_FORMAT.into(),
        workload: Workload::Abstract,
        microbatches: 1,
        devices: (0..2).map(|n| Device { name: format!("d{n}"), node: 0 }).collect(),
        groups: vec![Group {
            name: "both".into(),
            ranks: vec![RankId(0), RankId(1)],
            size: 2,
            level: NetworkLevel::Intra,
            crossing: None,
        }],
        stages: vec![Stage { units: vec![Unit { layers: vec![] }] }; 2],
        ranks: [(0, first), (1, second)]
            .into_iter()
            .map(|(number, ops)| RankProgram {
                device: DeviceId(number),
                coordinates: Coordinates { pipeline: number, ..Coordinates::default() },
                stages: vec![StageId(number as u16)],
                buffers: buffers(number as u16),
                persistent: vec![BufferId(0)],
                ops,
            })
            .collect(),
    }
}

/// What the check says of the valid program with something spoiled.
fn spoiled(spoil: impl FnOnce(&mut Program)) -> String {
    let mut program = valid();
    spoil(&mut program);
    check(&program).expect_err("it was spoiled").to_string()
}

fn spoil_op(rank: usize, index: usize, spoil: impl FnOnce(&mut Op)) -> String {
    spoiled(|program| spoil(&mut program.ranks[rank].ops[index]))
}

#[test]
fn a_sound_program_passes() {
    assert_eq!(check(&valid()), Ok(()));
}

#[test]
fn missing_waits_are_found() {
    let message = spoil_op(0, 3, |op| op.waits.retain(|wait| wait.0 != 2));
    assert!(message.starts_with("r0 op3 frees OutputGradient") && message.ends_with("r0 op2, which receives it"));
    let message = spoil_op(0, 3, |op| op.waits.retain(|wait| wait.0 != 1));
    assert!(
        message.starts_with("r0 op3 frees StageOutput") && message.ends_with("r0 op1, which sends it"),
        "{message}"
    );
    let message = spoil_op(1, 1, |op| op.waits.clear());
    assert!(message.starts_with("r1 op1 touches StageInput") && message.contains("without waiting for r1 op0"));
    let message = spoil_op(1, 5, |op| op.waits.clear());
    assert!(message.starts_with("r1 op5 touches Gradients") && message.ends_with("which reduces or gathers it"));
    // What another wait implies need not be waited for: the norm's collective follows the other one on its stream.
    let mut program = valid();
    program.ranks[0].ops[7].waits = SmallVec::from_slice(&[OpId(6), OpId(4), OpId(1)]);
    assert_eq!(check(&program), Ok(()));
}

#[test]
fn deadlocks_are_named() {
    // Each rank receives before it computes what the other waits for.
    let message = spoiled(|program| {
        let ops = &mut program.ranks[0].ops;
        ops[0].waits.push(OpId(0));
    });
    assert!(message.contains("r0 op0 waits for op0"), "{message}");
    let message = spoiled(|program| {
        // The receive of the gradient now comes first and the forward waits for it.
        let ops = &mut program.ranks[0].ops;
        ops.swap(0, 2);
        ops.swap(1, 2);
        ops[1].waits.push(OpId(0));
        ops[2].waits = SmallVec::from_slice(&[OpId(1)]);
        ops[3].waits = SmallVec::from_slice(&[OpId(0), OpId(2)]);
    });
    assert!(message.starts_with("deadlock: r0 op0 Recv") && message.contains("r1 op0 Recv"), "{message}");
}

#[test]
fn crossed_collectives_are_named() {
    let message = spoiled(|program| {
        let ops = &mut program.ranks[1].ops;
        let (a, b) = (ops[4].kind, ops[6].kind);
        (ops[4].kind, ops[6].kind) = (b, a);
        (ops[4].uses, ops[6].uses) = (ops[6].uses.clone(), ops[4].uses.clone());
        ops[4].alloc = SmallVec::from_slice(&[NORM]);
        ops[5].alloc.clear();
        ops[7].waits = SmallVec::from_slice(&[OpId(3), OpId(6)]);
    });
    assert!(message.contains("group `both` disagrees on its collective number 0"), "{message}");
    assert!(message.contains("r0 op4 brings AllReduce of TiedEmbedding") && message.contains("r1 op4"), "{message}");
}

#[test]
fn lives_are_checked() {
    let message = spoil_op(0, 7, |op| op.free.push(BufferId(1)));
    assert!(message.contains("r0 op7 frees StageOutput") && message.contains("do not declare"), "{message}");
    let message = spoil_op(0, 7, |op| {
        op.uses.push(BufferId(1));
        op.free.push(BufferId(1));
    });
    assert!(message.contains("r0 op7 uses StageOutput") && message.contains("op3 has freed"), "{message}");
    let message = spoil_op(0, 3, |op| op.free.push(BufferId(1)));
    assert!(
        message.contains("r0 op3 frees StageOutput") && message.contains("op3 has freed"),
        "double free: {message}"
    );
    let message = spoil_op(0, 3, |op| op.alloc.push(BufferId(1)));
    assert!(message.contains("r0 op3 allocates StageOutput") && message.contains("lives since op0"), "{message}");
    let message = spoil_op(0, 0, |op| op.alloc.clear());
    assert!(message.contains("r0 op0 uses StageOutput") && message.contains("nobody has allocated"), "{message}");
    let message = spoil_op(1, 7, |op| op.free.retain(|buffer| buffer.0 != 2));
    assert!(message.contains("InputGradient") && message.contains("of r1, allocated by r1 op2, is never freed"));
    let message = spoil_op(0, 3, |op| op.free.push(BufferId(0)));
    assert!(message.contains("r0 op3 frees Gradients") && message.contains("persists"), "{message}");
    let message = spoil_op(1, 3, |op| op.free.push(BufferId(2)));
    assert!(message.contains("r1 op3 frees InputGradient") && message.contains("compute stream"), "{message}");
}

#[test]
fn passes_come_in_order() {
    let message = spoil_op(1, 1, |op| op.kind = compute(Pass::BW, 1));
    assert!(message.starts_with("r1 op1 runs BW of m0 on s1 unit 0, before F"), "{message}");
    let message = spoil_op(1, 2, |op| op.kind = compute(Pass::F, 1));
    assert!(message.contains("r1 op2 runs F of m0 on s1 unit 0, for the second time"), "{message}");
    let message = spoil_op(1, 2, |op| op.kind = compute(Pass::W, 1));
    assert!(message.contains("W of m0 on s1 unit 0, before B"), "{message}");
    let message = spoil_op(1, 2, |op| op.kind = compute(Pass::B, 1));
    assert!(message.contains("r1 runs F of m0 on s1 unit 0 and never W"), "{message}");
}

#[test]
fn names_must_exist() {
    assert!(spoil_op(0, 0, |op| op.uses.push(BufferId(9))).contains("r0 op0 names buffer 9, and there are 4"));
    assert!(spoil_op(0, 0, |op| op.kind = compute(Pass::F, 7)).contains("names stage 7, and there are 2"));
    assert!(spoil_op(0, 1, |op| op.uses.clear()).contains("r0 op1 exchanges StageOutput"));
    let message = spoiled(|program| program.ranks[0].device = DeviceId(5));
    assert!(message.contains("runs on device 5 of 2"), "{message}");
}
