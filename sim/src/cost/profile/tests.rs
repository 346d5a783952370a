use super::*;
use crate::model::parameters::unit_parameters;
use crate::model::{Layer, ModelConfig, Trainable};
use crate::program::{
    Arrangement, Buffer, Collective, Coordinates, Device, MemoryClass, Message, NetworkLevel, PROGRAM_FORMAT, Payload,
    Precision, Recompute, Stage, Stream, Tensor, Unit,
};
use crate::program::{Direction, Program};
use crate::units::{BufferId, DeviceId, GroupId, MicrobatchId};
use paceline_profiles::{Machine, Profile, Row, Source, Subject};

const STAGE: StageId = StageId(0);
const MESSAGE_BYTES: u64 = 8192;

fn compute(pass: Pass, microbatch: u32, first: u16, end: u16) -> OpKind {
    OpKind::Compute { pass, stage: STAGE, microbatch: MicrobatchId(microbatch), first, end }
}

/// Two replicas that share out the optimizer, each a whole model in one unit, on so many devices.
fn program(devices: u32) -> Program {
    let model = ModelConfig { layers: 2, ..ModelConfig::preset("demo-1m").unwrap() };
    let workload = TransformerWorkload {
        model,
        micro_batch: 1,
        seq: 64,
        recompute: Recompute::None,
        tied_on_one_rank: true,
        trainable: Trainable::Full,
        precision: Precision::Fp32,
    };
    let layers = vec![Layer::Embedding, Layer::Block(0), Layer::Block(1), Layer::Head];
    let stages = vec![Stage { units: vec![Unit { layers }] }];
    let bytes = 4 * unit_parameters(&workload, &stages, STAGE, 0) as u64;
    let (stage, unit, group) = (STAGE, 0, GroupId(0));
    let buffer = |class, bytes, tensor| Buffer { class, bytes, tensor, start: 0, element: Element::F32 };
    let part = (bytes / 4).div_ceil(2) * 4;
    let own = |rank: u64| (rank * part).min(bytes)..((rank + 1) * part).min(bytes);
    let buffers = |rank: u32| {
        vec![
            buffer(MemoryClass::Gradient, bytes, Tensor::Gradients { stage, unit }),
            buffer(MemoryClass::CommScratch, 8, Tensor::GradientNorm),
            buffer(MemoryClass::Activation, MESSAGE_BYTES, Tensor::StageInput { stage, microbatch: MicrobatchId(0) }),
            buffer(MemoryClass::Parameter, bytes, Tensor::Parameters { stage, unit }),
            Buffer {
                start: own(u64::from(rank)).start / 4,
                ..buffer(
                    MemoryClass::OptimizerState,
                    2 * (own(u64::from(rank)).end - own(u64::from(rank)).start),
                    Tensor::Moments { stage, unit },
                )
            },
        ]
    };
    let collective = |collective, payload, buffer: u32, bytes| {
        let kind = OpKind::Collective {
            collective,
            group,
            payload,
            buffer: BufferId(buffer),
            bytes,
            arrangement: Arrangement::default(),
        };
        (Stream::COLLECTIVE, kind, vec![buffer])
    };
    let on_compute = |kind, uses: &[u32]| (Stream::COMPUTE, kind, uses.to_vec());
    let message = Message { direction: Direction::Forward, stage, microbatch: MicrobatchId(0) };
    let receive = |peer: u32| {
        let kind = OpKind::Recv { peer: RankId(peer), message, buffer: BufferId(2) };
        (Stream(2), kind, vec![2])
    };
    let ops = |rank: u32| {
        let all = [
            receive(1 - rank),
            on_compute(compute(Pass::F, 0, 0, 1), &[]),
            on_compute(compute(Pass::F, 1, 0, 1), &[]),
            on_compute(compute(Pass::BW, 0, 0, 1), &[0]),
            collective(Collective::ReduceScatter, Payload::Gradients { stage, unit }, 0, bytes),
            on_compute(OpKind::GradientNorm, &[0, 1]),
            collective(Collective::AllReduce, Payload::GradientNorm, 1, 8),
            on_compute(OpKind::Optimizer { stage, unit }, &[0, 1, 3, 4]),
            on_compute(OpKind::Join, &[]),
        ];
        let op = |(stream, kind, uses): (Stream, OpKind, Vec<u32>)| Op {
            stream,
            kind,
            waits: SmallVec::new(),
            alloc: SmallVec::new(),
            uses: uses.into_iter().map(BufferId).collect(),
            free: SmallVec::new(),
        };
        all.into_iter().map(op).collect()
    };
    Program {
        format: PROGRAM_FORMAT.into(),
        workload: Workload::Transformer(workload),
        microbatches: 2,
        devices: (0..devices).map(|n| Device { name: format!("cpu:{n}"), node: 0 }).collect(),
        groups: vec![Group {
            name: "dp".into(),
            ranks: vec![RankId(0), RankId(1)],
            size: 2,
            level: NetworkLevel::Intra,
            crossing: None,
        }],
        stages,
        ranks: (0..2)
            .map(|rank| RankProgram {
                device: DeviceId(rank % devices),
                coordinates: Coordinates { data: rank, ..Coordinates::default() },
                stages: vec![STAGE],
                buffers: buffers(rank),
                persistent: vec![BufferId(0), BufferId(3), BufferId(4)],
                ops: ops(rank),
            })
            .collect(),
    }
}

