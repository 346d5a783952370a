//! All 27 state partitions train the model that one rank trains alone, and hold at their peak what their programs say.

mod comparable;

use comparable::settings;
use paceline_exec::{Dataset, Evaluation, RunReport, RunSettings, Silent, run};
use paceline_kernels::CpuDevice;
use paceline_planner::lower::{Blueprint, Form, LowerError, Sharing, States, Substance, cut, forward_flops, lower};
use paceline_planner::schedules::{self, Request};
use paceline_sim::memory::walk;
use paceline_sim::model::ModelConfig;
use paceline_sim::partition::{Level, StatePartition};
use paceline_sim::program::{
    Device, MemoryClass, Op, OpKind, Payload, Precision, Program, Recompute, TransformerWorkload,
};
use paceline_sim::units::RankId;
use std::collections::BTreeMap;

const SEQ: u32 = 8;
/// Sequences of a global batch, one per microbatch.
const BATCH: u32 = 16;

#[derive(Debug, Clone, Copy)]
struct Case {
    schedule: &'static str,
    tied: bool,
    dp: u32,
    pp: u32,
    recompute: Recompute,
    states: StatePartition,
    sharing: Sharing,
    trainable: &'static str,
}

fn alone() -> Case {
    Case {
        schedule: "1f1b",
        tied: false,
        dp: 1,
        pp: 1,
        recompute: Recompute::None,
        states: StatePartition::NONE,
        sharing: Sharing::default(),
        trainable: "full",
    }
}

/// `dp` replicas in fast groups of `group`.
fn grouped(states: StatePartition, dp: u32, group: u32) -> Case {
    Case { states, dp, sharing: Sharing { group_size: Some(group), ..Sharing::default() }, ..alone() }
}

fn try_program(case: &Case) -> Result<Program, LowerError> {
    let model = ModelConfig {
        // Odd sizes, so that no part is as long as another.
        layers: 3,
        hidden: 12,
        heads: 3,
        kv_heads: 3,
        head_dim: 4,
        intermediate: 17,
        vocab: 32,
        max_positions: SEQ,
        tied_embeddings: case.tied,
        ..ModelConfig::preset("demo-1m").unwrap()
    };
    let request = Request { chunks: None, ..Request::new(case.pp, BATCH / case.dp) };
    let order = schedules::build(case.schedule, &request).unwrap();
    let mut stages = cut(&model, order.placement.stages_per_copy(), forward_flops(&model, SEQ)).unwrap();
    if order.placement.copies == 2 {
        stages.extend(stages.clone());
    }
    let workload = TransformerWorkload {
        model,
        micro_batch: 1,
        seq: SEQ,
        recompute: case.recompute,
        tied_on_one_rank: false,
        trainable: case.trainable.parse().unwrap(),
        precision: Precision::Fp32,
    };
    lower(&Blueprint {
        order: &order,
        substance: Substance::Transformer(workload),
        stages,
        data: case.dp,
        states: States { partition: case.states, sharing: case.sharing },
        devices: (0..2).map(|n| Device { name: format!("cpu:{n}"), node: 0 }).collect(),
        form: Form::Full,
    })
}

fn program(case: &Case) -> Program {
    try_program(case).unwrap_or_else(|error| panic!("{case:?}: {error}"))
}

fn train(program: &Program, steps: u64) -> RunReport {
    let tokens: Vec<u16> = (0..4000u32).map(|k| ((k * k + k / 7) % 32) as u16).collect();
    let evaluation = Some(Evaluation { every: steps, sequences: 4 });
    let settings = RunSettings { evaluation, ..settings(steps) };
    run(program, &CpuDevice::new(), &settings, &Dataset::from_tokens("squares", &tokens), &mut Silent).unwrap()
}

type Values = BTreeMap<String, Vec<f32>>;

/// Largest difference, relative to the largest value of the tensor.
fn difference(found: &Values, expected: &Values) -> f32 {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    let of = |(name, expected): (&String, &Vec<f32>)| {
        let size = expected.iter().fold(0f32, |size, x| size.max(x.abs()));
        let apart = found[name].iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0f32, f32::max);
        assert!(found[name].iter().all(|x| x.is_finite()), "{name}");
        apart / size
    };
    expected.iter().map(of).fold(0f32, f32::max)
}

