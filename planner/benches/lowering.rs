//! Time to lower: a schedule under study as the engine's bench has it, and a transformer as the search has it.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::Job;
use paceline_planner::lower::{AbstractStage, Blueprint, Form, States, Substance, lower, lower_unchecked};
use paceline_planner::schedules::{Request, build};
use paceline_sim::program::{Device, Program, Stage, Unit};
use std::hint::black_box;

fn ops(program: &Program) -> u64 {
    program.ranks.iter().map(|rank| rank.ops.len() as u64).sum()
}

fn lowering(c: &mut Criterion) {
    let order = build("interleaved", &Request::new(16, 128).chunks(2)).unwrap();
    let stages = order.placement.stages();
    let size =
        AbstractStage { parameters: 1 << 20, message: 1 << 16, until_b: 1 << 20, until_w: 1 << 19, checkpoint: 0 };
    let blueprint = Blueprint {
        order: &order,
        substance: Substance::Abstract(vec![size; stages]),
        stages: vec![Stage { units: vec![Unit { layers: vec![] }] }; stages],
        data: 1,
        states: States::default(),
        devices: (0..16).map(|n| Device { name: format!("gpu:{n}"), node: n / 8 }).collect(),
        form: Form::Full,
    };
    let mut group = c.benchmark_group("interleaved p=16 m=128 v=2");
    group.throughput(Throughput::Elements(ops(&lower(&blueprint).unwrap())));
    group.bench_function("lower", |b| b.iter(|| lower_unchecked(black_box(&blueprint)).unwrap()));
    group.bench_function("lower and check", |b| b.iter(|| lower(black_box(&blueprint)).unwrap()));
    group.finish();

    let text =
        "model = 'llama-3-8b'\nseq = 4096\nglobal_batch = 256\npp = 8\ndp = 2\nschedule = 'zb-h1'\nstates = 'zero1'";
    let job = Job::from_table(text.parse().unwrap(), "bench").unwrap();
    let configuration = Configuration::of_job(&job).unwrap();
    let machine = Machine { devices: 16, flops_per_second: None };
    let program = || configuration.program_unchecked(&job, machine, Form::Representative).unwrap();
    let mut group = c.benchmark_group("llama-3-8b zb-h1 p=8 m=128");
    group.throughput(Throughput::Elements(ops(&program())));
    group.bench_function("lower", |b| b.iter(program));
    group.finish();
}

criterion_group!(benches, lowering);
criterion_main!(benches);
