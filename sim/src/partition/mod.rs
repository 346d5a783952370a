//! How data-parallel ranks share out parameters, gradients and optimizer states: the 27 triples of PaRO (Wu et al.,
//! "Rethinking Memory and Communication Cost for Efficient Large Language Model Training", NeurIPS 2024, section 3).
//!
//! Ranks lie in groups of equal size that fast links join (a node, usually). Each of the three states is held whole by every
//! rank, cut within each group and replicated across groups, or cut over all ranks.
//!
//! [`exchange`] says which collectives a triple needs and when; [`dominance`] which triples are worth having.

pub mod dominance;
pub mod exchange;

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// Over which ranks one state is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Not cut: every rank holds all of it (`N`).
    Whole,
    /// Cut within a group, replicated across groups (`I`).
    Group,
    /// Cut over all data-parallel ranks (`G`).
    Global,
}

impl Level {
    /// All, from the coarsest to the finest.
    pub const ALL: [Level; 3] = [Level::Whole, Level::Group, Level::Global];

    /// Its letter.
    pub fn letter(self) -> char {
        match self {
            Level::Whole => 'N',
            Level::Group => 'I',
            Level::Global => 'G',
        }
    }

    /// Parts that a state is cut into, with `ranks` in all and `group` in a group.
    pub fn parts(self, ranks: u64, group: u64) -> u64 {
        match self {
            Level::Whole => 1,
            Level::Group => group,
            Level::Global => ranks,
        }
    }
}

/// A triple: parameters, gradients, optimizer states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StatePartition {
    /// Parameters, as the passes read them.
    pub parameters: Level,
    /// Gradients, as they accumulate over microbatches.
    pub gradients: Level,
    /// Optimizer states: master weights and moments.
    pub optimizer: Level,
}

/// A text that names no triple.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "states {text:?} is no state partition; use three letters for parameters, gradients and optimizer states (N whole, I within \
     a group, G over all ranks; NNN to GGG) or one of {names}"
)]
pub struct PartitionError {
    /// What was given.
    pub text: String,
    names: String,
}

const fn triple(parameters: Level, gradients: Level, optimizer: Level) -> StatePartition {
    StatePartition { parameters, gradients, optimizer }
}

/// Names that the field uses. The first name of a triple is the one that is printed.
const NAMES: [(&str, StatePartition); 14] = [
    ("none", StatePartition::NONE),
    ("ddp", StatePartition::NONE),
    ("zero0", StatePartition::NONE),
    ("zero1", StatePartition::ZERO1),
    ("zero2", StatePartition::ZERO2),
    ("zero3", StatePartition::ZERO3),
    ("fsdp", StatePartition::ZERO3),
    ("mics", StatePartition::MICS),
    ("hsdp", StatePartition::MICS),
    ("paro-nni", triple(Level::Whole, Level::Whole, Level::Group)),
    ("paro-nii", triple(Level::Whole, Level::Group, Level::Group)),
    ("paro-nig", triple(Level::Whole, Level::Group, Level::Global)),
    ("paro-iig", triple(Level::Group, Level::Group, Level::Global)),
    ("paro-igg", triple(Level::Group, Level::Global, Level::Global)),
];

impl StatePartition {
    /// Plain data parallelism (DDP).
    pub const NONE: StatePartition = triple(Level::Whole, Level::Whole, Level::Whole);
    /// ZeRO-1 (Rajbhandari et al., arXiv 1910.02054).
    pub const ZERO1: StatePartition = triple(Level::Whole, Level::Whole, Level::Global);
    /// ZeRO-2.
    pub const ZERO2: StatePartition = triple(Level::Whole, Level::Global, Level::Global);
    /// ZeRO-3, FSDP's full shard.
    pub const ZERO3: StatePartition = triple(Level::Global, Level::Global, Level::Global);
    /// MiCS (Zhang et al., arXiv 2205.00119), FSDP's hybrid shard.
    pub const MICS: StatePartition = triple(Level::Group, Level::Group, Level::Group);

