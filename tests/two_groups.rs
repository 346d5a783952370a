//! A cluster of two fast groups rehearsed on this machine: messages between groups are really held up by a link of given
//! bandwidth and latency. Step times of state partitions and collective algorithms, predicted and measured, are printed; what
//! is asserted is what no machine can undercut.

use paceline_exec::measure::rows_of_run;
use paceline_exec::{Dataset, RunSettings, Silent, run};
use paceline_kernels::CpuDevice;
use paceline_planner::lower::{Blueprint, Form, Sharing, States, Substance, cut, forward_flops, lower};
use paceline_planner::schedules::{self, Request};
use paceline_profiles::{Predictor, Profile, recalibrate};
use paceline_sim::cost::ProfileCost;
use paceline_sim::engine::simulate;
use paceline_sim::model::{ModelConfig, Trainable};
use paceline_sim::partition::StatePartition;
use paceline_sim::program::{
    Algorithm, Arrangement, Device, Link, OpKind, Precision, Program, Recompute, TransformerWorkload, rounds,
};
use paceline_sim::units::Nanos;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

const SEQ: u32 = 32;
/// Sequences of a global batch, two per microbatch.
const BATCH: u32 = 16;
const REPLICAS: u32 = 4;

fn program(states: &str, collectives: Algorithm, link: Option<Link>) -> Program {
    let model = ModelConfig { layers: 4, ..ModelConfig::preset("demo-1m").unwrap() };
    let order = schedules::build("1f1b", &Request::new(1, BATCH / REPLICAS / 2)).unwrap();
    let stages = cut(&model, 1, forward_flops(&model, SEQ)).unwrap();
    let workload = TransformerWorkload {
        model,
        micro_batch: 2,
        seq: SEQ,
        recompute: Recompute::None,
        tied_on_one_rank: true,
        trainable: Trainable::Full,
        precision: Precision::Fp32,
    };
    let partition: StatePartition = states.parse().unwrap();
    lower(&Blueprint {
        order: &order,
        substance: Substance::Transformer(workload),
        stages,
        data: REPLICAS,
        states: States {
            partition,
            sharing: Sharing { group_size: Some(2), collectives: collectives.into(), link, ..Sharing::default() },
        },
        devices: (0..2).map(|n| Device { name: format!("cpu:{n}"), node: 0 }).collect(),
        form: Form::Full,
    })
    .unwrap()
}

/// Seconds for which the link of a group is busy in a step: no run can be shorter.
fn busy(program: &Program) -> f64 {
    let mut sum = Nanos::ZERO;
    let mut seen: Vec<(usize, usize)> = Vec::new();
    for rank in &program.ranks {
        let mut of_group = vec![0; program.groups.len()];
        for op in &rank.ops {
            let OpKind::Collective { collective, group, bytes, arrangement, .. } = op.kind else { continue };
            let held = &program.groups[group.index()];
            // Every member issues the same ones: each is counted once.
            let number = of_group[group.index()];
            of_group[group.index()] += 1;
            let Some(link) = held.crossing.and_then(|crossing| crossing.link) else { continue };
            if seen.contains(&(group.index(), number)) {
                continue;
            }
            seen.push((group.index(), number));
            let Arrangement { algorithm, .. } = arrangement;
            let part = arrangement.part_of(bytes, held.size, 4).min(bytes);
            for step in rounds(collective, algorithm, held.size, held.fast_groups()) {
                sum += link.busy(step.crossing(held.size, held.fast_groups(), part));
            }
        }
    }
    sum.seconds()
}

static MACHINE: Mutex<()> = Mutex::new(());

/// Predicted seconds of a step, and those of the fastest one.
fn times(program: &Program, predictor: &Predictor) -> (f64, f64) {
    let costs = ProfileCost::new(predictor, program).unwrap();
    let predicted = simulate(program, &costs).unwrap().makespan.seconds();
    // One run at a time has the machine.
    let _alone = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let report = run(program, &CpuDevice::new(), &RunSettings::new(6, 1e-3), &Dataset::bundled(), &mut Silent).unwrap();
    assert!(report.steps[5].loss < report.steps[0].loss);
    // What other work on the machine delayed least.
    (predicted, report.steps.iter().map(|step| step.seconds).fold(f64::INFINITY, f64::min))
}

/// The shipped profile, corrected by what runs without a slow link show of this machine as it is now.
fn predictor() -> Predictor {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/profiles/data/cpu.csv"));
    let profile = Profile::load(path).unwrap();
    let before = Predictor::new(&profile).unwrap();
    let _alone = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let rows = ["NNN", "IIG"].map(|states| {
        let program = program(states, Algorithm::TwoLevel, None);
        let settings = RunSettings::new(12, 1e-3);
        let report = run(&program, &CpuDevice::new(), &settings, &Dataset::bundled(), &mut Silent).unwrap();
        rows_of_run(&program, &report, Some(&before))
    });
    Predictor::new(&recalibrate(&profile, &rows.concat()).unwrap().profile).unwrap()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[test]
fn state_partitions_over_a_slow_link() {
    let predictor = predictor();
    let mut errors = Vec::new();
    for bytes_per_second in [1 << 30, 1 << 28, 1 << 26] {
        let link = Some(Link { latency: Nanos(20_000), bytes_per_second });
        for states in ["NNN", "NNI", "NNG", "NII", "NIG", "III", "IIG", "NGG", "GGG"] {
            let program = program(states, Algorithm::TwoLevel, link);
            let least = busy(&program);
            let (predicted, measured) = times(&program, &predictor);
            errors.push((predicted / measured - 1.0).abs());
            println!(
                "{states} at {:>4} MiB/s: predicted {:6.1} ms, measured {:6.1} ms ({:+.1} %), link busy {:6.1} ms",
                bytes_per_second >> 20,
                predicted * 1e3,
                measured * 1e3,
                (predicted / measured - 1.0) * 100.0,
                least * 1e3
            );
            assert!(measured >= least && predicted >= least, "{states}: {measured} and {predicted}, link {least}");
        }
    }
    println!("median error {:.1} %", median(errors) * 100.0);
}

#[test]
fn two_levels_against_the_flat_ring_over_a_slow_link() {
    let predictor = predictor();
    let link = Some(Link { latency: Nanos(100_000), bytes_per_second: 1 << 27 });
    let [ring, two_level] = [Algorithm::Ring, Algorithm::TwoLevel].map(|algorithm| {
        let program = program("GGG", algorithm, link);
        let least = busy(&program);
        let (predicted, measured) = times(&program, &predictor);
        println!("{algorithm:?}: predicted {:.1} ms, measured {:.1} ms", predicted * 1e3, measured * 1e3);
        assert!(measured >= least && predicted >= least);
        (predicted, measured, least)
    });
    println!(
        "two levels save {:.1} % predicted, {:.1} % measured",
        (1.0 - two_level.0 / ring.0) * 100.0,
        (1.0 - two_level.1 / ring.1) * 100.0
    );
    // Three parts cross per gather on the ring, two with two levels.
    assert!((two_level.2 / ring.2 - 2.0 / 3.0).abs() < 0.01, "{} {}", two_level.2, ring.2);
    assert!(two_level.0 < ring.0);
}
