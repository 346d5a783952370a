//! Speed of the named generators and of the replay. Aims: any named schedule of p = 32, m = 256 in under 10 ms.

use criterion::{Criterion, criterion_group, criterion_main};
use paceline_planner::replay::{Replayer, StageTimes};
use paceline_planner::schedules::{Request, SCHEDULES, build};
use std::hint::black_box;

fn generators(c: &mut Criterion) {
    let mut group = c.benchmark_group("build p=32 m=256");
    for schedule in SCHEDULES {
        group.bench_function(schedule.name, |b| {
            b.iter(|| build(schedule.name, black_box(&Request::new(32, 256))));
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
    config = Criterion::default().sample_size(20);
    targets = generators, replays
}
criterion_main!(benches);