/// Trains ten steps and holds weights, losses and peaks against those of a rank alone.
fn check(case: &Case, expected: &RunReport) -> RunReport {
    let program = program(case);
    let report = train(&program, 10);
    let apart = difference(&report.parameters, &expected.parameters);
    assert!(apart < 1e-5, "{case:?}: weights differ by {apart}");
    for (found, expected) in report.steps.iter().zip(&expected.steps) {
        let error = (found.loss - expected.loss).abs() / expected.loss;
        assert!(error < 1e-5, "{case:?}: loss {} instead of {}", found.loss, expected.loss);
        let error = (found.gradient_norm - expected.gradient_norm).abs() / expected.gradient_norm;
        assert!(error < 1e-5, "{case:?}: norm {} instead of {}", found.gradient_norm, expected.gradient_norm);
    }
    let (found, expected) = (report.held_out[1].1, expected.held_out[1].1);
    assert!((found - expected).abs() < 1e-5 * expected, "{case:?}: held-out loss {found} instead of {expected}");
    for (rank, measured) in (0..).zip(&report.memory) {
        let walked = walk(&program, RankId(rank));
        assert_eq!(measured.peak_bytes, walked.peak_bytes, "{case:?}: peak of rank {rank}");
        assert_eq!(measured.peak_by_class, walked.peak_by_class, "{case:?}: peak of rank {rank}");
    }
    report
}

fn of(letters: &str) -> StatePartition {
    letters.parse().unwrap()
}

#[test]
fn all_triples_on_two_groups_of_two_and_of_four_train_the_same_model() {
    let expected = train(&program(&alone()), 10);
    for (dp, group) in [(4, 2), (8, 4)] {
        let reports: BTreeMap<String, Values> = StatePartition::all()
            .map(|states| (states.letters(), check(&grouped(states, dp, group), &expected).parameters))
            .collect();
        // What reduces in one order gives the same bits. Within groups and then across, when all microbatches are accumulated;
        // within groups in each microbatch; over all replicas in each microbatch:
        for equal in [
            &["NNN", "NNG", "ING", "GNG", "INN", "GNN", "NNI", "INI", "GNI"][..],
            &["NII", "III", "NIG", "IIG", "GIG", "GII", "NIN", "IIN", "GIN"][..],
            &["NGG", "IGG", "GGG", "NGN", "NGI", "IGN", "IGI", "GGN", "GGI"][..],
        ] {
            for letters in equal {
                assert!(reports[*letters] == reports[equal[0]], "{letters} and {} on {dp} ranks", equal[0]);
            }
        }
    }
}

#[test]
fn partitions_with_pipelines_recomputation_and_tied_matrices() {
    let alone_of = |tied| train(&program(&Case { tied, ..alone() }), 10);
    let expected = [alone_of(false), alone_of(true)];
    let cases = [
        Case { pp: 2, ..grouped(of("III"), 4, 2) },
        Case { pp: 2, tied: true, ..grouped(of("IIG"), 4, 2) },
        Case { pp: 2, schedule: "gpipe", recompute: Recompute::Full, ..grouped(of("GGG"), 4, 2) },
        Case { pp: 3, schedule: "zb-h1", ..grouped(of("IGG"), 4, 2) },
        Case { pp: 3, schedule: "zb-h1", tied: true, ..grouped(of("NIG"), 4, 2) },
        Case { recompute: Recompute::Selective, tied: true, ..grouped(of("GGG"), 4, 2) },
        Case { recompute: Recompute::Full, tied: true, ..grouped(of("GII"), 8, 4) },
        Case { pp: 2, states: of("GGG"), dp: 2, sharing: Sharing { prefetch: 0, ..Sharing::default() }, ..alone() },
        Case { states: of("GGG"), dp: 2, sharing: Sharing { prefetch: 3, ..Sharing::default() }, ..alone() },
    ];
    for case in cases {
        check(&case, &expected[usize::from(case.tied)]);
    }
}

#[test]
fn all_triples_train_a_part_of_the_parameters_and_adapters() {
    for trainable in ["0.3", "lora:2"] {
        let expected = train(&program(&Case { trainable, ..alone() }), 10);
        for (dp, group) in [(4, 2), (8, 4)] {
            for states in StatePartition::all() {
                check(&Case { trainable, ..grouped(states, dp, group) }, &expected);
            }
        }
    }
}

