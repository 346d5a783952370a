//! Speed of the event engine in ops per second, on a pipeline of 16 ranks, 128 microbatches and two chunks. Aim: 20
//! million ops per second on one core.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use paceline_planner::lower::{AbstractStage, Blueprint, Form, States, Substance, lower};
use paceline_planner::schedules::{Request, build};
use paceline_sim::cost::FixedTimes;
use paceline_sim::engine::Compiled;
use paceline_sim::program::{Device, Program, Stage, Unit, check};
use paceline_sim::units::Nanos;
use std::hint::black_box;

fn program(schedule: &str, data: u32) -> Program {
    let order = build(schedule, &Request { chunks: Some(2), ..Request::new(16, 128) }).expect("a schedule of 16 ranks");
    let stages = order.placement.stages();
    let sizes =
        AbstractStage { parameters: 1 << 20, message: 1 << 16, until_b: 1 << 18, until_w: 1 << 17, checkpoint: 0 };
    lower(&Blueprint {
        order: &order,
        substance: Substance::Abstract(vec![sizes; stages]),
        stages: vec![Stage { units: vec![Unit { layers: vec![] }] }; stages],
        data,
        states: States::default(),
        devices: (0..16 * data).map(|n| Device { name: format!("gpu:{n}"), node: n / 8 }).collect(),
        form: Form::Full,
    })
    .expect("a program that runs")
}

fn engine(c: &mut Criterion) {
    let times = FixedTimes::uniform(Nanos(10_000), Nanos(10_000), Nanos(8_000), Nanos(300));
    let mut group = c.benchmark_group("engine p=16 m=128 chunks=2");
    for (schedule, data) in [("interleaved", 1), ("v-half", 1), ("interleaved", 4)] {
        let program = program(schedule, data);
        let compiled = Compiled::new(&program).expect("it was checked");
        group.throughput(Throughput::Elements(compiled.len() as u64));
        group.bench_function(format!("{schedule} dp={data}"), |b| b.iter(|| compiled.run(black_box(&times))));
    }
    group.finish();

    let mut group = c.benchmark_group("before the engine p=16 m=128 chunks=2");
    let program = program("interleaved", 1);
    group.throughput(Throughput::Elements(program.ranks.iter().map(|rank| rank.ops.len() as u64).sum()));
    group.bench_function("compile", |b| b.iter(|| Compiled::new(black_box(&program)).map(|compiled| compiled.len())));
    group.bench_function("check", |b| b.iter(|| check(black_box(&program))));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = engine
}
criterion_main!(benches);