fn row(subject: Subject, seconds: f64) -> Row {
    Row {
        subject,
        busy_devices: 2,
        context: None,
        median_seconds: seconds,
        spread_seconds: 0.0,
        repetitions: 9,
        source: Source::Measured,
        date: "2026-11-21".into(),
        versions: "test".into(),
    }
}

/// Kernel `n` takes `n + 1` microseconds, and whatever else there is has a time of its own.
fn profile(keys: &BTreeSet<KernelKey>, gradient_bytes: u64) -> Profile {
    let machine = Machine { device: "cpu".into(), host: "test".into(), cores: 2 };
    let kernels = keys.iter().zip(1..).map(|(key, n)| row(Subject::Kernel(key.clone()), f64::from(n) * 1e-6));
    let collective = |round, bytes, seconds| row(Subject::Collective { round, members: 2, bytes }, seconds);
    let others = [
        row(Subject::Transfer { bytes: MESSAGE_BYTES }, 3e-3),
        collective(CollectiveRound::Reduce, gradient_bytes, 5e-3),
        collective(CollectiveRound::Reduce, 8, 7e-3),
        collective(CollectiveRound::Gather, 8, 9e-3),
        row(Subject::Overhead(Overhead::Op), 1e-4),
        row(Subject::Overhead(Overhead::SharedOp), 2e-4),
        row(Subject::Overhead(Overhead::Call), 1e-7),
        row(Subject::Overhead(Overhead::Message), 4e-5),
        row(Subject::Overhead(Overhead::SharedMessage), 6e-6),
    ];
    Profile { machine, rows: kernels.chain(others).collect() }
}

fn gradient_bytes(program: &Program) -> u64 {
    program.ranks[0].buffers[0].bytes
}

fn nanos(seconds: f64) -> Nanos {
    Nanos::from_seconds(seconds)
}

#[test]
fn a_pass_costs_its_kernels_and_what_calling_them_takes() {
    let program = program(2);
    let keys = kernels_of(&program).unwrap();
    let predictor = Predictor::new(&profile(&keys, gradient_bytes(&program))).unwrap();
    let costs = ProfileCost::new(&predictor, &program).unwrap();
    let Workload::Transformer(workload) = &program.workload else { unreachable!() };
    let microseconds = |key: &KernelKey| keys.iter().position(|k| k == key).unwrap() as f64 + 1.0;
    for kind in [compute(Pass::F, 0, 0, 1), compute(Pass::BW, 0, 0, 1)] {
        let pass = ModelPass::new(workload, &program.stages, 2, &kind);
        let kernels: f64 = pass.kernel_calls().map(microseconds).sum();
        let calls = pass.kernel_calls().count() as f64;
        assert!(calls > 15.0, "two blocks, embedding and head");
        let op = program.ranks[0].ops.iter().find(|op| op.kind == kind).unwrap();
        let found = costs.compute(&program, RankId(0), op);
        assert_eq!(found, nanos(kernels * 1e-6 + calls * 1e-7 + 1e-4));
    }
    let by_microbatch: Vec<Nanos> =
        program.ranks[0].ops[1..3].iter().map(|op| costs.compute(&program, RankId(0), op)).collect();
    assert_eq!(by_microbatch[0], by_microbatch[1]);
    assert_eq!(costs.compute(&program, RankId(0), &program.ranks[0].ops[8]), nanos(1e-4), "a join computes nothing");
}

