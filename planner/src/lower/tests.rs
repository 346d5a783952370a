//! Lowered programs of every schedule: they pass their check, take the time that the replay of their order takes, and
//! hold what the order holds.

use super::*;
use crate::replay::{StageMemory, StageTimes, peaks, replay};
use crate::schedules::{self, Request, SCHEDULES};
use paceline_sim::cost::{self, FixedTimes};
use paceline_sim::engine::simulate;
use paceline_sim::memory::walk;
use paceline_sim::program::{MemoryClass, Op, OpKind, Stream, Unit};
use paceline_sim::units::{Nanos, RankId};
use proptest::prelude::*;

const STAGE: AbstractStage = AbstractStage { parameters: 0, message: 0, checkpoint: 2, until_b: 34, until_w: 32 };

fn blueprint(order: &ComputeOrder, stage: AbstractStage, data: u32, states: StatePartition) -> Blueprint<'_> {
    let stages = order.placement.stages();
    Blueprint {
        order,
        substance: Substance::Abstract(vec![stage; stages]),
        stages: vec![Stage { units: vec![Unit { layers: vec![] }] }; stages],
        data,
        states: states.into(),
        devices: (0..data * order.actions.len() as u32)
            .map(|n| Device { name: format!("gpu:{n}"), node: n / 8 })
            .collect(),
        form: Form::Full,
    }
}

/// Every schedule that permits these numbers.
fn orders(p: u32, m: u32) -> Vec<ComputeOrder> {
    let built = SCHEDULES.iter().filter_map(|schedule| schedules::build(schedule.name, &Request::new(p, m)).ok());
    let orders: Vec<ComputeOrder> = built.collect();
    assert!(orders.len() >= 12, "p={p} m={m}");
    orders
}

fn times(stages: usize, [f, b, w, comm]: [u64; 4]) -> (StageTimes, FixedTimes) {
    let given = StageTimes::uniform(stages, f as f64, b as f64, w as f64, comm as f64);
    (given, FixedTimes::uniform(Nanos(f), Nanos(b), Nanos(w), Nanos(comm)))
}

#[test]
fn every_schedule_takes_the_time_and_the_memory_of_its_replay() {
    for (p, m) in [(1, 3), (2, 1), (2, 6), (3, 9), (4, 4), (4, 12), (6, 12), (8, 16)] {
        for order in orders(p, m) {
            let program = lower(&blueprint(&order, STAGE, 1, StatePartition::NONE)).unwrap();
            let stages = order.placement.stages();
            let memory =
                StageMemory { until_b: vec![34.0; stages], until_w: vec![32.0; stages], checkpoint: vec![2.0; stages] };
            let peaks = peaks(&order, &memory).peak;
            for (rank, peak) in peaks.iter().enumerate() {
                let walked = walk(&program, RankId(rank as u32));
                // While R runs, what it starts from lives beside what it makes.
                let beside = if order.name == "1f1b-r" { 2.0 } else { 0.0 };
                assert_eq!(walked.peak_bytes as f64, peak + beside, "{} p={p} m={m} rank {rank}", order.name);
            }
            for costs in [[1, 1, 1, 0], [185, 181, 93, 0], [100, 120, 80, 9]] {
                let (given, fixed) = times(stages, costs);
                let found = simulate(&program, &fixed).unwrap();
                let expected = replay(&order, &given).unwrap();
                assert_eq!(found.makespan.0 as f64, expected.makespan(), "{} p={p} m={m} {costs:?}", order.name);
            }
        }
    }
}

