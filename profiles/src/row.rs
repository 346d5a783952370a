//! One measurement: what was timed, on what machine, how often, and with what result.

use crate::context::Context;
use crate::kernel_key::{DType, KernelKey};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What was timed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// A kernel call.
    Kernel(KernelKey),
    /// The copy of a message by its receiver.
    Transfer {
        /// Size of the message.
        bytes: u64,
    },
    /// One member's part of one round of a collective over 32-bit elements.
    Collective {
        /// The round.
        round: CollectiveRound,
        /// Members of the group.
        members: u32,
        /// Size of the whole array.
        bytes: u64,
    },
    /// What the executor itself costs.
    Overhead(Overhead),
}

/// Rounds of a collective of the direct algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CollectiveRound {
    /// A member sums its own shard over all members.
    Reduce,
    /// A member copies the other shards from their owners.
    Gather,
}

/// Costs of the executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overhead {
    /// Of a compute op, beside its kernels.
    Op,
    /// Of a compute op on a device that ranks share, which may have to wake another thread.
    SharedOp,
    /// Of a kernel call, beside the kernel.
    Call,
    /// From the arrival of both sides of a message to the start of its copy.
    Message,
    /// The same where sender and receiver share a device.
    SharedMessage,
    /// From the end of a round of a collective to the start of the next, where everybody is awake.
    Round,
    /// From the moment when an op gets its device after another one to its begin, in runs.
    Turn,
    /// From the end of the op that an op waited for to its begin, in runs.
    Wake,
    /// What other work of the machine takes from a second of kernels, in seconds: how much longer calls last at the mean than at
    /// the median while so many devices work.
    Interference,
}

impl CollectiveRound {
    /// Both.
    pub const ALL: [CollectiveRound; 2] = [CollectiveRound::Reduce, CollectiveRound::Gather];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            CollectiveRound::Reduce => "reduce",
            CollectiveRound::Gather => "gather",
        }
    }
}

impl Overhead {
    /// All of them.
    pub const ALL: [Overhead; 9] = [
        Overhead::Op,
        Overhead::SharedOp,
        Overhead::Call,
        Overhead::Message,
        Overhead::SharedMessage,
        Overhead::Round,
        Overhead::Turn,
        Overhead::Wake,
        Overhead::Interference,
    ];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Overhead::Op => "op",
            Overhead::SharedOp => "shared-op",
            Overhead::Call => "call",
            Overhead::Message => "message",
            Overhead::SharedMessage => "shared-message",
            Overhead::Round => "round",
            Overhead::Turn => "turn",
            Overhead::Wake => "wake",
            Overhead::Interference => "interference",
        }
    }
}

impl Subject {
    /// The first column of a row.
    pub fn kind(&self) -> &'static str {
        match self {
            Subject::Kernel(_) => "kernel",
            Subject::Transfer { .. } => "transfer",
            Subject::Collective { .. } => "collective-work",
            Subject::Overhead(_) => "overhead",
        }
    }

    /// The operator, round or overhead.
    pub fn op(&self) -> &'static str {
        match self {
            Subject::Kernel(key) => key.op.name(),
            Subject::Transfer { .. } => "copy",
            Subject::Collective { round, .. } => round.name(),
            Subject::Overhead(overhead) => overhead.name(),
        }
    }

    /// The number format, where it matters.
    pub fn dtype(&self) -> &'static str {
        match self {
            Subject::Kernel(key) => key.dtype.name(),
            Subject::Collective { .. } => "f32",
            Subject::Transfer { .. } | Subject::Overhead(_) => "",
        }
    }

    /// The dimensions by name.
    pub fn shape(&self) -> String {
        match self {
            Subject::Kernel(key) => key.shape(),
            Subject::Transfer { bytes } => format!("bytes={bytes}"),
            Subject::Collective { members, bytes, .. } => format!("members={members};bytes={bytes}"),
            Subject::Overhead(_) => String::new(),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.kind(), self.op(), self.shape())?;
        match self {
            Subject::Kernel(key) if key.dtype != DType::F32 => write!(f, " {}", key.dtype),
            _ => Ok(()),
        }
    }
}

/// How a time was obtained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// By itself, repeated under the conditions of a run.
    Measured,
    /// Inside a real run.
    Trace,
    /// Stated by a vendor.
    Datasheet,
}

impl Source {
    /// All of them.
    pub const ALL: [Source; 3] = [Source::Measured, Source::Trace, Source::Datasheet];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Source::Measured => "measured",
            Source::Trace => "trace",
            Source::Datasheet => "datasheet",
        }
    }
}

/// The machine that a profile describes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Machine {
    /// The device that ran the kernels, as it names itself.
    pub device: String,
    /// The processor of the host.
    pub host: String,
    /// Logical processors of the host.
    pub cores: u32,
}

impl Machine {
    /// Whether the device is the host's processor.
    pub fn is_host(&self) -> bool {
        self.device == "cpu"
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {} with {} cores", self.device, self.host, self.cores)
    }
}

/// One measurement: a line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was timed.
    pub subject: Subject,
    /// How many devices of the machine worked at that time: they share caches and memory bandwidth.
    pub busy_devices: u32,
    /// The circumstances of the run, where it was timed inside one.
    pub context: Option<Context>,
    /// Median over the repetitions; inside a run, the mean over the calls of a typical step.
    pub median_seconds: f64,
    /// Distance between the quartiles.
    pub spread_seconds: f64,
    /// Number of repetitions.
    pub repetitions: u64,
    /// How it was obtained.
    pub source: Source,
    /// Day of the measurement, UTC, as `2026-11-21`.
    pub date: String,
    /// What was measured with, for example `paceline 0.1.0`.
    pub versions: String,
}