#[test]
fn the_optimizer_works_on_its_shard_and_zeroes_the_rest() {
    let program = program(2);
    let len = (gradient_bytes(&program) / 4) as u32;
    let half = len.div_ceil(2);
    let keys = kernels_of(&program).unwrap();
    let elements = |op, n: u32| KernelKey::new(op, &[n]).unwrap();
    for (op, sizes) in [(KernelOp::Zero, [len - half, half]), (KernelOp::SumSquares, [half, len - half])] {
        for size in sizes {
            assert!(keys.contains(&elements(op, size)), "{op} {size}");
        }
        assert!(!keys.contains(&elements(op, len)), "{op}");
    }
    // Matrices decay, norms do not: one call for all of them.
    let predictor = Predictor::new(&profile(&keys, gradient_bytes(&program))).unwrap();
    let costs = ProfileCost::new(&predictor, &program).unwrap();
    let time = |op, n| keys.iter().position(|key| *key == elements(op, n)).unwrap() as f64 * 1e-6 + 1e-6;
    for (rank, own, other) in [(0, half, len - half), (1, len - half, half)] {
        let ops = &program.ranks[rank].ops;
        let cost = |op: &Op| costs.compute(&program, RankId(rank as u32), op);
        assert_eq!(cost(&ops[5]), nanos(time(KernelOp::SumSquares, own) + 1e-7 + 1e-4));
        let calls = time(KernelOp::AdamW, own) + time(KernelOp::Zero, other) + 2e-7;
        assert_eq!(cost(&ops[7]), nanos(calls + 1e-4));
    }
}

#[test]
fn communication_takes_the_rounds_of_the_executor() {
    let two = program(2);
    let predictor = Predictor::new(&profile(&kernels_of(&two).unwrap(), gradient_bytes(&two))).unwrap();
    let costs = ProfileCost::new(&predictor, &two).unwrap();
    let (group, bytes) = (&two.groups[0], gradient_bytes(&two));
    let collective = |costs: &ProfileCost, collective, bytes| {
        costs.collective(
            &two,
            Exchange { collective, bytes, element: Element::F32, arrangement: Arrangement::default() },
            group,
        )
    };
    // Handed over as a message is.
    let work = |seconds| Round { late: nanos(4e-5), work: nanos(seconds), ..Round::default() };
    assert_eq!(collective(&costs, Collective::ReduceScatter, bytes)[..], [work(5e-3)]);
    assert_eq!(collective(&costs, Collective::AllReduce, 8)[..], [work(7e-3), work(9e-3)]);
    let message = |costs: &ProfileCost, program| costs.transfer(program, RankId(0), RankId(1), MESSAGE_BYTES);
    assert_eq!(message(&costs, &two), Round { late: nanos(4e-5), work: nanos(3e-3), ..Round::default() });

    // On one device, threads take turns and wake each other in another way.
    let one = program(1);
    let shared = ProfileCost::new(&predictor, &one).unwrap();
    assert_eq!(message(&shared, &one).late, nanos(6e-6));
    assert_eq!(shared.compute(&one, RankId(1), &one.ranks[1].ops[8]), nanos(2e-4));
}

#[test]
fn provenance_covers_all_work() {
    let program = program(2);
    let keys = kernels_of(&program).unwrap();
    let full = profile(&keys, gradient_bytes(&program));
    let of = |profile: &Profile| {
        let predictor = Predictor::new(profile).unwrap();
        ProfileCost::new(&predictor, &program).unwrap().provenance(&program)
    };
    let all = of(&full);
    assert!(all.measured > 0.0 && all.measured == all.total(), "{all:?}");
    let communication = 2.0 * (3e-3 + 4e-5 + 5e-3 + 7e-3 + 9e-3);
    assert!(all.total() > communication);

    // Without one shape, its calls are interpolated and everything else is as before.
    let lost = keys.iter().find(|key| key.op == KernelOp::MatmulNt).unwrap();
    let mut gap = full.clone();
    gap.rows.retain(|row| row.subject != Subject::Kernel(lost.clone()));
    let parts = of(&gap);
    assert!(parts.fitted > 0.0 && parts.measured < all.measured, "{parts:?}");
    assert_eq!(parts.assumed + parts.datasheet, 0.0);
}

#[test]
fn abstract_programs_are_refused() {
    let mut program = program(1);
    let predictor = Predictor::new(&profile(&kernels_of(&program).unwrap(), 8)).unwrap();
    program.workload = Workload::Abstract;
    assert!(matches!(ProfileCost::new(&predictor, &program), Err(CostError::Abstract)));
    assert_eq!(kernels_of(&program), Err(CostError::Abstract));
}
