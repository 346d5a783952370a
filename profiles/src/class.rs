//! Classes of what is measured: the subjects that share a curve, a ratio and a correction.

use crate::kernel_key::{DType, Family, KernelOp};
use crate::row::{CollectiveRound, Overhead, Subject};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is fitted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// All shapes of a kernel on operands of one type.
    Kernel(KernelOp, DType),
    /// Messages of all sizes.
    Transfer,
    /// A round of collectives of all sizes.
    Collective(CollectiveRound),
    /// A cost of the executor.
    Overhead(Overhead),
}

impl Class {
    /// The class of a subject.
    pub fn of(subject: &Subject) -> Class {
        match subject {
            Subject::Kernel(key) => Class::Kernel(key.op, key.dtype),
            Subject::Transfer { .. } => Class::Transfer,
            Subject::Collective { round, .. } => Class::Collective(*round),
            Subject::Overhead(overhead) => Class::Overhead(*overhead),
        }
    }

    /// The family of its kernels; everything else moves memory.
    pub(crate) fn family(self) -> Family {
        match self {
            Class::Kernel(op, _) => op.family(),
            _ => Family::Memory,
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Class::Kernel(op, DType::F32) => write!(f, "{op}"),
            Class::Kernel(op, dtype) => write!(f, "{op} {dtype}"),
            Class::Transfer => f.write_str("transfer"),
            Class::Collective(round) => write!(f, "collective {}", round.name()),
            Class::Overhead(overhead) => write!(f, "overhead {}", overhead.name()),
        }
    }
}
