//! Steps that follow each other without a barrier: the optimizer goes ahead of the gradient norm and is taken back where it
//! guessed wrong. Training ends with the same bits as with the barrier, and ranks hold what was predicted.

use paceline_exec::{
    Dataset, LearningRate, Observer, OptimizerSettings, RunReport, RunSettings, Silent, rehearse, run,
};
use paceline_kernels::CpuDevice;
use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::Job;
use paceline_planner::lower::{AbstractStage, Blueprint, Form, States, Substance, lower, unroll};
use paceline_planner::schedules::{Request, build};
use paceline_sim::cost::FixedTimes;
use paceline_sim::engine::simulate;
use paceline_sim::memory::walk;
use paceline_sim::program::{Device, Program, Stage, Unit};
use paceline_sim::units::{Nanos, RankId};

/// One step with 4 devices at most.
fn step(layout: &str) -> Program {
    let text = format!("model = 'demo-1m'\nseq = 16\nglobal_batch = 8\n{layout}");
    let job = Job::from_table(text.parse().unwrap(), "test").unwrap();
    Configuration::of_job(&job).unwrap().program(&job, Machine { devices: 2, flops_per_second: None }).unwrap()
}

fn train(program: &Program, steps: u64, clip: Option<f32>, observer: &mut dyn Observer) -> RunReport {
    let optimizer =
        OptimizerSettings { learning_rate: LearningRate::constant(3e-3), clip, ..OptimizerSettings::default() };
    let settings =
        RunSettings { optimizer, capture_gradients: true, poison: true, seed: 3, ..RunSettings::new(steps, 3e-3) };
    run(program, &CpuDevice::new(), &settings, &Dataset::bundled(), observer).unwrap()
}

fn assert_same_bits(what: &str, found: &RunReport, expected: &RunReport) {
    assert_eq!(found.parameters.len(), expected.parameters.len());
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    for (name, values) in &expected.parameters {
        assert!(bits(&found.parameters[name]) == bits(values), "{what}: {name} differs");
    }
    for (name, values) in &expected.gradients {
        assert!(bits(&found.gradients[name]) == bits(values), "{what}: last gradient of {name} differs");
    }
    let told = |report: &RunReport| {
        let steps = report.steps.iter();
        steps.map(|s| (s.step, s.loss.to_bits(), s.gradient_norm.to_bits(), s.learning_rate)).collect::<Vec<_>>()
    };
    assert_eq!(told(found), told(expected), "{what}");
}

#[test]
fn schedules_train_to_the_same_bits() {
    for layout in [
        "pp = 4\nschedule = 'zb-h2'",
        "pp = 4\nschedule = '1f1b'",
        "pp = 2\nschedule = 'zb-v'",
        "pp = 2\ndp = 2\nschedule = 'zb-h1'",
        "pp = 2\nschedule = 'dualpipe'",
        "pp = 2\nschedule = 'interleaved'\nchunks = 2\nrecompute = 'full'",
    ] {
        let one = step(layout);
        let free = unroll(one.clone(), 3).unwrap();
        let plain = train(&one, 8, None, &mut Silent);
        let norms: Vec<f64> = plain.steps.iter().map(|step| step.gradient_norm).collect();
        assert_same_bits(layout, &train(&free, 8, None, &mut Silent), &plain);
        // A limit that some steps exceed and others do not, and one that all exceed.
        let mut sorted = norms.clone();
        sorted.sort_by(f64::total_cmp);
        for clip in [(sorted[3] + sorted[4]) as f32 / 2.0, sorted[0] as f32 / 10.0] {
            let expected = train(&one, 8, Some(clip), &mut Silent);
            let clipped = expected.steps.iter().filter(|step| step.gradient_norm > f64::from(clip)).count();
            let found = train(&free, 8, Some(clip), &mut Silent);
            println!("{layout:?} clip {clip}: {clipped} of 8 steps clipped");
            assert!(clipped >= 2, "{layout}: {norms:?} against {clip}");
            assert_same_bits(layout, &found, &expected);
        }
        // 8 steps are 1, 3, 3 and 1: whole programs are among them.
        let found = train(&free, 8, None, &mut Silent);
        for (rank, measured) in (0..).zip(&found.memory) {
            let walked = walk(&free, RankId(rank));
            assert_eq!(measured.peak_bytes, walked.peak_bytes, "{layout}: rank {rank}");
            assert_eq!(measured.peak_by_class, walked.peak_by_class, "{layout}: rank {rank}");
        }
    }
}

#[test]
fn the_job_key_runs_several_steps_at_once() {
    let layout = "pp = 2\nschedule = 'zb-h2'";
    assert_eq!(step(&format!("{layout}\nbarrier_every = 4")), unroll(step(layout), 4).unwrap());
    // Without a pipeline there is no barrier to speak of.
    assert_eq!(step("dp = 2\nbarrier_every = 4").steps(), 1);
}

/// Rehearsals until one lands close: lateness is the machine's, and a busy machine wakes sleepers late.
const ATTEMPTS: usize = 4;

#[test]
fn a_rehearsed_schedule_gains_what_was_simulated() {
    let (p, m, steps) = (8, 16, 4);
    let order = build("zb-h2", &Request::new(p, m)).unwrap();
    let size = AbstractStage { parameters: 4096, message: 64, checkpoint: 0, until_b: 340, until_w: 320 };
    let one = lower(&Blueprint {
        order: &order,
        substance: Substance::Abstract(vec![size; p as usize]),
        stages: vec![Stage { units: vec![Unit { layers: vec![] }] }; p as usize],
        data: 1,
        states: States::default(),
        devices: (0..p).map(|n| Device { name: format!("paced:{n}"), node: 0 }).collect(),
        form: Form::Full,
    })
    .unwrap();
    let free = unroll(one.clone(), steps).unwrap();
    let pass = Nanos(2_000_000);
    let costs = FixedTimes { optimizer: Nanos(500_000), ..FixedTimes::uniform(pass, pass, pass, Nanos(100_000)) };
    let [barrier, without] = [&one, &free].map(|program| simulate(program, &costs).unwrap().makespan.seconds());
    let (barrier, without) = (barrier, without / f64::from(steps));
    let mut fastest = f64::INFINITY;
    for _ in 0..ATTEMPTS {
        let rehearsal = rehearse(&free, &costs, 2, None).unwrap();
        fastest = rehearsal.iteration_seconds.iter().copied().fold(fastest, f64::min);
        for (rank, memory) in (0..).zip(&rehearsal.memory) {
            assert_eq!(memory.peak_bytes, walk(&free, RankId(rank)).peak_bytes);
        }
        if fastest < 1.03 * without {
            break;
        }
    }
    println!("per step: {barrier:.4} s with the barrier, {without:.4} s without, rehearsed {fastest:.4} s");
    assert!(without < 0.92 * barrier, "{without} {barrier}");
    assert!((1.0..1.03).contains(&(fastest / without)), "{fastest} {without}");
}
