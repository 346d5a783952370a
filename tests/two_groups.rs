//! A cluster of two fast groups rehearsed on this machine: messages between groups are really held up by a link of given
//! bandwidth and latency. Step times of state partitions and collective algorithms, predicted and measured, are printed; what
//! is asserted is what no machine can undercut.

use paceline_exec::measure::rows_of_run;
use paceline_exec::{Dataset, RunSettings, Silent, run};
use paceline_kernels::CpuDevice;
use paceline_planner::lower::{Blueprint, Form, Sharing, States, Substance, cut, forward_flops, lower};
use paceline_planner::schedules::{self, Request};
use paceline_profiles::{Conditions, Predictor, Profile, recalibrate};
use paceline_sim::cost::ProfileCost;
use paceline_sim::engine::simulate;
use paceline_sim::model::{ModelConfig, Trainable};
use paceline_sim::partition::StatePartition;
use paceline_sim::program::{
    Algorithm, Arrangement, Device, Link, OpKind, Precision, Program, Recompute, TransformerWorkload, rounds,
};
use paceline_sim::units::{Nanos, RankId};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

const SEQ: u32 = 32;
/// Sequences of a global batch, two per microbatch.
const BATCH: u32 = 16;
const REPLICAS: u32 = 4;

fn program(states: &str, collectives: Algorithm, link: Option<Link>) -> Program {
    let sharing = Sharing { group_size: Some(2), collectives: collectives.into(), link, ..Sharing::default() };
    lowered(states, REPLICAS, 1, sharing)
}

/// Two pipeline ranks in two groups, two replicas of them.
fn pipeline(link: Option<Link>) -> Program {
    lowered("NNG", 2, 2, Sharing { pipeline_groups: 2, link, ..Sharing::default() })
}

fn lowered(states: &str, data: u32, pp: u32, sharing: Sharing) -> Program {
    let model = ModelConfig { layers: 4, ..ModelConfig::preset("demo-1m").unwrap() };
    let order = schedules::build("1f1b", &Request::new(pp, BATCH / data / 2)).unwrap();
    let stages = cut(&model, pp as usize, forward_flops(&model, SEQ)).unwrap();
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
        data,
        states: States { partition, sharing },
        devices: (0..2).map(|n| Device { name: format!("cpu:{n}"), node: 0 }).collect(),
        form: Form::Full,
    })
    .unwrap()
}

/// Seconds for which collectives keep the link of a group busy in a step: no run can be shorter.
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

