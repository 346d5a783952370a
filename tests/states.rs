//! All 27 state partitions train the model that one rank trains alone, and hold at their peak what their programs say.

use paceline_exec::{Dataset, Evaluation, LearningRate, OptimizerSettings, RunReport, RunSettings, Silent, run};
use paceline_kernels::CpuDevice;
use paceline_planner::lower::{Blueprint, Form, LowerError, Sharing, States, Substance, cut, forward_flops, lower};
use paceline_planner::schedules::{self, Request};
use paceline_sim::memory::walk;
use paceline_sim::model::ModelConfig;
use paceline_sim::partition::{Level, StatePartition};
use paceline_sim::program::{Device, MemoryClass, Program, Recompute, TransformerWorkload};
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
    let workload =
        TransformerWorkload { model, micro_batch: 1, seq: SEQ, recompute: case.recompute, tied_on_one_rank: false };
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
    let settings = RunSettings {
        optimizer: OptimizerSettings {
            learning_rate: LearningRate::constant(1e-3),
            clip: Some(0.5),
            // Adam divides each gradient by its own size, and would make of the rounding error of an element that is nearly zero
            // one of the learning rate; below this size it does not.
            epsilon: 1e-2,
            ..OptimizerSettings::default()
        },
        seed: 5,
        capture_gradients: true,
        poison: true,
        evaluation: Some(Evaluation { every: steps, sequences: 4 }),
        ..RunSettings::new(steps, 1e-3)
    };
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
    let text = refused(&Case { schedule: "dualpipe", pp: 2, ..grouped(of("GGG"), 2, 2) });
    assert!(text.contains("dualpipe") && text.contains("zero1"), "{text}");
}
