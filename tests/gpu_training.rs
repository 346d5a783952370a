//! A step on the GPU's code path, on an emulated GPU: the same program, kernels of the GPU, memory that the host may not touch,
//! communication as copies and sums on the device. Losses and gradients are those of the CPU.

use paceline_exec::{Dataset, RunReport, RunSettings, Silent, run};
use paceline_kernels::{CpuDevice, Device, EmulatedGpu};
use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::Job;
use std::path::Path;

fn train(lines: &str, steps: u64, device: &dyn Device) -> RunReport {
    let job = Job::from_table(lines.parse().unwrap(), "job.toml").unwrap();
    let configuration = Configuration::of_job(&job).unwrap();
    let program = configuration.program(&job, Machine { devices: 1, flops_per_second: None }).unwrap();
    let mut settings = RunSettings::new(steps, 1e-2);
    (settings.capture_gradients, settings.poison) = (true, true);
    let data = Dataset::bundled();
    run(&program, device, &settings, &data, &mut Silent).unwrap()
}

/// Losses, gradients (by tensor, relative to its size) and memory of both.
fn assert_alike(lines: &str, expected: &RunReport, got: &RunReport, loss: f64, gradient: f64) {
    for (expected, got) in expected.steps.iter().zip(&got.steps) {
        let apart = (expected.loss - got.loss).abs();
        assert!(apart <= loss * expected.loss, "{lines}: {} and {}", expected.loss, got.loss);
    }
    assert_eq!(expected.gradients.len(), got.gradients.len());
    for (name, expected) in &expected.gradients {
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let scale = norm(&mut expected.iter().map(|&x| f64::from(x)));
        let error = norm(&mut expected.iter().zip(&got.gradients[name]).map(|(&a, &b)| f64::from(a) - f64::from(b)));
        assert!(error <= gradient * scale + 1e-9, "{lines}: {name} is off by {}", error / scale);
    }
    for (expected, got) in expected.memory.iter().zip(&got.memory) {
        assert_eq!(expected, got, "the same arena, the same peak");
    }
    assert!(!got.kernels.is_empty(), "kernels of the last step are timed");
}

#[test]
fn pipelines_and_sharded_replicas_train_on_the_gpu_as_on_the_cpu() {
    let gpu = EmulatedGpu::open(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    for layout in [
        "pp = 2\nmicro_batch = 1\nschedule = 'zb-h1'\nmodel = 'demo-1m'",
        "dp = 2\nmicro_batch = 2\nstates = 'zero1'\nmodel = 'demo-gpt-1m'",
    ] {
        let lines = format!("{layout}\nseq = 8\nglobal_batch = 4\n");
        // Of the second step: the first update divides by roots of squares, which enlarges what rounding left.
        assert_alike(&lines, &train(&lines, 2, &CpuDevice::new()), &train(&lines, 2, &gpu), 1e-5, 1e-3);
    }
}

/// Values are rounded to eight bits in other places of a kernel, and sums are made in another order.
#[test]
fn narrow_values_train_on_the_gpu_as_on_the_cpu() {
    let gpu = EmulatedGpu::open(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    for layout in [
        "pp = 2\nmicro_batch = 1\nschedule = 'zb-h1'\nmodel = 'demo-1m'",
        "dp = 2\nmicro_batch = 1\nstates = 'zero3'\nmodel = 'demo-gpt-1m'",
    ] {
        let lines = format!("{layout}\nseq = 8\nglobal_batch = 2\nprecision = 'bf16-fp32-gradients'\n");
        assert_alike(&lines, &train(&lines, 1, &CpuDevice::new()), &train(&lines, 1, &gpu), 2e-3, 2e-2);
    }
    let lines = "model = 'demo-1m'\nseq = 8\nglobal_batch = 1\nprecision = 'bf16'\n";
    let job = Job::from_table(lines.parse().unwrap(), "job.toml").unwrap();
    let program =
        Configuration::of_job(&job).unwrap().program(&job, Machine { devices: 1, flops_per_second: None }).unwrap();
    let refused = run(&program, &gpu, &RunSettings::new(1, 1e-2), &Dataset::bundled(), &mut Silent).unwrap_err();
    assert!(refused.to_string().contains("bf16-fp32-gradients"), "{refused}");
}
