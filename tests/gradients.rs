//! Every schedule, under every layout, trains the same model: loss and gradients of a lowered program equal those of one
//! rank that works alone, and what a rank holds at its peak is what its program says.

use paceline_exec::{Dataset, LearningRate, OptimizerSettings, RunReport, RunSettings, Silent, run};
use paceline_kernels::CpuDevice;
use paceline_planner::lower::{Blueprint, Form, Substance, cut, forward_flops, lower};
use paceline_planner::schedules::{self, Request, SCHEDULES};
use paceline_sim::memory::walk;
use paceline_sim::model::{Activation, ModelConfig, Norm, Positions, Trainable};
use paceline_sim::partition::StatePartition;
use paceline_sim::program::{Device, Precision, Program, Recompute, TransformerWorkload};
use paceline_sim::units::RankId;
use std::collections::BTreeMap;

const SEQ: u32 = 8;

fn model(tied: bool) -> ModelConfig {
    let base = ModelConfig::preset("demo-1m").unwrap();
    let small = ModelConfig {
        layers: 8,
        hidden: 16,
        heads: 4,
        kv_heads: 2,
        head_dim: 4,
        intermediate: 24,
        vocab: 32,
        max_positions: SEQ,
        ..base
    };
    match tied {
        false => small,
        true => ModelConfig {
            kv_heads: 4,
            norm: Norm::LayerNorm,
            activation: Activation::Gelu,
            positions: Positions::Learned,
            qkv_bias: true,
            attention_output_bias: true,
            mlp_bias: true,
            tied_embeddings: true,
            ..small
        },
    }
}

#[derive(Debug, Clone, Copy)]
struct Case {
    schedule: &'static str,
    tied: bool,
    dp: u32,
    pp: u32,
    chunks: Option<u32>,
    microbatches: u32,
    recompute: Recompute,
    states: StatePartition,
    devices: u32,
}

const ALONE: Case = Case {
    schedule: "gpipe",
    tied: false,
    dp: 1,
    pp: 1,
    chunks: None,
    microbatches: 8,
    recompute: Recompute::None,
    states: StatePartition::NONE,
    devices: 1,
};

fn program(case: &Case) -> Program {
    let model = model(case.tied);
    let request = Request { chunks: case.chunks, ..Request::new(case.pp, case.microbatches) };
    let order = schedules::build(case.schedule, &request).unwrap();
    let mut stages = cut(&model, order.placement.stages_per_copy(), forward_flops(&model, SEQ)).unwrap();
    if order.placement.copies == 2 {
        stages.extend(stages.clone());
    }
    let recompute = if case.schedule == "1f1b-r" { Recompute::Full } else { case.recompute };
    let workload = TransformerWorkload {
        model,
        micro_batch: 1,
        seq: SEQ,
        recompute,
        tied_on_one_rank: false,
        trainable: Trainable::Full,
        precision: Precision::Fp32,
    };
    let devices = (0..case.devices).map(|n| Device { name: format!("cpu:{n}"), node: 0 }).collect();
    lower(&Blueprint {
        order: &order,
        substance: Substance::Transformer(workload),
        stages,
        data: case.dp,
        states: case.states.into(),
        devices,
        form: Form::Full,
    })
    .unwrap()
}

/// Gradients in the report are those of the last step.
fn train(program: &Program, steps: u64) -> RunReport {
    let tokens: Vec<u16> = (0..4000u32).map(|k| ((k * k + k / 7) % 32) as u16).collect();
    let settings = RunSettings {
        optimizer: OptimizerSettings {
            learning_rate: LearningRate::constant(1e-3),
            clip: Some(0.5),
            ..OptimizerSettings::default()
        },
        seed: 5,
        capture_gradients: true,
        poison: true,
        ..RunSettings::new(steps, 1e-3)
    };
    run(program, &CpuDevice::new(), &settings, &Dataset::from_tokens("squares", &tokens), &mut Silent).unwrap()
}

