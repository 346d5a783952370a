//! What a run is told beside the program and the data.

use crate::error::ExecError;
use crate::learning_rate::LearningRate;
use crate::processes::Processes;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Settings of [`crate::run`].
#[derive(Debug, Clone)]
pub struct RunSettings {
    /// Train until this many steps are done, those before a resumed checkpoint included.
    pub steps: u64,
    /// Seeds the first parameters and the order of the data.
    pub seed: u64,
    /// The optimizer.
    pub optimizer: OptimizerSettings,
    /// Loss on held-out data, if wanted.
    pub evaluation: Option<Evaluation>,
    /// Where to write checkpoints, if anywhere.
    pub checkpoint: Option<CheckpointSettings>,
    /// Directory of a checkpoint (or of several: the latest) to go on from.
    pub resume: Option<PathBuf>,
    /// When it becomes true, the run ends after the present step, with a checkpoint if there is a place for it.
    pub stop: Option<Arc<AtomicBool>>,
    /// Report the gradients of the last step, reduced and not yet clipped.
    pub capture_gradients: bool,
    /// Fill new buffers with NaN, so that reading what nobody wrote shows.
    pub poison: bool,
    /// Keep the ranks of a device on one core; by default where several ranks share a device and every device can have
    /// its core, because handing a device over is several times faster within a core than between cores.
    pub pin: Option<bool>,
    /// Let the host run ahead of a device that has queues: ops are only queued, and wait for each other on the device. Else the host
    /// waits for every op.
    pub run_ahead: bool,
    /// Keep the kernels of a pass, where the host runs ahead, and launch them as one from the third step on: their operands are the same in
    /// every step.
    pub graphs: bool,
    /// The other processes, where each rank has its own; without, all ranks run in this one.
    pub processes: Option<Processes>,
}

impl RunSettings {
    /// `steps` steps with the usual optimizer at a peak rate, warming up over the first tenth.
    pub fn new(steps: u64, peak_learning_rate: f64) -> RunSettings {
        let learning_rate = LearningRate {
            peak: peak_learning_rate,
            floor: peak_learning_rate / 10.0,
            warmup_steps: steps / 10,
            total_steps: steps,
        };
        RunSettings {
            steps,
            seed: 0,
            optimizer: OptimizerSettings { learning_rate, ..OptimizerSettings::default() },
            evaluation: None,
            checkpoint: None,
            resume: None,
            stop: None,
            capture_gradients: false,
            poison: false,
            pin: None,
            run_ahead: true,
            graphs: false,
            processes: None,
        }
    }
}

/// AdamW (Loshchilov and Hutter 2019) with clipping by the global gradient norm.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OptimizerSettings {
    /// The rate of every step.
    pub learning_rate: LearningRate,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Gradients are scaled down to this global norm.
    pub clip: Option<f32>,
}

impl Default for OptimizerSettings {
    /// The settings of GPT-3 and llama: betas 0.9 and 0.95, decay 0.1, clipping at 1, and a constant rate of 3e-4.
    fn default() -> Self {
        OptimizerSettings {
            learning_rate: LearningRate::constant(3e-4),
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip: Some(1.0),
        }
    }
}

impl OptimizerSettings {
    /// Refuses values outside their ranges.
    pub fn validate(&self) -> Result<(), ExecError> {
        self.learning_rate.validate()?;
        let refuse = |key, value: f32, allowed: &str| {
            Err(ExecError::Setting { key, value: value.to_string(), allowed: allowed.into() })
        };
        for (key, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return refuse(key, beta, "0 <= beta < 1 is needed, for example 0.9 and 0.95");
            }
        }
        if !(self.epsilon > 0.0 && self.epsilon.is_finite()) {
            return refuse("epsilon", self.epsilon, "a value > 0 is needed, for example 1e-8");
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return refuse("weight_decay", self.weight_decay, "a value >= 0 is needed, for example 0.1");
        }
        match self.clip {
            Some(clip) if clip.is_nan() || clip <= 0.0 => {
                refuse("clip", clip, "a norm > 0 is needed, for example 1.0; leave it out for none")
            }
            _ => Ok(()),
        }
    }
}

/// Measuring the loss on held-out data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Every so many steps, and after the last. The loss before the first step is measured too.
    pub every: u64,
    /// Held-out sequences, spread evenly; all there are if fewer.
    pub sequences: u64,
}

/// Writing checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointSettings {
    /// Each checkpoint is a folder in here.
    pub directory: PathBuf,
    /// Every so many steps; the last step is always written.
    pub every: Option<u64>,
}
