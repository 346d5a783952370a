//! From a job to a trained model: the search's plan is written, read, lowered and run, and holds exactly what was
//! predicted. And a schedule for 32 devices rehearsed in real time.

use paceline_exec::{Dataset, RunSettings, Silent, rehearse, run};
use paceline_kernels::CpuDevice;
use paceline_planner::configuration::Machine;
use paceline_planner::job::Job;
use paceline_planner::lower::{AbstractStage, Blueprint, Form, States, Substance, lower};
use paceline_planner::plan::Plan;
use paceline_planner::schedules::{Request, build};
use paceline_planner::search::search;
use paceline_profiles::{Predictor, Profile};
use paceline_sim::cost::FixedTimes;
use paceline_sim::engine::simulate;
use paceline_sim::memory::walk;
use paceline_sim::program::{Device, Stage, Stream, Unit};
use paceline_sim::units::{Nanos, RankId};
use std::path::Path;

#[test]
fn the_best_plan_of_a_search_trains_and_holds_what_it_said() {
    let text = "model = 'demo-1m'\nseq = 64\nglobal_batch = 8\nmemory_limit = '24MiB'\n[train]\nsteps = 3";
    let job = Job::from_table(text.parse().unwrap(), "job").unwrap();
    let profile = Profile::load(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/profiles/data/cpu.csv"))).unwrap();
    let predictor = Predictor::new(&profile).unwrap();
    let machine = Machine { devices: 2, flops_per_second: None };
    let plans = search(&job, machine, &predictor, 10, &|_| true).unwrap();
    println!(
        "{} candidates, {:?}, {} simulated in {:.3} s, gap {:.3}",
        plans.candidates, plans.pruned, plans.simulated, plans.search_seconds, plans.gap
    );
    for plan in &plans.plans {
        println!("{:.2} ms {}", plan.prediction.iteration_seconds * 1e3, plan.configuration);
    }
    // Without recomputation and sharding two replicas do not fit, and one device alone is slower than two.
    assert!(plans.pruned.memory > 0 && plans.pruned.invalid + plans.pruned.bound < plans.candidates);
    let best = &plans.plans[0];
    assert_eq!(best.configuration.ranks(), 2, "{}", best.configuration);

    let plan = Plan { job, configuration: best.configuration.clone(), machine, prediction: best.prediction.clone() };
    let path = std::env::temp_dir().join(format!("paceline-plan-and-run-{}.json", std::process::id()));
    plan.write(&path).unwrap();
    let read = Plan::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(read, plan);
    let program = read.program().unwrap();
    let report = run(
        &program,
        &CpuDevice::new(),
        &RunSettings::new(read.job.train.steps, read.job.train.lr),
        &Dataset::bundled(),
        &mut Silent,
    )
    .unwrap();
    println!("measured {:.2} ms", report.median_seconds() * 1e3);
    assert!(report.steps[2].loss < report.steps[0].loss);
    for (pipeline, predicted) in best.prediction.memory.peak_bytes.iter().enumerate() {
        let of_rank = |(rank, _): &(usize, _)| program.ranks[*rank].coordinates.pipeline as usize == pipeline;
        let measured = report.memory.iter().enumerate().filter(of_rank).map(|(_, memory)| memory.peak_bytes).max();
        assert_eq!(measured, Some(*predicted));
    }
}

/// Rehearsals per schedule until one lands close: lateness is the machine's, and a busy machine wakes sleepers late.
const ATTEMPTS: usize = 3;

#[test]
fn schedules_for_32_devices_are_rehearsed_at_the_simulated_pace() {
    for name in ["1f1b", "interleaved", "zb-h1", "v-half", "zb-v", "dualpipe-v"] {
        let order = build(name, &Request::new(32, 64)).unwrap();
        let stages = order.placement.stages();
        let size = AbstractStage { parameters: 4096, message: 64, checkpoint: 0, until_b: 340, until_w: 320 };
        let program = lower(&Blueprint {
            order: &order,
            substance: Substance::Abstract(vec![size; stages]),
            stages: vec![Stage { units: vec![Unit { layers: vec![] }] }; stages],
            data: 1,
            states: States::default(),
            devices: (0..32).map(|n| Device { name: format!("paced:{n}"), node: n / 8 }).collect(),
            form: Form::Full,
        })
        .unwrap();
        let chunks = stages as u64 / 32;
        let [f, b, w, comm] = [3_700_000, 3_620_000, 1_860_000, 200_000].map(|whole| Nanos(whole / chunks));
        let costs = FixedTimes { optimizer: Nanos(500_000), ..FixedTimes::uniform(f, b, w, comm) };
        let simulated = simulate(&program, &costs).unwrap();
        let makespan = simulated.makespan.seconds();
        let mut closest = f64::INFINITY;
        for _ in 0..ATTEMPTS {
            let rehearsal = rehearse(&program, &costs, 2, None).unwrap();
            let fastest = rehearsal.iteration_seconds.iter().copied().fold(f64::INFINITY, f64::min);
            closest = closest.min(fastest / makespan);
            for ((rank, memory), trace) in (0..).zip(&rehearsal.memory).zip(&rehearsal.trace.ranks) {
                let walked = walk(&program, RankId(rank));
                assert_eq!((memory.peak_bytes, &memory.peak_by_class), (walked.peak_bytes, &walked.peak_by_class));
                // Ops begin when they are planned to, whenever the thread woke that ran them.
                let starts = trace.events.iter().zip(&simulated.ranks[rank as usize].events);
                for (event, planned) in starts.filter(|(event, _)| event.stream == Stream::COMPUTE) {
                    assert_eq!(event.start, planned.start, "{name}: rank {rank} {}", event.op);
                }
            }
            if closest < 1.03 {
                break;
            }
        }
        println!("{name}: simulated {makespan:.4} s, rehearsed {closest:.4} of that");
        // Never faster than planned.
        assert!((1.0..1.03).contains(&closest), "{name}: {closest} of {makespan} s");
    }
}
