//! Weight decay acts on matrices and leaves norms and biases alone, wherever the cut of a shard falls.

use paceline_exec::{Dataset, LearningRate, OptimizerSettings, RunSettings, Silent, run};
use paceline_kernels::CpuDevice;
use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::Job;
use std::collections::BTreeMap;

const RATE: f64 = 0.01;

/// Parameters by name after one step.
fn after_one_step(layout: &str, weight_decay: f32) -> BTreeMap<String, Vec<f32>> {
    let text = format!("model = 'demo-gpt-1m'\nseq = 16\nglobal_batch = 6\n{layout}");
    let job = Job::from_table(text.parse().unwrap(), "test").unwrap();
    let machine = Machine { devices: 2, flops_per_second: None };
    let program = Configuration::of_job(&job).unwrap().program(&job, machine).unwrap();
    let optimizer =
        OptimizerSettings { learning_rate: LearningRate::constant(RATE), weight_decay, ..OptimizerSettings::default() };
    let settings = RunSettings { optimizer, capture_gradients: true, ..RunSettings::new(1, RATE) };
    run(&program, &CpuDevice::new(), &settings, &Dataset::bundled(), &mut Silent).unwrap().parameters
}

#[test]
fn norms_and_biases_do_not_decay() {
    let [none, once, twice] = [0.0, 1.0, 2.0].map(|decay| after_one_step("", decay));
    let (mut decayed, mut kept) = (0, 0);
    for (name, plain) in &none {
        let is_matrix = !name.ends_with("bias") && !name.contains("norm");
        for ((&p, &a), &b) in plain.iter().zip(&once[name]).zip(&twice[name]) {
            if is_matrix {
                // Each unit of decay takes the same part of the first value.
                assert!(((p - a) - (a - b)).abs() < 1e-6, "{name}: {p} {a} {b}");
            } else {
                assert!(p == a && a == b, "{name}: {p} {a} {b}");
            }
        }
        let moved = plain.iter().zip(&once[name]).filter(|(p, a)| p != a).count();
        if is_matrix {
            assert!(moved > plain.len() / 2, "{name}: {moved} of {}", plain.len());
            decayed += 1;
        } else {
            kept += 1;
        }
    }
    // Six blocks of four matrices, embedding, positions and head or tied; norms with bias and the biases of linear layers.
    assert!(decayed >= 26 && kept >= 6 * 8, "{decayed} {kept}");
}

#[test]
fn shards_decay_as_the_whole_does() {
    let whole = after_one_step("", 0.5);
    // Three shards cut matrices, norms and biases anywhere.
    for layout in ["dp = 3\nstates = 'zero1'", "dp = 2\npp = 2\nstates = 'zero1'\nmicro_batch = 3"] {
        for (name, values) in after_one_step(layout, 0.5) {
            for (a, b) in values.iter().zip(&whole[&name]) {
                // Adam's first step is the sign of the gradient times the rate: elements with almost no gradient may differ.
                assert!((a - b).abs() <= 2.1 * RATE as f32, "{layout}: {name}: {a} {b}");
            }
            let off = values.iter().zip(&whole[&name]).filter(|(a, b)| (**a - **b).abs() > 1e-4).count();
            assert!(off <= values.len() / 100, "{layout}: {name}: {off} of {}", values.len());
        }
    }
}
