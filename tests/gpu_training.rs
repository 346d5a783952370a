//! A step on the GPU's code path, on an emulated GPU: the same program, kernels of the GPU, memory that the host may not touch,
//! communication as copies and sums on the device. Losses and gradients are those of the CPU.

use paceline_exec::measure::{MeasureSettings, calibrate, grid_around};
use paceline_exec::{Dataset, RunReport, RunSettings, Silent, run};
use paceline_kernels::{CpuDevice, Device, EmulatedGpu};
use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::Job;
use paceline_profiles::{DType, KernelKey, KernelOp, Predictor, Subject};
use std::path::Path;
use std::time::Duration;

/// The first GPU of the driver with `PACELINE_TEST_DEVICE=cuda`, else the emulated one.
fn gpu() -> (Box<dyn Device>, bool) {
    match std::env::var("PACELINE_TEST_DEVICE").as_deref() {
        Ok("cuda") => {
            let cache = std::env::temp_dir().join("paceline-kernel-tests");
            (Box::new(paceline_kernels::CudaDevice::open(0, &cache).unwrap()), true)
        }
        _ => {
            // A bundled executable has no target folder.
            let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
            let cache = if target.is_dir() { target.to_path_buf() } else { std::env::temp_dir() };
            (Box::new(EmulatedGpu::open(&cache).unwrap()), false)
        }
    }
}

fn train(lines: &str, steps: u64, device: &dyn Device) -> RunReport {
    let job = Job::from_table(lines.parse().unwrap(), "job.toml").unwrap();
    let configuration = Configuration::of_job(&job).unwrap();
    let program = configuration.program(&job, Machine { devices: 1, flops_per_second: None }).unwrap();
    let mut settings = RunSettings::new(steps, 1e-2);
    // Poison fills every buffer from the host, which is too slow for large models.
    (settings.capture_gradients, settings.poison) = (true, job.model.hidden < 512);
    let data = Dataset::bundled();
    run(&program, device, &settings, &data, &mut Silent).unwrap()
}

/// The norm of the difference of two tensors, and that of the expected one.
fn apart(expected: &[f32], got: &[f32]) -> (f64, f64) {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = &mut expected.iter().zip(got).map(|(&a, &b)| f64::from(a) - f64::from(b));
    (norm(difference), norm(&mut expected.iter().map(|&x| f64::from(x))))
}

/// Losses, gradients (by tensor, relative to its size) and memory of both.
fn assert_alike(lines: &str, expected: &RunReport, got: &RunReport, loss: f64, gradient: f64) {
    for (expected, got) in expected.steps.iter().zip(&got.steps) {
        let apart = (expected.loss - got.loss).abs();
        assert!(apart <= loss * expected.loss, "{lines}: {} and {}", expected.loss, got.loss);
    }
    assert_eq!(expected.gradients.len(), got.gradients.len());
    for (name, expected) in &expected.gradients {
        let (error, scale) = apart(expected, &got.gradients[name]);
        assert!(error <= gradient * scale + 1e-9, "{lines}: {name} is off by {}", error / scale);
    }
    for (expected, got) in expected.memory.iter().zip(&got.memory) {
        assert_eq!(expected, got, "the same arena, the same peak");
    }
    assert!(!got.kernels.is_empty(), "kernels of the last step are timed");
}

#[test]
fn pipelines_and_sharded_replicas_train_on_the_gpu_as_on_the_cpu() {
    let (gpu, _) = gpu();
    for layout in [
        "pp = 2\nmicro_batch = 1\nschedule = 'zb-h1'\nmodel = 'demo-1m'",
        "dp = 2\nmicro_batch = 2\nstates = 'zero1'\nmodel = 'demo-gpt-1m'",
    ] {
        let lines = format!("{layout}\nseq = 8\nglobal_batch = 4\n");
        // Of the second step: the first update divides by roots of squares, which enlarges what rounding left.
        assert_alike(&lines, &train(&lines, 2, &CpuDevice::new()), &train(&lines, 2, &*gpu), 1e-5, 1e-3);
    }
}

/// Values are rounded to eight bits in other places of a kernel, and sums are made in another order.
#[test]
fn narrow_values_train_on_the_gpu_as_on_the_cpu() {
    let (gpu, _) = gpu();
    for (layout, precision) in [
        ("pp = 2\nmicro_batch = 1\nschedule = 'zb-h1'\nmodel = 'demo-1m'", "bf16"),
        ("dp = 2\nmicro_batch = 1\nstates = 'zero3'\nmodel = 'demo-gpt-1m'", "bf16"),
        ("pp = 2\nmicro_batch = 1\nschedule = 'zb-h1'\nmodel = 'demo-gpt-1m'", "bf16-fp32-gradients"),
        ("dp = 2\nmicro_batch = 1\nstates = 'zero3'\nmodel = 'demo-1m'", "bf16-fp32-gradients"),
    ] {
        let lines = format!("{layout}\nseq = 8\nglobal_batch = 2\nprecision = '{precision}'\n");
        assert_alike(&lines, &train(&lines, 1, &CpuDevice::new()), &train(&lines, 1, &*gpu), 2e-3, 2e-2);
    }
}