/// Seconds for which the messages of the first group's ranks keep its link busy, in one direction.
fn busy_with_messages(program: &Program) -> f64 {
    let Some(link) = program.link() else { return 0.0 };
    let mut sum = Nanos::ZERO;
    for (number, rank) in (0..).zip(&program.ranks) {
        for op in &rank.ops {
            if let OpKind::Send { peer, buffer, .. } = op.kind
                && rank.coordinates.group == 0
                && program.crosses(RankId(number), peer)
            {
                sum += link.busy(rank.buffers[buffer.index()].bytes);
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

/// What a rank copies from another one's memory in a second, while all devices copy.
fn within(predictor: &Predictor) -> f64 {
    let under = Conditions { busy: 2, context: None };
    (1 << 20) as f64 / predictor.transfer(1 << 20, under).seconds
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[test]
fn state_partitions_over_a_slow_link() {
    let predictor = predictor();
    let mut errors = Vec::new();
    let within = within(&predictor);
    println!("within a group {:.1} GB/s", within / 1e9);
    for part in [1.0, 4.0, 16.0] {
        let bytes_per_second = (within / part) as u64;
        let link = Some(Link { latency: Nanos(20_000), bytes_per_second });
        let mut found = Vec::new();
        for states in ["NNN", "NNI", "NNG", "NII", "NIG", "III", "IIG", "NGG", "GGG"] {
            let program = program(states, Algorithm::TwoLevel, link);
            let least = busy(&program);
            let (predicted, measured) = times(&program, &predictor);
            errors.push((predicted / measured - 1.0).abs());
            found.push((states, predicted, measured));
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
        let order = |seconds: fn(&(&'static str, f64, f64)) -> f64| {
            let mut found = found.clone();
            found.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
            found.into_iter().map(|(states, ..)| states).collect::<Vec<_>>()
        };
        let (predicted, measured) = (order(|f| f.1), order(|f| f.2));
        let place = |order: &[&str], states: &str| order.iter().position(|o| *o == states).unwrap_or(0) as f64;
        let apart: f64 = predicted.iter().map(|s| (place(&predicted, s) - place(&measured, s)).powi(2)).sum();
        let n = predicted.len() as f64;
        println!("  fastest first, predicted: {}", predicted.join(" "));
        println!("  fastest first, measured:  {}", measured.join(" "));
        println!("  correlation of ranks {:.2}", 1.0 - 6.0 * apart / (n * (n * n - 1.0)));
    }
    println!("median error {:.1} %", median(errors) * 100.0);
}

/// What the optimizer has updated, gathered beside the first passes of the next step, hides part of the way over the link.
#[test]
fn late_gathers_hide_behind_the_next_forward() {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/profiles/data/cpu.csv"));
    let predictor = Predictor::new(&Profile::load(path).unwrap()).unwrap();
    let link = Some(Link { latency: Nanos(20_000), bytes_per_second: 1 << 29 });
    for states in ["NNG", "NIG", "IIG"] {
        let [usual, late] = [false, true].map(|late_gather| {
            let sharing = Sharing { group_size: Some(2), link, late_gather, ..Sharing::default() };
            let program = lowered(states, REPLICAS, 1, sharing);
            simulate(&program, &ProfileCost::new(&predictor, &program).unwrap()).unwrap().makespan.seconds()
        });
        println!("{states}: {:.1} ms, gathered late {:.1} ms", usual * 1e3, late * 1e3);
        assert!(late < usual, "{states}: {late} and {usual}");
    }
}

#[test]
fn two_levels_against_the_flat_ring_over_a_slow_link() {
    let predictor = predictor();
    // A link ten times as slow as copies inside a group.
    let bytes_per_second = (within(&predictor) / 10.0) as u64;
    let link = Some(Link { latency: Nanos(20_000), bytes_per_second });
    let [ring, two_level] = [Algorithm::Ring, Algorithm::TwoLevel].map(|algorithm| {
        let program = program("GGG", algorithm, link);
        let least = busy(&program);
        let (predicted, measured) = times(&program, &predictor);
        println!("{algorithm:?}: predicted {:.1} ms, measured {:.1} ms", predicted * 1e3, measured * 1e3);
        assert!(measured >= least && predicted >= least);
        (predicted, measured, least)
    });
    println!(
        "two levels at {} MiB/s are {:.3} times as fast predicted, {:.3} times measured",
        bytes_per_second >> 20,
        ring.0 / two_level.0,
        ring.1 / two_level.1
    );
    // Three parts cross per gather on the ring, two with two levels.
    assert!((two_level.2 / ring.2 - 2.0 / 3.0).abs() < 0.01, "{} {}", two_level.2, ring.2);
    assert!(two_level.0 < ring.0);
}

/// A pipeline over two groups: activations and gradients wait for the link.
#[test]
fn messages_between_stages_over_a_slow_link() {
    let predictor = predictor();
    let free = times(&pipeline(None), &predictor);
    let link = Link { latency: Nanos(50_000), bytes_per_second: 4 << 20 };
    let program = pipeline(Some(link));
    let least = busy_with_messages(&program);
    // Per replica and microbatch of 64 tokens an activation of 128 elements each leaves the first group.
    assert_eq!(least, 8.0 * link.busy(64 * 128 * 4).seconds());
    let (predicted, measured) = times(&program, &predictor);
    println!(
        "pipeline over two groups: predicted {:.1} ms, measured {:.1} ms, link busy {:.1} ms each way; without it {:.1} and {:.1} ms",
        predicted * 1e3,
        measured * 1e3,
        least * 1e3,
        free.0 * 1e3,
        free.1 * 1e3
    );
    assert!(measured >= least && predicted >= least && predicted > free.0, "{predicted} {measured} {least}");
}