#[test]
fn parts_and_adapters_with_pipelines_recomputation_and_tied_matrices() {
    let mut known = BTreeMap::new();
    for case in [
        Case { trainable: "lora:3:q,v,down", pp: 2, tied: true, ..grouped(of("IIG"), 4, 2) },
        Case { trainable: "0.4", pp: 2, tied: true, ..grouped(of("NIG"), 4, 2) },
        Case { trainable: "0.4", pp: 3, schedule: "zb-h1", ..grouped(of("IGG"), 4, 2) },
        Case { trainable: "lora:1", pp: 3, schedule: "zb-h1", ..grouped(of("NGG"), 4, 2) },
        Case { trainable: "lora:2", pp: 2, recompute: Recompute::Full, ..grouped(of("GGG"), 4, 2) },
        Case { trainable: "0.2", recompute: Recompute::Selective, ..grouped(of("INI"), 8, 4) },
        Case { trainable: "lora:2:k", recompute: Recompute::Selective, pp: 2, tied: true, ..alone() },
        // Stages with nothing to train.
        Case { trainable: "0.01", pp: 3, ..grouped(of("III"), 4, 2) },
        Case { trainable: "0.01", pp: 3, dp: 2, states: of("GGG"), ..alone() },
    ] {
        let (tied, trainable) = (case.tied, case.trainable);
        let expected =
            known.entry((tied, trainable)).or_insert_with(|| train(&program(&Case { tied, trainable, ..alone() }), 10));
        check(&case, expected);
    }
}

/// What is frozen takes its weights and nothing else, whole or cut; what stands beside it learns.
#[test]
fn frozen_weights_have_neither_gradients_nor_moments_and_do_not_change() {
    let bytes = |program: &Program, class| {
        let rank = &program.ranks[0];
        let held = rank.persistent.iter().map(|buffer| &rank.buffers[buffer.index()]);
        held.filter(|buffer| buffer.class == class).map(|buffer| buffer.bytes).sum::<u64>()
    };
    let full = program(&alone());
    let all = bytes(&full, MemoryClass::Parameter);
    let adapted = Case { trainable: "lora:2:q,up", ..alone() };
    // Per block A and B of queries, 2 (12 + 12), and of the up projection, 2 (12 + 17), four bytes each.
    let adapters = 4 * 3 * (2 * 24 + 2 * 29);
    for (states, parameters, gradients, optimizer) in
        [("NNN", 1, 1, 1), ("III", 2, 2, 2), ("NIG", 1, 2, 4), ("GGG", 4, 4, 4)]
    {
        let case =
            if states == "NNN" { adapted } else { Case { trainable: "lora:2:q,up", ..grouped(of(states), 4, 2) } };
        let program = program(&case);
        // Parts are rounded up to whole blocks of each unit: three blocks and the ends.
        let near = |found: u64, whole: u64, parts: u64| {
            assert!(
                found >= whole / parts && found <= whole / parts + 5 * 16,
                "{states}: {found} of {whole} / {parts}"
            );
        };
        near(bytes(&program, MemoryClass::Parameter), all + adapters, parameters);
        near(bytes(&program, MemoryClass::Gradient), adapters, gradients);
        near(bytes(&program, MemoryClass::OptimizerState), 2 * adapters, optimizer);
    }
    let start = train(&program(&adapted), 1).parameters;
    let report = train(&program(&adapted), 10);
    for (name, values) in &report.parameters {
        let moved = values.iter().zip(&start[name]).any(|(a, b)| a != b);
        assert_eq!(moved, name.contains(".adapter."), "{name}");
    }
    assert_eq!(report.gradients.len(), 3 * 4);
    // The head is frozen with small random weights, which lets no model do much better than chance: adapters come some way.
    let data = Dataset::from_tokens("stairs", &(0..4000u32).map(|k| (k / 3 % 32) as u16).collect::<Vec<_>>());
    let evaluation = Some(Evaluation { every: 60, sequences: 16 });
    let settings = RunSettings { evaluation, ..RunSettings::new(60, 3e-2) };
    let held_out = run(&program(&adapted), &CpuDevice::new(), &settings, &data, &mut Silent).unwrap().held_out;
    assert!(held_out[1].1 < held_out[0].1 - 0.01, "{held_out:?}");
}

