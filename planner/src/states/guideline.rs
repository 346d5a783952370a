//! PaRO's closed-form guideline (NeurIPS 2024, section 3.3 and appendix A.2): ring terms without latency over links of two speeds,
//! and full overlap of communication with computation.
//!
//! It ranks triples; it does not predict their times, since it prices every collective over all ranks as one flat ring at the
//! bandwidth of a single pair of GPUs.

use paceline_sim::partition::StatePartition;
use paceline_sim::partition::exchange::{Exchange, Kind, Scope};
use serde::{Deserialize, Serialize};

/// What the guideline knows of a job.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Guideline {
    /// Data-parallel ranks (n).
    pub ranks: f64,
    /// Ranks of a group (m).
    pub group: f64,
    /// Bytes per second between two GPUs of different groups (B).
    pub across: f64,
    /// Bytes per second between two GPUs of a group (B').
    pub inside: f64,
    /// Parameters.
    pub parameters: f64,
    /// Those that are trained.
    pub trainable: f64,
    /// Microbatches of a step (s).
    pub microbatches: f64,
    /// Bytes per element on the wire.
    pub wire: f64,
    /// Seconds of computation of a step.
    pub compute: f64,
}

/// Communication times by purpose, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct GuidelineParts {
    /// Gathering parameters for forward and backward, of one microbatch.
    pub parameters: f64,
    /// Reducing gradients, of one microbatch.
    pub gradients: f64,
    /// Gradients once per step.
    pub gradient_sync: f64,
    /// Parameters once per step.
    pub parameter_sync: f64,
    /// All communication of a step.
    pub communication: f64,
}

impl Guideline {
    /// A ring over the ranks of a scope at the bandwidth of its slowest link.
    fn ring(&self, exchange: Exchange, bytes: f64) -> f64 {
        let (ranks, bandwidth) = match exchange.scope {
            Scope::Group => (self.group, self.inside),
            Scope::Across => (self.ranks / self.group, self.across),
            Scope::World => (self.ranks, self.across),
        };
        let passes = if exchange.kind == Kind::AllReduce { 2.0 } else { 1.0 };
        passes * exchange.buffer(bytes, self.group) * (ranks - 1.0) / ranks / bandwidth
    }

    /// Communication of a step.
    pub fn parts(&self, triple: &StatePartition) -> GuidelineParts {
        let (all, trained) = (self.wire * self.parameters, self.wire * self.trainable);
        let parameters = triple.parameter_gather().map_or(0.0, |e| 2.0 * self.ring(e, all));
        let gradients = triple.gradient_reduction().map_or(0.0, |e| self.ring(e, trained));
        let gradient_sync = triple.gradient_sync().into_iter().map(|e| self.ring(e, trained)).sum();
        let parameter_sync = triple.parameter_sync().map_or(0.0, |e| self.ring(e, trained));
        let communication = self.microbatches * (parameters + gradients) + gradient_sync + parameter_sync;
        GuidelineParts { parameters, gradients, gradient_sync, parameter_sync, communication }
    }

    /// Time of a step: the longer of communication and computation.
    pub fn seconds(&self, triple: &StatePartition) -> f64 {
        self.parts(triple).communication.max(self.compute)
    }

    /// The published indicator, log(1/T): the higher, the better.
    pub fn indicator(&self, triple: &StatePartition) -> f64 {
        (1.0 / self.seconds(triple)).ln()
    }