/// bfloat16 on the GPU against 32 bits: every gradient of GPT-2 124M (against the CPU) and of a llama of 1.1 billion parameters (against the same
/// GPU); on the emulated GPU, of small models.
#[test]
fn gradients_in_bfloat16_are_those_in_32_bits() {
    let (gpu, real) = gpu();
    let folder = tempfile::tempdir().unwrap();
    let one_billion = folder.path().join("one-billion.json");
    std::fs::write(
        &one_billion,
        r#"{"model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 8192, "vocab_size": 32000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": false}"#,
    )
    .unwrap();
    let path = one_billion.display().to_string();
    let cases: [(&str, &str, bool); 2] = if real {
        [("gpt2", "seq = 256", true), (path.as_str(), "seq = 512", false)]
    } else {
        [("demo-gpt-1m", "seq = 8", true), ("demo-1m", "seq = 8", true)]
    };
    for (model, seq, on_cpu) in cases {
        let lines = |precision: &str| {
            format!("model = '{model}'\n{seq}\nglobal_batch = 1\nmicro_batch = 1\nprecision = '{precision}'\n")
        };
        let cpu = CpuDevice::new();
        let reference: &dyn Device = if on_cpu { &cpu } else { &*gpu };
        let expected = train(&lines("fp32"), 1, reference);
        let got = train(&lines("bf16-fp32-gradients"), 1, &*gpu);
        let mut worst = (0.0f64, "");
        for (name, expected) in &expected.gradients {
            let (error, scale) = apart(expected, &got.gradients[name]);
            let error = error / scale.max(1e-12);
            if error > worst.0 {
                worst = (error, name);
            }
        }
        let loss = (expected.steps[0].loss - got.steps[0].loss).abs() / expected.steps[0].loss;
        println!(
            "{{\"model\": {model:?}, \"worst_gradient_error\": {}, \"tensor\": {:?}, \"loss_error\": {loss}}}",
            worst.0, worst.1
        );
        // Small models have nothing to average rounding over.
        let allowed = if real { 1e-2 } else { 1e-1 };
        assert!(worst.0 <= allowed, "{model}: the gradient of {} is off by {:.2e}", worst.1, worst.0);
        assert!(loss <= 5e-3, "{model}: the loss is off by {loss:.2e}");
        for memory in &got.memory {
            assert!(memory.peak_bytes <= memory.reserved_bytes, "the arena holds the peak");
        }
    }
}

/// The way of `calibrate --device cuda` on the emulated GPU: every kind of row, by the device's clock, beside copies too, and a profile that predicts.
#[test]
fn a_profile_of_a_gpu_has_kernels_copies_collectives_and_overheads() {
    let (gpu, _) = gpu();
    let key = |op, dims: &[u32]| KernelKey::new(op, dims).unwrap();
    let keys = [
        key(KernelOp::MatmulNt, &[16, 32, 8]),
        key(KernelOp::MatmulTn, &[16, 32, 8]).with(DType::Bf16F32),
        key(KernelOp::RmsNorm, &[16, 32]),
        key(KernelOp::Add, &[256]).with(DType::Bf16),
    ];
    let settings = MeasureSettings {
        budget: Duration::from_millis(300),
        working_set_bytes: 64 << 10,
        ..MeasureSettings::default()
    };
    let mut fractions = Vec::new();
    let profile =
        calibrate(&*gpu, &keys, &grid_around(&keys[..1]), &settings, &mut |at| fractions.push(at.fraction), None)
            .unwrap();
    assert!(fractions.is_sorted() && (fractions[fractions.len() - 1] - 1.0).abs() < 1e-9);
    assert_eq!(profile.machine.device, gpu.name());
    assert!(profile.rows.iter().all(|row| row.median_seconds > 0.0 && row.repetitions >= 3), "{:?}", profile.rows);
    let of = |wanted: &dyn Fn(&Subject) -> bool, busy: u32| {
        profile.rows.iter().filter(|row| wanted(&row.subject) && row.busy_devices == busy).count()
    };
    for key in &keys {
        for busy in [1, 2] {
            assert_eq!(of(&|subject| *subject == Subject::Kernel(key.clone()), busy), 1, "{key} {busy}");
        }
    }
    assert_eq!(of(&|subject| matches!(subject, Subject::Kernel(key) if key.op == KernelOp::Zero), 1), 1, "launches");
    assert!(of(&|subject| matches!(subject, Subject::Transfer { .. }), 1) >= 2);
    assert!(of(&|subject| matches!(subject, Subject::Collective { .. }), 1) >= 8);
    assert!(of(&|subject| matches!(subject, Subject::Overhead(_)), 1) >= 3);
    let predictor = Predictor::new(&profile).unwrap();
    assert!(predictor.kernel(&key(KernelOp::MatmulNt, &[64, 64, 64]), 1).seconds > 0.0);
}
