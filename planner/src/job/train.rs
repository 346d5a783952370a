//! How to train: the `[train]` table of a job.

use super::JobError;
use super::fields::Fields;
use serde::{Deserialize, Serialize};

/// Settings of training. Defaults are those of GPT-3 and llama at small scale.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Train {
    /// Steps in all.
    pub steps: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps until the peak is reached.
    pub warmup: u64,
    /// Rate at the end of the cosine.
    pub min_lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Global gradient norm to which gradients are clipped; none when absent.
    pub clip: Option<f64>,
    /// Seeds first parameters and the order of the data.
    pub seed: u64,
    /// A text file, a `.bin` token file or a directory; the repository's own texts when absent.
    pub data: Option<String>,
    /// Share of the held-out data that an evaluation reads.
    pub validation: f64,
}

impl Default for Train {
    fn default() -> Self {
        Train {
            steps: 100,
            lr: 1e-3,
            warmup: 10,
            min_lr: 1e-4,
            weight_decay: 0.1,
            clip: Some(1.0),
            seed: 0,
            data: None,
            validation: 0.1,
        }
    }
}

const KEYS: &[&str] = &["steps", "lr", "warmup", "min_lr", "weight_decay", "clip", "seed", "data", "validation"];

impl Train {
    pub(super) fn from_fields(job: &mut Fields) -> Result<Train, JobError> {
        let fields = job.inner("train", "train.", KEYS)?;
        let usual = Train::default();
        let steps = match fields.whole("steps")? {
            Some(0) => return Err(fields.wrong("steps", &toml::Value::Integer(0), "a whole number from 1 on")),
            given => given.unwrap_or(usual.steps),
        };
        let lr = fields.number("lr", "a number above 0, for example 3e-4", |x| x > 0.0)?.unwrap_or(usual.lr);
        let least = |x: f64| (0.0..=lr).contains(&x);
        let min_lr = fields.number("min_lr", "a number from 0 to lr", least)?.unwrap_or(lr / 10.0);
        let clip = fields.number("clip", "a norm from 0 on, for example 1.0; 0 for none", |x| x >= 0.0)?;
        let share = "a share above 0 and up to 1";
        Ok(Train {
            steps,
            lr,
            warmup: fields.whole("warmup")?.unwrap_or(usual.warmup.min(steps / 10)),
            min_lr,
            weight_decay: fields
                .number("weight_decay", "a number from 0 on, for example 0.1", |x| x >= 0.0)?
                .unwrap_or(usual.weight_decay),
            clip: clip.map_or(usual.clip, |clip| (clip > 0.0).then_some(clip)),
            seed: fields.whole("seed")?.unwrap_or(usual.seed),
            data: fields.optional_text("data")?,
            validation: fields.number("validation", share, |x| x > 0.0 && x <= 1.0)?.unwrap_or(usual.validation),
        })
    }
}