#[test]
fn replicas_and_sharded_optimizers_pass_the_check() {
    let stage = AbstractStage { parameters: 1000, message: 64, ..STAGE };
    for (p, m) in [(1, 2), (2, 4), (4, 8)] {
        for order in orders(p, m) {
            for (data, states) in [
                (1, StatePartition::NONE),
                (1, StatePartition::ZERO1),
                (2, StatePartition::NONE),
                (3, StatePartition::ZERO1),
            ] {
                let blueprint = blueprint(&order, stage, data, states);
                let full = lower(&blueprint).unwrap_or_else(|error| panic!("{} dp={data}: {error}", order.name));
                let holders = u64::from(data) * u64::from(order.placement.copies);
                let shards = if states == StatePartition::ZERO1 { holders } else { 1 };
                let moments: u64 = full
                    .ranks
                    .iter()
                    .flat_map(|rank| rank.persistent.iter().map(|b| &rank.buffers[b.index()]))
                    .filter(|buffer| buffer.class == MemoryClass::OptimizerState)
                    .map(|buffer| buffer.bytes)
                    .sum();
                let layers = order.placement.stages_per_copy() as u64;
                assert_eq!(moments, layers * 2 * 1000 * holders / shards, "{} dp={data}", order.name);

                let one = lower_unchecked(&Blueprint { form: Form::Representative, ..blueprint }).unwrap();
                assert_eq!(one.ranks.len(), order.actions.len());
                let size = |program: &Program| program.groups.iter().map(|g| g.size).max();
                assert_eq!(size(&one), size(&full));
                let (_, mut fixed) = times(order.placement.stages(), [10, 10, 10, 1]);
                (fixed.collective, fixed.optimizer) = (Nanos(7), Nanos(5));
                let makespan = |program: &Program| simulate(program, &fixed).unwrap().makespan;
                assert_eq!(makespan(&one), makespan(&full), "{} dp={data} {states:?}", order.name);
            }
        }
    }
}

/// Everything that lowering puts in is needed: a program with one thing taken out or turned round fails its check, and the
/// ops that it is about are named.
#[test]
fn planted_faults_are_found_and_named() {
    let stage = AbstractStage { parameters: 1000, message: 64, ..STAGE };
    let (mut waits, mut frees, mut swaps, mut circles) = (0, 0, 0, 0);
    for name in ["1f1b", "interleaved", "zb-h1", "v-half", "dualpipe"] {
        let order = schedules::build(name, &Request::new(4, 8)).unwrap();
        let sound = lower(&blueprint(&order, stage, 2, StatePartition::ZERO1)).unwrap();
        let fault = |rank: usize, spoil: &mut dyn FnMut(&mut Vec<Op>)| {
            let mut program = sound.clone();
            spoil(&mut program.ranks[rank].ops);
            check(&program).err().map(|error| error.to_string())
        };
        // The replicas are alike.
        for (rank, held) in sound.ranks.iter().enumerate().take(4) {
            for (index, op) in held.ops.iter().enumerate() {
                let named = |other: usize| [format!("r{rank} op{index}"), format!("r{rank} op{other}")];
                for (place, wait) in op.waits.iter().enumerate() {
                    let found = fault(rank, &mut |ops| {
                        ops[index].waits.remove(place);
                    });
                    let [waiter, other] = named(wait.index());
                    // A join collects what is still under way, without touching it; and a stream is first in, first out,
                    // so a wait for a later op of it is one for this op too.
                    let awaited = &held.ops[wait.index()];
                    let touches = awaited.uses.iter().any(|buffer| op.uses.contains(buffer));
                    let implied = (0..=index).any(|n| {
                        let before = held.ops[n].waits.iter().filter(|w| n < index || *w != wait);
                        held.ops[n].stream == Stream::COMPUTE
                            && before.into_iter().any(|w| w >= wait && held.ops[w.index()].stream == awaited.stream)
                    });
                    if touches && !implied {
                        let message = found.unwrap_or_else(|| panic!("{name}: {waiter} need not wait for {other}"));
                        assert!(message.contains(&waiter) && message.contains(&other), "{name}: {message}");
                        waits += 1;
                    }
                }
                for &buffer in &op.free {
                    let twice = fault(rank, &mut |ops| ops[index].free.push(buffer)).unwrap();
                    assert!(twice.contains(&named(0)[0]) && twice.contains("has freed"), "{name}: {twice}");
                    let never = fault(rank, &mut |ops| ops[index].free.retain(|b| *b != buffer)).unwrap();
                    assert!(never.contains("is never freed"), "{name}: {never}");
                    frees += 1;
                }
            }
            let collectives: Vec<usize> =
                (0..held.ops.len()).filter(|&n| matches!(held.ops[n].kind, OpKind::Collective { .. })).collect();
            for pair in collectives.windows(2) {
                let (a, b) = (held.ops[pair[0]].kind, held.ops[pair[1]].kind);
                let same_group = |a, b| match (a, b) {
                    (OpKind::Collective { group: a, .. }, OpKind::Collective { group: b, .. }) => a == b,
                    _ => false,
                };
                let crossed = fault(rank, &mut |ops| {
                    (ops[pair[0]].kind, ops[pair[1]].kind) = (b, a);
                    let uses = ops[pair[0]].uses.clone();
                    ops[pair[0]].uses = std::mem::replace(&mut ops[pair[1]].uses, uses);
                });
                let message = crossed.unwrap_or_else(|| panic!("{name}: {a:?} and {b:?} may be crossed"));
                if same_group(a, b) && message.contains("disagrees") {
                    assert!(message.contains(&format!("r{rank} op{}", pair[0])), "{name}: {message}");
                    swaps += 1;
                }
            }
        }
        // A pass of the first rank that waits for the gradient of a later one: nobody can go on.
        let ops = &sound.ranks[0].ops;
        let last = (0..ops.len()).rev().find(|&n| matches!(ops[n].kind, OpKind::Recv { .. })).unwrap();
        let circle = fault(0, &mut |ops| {
            let receive = ops.remove(last);
            ops.insert(0, receive);
            for op in ops.iter_mut().skip(1) {
                for wait in &mut op.waits {
                    wait.0 = match wait.index() {
                        w if w == last => 0,
                        w if w < last => wait.0 + 1,
                        _ => wait.0,
                    };
                }
            }
            ops[1].waits.push(paceline_sim::units::OpId(0));
        });
        let message = circle.unwrap();
        assert!(message.starts_with("deadlock: ") && message.contains("r0 op0 Recv"), "{name}: {message}");
        circles += 1;
    }
    assert!(waits > 500 && frees > 500 && swaps >= 8 && circles == 5, "{waits} {frees} {swaps}");
}