/// Single elements of a gradient are sums of terms that nearly cancel; they are held against the largest of their tensor.
fn assert_same(
    case: &Case,
    what: &str,
    tolerance: f32,
    found: &BTreeMap<String, Vec<f32>>,
    expected: &BTreeMap<String, Vec<f32>>,
) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{case:?}");
    for (name, expected) in expected {
        let size = expected.iter().fold(0f32, |size, x| size.max(x.abs()));
        for (n, (f, e)) in found[name].iter().zip(expected).enumerate() {
            assert!(
                (f - e).abs() <= tolerance * size,
                "{case:?}: {what} of {name}[{n}] is {f} instead of {e} (size {size})"
            );
        }
    }
}

fn check(cases: &[Case]) {
    let alone = [1, 2].map(|steps| [false, true].map(|tied| train(&program(&Case { tied, ..ALONE }), steps)));
    for case in cases {
        let program = program(case);
        let first = train(&program, 1).gradients;
        assert_same(case, "gradient", 1e-5, &first, &alone[0][usize::from(case.tied)].gradients);
        let (found, expected) = (train(&program, 2), &alone[1][usize::from(case.tied)]);
        for (found, expected) in found.steps.iter().zip(&expected.steps) {
            let error = (found.loss - expected.loss).abs() / expected.loss;
            assert!(error < 1e-5, "{case:?}: loss {} instead of {}", found.loss, expected.loss);
            let error = (found.gradient_norm - expected.gradient_norm).abs() / expected.gradient_norm;
            assert!(error < 1e-5, "{case:?}: norm {} instead of {}", found.gradient_norm, expected.gradient_norm);
        }
        // Adam's first update divides each gradient by its own size, so a rounding error of an element that is nearly zero
        // becomes one of the learning rate: the second gradient is of slightly different parameters.
        assert_same(case, "second gradient", 2e-5, &found.gradients, &expected.gradients);
        for (rank, measured) in (0..).zip(&found.memory) {
            let walked = walk(&program, RankId(rank));
            assert_eq!(measured.peak_bytes, walked.peak_bytes, "{case:?}: peak of rank {rank}");
            assert_eq!(measured.peak_by_class, walked.peak_by_class, "{case:?}: peak of rank {rank}");
        }
    }
}

fn cases_of(schedule: &'static str) -> Vec<Case> {
    let base = Case { schedule, pp: 4, devices: 2, ..ALONE };
    let zero1 = StatePartition::ZERO1;
    let interleaved = schedule == "interleaved";
    vec![
        base,
        Case { tied: true, ..base },
        Case { pp: 2, dp: 2, microbatches: 4, ..base },
        Case { pp: 2, dp: 2, microbatches: 4, states: zero1, tied: true, ..base },
        Case { recompute: Recompute::Selective, devices: 4, ..base },
        Case { recompute: Recompute::Full, states: zero1, devices: 1, ..base },
        Case { pp: 2, dp: 4, microbatches: 2, states: zero1, recompute: Recompute::Full, tied: true, ..base },
        Case { pp: 2, dp: if interleaved { 4 } else { 8 }, microbatches: if interleaved { 2 } else { 1 }, ..base },
    ]
}

#[test]
fn schedules_with_fused_backward_train_the_same_model() {
    let fused = SCHEDULES.iter().filter(|s| !s.split);
    let cases: Vec<Case> = fused.flat_map(|s| cases_of(s.name)).filter(fits).collect();
    assert!(cases.len() > 40);
    check(&cases);
}

#[test]
fn schedules_with_split_backward_train_the_same_model() {
    let split = SCHEDULES.iter().filter(|s| s.split);
    let cases: Vec<Case> = split.flat_map(|s| cases_of(s.name)).filter(fits).collect();
    assert!(cases.len() > 40);
    check(&cases);
}

/// 1F1B-R is full recomputation.
fn fits(case: &Case) -> bool {
    case.schedule != "1f1b-r" || case.recompute != Recompute::Selective
}

#[test]
fn replicas_alone_train_the_same_model() {
    for (dp, states) in [(2, StatePartition::NONE), (8, StatePartition::ZERO1), (4, StatePartition::ZERO1)] {
        for tied in [false, true] {
            check(&[Case { dp, states, tied, microbatches: 8 / dp, devices: 2, ..ALONE }]);
        }
    }
}