/// Gathers at the begin of the next step change nothing but when they run: bits, held-out loss and final weights are those of gathers
/// behind the optimizer.
#[test]
fn updated_weights_may_be_gathered_beside_the_next_forward() {
    let expected = train(&program(&alone()), 10);
    for (states, pp) in [("NNG", 1), ("NNI", 2), ("NIG", 1), ("IIG", 2), ("ING", 1)] {
        let usual = Case { pp, ..grouped(of(states), 4, 2) };
        let late = Case { sharing: Sharing { late_gather: true, ..usual.sharing }, ..usual };
        let found = check(&late, &expected);
        assert!(found.parameters == check(&usual, &expected).parameters, "{states}");
        let gathers = |case: &Case| -> Vec<bool> {
            let program = program(case);
            let ops = &program.ranks[0].ops;
            let update = ops.iter().position(|op| matches!(op.kind, OpKind::Optimizer { .. })).unwrap();
            let gather = |op: &Op| matches!(op.kind, OpKind::Collective { payload: Payload::Parameters { .. }, .. });
            ops.iter().enumerate().filter(|(_, op)| gather(op)).map(|(place, _)| place > update).collect()
        };
        assert!(gathers(&usual).contains(&true) && !gathers(&late).contains(&true), "{states}");
        assert_eq!(gathers(&usual).len(), gathers(&late).len());
    }
}

#[test]
fn parameters_that_stay_gathered_cost_memory_and_save_gathers() {
    let case = Case { pp: 2, ..grouped(of("IIG"), 4, 2) };
    let kept = Case { sharing: Sharing { keep_gathered: true, ..case.sharing }, ..case };
    let expected = train(&program(&alone()), 10);
    check(&kept, &expected);
    let (dropped, kept) = (program(&case), program(&kept));
    let gathers = |program: &Program| program.ranks[0].ops.iter().filter(|op| op.stream.0 == 2).count();
    let units = dropped.stages[0].units.len();
    // Once a unit for the step's passes, and once behind the optimizer for the shard.
    assert_eq!(gathers(&kept), 2 * units);
    assert!(gathers(&dropped) > 4 * units, "{}", gathers(&dropped));
    let peak = |program: &Program| walk(program, RankId(0)).peak_by_class[&MemoryClass::Parameter];
    assert!(peak(&kept) > peak(&dropped));
}

/// Persistent bytes are those of the formula: parameters and gradients of four bytes, moments of eight, and where the optimizer
/// is cut more coarsely than the parameters, its own weights.
#[test]
fn persistent_bytes_follow_the_formula() {
    let whole = program(&alone());
    let bytes_of = |program: &Program, class| -> u64 {
        let rank = &program.ranks[0];
        let held = rank.persistent.iter().map(|b| &rank.buffers[b.index()]);
        held.filter(|buffer| buffer.class == class).map(|buffer| buffer.bytes).sum()
    };
    let all = bytes_of(&whole, MemoryClass::Parameter);
    let units = whole.stages[0].units.len() as u64;
    for states in StatePartition::all() {
        let program = program(&grouped(states, 8, 4));
        let StatePartition { parameters, gradients, optimizer } = states;
        let near = |found: u64, bytes: u64, level: Level| {
            let expected = bytes / level.parts(8, 4);
            // Each unit's part is rounded up to whole elements of the smallest block.
            assert!((expected..=expected + units * 2 * 12).contains(&found), "{states}: {found}, not {expected}");
        };
        near(bytes_of(&program, MemoryClass::Parameter), all, parameters);
        near(bytes_of(&program, MemoryClass::Gradient), all, gradients);
        let weights = if optimizer < parameters { 3 } else { 2 };
        near(bytes_of(&program, MemoryClass::OptimizerState), weights * all, optimizer);
    }
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let refused = |case: &Case| try_program(case).unwrap_err().to_string();
    let text = refused(&grouped(of("III"), 4, 3));
    assert!(text.contains("group_size = 3 does not divide the 4"), "{text}");
    let text = refused(&grouped(of("IIG"), 4, 1));
    assert!(text.contains("states = IIG") && text.contains("states = zero1"), "{text}");
    let text = refused(&Case { states: of("IIG"), dp: 4, ..alone() });
    assert!(text.contains("default group_size = 4") && text.contains("states = zero3"), "{text}");
    let spread = Sharing { pipeline_groups: 2, ..Sharing::default() };
    let text = refused(&Case { pp: 3, sharing: spread, ..alone() });
    assert!(text.contains("pipeline_groups = 2 does not divide the 3"), "{text}");
    let text = refused(&Case { schedule: "dualpipe", pp: 2, ..grouped(of("GGG"), 2, 2) });
    assert!(text.contains("dualpipe") && text.contains("zero1"), "{text}");
}
