//! How fast a real model trains, and how much of what this machine can multiply reaches it: tokens per second of a model of 25
//! million parameters on one device and on all, with its share of the best rate of large matrix products, measured in the
//! same run on as many cores.
//!
//! `cargo bench --bench training`

use paceline_exec::{Dataset, RunSettings, Silent, run};
use paceline_kernels::{Call, CpuDevice, DType, Device};
use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::Job;
use paceline_sim::model::model_flops_per_token;
use std::time::Instant;

/// Side of the square matrices: large enough to hide all that is not multiplying.
const SIDE: u32 = 1024;
/// Products per measurement, of which the best counts.
const REPETITIONS: u32 = 8;

/// The best rate of one core, in FLOP/s, while so many multiply at once.
fn peak(device: &CpuDevice, cores: u32) -> f64 {
    let bytes = (SIDE * SIDE * 4) as usize;
    let one = || {
        let blocks: Vec<_> = (0..3).map(|_| device.allocate(bytes).unwrap()).collect();
        let view = |n: usize| blocks[n].view(0, (SIDE * SIDE) as usize, DType::F32);
        for n in 0..2 {
            let ones: Vec<u8> = std::iter::repeat_n(1.0f32.to_ne_bytes(), (SIDE * SIDE) as usize).flatten().collect();
            // SAFETY: the blocks live in this function and no other thread knows them.
            unsafe { device.upload(&ones, view(n)) }.unwrap();
        }
        let call = Call::MatMul {
            a: view(0),
            b: view(1),
            c: view(2),
            m: SIDE,
            n: SIDE,
            k: SIDE,
            transpose_a: false,
            transpose_b: true,
            accumulate: false,
        };
        let mut best = f64::INFINITY;
        for _ in 0..REPETITIONS {
            let begin = Instant::now();
            // SAFETY: as above.
            unsafe { device.run(&call) }.unwrap();
            best = best.min(begin.elapsed().as_secs_f64());
        }
        2.0 * f64::from(SIDE).powi(3) / best
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..cores).map(|_| scope.spawn(one)).collect();
        let rates: Vec<f64> = all.into_iter().map(|thread| thread.join().unwrap()).collect();
        rates.iter().sum::<f64>() / rates.len() as f64
    })
}

fn main() {
    let device = CpuDevice::new();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let data = Dataset::bundled();
    println!(
        "{:<10} {:>7} {:>4} {:>12} {:>10} {:>16} {:>8}",
        "model", "devices", "seq", "micro-batch", "tokens/s", "peak GFLOP/s", "share"
    );
    for (seq, micro_batch) in [(256, 4), (1024, 1)] {
        for devices in [1, cores] {
            let text = format!("model = 'demo-25m'\nseq = {seq}\nglobal_batch = {}", devices * micro_batch);
            let job = Job::from_table(text.parse().unwrap(), "bench").unwrap();
            let configuration = Configuration { dp: devices, micro_batch, ..Configuration::of_job(&job).unwrap() };
            let machine = Machine { devices, flops_per_second: None };
            let program = configuration.program(&job, machine).unwrap();
            let before = peak(&device, devices);
            let report = run(&program, &device, &RunSettings::new(6, 1e-3), &data, &mut Silent).unwrap();
            let peak = before.max(peak(&device, devices));
            let rate = report.tokens_per_step as f64 / report.median_seconds();
            let share = rate * model_flops_per_token(&job.model, seq) / (peak * f64::from(devices));
            println!(
                "{:<10} {devices:>7} {seq:>4} {micro_batch:>12} {rate:>10.0} {:>16.1} {:>7.1}%",
                job.model.name,
                peak / 1e9,
                share * 100.0
            );
            if devices == cores {
                break;
            }
        }
    }
    let model = paceline_sim::model::ModelConfig::preset("demo-25m").unwrap();
    println!("{}: {} parameters", model.name, model.parameters());
}
