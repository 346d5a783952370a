//! A cluster of two fast groups rehearsed on this machine: messages between groups are really held up by a link of given
//! bandwidth and latency. Step times of state partitions and collective algorithms, predicted and measured, are printed; what
//! is asserted is what no machine can undercut.
//!
//! The predictor is corrected by two teachers, NNN and IIG without a slow link, so that what the link costs is foretold. Kernels find weights and
//! gradients that a rank holds whole elsewhere than gathered ones and those that are reduced at once, so there is one of each. Teachers and
//! tested run in the same rounds. More rounds take longer and print steadier figures: `PACELINE_ROUNDS=6 cargo test --test two_groups -- --nocapture`.

mod rounds;

use paceline_exec::measure::rows_of_runs;
use paceline_planner::lower::{Blueprint, Form, Sharing, States, Substance, cut, forward_flops, lower};
use paceline_planner::schedules::{self, Request};
use paceline_profiles::{Conditions, Predictor, Profile, Row, recalibrate};
use paceline_sim::attribution::Attribution;
use paceline_sim::cost::ProfileCost;
use paceline_sim::engine::simulate;
use paceline_sim::model::{ModelConfig, Trainable};
use paceline_sim::partition::StatePartition;
use paceline_sim::program::{
    Algorithm, Arrangement, Device, Link, OpKind, Precision, Program, Recompute, TransformerWorkload, rounds,
};
use paceline_sim::units::{Nanos, RankId};
use rounds::{Runs, measure, median};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