    /// All 27, parameters first, from the coarsest to the finest.
    pub fn all() -> impl Iterator<Item = StatePartition> {
        let each = |p| Level::ALL.into_iter().flat_map(move |g| Level::ALL.into_iter().map(move |os| triple(p, g, os)));
        Level::ALL.into_iter().flat_map(each)
    }

    /// Its three letters.
    pub fn letters(&self) -> String {
        [self.parameters, self.gradients, self.optimizer].map(Level::letter).iter().collect()
    }

    /// What the field calls it.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let own = *self;
        NAMES.iter().filter(move |(_, partition)| *partition == own).map(|(name, _)| *name)
    }

    /// Whether no state is cut.
    pub fn is_whole(&self) -> bool {
        *self == StatePartition::NONE
    }

    /// Whether a state is cut within groups, so that the size of a group matters.
    pub fn has_groups(&self) -> bool {
        [self.parameters, self.gradients, self.optimizer].contains(&Level::Group)
    }

    /// Whether every state is cut at least as finely as in the other, and one more finely: it takes less memory.
    pub fn is_finer_than(&self, other: &StatePartition) -> bool {
        self != other
            && self.parameters >= other.parameters
            && self.gradients >= other.gradients
            && self.optimizer >= other.optimizer
    }
}

impl fmt::Display for StatePartition {
    /// The field's name where it is a general one, else the letters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.names().next() {
            Some(name) if !name.starts_with("paro-") => f.pad(name),
            _ => f.pad(&self.letters()),
        }
    }
}

impl FromStr for StatePartition {
    type Err = PartitionError;

    fn from_str(text: &str) -> Result<StatePartition, PartitionError> {
        let named = NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)).map(|(_, partition)| *partition);
        let lettered = || StatePartition::all().find(|t| t.letters().eq_ignore_ascii_case(text));
        named
            .or_else(lettered)
            .ok_or_else(|| PartitionError { text: text.to_owned(), names: NAMES.map(|(name, _)| name).join(", ") })
    }
}

impl TryFrom<String> for StatePartition {
    type Error = PartitionError;

    fn try_from(text: String) -> Result<StatePartition, PartitionError> {
        text.parse()
    }
}

impl From<StatePartition> for String {
    fn from(partition: StatePartition) -> String {
        partition.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twenty_seven_that_print_and_parse_back() {
        let all: Vec<_> = StatePartition::all().collect();
        assert_eq!(all.len(), 27);
        assert_eq!((all[0].letters(), all[5].letters(), all[26].letters()), ("NNN".into(), "NIG".into(), "GGG".into()));
        for partition in all {
            for text in [partition.letters(), partition.letters().to_lowercase(), partition.to_string()] {
                assert_eq!(text.parse(), Ok(partition));
            }
            for name in partition.names() {
                assert_eq!(name.to_uppercase().parse(), Ok(partition));
            }
        }
    }

    #[test]
    fn known_names() {
        for (name, letters) in
            [("ddp", "NNN"), ("zero1", "NNG"), ("zero2", "NGG"), ("fsdp", "GGG"), ("mics", "III"), ("HSDP", "III")]
        {
            assert_eq!(name.parse::<StatePartition>().unwrap().letters(), letters);
        }
        assert_eq!("IIG".parse::<StatePartition>().unwrap().to_string(), "IIG");
        let error = "zero9".parse::<StatePartition>().unwrap_err().to_string();
        assert!(error.contains("zero9") && error.contains("zero3") && error.contains("NNN"), "{error}");
    }

    #[test]
    fn finer_is_componentwise() {
        let of = |text: &str| text.parse::<StatePartition>().unwrap();
        assert!(of("NII").is_finer_than(&of("NIN")) && of("GGG").is_finer_than(&of("NNN")));
        assert!(!of("IIG").is_finer_than(&of("GII")) && !of("III").is_finer_than(&of("III")));
    }
}