#[test]
fn a_message_is_posted_ahead_and_its_buffer_goes_when_it_must_have_arrived() {
    let order = schedules::build("1f1b", &Request::new(2, 2)).unwrap();
    let stage = AbstractStage { message: 8, ..STAGE };
    let program = lower(&blueprint(&order, stage, 1, StatePartition::NONE)).unwrap();
    let show = |op: &Op| match op.kind {
        OpKind::Compute { pass, microbatch, .. } => format!("{pass}{}", microbatch.0),
        OpKind::Send { message, .. } => format!("send{}", message.microbatch.0),
        OpKind::Recv { message, .. } => format!("recv{}", message.microbatch.0),
        other => format!("{other:?}"),
    };
    let ops = |rank: usize| program.ranks[rank].ops.iter().map(show).collect::<Vec<_>>().join(" ");
    assert_eq!(ops(0), "F0 send0 recv0 F1 send1 recv1 BW0 BW1");
    assert_eq!(ops(1), "recv0 F0 recv1 BW0 send0 F1 BW1 send1 Join");
    let rank = &program.ranks[0];
    // The output of F0 goes with BW0, whose gradient tells that it arrived; nothing else is freed there but what BW0 used.
    let freed = |op: usize| rank.ops[op].free.iter().map(|b| rank.buffers[b.index()].tensor).collect::<Vec<_>>();
    let frees_output = |op: usize, n: u32| {
        freed(op).iter().any(|t| matches!(t, Tensor::StageOutput { microbatch, .. } if microbatch.0 == n))
    };
    assert!(frees_output(6, 0) && frees_output(7, 1) && !frees_output(6, 1));
    assert!(rank.ops[6].waits.contains(&paceline_sim::units::OpId(1)));
    // Four edges of a middle rank are four streams.
    let order = schedules::build("1f1b", &Request::new(3, 3)).unwrap();
    let program = lower(&blueprint(&order, stage, 1, StatePartition::NONE)).unwrap();
    let mut streams: Vec<Stream> = program.ranks[1].ops.iter().map(|op| op.stream).collect();
    streams.sort();
    streams.dedup();
    assert_eq!(streams.len(), 5);
}

#[test]
fn sent_activations_do_not_pile_up() {
    let order = schedules::build("1f1b", &Request::new(8, 64)).unwrap();
    let stage = AbstractStage { message: 1, until_b: 0, until_w: 0, ..STAGE };
    let program = lower(&blueprint(&order, stage, 1, StatePartition::NONE)).unwrap();
    let peaks: Vec<u64> = (0..8).map(|rank| walk(&program, RankId(rank)).peak_bytes).collect();
    // Stage inputs of p - i microbatches, what was sent and not yet answered, and a message on its way in or out: not 64.
    assert!(peaks.iter().all(|&peak| peak <= 20), "{peaks:?}");
}

