//! The collectives of a triple over one optimizer step: what is gathered for the passes, what is reduced after each microbatch,
//! what happens once at the end of accumulation and once after the optimizer (PaRO, section 3 and appendix A.1).

use super::{Level, StatePartition};
use serde::{Deserialize, Serialize};

/// What a collective does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Every rank ends with all parts.
    AllGather,
    /// Every rank ends with the sum of one part.
    ReduceScatter,
    /// Every rank ends with the sum of all parts.
    AllReduce,
}

/// Who takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// The ranks of a group.
    Group,
    /// The ranks with the same place in every group; as many of these communicators run at once as a group has ranks.
    Across,
    /// All data-parallel ranks.
    World,
}

/// One collective on a buffer that holds a whole state, or one rank's part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Exchange {
    /// What it does.
    pub kind: Kind,
    /// Who takes part.
    pub scope: Scope,
}

impl Exchange {
    const fn of(kind: Kind, scope: Scope) -> Exchange {
        Exchange { kind, scope }
    }

    /// Bytes of its buffer (the gathered or unreduced size, S of nccl-tests) for a state of `bytes`, with groups of `group`:
    /// across groups, each rank's communicator carries its part of a group.
    pub fn buffer(&self, bytes: f64, group: f64) -> f64 {
        if self.scope == Scope::Across { bytes / group } else { bytes }
    }
}

use Kind::{AllGather, AllReduce, ReduceScatter};
use Level::{Global, Group, Whole};

impl StatePartition {
    /// Before a unit's forward pass, and again before its backward pass, in every microbatch.
    pub fn parameter_gather(&self) -> Option<Exchange> {
        match self.parameters {
            Whole => None,
            Group => Some(Exchange::of(AllGather, Scope::Group)),
            Global => Some(Exchange::of(AllGather, Scope::World)),
        }
    }

    /// After a unit's backward pass, in every microbatch.
    pub fn gradient_reduction(&self) -> Option<Exchange> {
        match self.gradients {
            Whole => None,
            Group => Some(Exchange::of(ReduceScatter, Scope::Group)),
            Global => Some(Exchange::of(ReduceScatter, Scope::World)),
        }
    }

    /// Once all microbatches are accumulated: from gradients as they accumulate to reduced ones as the optimizer needs them.
    pub fn gradient_sync(&self) -> Vec<Exchange> {
        let of = Exchange::of;
        match (self.gradients, self.optimizer) {
            (Whole, Whole) => vec![of(AllReduce, Scope::World)],
            (Whole, Group) => vec![of(ReduceScatter, Scope::Group), of(AllReduce, Scope::Across)],
            (Whole, Global) => vec![of(ReduceScatter, Scope::World)],
            (Group, Whole) => vec![of(AllReduce, Scope::Across), of(AllGather, Scope::Group)],
            (Group, Group) => vec![of(AllReduce, Scope::Across)],
            (Group, Global) => vec![of(ReduceScatter, Scope::Across)],
            (Global, Whole) => vec![of(AllGather, Scope::World)],
            (Global, Group) => vec![of(AllGather, Scope::Across)],
            (Global, Global) => vec![],
        }
    }

    /// After the optimizer: from updated parameters as it holds them to parameters as they are kept.
    pub fn parameter_sync(&self) -> Option<Exchange> {
        match (self.parameters, self.optimizer) {
            (Whole, Group) => Some(Exchange::of(AllGather, Scope::Group)),
            (Whole, Global) => Some(Exchange::of(AllGather, Scope::World)),
            (Group, Global) => Some(Exchange::of(AllGather, Scope::Across)),
            // The optimizer updates all that the rank keeps, and more where it is the coarser.
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(exchanges: impl IntoIterator<Item = Exchange>) -> String {
        let word = |e: Exchange| {
            let kind = match e.kind {
                AllGather => "AG",
                ReduceScatter => "RS",
                AllReduce => "AR",
            };
            let scope = match e.scope {
                Scope::Group => "intra",
                Scope::Across => "inter",
                Scope::World => "world",
            };
            format!("{kind} {scope}")
        };
        exchanges.into_iter().map(word).collect::<Vec<_>>().join(", ")
    }

    /// The table of one optimizer step for the effective triples: gathers of parameters, reduction per microbatch, sync of
    /// gradients, sync of parameters.
    #[test]
    fn the_step_of_every_effective_triple() {
        for (letters, gather, reduce, sync, after) in [
            ("NNN", "", "", "AR world", ""),
            ("NNI", "", "", "RS intra, AR inter", "AG intra"),
            ("NNG", "", "", "RS world", "AG world"),
            ("NII", "", "RS intra", "AR inter", "AG intra"),
            ("NIG", "", "RS intra", "RS inter", "AG world"),
            ("NGG", "", "RS world", "", "AG world"),
            ("INI", "AG intra", "", "RS intra, AR inter", ""),
            ("ING", "AG intra", "", "RS world", "AG inter"),
            ("III", "AG intra", "RS intra", "AR inter", ""),
            ("IIG", "AG intra", "RS intra", "RS inter", "AG inter"),
            ("IGG", "AG intra", "RS world", "", "AG inter"),
            ("GNG", "AG world", "", "RS world", ""),
            ("GIG", "AG world", "RS intra", "RS inter", ""),
            ("GGG", "AG world", "RS world", "", ""),
        ] {
            let triple: StatePartition = letters.parse().unwrap();
            assert_eq!(words(triple.parameter_gather()), gather, "{letters}");
            assert_eq!(words(triple.gradient_reduction()), reduce, "{letters}");
            assert_eq!(words(triple.gradient_sync()), sync, "{letters}");
            assert_eq!(words(triple.parameter_sync()), after, "{letters}");
        }
    }

    #[test]
    fn across_groups_each_rank_carries_its_part() {
        let across = Exchange::of(AllReduce, Scope::Across);
        assert_eq!((across.buffer(80.0, 8.0), Exchange::of(AllGather, Scope::Group).buffer(80.0, 8.0)), (10.0, 80.0));
    }
}
