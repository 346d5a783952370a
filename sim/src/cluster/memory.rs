//! Parameters, gradients and optimizer states that one rank holds, and the buffers that gathering and reducing them takes.

use super::{Architecture, Layout};
use crate::partition::Level;
use serde::{Deserialize, Serialize};

/// Parameters of one pipeline rank on one tensor-parallel rank.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RankParameters {
    /// Replicated over the data-parallel (and context-parallel) ranks.
    pub dense: f64,
    /// Routed experts, replicated over the groups that hold the same experts.
    pub routed: f64,
    /// The largest unit that is gathered at a time under full sharding: one block or the embedding.
    pub largest_unit: f64,
}

/// Bytes of states by class.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct States {
    /// Parameters as the forward pass reads them.
    pub parameters: f64,
    /// Gradients.
    pub gradients: f64,
    /// Master weights and moments.
    pub optimizer: f64,
    /// Buffers of gathering and reducing.
    pub communication: f64,
}

impl RankParameters {
    /// Of a rank that holds the blocks `layers`, and these shares of the embedding and of the head.
    pub fn of(
        model: &Architecture,
        layout: &Layout,
        layers: impl Iterator<Item = u64>,
        embedding: f64,
        head: f64,
    ) -> RankParameters {
        let tp = layout.tp as f64;
        let mut rank = RankParameters::default();
        for layer in layers {
            // Norms are replicated; next to the matrices they are nothing.
            let dense = model.block_parameters(layer) as f64 / tp;
            // Experts are spread over `ep` ranks and, where those do not cover them, cut by tensor parallelism.
            let routed = model.expert_parameters(layer) as f64 / layout.ep as f64 / expert_tensor_cut(layout);
            rank.dense += dense;
            rank.routed += routed;
            rank.largest_unit = rank.largest_unit.max(dense + routed);
        }
        let mut ends =
            embedding * model.embedding_parameters() as f64 / tp + head * model.head_parameters() as f64 / tp;
        if model.tied && embedding == 0.0 {
            // The last stage has a copy of the matrix that it shares with the first.
            ends += head * (model.vocab * model.hidden) as f64 / tp;
        }
        rank.dense += ends;
        rank.largest_unit = rank.largest_unit.max(ends);
        rank
    }

    /// All of them.
    pub fn total(&self) -> f64 {
        self.dense + self.routed
    }
}

/// By how much tensor parallelism cuts an expert: not at all where expert parallelism takes the tensor ranks too.
fn expert_tensor_cut(layout: &Layout) -> f64 {
    if layout.ep > 1 { 1.0 } else { layout.tp as f64 }
}

/// Over how many ranks the states of the routed experts are sharded.
pub fn expert_replicas(layout: &Layout) -> f64 {
    let ranks = (layout.dp * layout.cp) as f64 * layout.tp as f64 / expert_tensor_cut(layout);
    (ranks / layout.ep as f64).max(1.0)
}

/// Parts that a level cuts dense parameters and routed experts into, on nodes of `node` GPUs.
pub fn parts(layout: &Layout, level: Level, node: u64) -> (f64, f64) {
    let (ranks, group) = (layout.data_ranks(), layout.group_ranks(node));
    let replicas = expert_replicas(layout);
    let dense = level.parts(ranks, group) as f64;
    let routed = match level {
        Level::Whole => 1.0,
        // Replicas of an expert lie as far apart as the expert groups are wide.
        Level::Group => (replicas * group as f64 / ranks as f64).max(1.0),
        Level::Global => replicas,
    };
    (dense, routed)
}