    /// Bytes of states per rank in mixed precision: 2 per parameter, 2 per gradient, 12 of optimizer states.
    pub fn state_bytes(&self, triple: &StatePartition) -> f64 {
        let share =
            |level: paceline_sim::partition::Level| 1.0 / level.parts(self.ranks as u64, self.group as u64) as f64;
        2.0 * self.parameters * share(triple.parameters)
            + self.trainable * (2.0 * share(triple.gradients) + 12.0 * share(triple.optimizer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(letters: &str) -> StatePartition {
        letters.parse().unwrap()
    }

    /// The times and bytes of the 14 effective triples in five cases, worked out from the published definitions.
    #[test]
    fn the_worked_cases() {
        #[derive(serde::Deserialize)]
        struct Row {
            case: String,
            psi: f64,
            psi_trainable: f64,
            n: f64,
            m: f64,
            s: f64,
            #[serde(rename = "B_bits_per_s")]
            across: f64,
            #[serde(rename = "Bintra_bits_per_s")]
            inside: f64,
            wire_bytes: f64,
            triple: String,
            t_param_s: f64,
            t_gradient_s: f64,
            t_syncg_s: f64,
            t_syncp_s: f64,
            t_comm_s: f64,
            #[serde(rename = "mem_GB_1e9")]
            gigabytes: f64,
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/paro_formula_check.csv");
        let mut rows = 0;
        for row in csv::Reader::from_path(path).unwrap().deserialize() {
            let row: Row = row.unwrap();
            let guideline = Guideline {
                ranks: row.n,
                group: row.m,
                across: row.across / 8.0,
                inside: row.inside / 8.0,
                parameters: row.psi,
                trainable: row.psi_trainable,
                microbatches: row.s,
                wire: row.wire_bytes,
                compute: 0.0,
            };
            let triple = of(&row.triple);
            let parts = guideline.parts(&triple);
            for (found, stated, digits) in [
                (parts.parameters, row.t_param_s, 1e-6),
                (parts.gradients, row.t_gradient_s, 1e-6),
                (parts.gradient_sync, row.t_syncg_s, 1e-6),
                (parts.parameter_sync, row.t_syncp_s, 1e-6),
                (parts.communication, row.t_comm_s, 1e-6),
                (guideline.state_bytes(&triple) / 1e9, row.gigabytes, 1e-4),
            ] {
                assert!((found - stated).abs() <= 0.501 * digits, "{} {}: {found} for {stated}", row.case, row.triple);
            }
            rows += 1;
        }
        assert_eq!(rows, 70);
    }

    /// Bytes per parameter of all 27 on 32 ranks in groups of 8.
    #[test]
    fn bytes_of_all_triples() {
        let guideline = Guideline {
            ranks: 32.0,
            group: 8.0,
            across: 1.0,
            inside: 1.0,
            parameters: 1.0,
            trainable: 1.0,
            microbatches: 1.0,
            wire: 2.0,
            compute: 1.0,
        };
        let published = [
            16.0, 5.5, 4.375, 14.25, 3.75, 2.625, 14.0625, 3.5625, 2.4375, 14.25, 3.75, 2.625, 12.5, 2.0, 0.875,
            12.3125, 1.8125, 0.6875, 14.0625, 3.5625, 2.4375, 12.3125, 1.8125, 0.6875, 12.125, 1.625, 0.5,
        ];
        for (triple, bytes) in StatePartition::all().zip(published) {
            assert_eq!(guideline.state_bytes(&triple), bytes, "{}", triple.letters());
        }
    }

    proptest! {
        /// ZeRO's own figures (arXiv 1910.02054, sections 3 and 7) and MiCS' (arXiv 2205.00119): bytes of states, and traffic of
        /// two buffers per step for stages 1 and 2 with one microbatch, three for stage 3.
        #[test]
        fn special_cases(log_ranks in 1u32..10, log_group in 0u32..4, parameters in 1e6..1e12f64, ratio in 0.001..1.0f64) {
            let ranks = f64::from(1u32 << log_ranks);
            let group = f64::from(1u32 << log_group).min(ranks);
            let g = Guideline {
                ranks, group, across: 1e10, inside: 1e11, parameters, trainable: parameters * ratio, microbatches: 1.0,
                wire: 2.0, compute: 1.0,
            };
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs().max(1e-30);
            let (p, t) = (g.parameters, g.trainable);
            prop_assert!(close(g.state_bytes(&StatePartition::NONE), 2.0 * p + 14.0 * t));
            prop_assert!(close(g.state_bytes(&StatePartition::ZERO1), 2.0 * p + 2.0 * t + 12.0 * t / ranks));
            prop_assert!(close(g.state_bytes(&StatePartition::ZERO2), 2.0 * p + 14.0 * t / ranks));
            prop_assert!(close(g.state_bytes(&StatePartition::ZERO3), (2.0 * p + 14.0 * t) / ranks));
            prop_assert!(close(g.state_bytes(&StatePartition::MICS), (2.0 * p + 14.0 * t) / group));
            let ring = 2.0 * (ranks - 1.0) / ranks / 1e10;
            prop_assert!(close(g.parts(&StatePartition::NONE).communication, 2.0 * t * ring));
            prop_assert!(close(g.parts(&StatePartition::ZERO1).communication, 2.0 * t * ring));
            prop_assert!(close(g.parts(&StatePartition::ZERO2).communication, 2.0 * t * ring));
            prop_assert!(close(g.parts(&StatePartition::ZERO3).communication, (2.0 * p + t) * ring));
            // One group of all ranks: within a group is over all ranks; groups of one: it is not cut.
            let (one, single) = (Guideline { group: ranks, across: g.inside, ..g }, Guideline { group: 1.0, ..g });
            prop_assert!(close(one.state_bytes(&StatePartition::MICS), g.state_bytes(&StatePartition::ZERO3)));
            prop_assert!(close(single.state_bytes(&StatePartition::MICS), g.state_bytes(&StatePartition::NONE)));
            prop_assert!(close(
                single.parts(&StatePartition::MICS).communication, g.parts(&StatePartition::NONE).communication));
            for triple in StatePartition::all() {
                let parts = g.parts(&triple);
                prop_assert!(parts.communication.is_finite() && parts.communication >= 0.0);
                prop_assert!(g.seconds(&triple) >= g.compute);
                prop_assert!(close((-g.indicator(&triple)).exp(), g.seconds(&triple)));
            }
        }
    }
}
