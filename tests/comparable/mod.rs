//! Settings of runs whose weights are compared.

use paceline_exec::{LearningRate, OptimizerSettings, RunSettings};

pub fn settings(steps: u64) -> RunSettings {
    RunSettings {
        optimizer: OptimizerSettings {
            learning_rate: LearningRate::constant(1e-3),
            clip: Some(0.5),
            // Adam divides each gradient by its own size, and would make of the rounding error of an element that is nearly zero
            // one of the learning rate; below this size it does not.
            epsilon: 1e-2,
            ..OptimizerSettings::default()
        },
        seed: 5,
        capture_gradients: true,
        poison: true,
        ..RunSettings::new(steps, 1e-3)
    }
}
