//! Speed of the generators and of the replay, on one core. Aims: any named schedule of p = 32, m = 256 in under 10 ms; the zero-bubble heuristic of
//! that size in under 50 ms; the adaptive V search of p = 16, m = 32 in under 1 s and of p = 8, m = 64 in under 0.3 s; the optimiser of
//! p = 16, m = 64 in under 2 s.

use criterion::{Criterion, criterion_group, criterion_main};
use paceline_planner::replay::{Replayer, StageMemory, StageTimes};
use paceline_planner::schedules::{Request, SCHEDULES, build, find};
use std::hint::black_box;

fn generators(c: &mut Criterion) {
    let mut group = c.benchmark_group("build p=32 m=256");
    for schedule in SCHEDULES.iter().filter(|schedule| schedule.fixed) {
        group.bench_function(schedule.name, |b| {
            b.iter(|| build(schedule.name, black_box(&Request::new(32, 256))));
        });
    }
    group.finish();
}

/// Per device, in milliseconds, on A100 (arXiv 2401.10241v1, Table 9, 14.6B).
const TIMES: [f64; 4] = [11.347, 11.248, 8.132, 0.377];

fn timed(c: &mut Criterion) {
    let mut group = c.benchmark_group("timed");
    let cases = [
        ("zb-1p", 32, 256, 32.0),
        ("zb-2p", 32, 256, 64.0),
        ("zb-v-timed", 32, 256, 32.0),
        ("adaptive-v", 16, 32, 16.0),
        ("adaptive-v", 8, 64, 8.0),
        ("optimised", 16, 64, 9.0),
        ("optimised", 16, 64, 16.0),
    ];
    for (name, p, m, limit) in cases {
        let placement =
            find(name).and_then(|schedule| schedule.placement(p, None)).expect("a schedule of the registry");
        let stages = placement.stages();
        let share = f64::from(p) / stages as f64;
        let [f, b, w, comm] = TIMES;
        let request = Request {
            times: Some(StageTimes::uniform(stages, f * share, b * share, w * share, comm)),
            memory: Some(StageMemory::microbatch_stages(&placement, p as usize, 0.0)),
            limit: Some(vec![limit; p as usize]),
            ..Request::new(p, m)
        };
        group.bench_function(format!("{name} p={p} m={m} limit={limit}"), |b| {
            b.iter(|| build(name, black_box(&request)));
        });
    }
    group.finish();
}

fn replays(c: &mut Criterion) {
    let mut group = c.benchmark_group("replay p=32 m=256");
    for name in ["1f1b", "zb-h2", "v-half"] {
        let Ok(order) = build(name, &Request::new(32, 256)) else { continue };
        let times = StageTimes::uniform(order.placement.stages(), 10.4, 10.2, 7.7, 0.4);
        let mut replayer = Replayer::default();
        group.bench_function(name, |b| b.iter(|| replayer.run(black_box(&order), &times)));
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = generators, timed, replays
}
criterion_main!(benches);