/// Few tokens for many parameters, so that what is gathered and reduced takes a good part of a step.
const SEQ: u32 = 16;
/// Sequences of a global batch, each a microbatch.
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
    let model = ModelConfig { layers: 4, ..ModelConfig::preset("demo-3m").unwrap() };
    let order = schedules::build("1f1b", &Request::new(pp, BATCH / data)).unwrap();
    let stages = cut(&model, pp as usize, forward_flops(&model, SEQ)).unwrap();
    let workload = TransformerWorkload {
        model,
        micro_batch: 1,
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

/// Partitions that are ranked: effective ones that cut in groups or not at all, and ZeRO's.
const RANKED: [&str; 9] = ["NNN", "NNI", "NNG", "NII", "NIG", "III", "IIG", "NGG", "GGG"];
/// Bandwidths between groups, as parts of the one within.
const PARTS: [f64; 3] = [1.0, 4.0, 16.0];

/// Everything that is held against its prediction, measured in the same rounds.
struct Bench {
    predictor: Predictor,
    /// What a rank copies from another one's memory in a second, while all devices copy.
    within: f64,
    /// By bandwidth, in the order of [`RANKED`].
    ranked: [Vec<Runs>; 3],
    /// Flat ring and two levels over a link ten times as slow as copies within a group.
    gathers: [Runs; 2],
    /// A pipeline over two groups, without and with a slow link.
    pipelines: [Runs; 2],
}

static BENCH: LazyLock<Bench> = LazyLock::new(|| {
    let rounds = std::env::var("PACELINE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let profile = shipped();
    let before = Predictor::new(&profile).unwrap();
    let taught = |teachers: &[Runs]| {
        let rows: Vec<Row> =
            teachers.iter().flat_map(|runs| rows_of_runs(&runs.program, &runs.reports, Some(&before))).collect();
        Predictor::new(&recalibrate(&profile, &rows).unwrap().profile).unwrap()
    };
    let teachers = || ["NNN", "IIG"].map(|states| program(states, Algorithm::TwoLevel, None)).to_vec();
    let under = Conditions { busy: 2, context: None };
    let begin = measure(teachers(), 1);
    let within = (1 << 20) as f64 / taught(&begin).transfer(1 << 20, under).seconds;
    let link = |part: f64| Some(Link { latency: Nanos(20_000), bytes_per_second: (within / part) as u64 });

    let mut programs = teachers();
    programs.extend([None, Some(PIPELINE_LINK)].map(pipeline));
    programs.extend([Algorithm::Ring, Algorithm::TwoLevel].map(|algorithm| program("GGG", algorithm, link(10.0))));
    programs
        .extend(PARTS.iter().flat_map(|&part| RANKED.map(|states| program(states, Algorithm::TwoLevel, link(part)))));
    let mut runs = measure(programs, rounds).into_iter();
    let mut two = || [runs.next(), runs.next()].map(Option::unwrap);
    let (teachers, pipelines, gathers) = (two(), two(), two());
    let ranked = PARTS.map(|_| runs.by_ref().take(RANKED.len()).collect());
    Bench { predictor: taught(&teachers), within, ranked, gathers, pipelines }
});

const PIPELINE_LINK: Link = Link { latency: Nanos(50_000), bytes_per_second: 4 << 20 };

fn shipped() -> Profile {
    Profile::load(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/profiles/data/cpu.csv"))).unwrap()
}

impl Bench {
    /// Predicted seconds of a step.
    fn predicted(&self, runs: &Runs) -> f64 {
        simulate(&runs.program, &self.costs(runs)).unwrap().makespan.seconds()
    }

    fn costs(&self, runs: &Runs) -> ProfileCost {
        ProfileCost::new(&self.predictor, &runs.program).unwrap()
    }
}

/// How two rankings agree, over pairs that are measured further apart than their spreads: those in the same order, and all.
fn in_order(predicted: &[f64], runs: &[Runs]) -> (usize, usize) {
    let (mut same, mut apart) = (0, 0);
    for (n, a) in runs.iter().enumerate() {
        for (m, b) in runs.iter().enumerate().take(n) {
            let by = a.seconds - b.seconds;
            if by.abs() > a.spread + b.spread {
                apart += 1;
                same += usize::from((predicted[n] - predicted[m]) * by > 0.0);
            }
        }
    }
    (same, apart)
}

/// Names from the fastest to the slowest; `~` between neighbours closer together than `spread` tells apart.
fn order(seconds: &[f64], spread: impl Fn(usize) -> f64) -> String {
    let mut places: Vec<usize> = (0..seconds.len()).collect();
    places.sort_by(|&a, &b| seconds[a].total_cmp(&seconds[b]));
    let mut text = RANKED[places[0]].to_string();
    for pair in places.windows(2) {
        let tied = seconds[pair[1]] - seconds[pair[0]] <= spread(pair[0]) + spread(pair[1]);
        text += if tied { " ~ " } else { " < " };
        text += RANKED[pair[1]];
    }
    text
}

#[test]
fn state_partitions_over_a_slow_link() {
    let bench = &*BENCH;
    let mut errors = Vec::new();
    println!("within a group {:.1} GB/s", bench.within / 1e9);
    for (part, ranked) in PARTS.iter().zip(&bench.ranked) {
        let predicted: Vec<f64> = ranked.iter().map(|runs| bench.predicted(runs)).collect();
        println!("between groups 1/{part} of that");
        for ((states, runs), &predicted) in RANKED.iter().zip(ranked).zip(&predicted) {
            let least = busy(&runs.program);
            let error = predicted / runs.seconds - 1.0;
            errors.push(error.abs());
            println!(
                "  {states}: predicted {:6.1} ms, measured {:6.1} ms, spread {:4.1} ms ({:+.1} %), link busy {:6.1} ms",
                predicted * 1e3,
                runs.seconds * 1e3,
                runs.spread * 1e3,
                error * 100.0,
                least * 1e3
            );
            let fastest = runs.reports.iter().map(|report| report.median_seconds()).fold(f64::INFINITY, f64::min);
            assert!(fastest >= least && predicted >= least, "{states}: {fastest} and {predicted}, link {least}");
        }
        let measured: Vec<f64> = ranked.iter().map(|runs| runs.seconds).collect();
        println!("  fastest first, predicted: {}", order(&predicted, |_| 0.0));
        println!(
            "  fastest first, measured:  {} (~ closer together than their spreads)",
            order(&measured, |n| ranked[n].spread)
        );
        let (same, apart) = in_order(&predicted, ranked);
        let against = apart - same;
        println!(
            "  of {apart} pairs that lie apart {same} are in the predicted order: correlation {:.2}",
            (same as f64 - against as f64) / apart.max(1) as f64
        );
        println!("  measured minus predicted, by cause, means over the partitions: {}", causes(bench, ranked));
    }
    println!("median error {:.1} %", median(errors) * 100.0);
}

/// Where the errors come from, in milliseconds.
fn causes(bench: &Bench, ranked: &[Runs]) -> String {
    let mut sums: BTreeMap<String, f64> = BTreeMap::new();
    let traces: usize = ranked.iter().map(|runs| runs.reports.len()).sum();
    for runs in ranked {
        let costs = bench.costs(runs);
        for report in &runs.reports {
            for part in Attribution::of(&runs.program, &costs, &report.trace).unwrap().parts {
                *sums.entry(part.cause.to_string()).or_default() += part.seconds * 1e3 / traces as f64;
            }
        }
    }
    sums.iter().map(|(cause, ms)| format!("{cause} {ms:+.1}")).collect::<Vec<_>>().join(", ")
}

/// What the optimizer has updated, gathered beside the first passes of the next step, hides part of the way over the link.
#[test]
fn late_gathers_hide_behind_the_next_forward() {
    let predictor = Predictor::new(&shipped()).unwrap();
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
    let bench = &*BENCH;
    let [ring, two_level] = [0, 1].map(|n| {
        let runs = &bench.gathers[n];
        let (least, predicted) = (busy(&runs.program), bench.predicted(runs));
        let name = ["flat ring", "two levels"][n];
        println!("{name}: predicted {:.1} ms, measured {:.1} ms", predicted * 1e3, runs.seconds * 1e3);
        assert!(runs.seconds >= least && predicted >= least);
        (predicted, runs.seconds, least)
    });
    let (predicted, measured) = (ring.0 / two_level.0, ring.1 / two_level.1);
    println!(
        "two levels at a tenth of the bandwidth are {predicted:.3} times as fast predicted, {measured:.3} times measured ({:+.1} %)",
        (predicted / measured - 1.0) * 100.0
    );
    // Three parts cross per gather on the ring, two with two levels.
    assert!((two_level.2 / ring.2 - 2.0 / 3.0).abs() < 0.01, "{} {}", two_level.2, ring.2);
    assert!(two_level.0 < ring.0);
}

/// A pipeline over two groups: activations and gradients wait for the link.
#[test]
fn messages_between_stages_over_a_slow_link() {
    let bench = &*BENCH;
    let [free, held] = &bench.pipelines;
    let least = busy_with_messages(&held.program);
    // For each of 16 microbatches of 16 tokens an activation of 192 elements each leaves the first group.
    assert_eq!(least, 16.0 * PIPELINE_LINK.busy(16 * 192 * 4).seconds());
    let (without, predicted) = (bench.predicted(free), bench.predicted(held));
    println!(
        "pipeline over two groups: predicted {:.1} ms, measured {:.1} ms, link busy {:.1} ms each way; without it {:.1} and {:.1} ms",
        predicted * 1e3,
        held.seconds * 1e3,
        least * 1e3,
        without * 1e3,
        free.seconds * 1e3
    );
    assert!(held.seconds >= least && predicted >= least && predicted > without, "{predicted} {} {least}", held.seconds);
}