#[test]
fn what_cannot_be_lowered_is_refused_with_a_way_out() {
    let order = schedules::build("1f1b", &Request::new(2, 2)).unwrap();
    let good = blueprint(&order, STAGE, 1, StatePartition::NONE);
    let refused = |blueprint: &Blueprint| lower(blueprint).unwrap_err().to_string();
    let text = refused(&Blueprint { stages: vec![], ..good.clone() });
    assert!(text.contains("0 stages given") && text.contains("2 stages"), "{text}");
    let text = refused(&Blueprint { data: 0, ..good.clone() });
    assert!(text.contains("dp is 0"), "{text}");
    let text = refused(&Blueprint { devices: vec![], ..good.clone() });
    assert!(text.contains("devices is 0"), "{text}");
    let model = paceline_sim::model::ModelConfig::preset("demo-1m").unwrap();
    let text = cut(&model, 9, |_| 1.0).unwrap_err().to_string();
    assert!(text.contains("9 stages") && text.contains("8 blocks"), "{text}");

    let order = schedules::build("1f1b-r", &Request::new(2, 2)).unwrap();
    let workload = paceline_sim::program::TransformerWorkload {
        micro_batch: 1,
        seq: 8,
        recompute: paceline_sim::program::Recompute::None,
        tied_on_one_rank: false,
        trainable: Default::default(),
        precision: Default::default(),
        model: model.clone(),
    };
    let stages = cut(&model, 2, forward_flops(&model, 8)).unwrap();
    let text =
        refused(&Blueprint { order: &order, substance: Substance::Transformer(workload), stages, ..good.clone() });
    assert!(text.contains("1f1b-r recomputes") && text.contains("recompute = \"full\""), "{text}");
}

#[test]
fn layers_are_cut_so_that_the_heaviest_stage_is_lightest() {
    let model = paceline_sim::model::ModelConfig::preset("demo-1m").unwrap();
    let sizes = |stages: &[Stage]| stages.iter().map(|stage| stage.units.len()).collect::<Vec<_>>();
    // A head as heavy as two blocks: 10 in all over three stages cannot be cut below four.
    let weight = |layer| match layer {
        paceline_sim::model::Layer::Embedding => 0.0,
        paceline_sim::model::Layer::Block(_) => 1.0,
        paceline_sim::model::Layer::Head => 2.0,
    };
    let cut3 = cut(&model, 3, weight).unwrap();
    assert_eq!(sizes(&cut3).iter().sum::<usize>(), 10);
    let heaviest = |stages: &[Stage]| {
        let load = |s: &Stage| s.units.iter().flat_map(|u| &u.layers).map(|&l| weight(l)).sum::<f64>();
        stages.iter().map(load).fold(0.0, f64::max)
    };
    assert_eq!(heaviest(&cut3), 4.0);
    assert_eq!(heaviest(&cut(&model, 5, weight).unwrap()), 2.0);
    assert_eq!(sizes(&cut(&model, 1, weight).unwrap()), [10]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Unequal stages, any schedule: the engine and the replay agree, however the times fall.
    #[test]
    fn engine_and_replay_agree_on_uneven_stages(
        schedule in 0..SCHEDULES.len(),
        p in 1u32..6,
        rounds in 1u32..4,
        seed in any::<u64>(),
    ) {
        let p = if SCHEDULES[schedule].name == "dualpipe" { 2 * p } else { p };
        let order = schedules::build(SCHEDULES[schedule].name, &Request::new(p, rounds * p)).unwrap();
        let stages = order.placement.stages();
        let mut state = seed;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            1 + (state >> 40) % 500
        };
        let stage_times: Vec<cost::StageTimes> = (0..stages)
            .map(|_| cost::StageTimes { forward: Nanos(draw()), input: Nanos(draw()), weight: Nanos(draw()) })
            .collect();
        let list = |of: fn(&cost::StageTimes) -> Nanos| stage_times.iter().map(|t| of(t).0 as f64).collect::<Vec<_>>();
        let given = StageTimes { f: list(|t| t.forward), b: list(|t| t.input), w: list(|t| t.weight), comm: 0.0 };
        let fixed = FixedTimes { stages: stage_times.clone(), ..FixedTimes::default() };
        let program = lower(&blueprint(&order, STAGE, 1, StatePartition::NONE)).unwrap();
        let found = simulate(&program, &fixed).unwrap();
        prop_assert_eq!(found.makespan.0 as f64, replay(&order, &given).unwrap().makespan());
    }
}