/// Bytes of the states of a rank, on nodes of `node` GPUs.
pub fn states(layout: &Layout, rank: &RankParameters, node: u64) -> States {
    let numerics = &layout.numerics;
    let triple = layout.sharding;
    let sum = |level: Level, bytes: f64| {
        let (dense, routed) = parts(layout, level, node);
        bytes * (rank.dense / dense + rank.routed / routed)
    };
    let trained = layout.trainable;
    // Beside a buffer that sums microbatches, gradients as they are written stay only in the buckets that replicas reduce.
    let buckets = numerics.accumulated == 0.0 || layout.data_ranks() > 1;
    let gradient = if buckets { numerics.gradient + numerics.accumulated } else { numerics.accumulated };
    let wire = numerics.parameter.min(numerics.activation);
    let mut states = States {
        parameters: match layout.adapters {
            None => sum(triple.parameters, numerics.parameter),
            // Frozen ones are held in the format that they are computed with; the adapters come on top.
            Some(_) => sum(triple.parameters, wire) + trained * sum(triple.parameters, numerics.parameter),
        },
        gradients: trained * sum(triple.gradients, gradient),
        optimizer: trained * sum(triple.optimizer, numerics.master + numerics.moments),
        communication: 0.0,
    };
    let cut = |level: Level| parts(layout, level, node).0 > 1.0;
    if cut(triple.parameters) {
        // Two units gathered, one of them ahead; or all, where they stay.
        let gathered = if layout.keep_gathered { rank.total() } else { 2.0 * rank.largest_unit };
        states.communication += gathered * wire;
    }
    if cut(triple.gradients) {
        // A unit's gradients before they are reduced.
        states.communication += rank.largest_unit * trained * numerics.reduced;
    }
    states
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Attention, Numerics, PositionTable};
    use crate::partition::StatePartition;

    fn layout(sharding: StatePartition, numerics: Numerics) -> Layout {
        Layout { dp: 64, sharding, numerics, ..Layout::single(2048, 1) }
    }

    /// The ZeRO paper's figure 1 (arXiv 1910.02054): 7.5B parameters, 64 ranks, K = 12: 120, 31.4, 16.6 and 1.9 GB.
    #[test]
    fn figure_1_of_zero() {
        let rank = RankParameters { dense: 7.5e9, routed: 0.0, largest_unit: 0.0 };
        for (sharding, gigabytes) in [("none", 120.0), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)] {
            let s = states(&layout(sharding.parse().unwrap(), Numerics::MIXED), &rank, 8);
            let total = (s.parameters + s.gradients + s.optimizer) / 1e9;
            assert!((total - gigabytes).abs() < 0.05, "{sharding:?}: {total}");
        }
    }

    /// Bytes per parameter of PaRO's triples on 32 ranks in groups of 8 (NeurIPS 2024, section 3.2, with 2, 2 and 12 bytes), and
    /// with a sixteenth of the parameters trained.
    #[test]
    fn bytes_of_the_triples() {
        let rank = RankParameters { dense: 1e9, routed: 0.0, largest_unit: 0.0 };
        for (triple, bytes) in
            [("NNI", 5.5), ("NIG", 2.625), ("III", 2.0), ("IIG", 0.875), ("GIG", 0.6875), ("GGG", 0.5)]
        {
            let layout = Layout { dp: 32, ..layout(triple.parse().unwrap(), Numerics::MIXED) };
            let s = states(&layout, &rank, 8);
            assert_eq!((s.parameters + s.gradients + s.optimizer) / 1e9, bytes, "{triple}");
            let part = states(&Layout { trainable: 1.0 / 16.0, ..layout }, &rank, 8);
            assert_eq!(part.parameters, s.parameters);
            assert_eq!(part.gradients + part.optimizer, (s.gradients + s.optimizer) / 16.0, "{triple}");
        }
    }

    /// Beside frozen parameters of 16 bits, adapters of a hundredth of them have the states: 2 + 0.01 (2 + 2 + 12) bytes, also where all
    /// parameters would be held in 32 bits to be trained.
    #[test]
    fn adapters_have_the_states() {
        let rank = RankParameters { dense: 1e9, routed: 0.0, largest_unit: 0.0 };
        let adapters = Some(crate::cluster::Adapters { rank: 8, beside: Vec::new() });
        let bytes = |numerics| {
            let layout =
                Layout { trainable: 0.01, adapters: adapters.clone(), dp: 1, ..layout(StatePartition::NONE, numerics) };
            let s = states(&layout, &rank, 8);
            (s.parameters + s.gradients + s.optimizer) / 1e9
        };
        assert!((bytes(Numerics::MIXED) - 2.16).abs() < 1e-12);
        assert!(
            (bytes(Numerics::GATHERED_16_BIT) - (2.0 + 0.01 * Numerics::GATHERED_16_BIT.bytes_per_parameter())).abs()
                < 1e-12
        );
    }

    /// The playbook's table: 1B, 7B, 70B, 405B take 16 and 20 bytes per parameter.
    #[test]
    fn table_of_the_playbook() {
        for (billions, mixed, accumulated) in
            [(1.0, 16.0, 20.0), (7.0, 112.0, 140.0), (70.0, 1120.0, 1400.0), (405.0, 6480.0, 8100.0)]
        {
            let rank = RankParameters { dense: billions * 1e9, routed: 0.0, largest_unit: 0.0 };
            for (numerics, gigabytes) in [(Numerics::MIXED, mixed), (Numerics::MIXED_FP32_ACCUMULATION, accumulated)] {
                let s = states(&layout(StatePartition::NONE, numerics), &rank, 8);
                assert_eq!((s.parameters + s.gradients + s.optimizer) / 1e9, gigabytes);
            }
        }
    }

    #[test]
    fn pipeline_ranks_hold_the_model_once() {
        let model = Architecture {
            name: String::new(),
            layers: 8,
            hidden: 512,
            attention: Attention::Grouped { heads: 8, kv_heads: 8, head_dim: 64 },
            ffn: 2048,
            gated: true,
            experts: None,
            vocab: 32000,
            tied: false,
            biases: false,
            positions: PositionTable::None,
            dropout: false,
        };
        let layout = Layout { pp: 2, tp: 2, ..Layout::single(2048, 1) };
        let first = RankParameters::of(&model, &layout, 0..4, 1.0, 0.0);
        let last = RankParameters::of(&model, &layout, 4..8, 0.0, 1.0);
        assert_eq!(2.0 * (first.total() + last.total()), model.parameters() as f64);
    }
}
