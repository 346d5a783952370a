//! Times of collectives and messages over the two levels of a cluster: nodes joined by fast links inside, and a network
//! between them.
//!
//! Latency and bandwidth: a ring over `k` ranks takes `k - 1` steps per direction, each as long as its slowest hop, and moves
//! `(k - 1) / k` of the buffer at the bandwidth of its slowest link (Thakur et al. 2005). A group that takes `m` GPUs of
//! every node has the network adapters of these `m` GPUs to itself. An all-reduce may go over a double binary tree, of
//! logarithmically many steps, instead; an all-to-all over `k` ranks sends the share `(k - m) / k` over the network.

use super::Physics;
use crate::partition::exchange::{Kind, Scope};
use paceline_profiles::Cluster;
use serde::{Deserialize, Serialize};

/// A group of ranks: how many, and how many of them in one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Members.
    pub ranks: u64,
    /// Members in a node.
    pub per_node: u64,
}

impl Span {
    /// The group of every `stride`-th of `ranks * stride` neighbouring ranks, on nodes of `node` GPUs.
    pub fn strided(ranks: u64, stride: u64, node: u64) -> Span {
        let per_node = (node / stride.max(1)).clamp(1, ranks.max(1));
        Span { ranks, per_node }
    }

    /// The groups of `group` neighbouring members that it is cut into.
    pub fn inner(&self, group: u64) -> Span {
        Span { ranks: group, per_node: self.per_node.min(group) }
    }

    /// The members with the same place in each of these groups.
    pub fn across(&self, group: u64) -> Span {
        let ranks = (self.ranks / group.max(1)).max(1);
        Span { ranks, per_node: (self.per_node / group.max(1)).clamp(1, ranks) }
    }

    /// The ranks of a scope, if groups have `group` members.
    pub fn scope(&self, scope: Scope, group: u64) -> Span {
        match scope {
            Scope::Group => self.inner(group),
            Scope::Across => self.across(group),
            Scope::World => *self,
        }
    }

    /// Nodes that it touches.
    pub fn nodes(&self) -> u64 {
        self.ranks.div_ceil(self.per_node)
    }
}

/// Time of a step inside a node, for a message in the pipelined protocol (NCCL's tuning table, NVLink, `Simple`).
const NVLINK_STEP: f64 = 3.4e-6;
/// The same over PCIe.
const PCIE_STEP: f64 = 5.7e-6;
/// Start of any collective: launch of its kernel and the first handshake (NCCL's base latency of a ring, `Simple`).
const START: f64 = 8.4e-6;

/// Posting of a message to a further peer. Assumed.
const POST: f64 = 1e-6;

/// Share of its link that a single message inside a node reaches.
const MESSAGE_SHARE: f64 = 0.8;

/// The network of a cluster under the fitted parameters.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    /// Bytes per second of messages inside a node, per GPU.
    pub intra: f64,
    /// Bus bandwidth of gathers inside a node, in bytes per second.
    pub gathers: f64,
    /// Bus bandwidth of all-reduces inside a node.
    pub all_reduces: f64,
    /// Bytes per second between nodes, per GPU.
    pub inter: f64,
    /// Seconds of a step inside a node.
    pub intra_step: f64,
    /// Seconds of a step between nodes.
    pub inter_step: f64,
    /// Whether every step of a ring over several nodes takes as long as one between nodes; elsewhere hops inside a node are
    /// taken as fast as they are (NCCL's tuning model).
    pub paced: bool,
    /// How much longer rings that take several GPUs of each of many nodes have their links busy, as a share.
    pub crowding: f64,
}

impl Network {
    /// Of a cluster.
    pub fn of(cluster: &Cluster, physics: &Physics) -> Network {
        Network {
            intra: cluster.intra_gbps * 1e9 * MESSAGE_SHARE,
            gathers: cluster.gather_gbps * 1e9 * physics.intra,
            all_reduces: cluster.all_reduce_gbps * 1e9 * physics.intra,
            inter: cluster.inter_gbps * 1e9 * physics.inter,
            intra_step: if cluster.gpu.nvlink_gbps.is_some() { NVLINK_STEP } else { PCIE_STEP },
            inter_step: (cluster.inter_latency_us + cluster.host_pace_us) * 1e-6,
            paced: cluster.paced,
            crowding: cluster.ring_crowding,
        }
    }

    /// Bandwidth of a ring, and the time of a step of it.
    fn ring(&self, span: Span, inside: f64) -> (f64, f64) {
        if span.nodes() > 1 {
            let rails = self.inter * span.per_node as f64;
            let crowded = 1.0 + self.crowding * (1.0 - 1.0 / span.nodes() as f64);
            // A ring enters and leaves a node once; with one member per node it never uses the links inside.
            let slowest = if span.per_node > 1 { (rails / crowded).min(inside) } else { rails };
            (slowest, self.inter_step)
        } else {
            (inside, self.intra_step)
        }
    }

    /// All-gather of a buffer of `bytes` (the gathered size), or reduce-scatter of one.
    pub fn gather(&self, span: Span, bytes: f64) -> f64 {
        if span.ranks <= 1 || bytes <= 0.0 {
            return 0.0;
        }
        let (bandwidth, step) = self.ring(span, self.gathers);
        let others = (span.ranks - 1) as f64;
        START + others * self.steps_weight(span, step) + bytes * others / span.ranks as f64 / bandwidth
    }

    /// Reduction of a buffer of `bytes` to one of the ranks: down a chain, each link of which carries the whole buffer in chunks.
    pub fn reduce(&self, span: Span, bytes: f64) -> f64 {
        if span.ranks <= 1 || bytes <= 0.0 {
            return 0.0;
        }
        let (bandwidth, step) = self.ring(span, self.gathers);
        START + (span.ranks - 1) as f64 * self.steps_weight(span, step) + bytes / bandwidth
    }

    /// A step's time, averaged over the ring: hops inside a node are pipelined behind those between nodes.
    fn steps_weight(&self, span: Span, step: f64) -> f64 {
        if span.nodes() > 1 && !self.paced {
            let between = span.nodes() as f64 / span.ranks as f64;
            between * step + (1.0 - between) * self.intra_step
        } else {
            step
        }
    }

    /// All-reduce of a buffer of `bytes`.
    pub fn all_reduce(&self, span: Span, bytes: f64) -> f64 {
        if span.ranks <= 1 || bytes <= 0.0 {
            return 0.0;
        }
        let (bandwidth, step) = self.ring(span, self.all_reduces);
        let others = (span.ranks - 1) as f64;
        let moved = 2.0 * bytes * others / span.ranks as f64 / bandwidth;
        let ring = 2.0 * others * self.steps_weight(span, step);
        let nodes = span.nodes() as f64;
        let tree = 2.0 * ((span.per_node - 1) as f64 * self.intra_step + nodes.log2() * self.inter_step);
        START + moved + if nodes > 1.0 { ring.min(tree) } else { ring }
    }

    /// A collective of a kind.
    pub fn collective(&self, kind: Kind, span: Span, bytes: f64) -> f64 {
        match kind {
            Kind::AllGather | Kind::ReduceScatter => self.gather(span, bytes),
            Kind::AllReduce => self.all_reduce(span, bytes),
        }
    }

    /// All-gather (or, mirrored, reduce-scatter) of a buffer of `bytes` in two levels, as PaRO-CC does it (NeurIPS 2024, section
    /// 3.4): between nodes first, every GPU with its peers over its own adapters, then inside each node; the parts that have
    /// arrived go round the node while the next arrive. In one node, or with one member per node, the ring.
    pub fn gather_in_two_levels(&self, span: Span, bytes: f64) -> f64 {
        let (nodes, members) = (span.nodes() as f64, span.per_node as f64);
        if nodes <= 1.0 || members <= 1.0 || bytes <= 0.0 {
            return self.gather(span, bytes);
        }
        let between = self.inter_step + bytes / span.ranks as f64 / self.inter;
        let inside = (members - 1.0) * (self.intra_step + bytes / span.ranks as f64 / self.gathers);
        START + inside + (nodes - 1.0) * between.max(inside)
    }

    /// The same as PaRO's released code does it (`InterIntraCommInfo` in `deepspeed/comm/comm.py`): all of the first level, then the second
    /// in one collective for each node's part.
    pub fn gather_in_two_steps(&self, span: Span, bytes: f64) -> f64 {
        let (nodes, members) = (span.nodes() as f64, span.per_node as f64);
        if nodes <= 1.0 || members <= 1.0 || bytes <= 0.0 {
            return self.gather(span, bytes);
        }
        let between = Span { ranks: span.nodes(), per_node: 1 };
        let inside = Span { ranks: span.per_node, per_node: span.per_node };
        self.gather(between, bytes / members) + nodes * self.gather(inside, bytes / nodes)
    }

    /// All-to-all in which every rank sends `bytes` in all: in the faster of both ways.
    pub fn all_to_all(&self, span: Span, bytes: f64) -> f64 {
        self.all_to_all_direct(span, bytes).min(self.all_to_all_in_two_levels(span, bytes))
    }

    /// All-to-all in which every rank sends each other one its part by itself. All pairs exchange at once; each further peer adds
    /// the posting of a message.
    pub fn all_to_all_direct(&self, span: Span, bytes: f64) -> f64 {
        if span.ranks <= 1 || bytes <= 0.0 {
            return 0.0;
        }
        let k = span.ranks as f64;
        let inside = bytes * (span.per_node as f64 - 1.0) / k / self.intra;
        let outside = bytes * (k - span.per_node as f64) / k / self.inter;
        let step = if span.nodes() > 1 { self.inter_step } else { self.intra_step };
        START + step + (k - 1.0) * POST + inside.max(outside)
    }

    /// The same in two levels: in the node, each rank hands the parts for all members with a place to the one with that place; these
    /// exchange between nodes, one message per node instead of one per rank. Fewer messages, and the links inside a node carry almost all
    /// bytes once before those between nodes do.
    pub fn all_to_all_in_two_levels(&self, span: Span, bytes: f64) -> f64 {
        let (nodes, members) = (span.nodes() as f64, span.per_node as f64);
        if nodes <= 1.0 || members <= 1.0 || bytes <= 0.0 {
            return self.all_to_all_direct(span, bytes);
        }
        let k = span.ranks as f64;
        let inside = self.intra_step + (members - 1.0) * POST + bytes * (members - 1.0) / members / self.intra;
        let outside = self.inter_step + (nodes - 1.0) * POST + bytes * (k - members) / k / self.inter;
        2.0 * START + inside + outside
    }

    /// A message between two ranks.
    pub fn message(&self, across: bool, bytes: f64) -> f64 {
        if bytes <= 0.0 {
            return 0.0;
        }
        let (bandwidth, step) = if across { (self.inter, self.inter_step) } else { (self.intra, self.intra_step) };
        START + step + bytes / bandwidth
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_profiles::find_cluster;

    fn network(name: &str) -> Network {
        let ideal = Physics { intra: 1.0, inter: 1.0, ..Physics::default() };
        Network::of(find_cluster(name).unwrap(), &ideal)
    }

    #[test]
    fn textbook_times_of_large_buffers() {
        let n = network("dgx-h100-ib");
        let node = Span::strided(8, 1, 8);
        let bytes = 8e12;
        assert!((n.gather(node, bytes) / (bytes * 7.0 / 8.0 / 262e9) - 1.0).abs() < 1e-3);
        assert!((n.all_reduce(node, bytes) / (2.0 * bytes * 7.0 / 8.0 / 479e9) - 1.0).abs() < 1e-3);
        // The ring of whole nodes is as slow as their links, that of one GPU per node as its adapter of 50 GB/s.
        let wide = Span::strided(32, 1, 8);
        assert!((n.gather(wide, bytes) / (bytes * 31.0 / 32.0 / 262e9) - 1.0).abs() < 1e-3);
        let narrow = Span::strided(4, 8, 8);
        assert_eq!(narrow, Span { ranks: 4, per_node: 1 });
        assert!((n.gather(narrow, bytes) / (bytes * 0.75 / 50e9) - 1.0).abs() < 1e-3);
        assert!((n.message(true, bytes) / (bytes / 50e9) - 1.0).abs() < 1e-3);
        assert!((n.all_to_all(wide, bytes) / (bytes * 0.75 / 50e9) - 1.0).abs() < 1e-3);
    }

    #[test]
    fn one_rank_sends_nothing_and_more_ranks_take_longer() {
        let n = network("p5");
        let one = Span::strided(1, 8, 8);
        assert_eq!(n.gather(one, 1e9) + n.all_reduce(one, 1e9) + n.all_to_all(one, 1e9), 0.0);
        let times: Vec<f64> = [2u64, 4, 8, 16, 64, 512].map(|k| n.all_reduce(Span::strided(k, 1, 8), 2.5e8)).into();
        assert!(times.windows(2).all(|w| w[0] < w[1]), "{times:?}");
    }

    #[test]
    fn small_all_reduces_take_trees_where_there_are_any() {
        let far = Span { ranks: 512, per_node: 8 };
        let n = network("p5");
        assert!(n.all_reduce(far, 1e3) < 0.1 * 2.0 * n.gather(far, 1e3));
    }

    /// Small all-to-alls over many nodes are made of few messages, large ones go over the network at once; in a node, or with one
    /// member per node, there is one way.
    #[test]
    fn all_to_alls_go_in_two_levels_where_messages_are_small() {
        let n = network("dgx-h100-ib");
        let wide = Span::strided(512, 1, 8);
        let faster = |bytes| n.all_to_all_in_two_levels(wide, bytes) < n.all_to_all_direct(wide, bytes);
        assert!(faster(1e5) && !faster(1e9));
        // By hand: 511 posts against 7 and 63, with one launch and one step inside a node more.
        let saved = 511e-6 - 7e-6 - 63e-6 - START - n.intra_step;
        let found = n.all_to_all_direct(wide, 1e-3) - n.all_to_all_in_two_levels(wide, 1e-3);
        assert!((found - saved).abs() < 1e-9, "{found} {saved}");
        for one in [Span::strided(8, 1, 8), Span::strided(64, 8, 8)] {
            assert_eq!(n.all_to_all_in_two_levels(one, 1e6), n.all_to_all_direct(one, 1e6));
        }
        let times: Vec<f64> = [1e4, 1e5, 1e6, 1e7, 1e8, 1e9].map(|b| n.all_to_all(wide, b)).into();
        assert!(times.windows(2).all(|w| w[0] < w[1]), "{times:?}");
    }

    /// A chain carries the whole buffer over every link: as long as a ring's half of an all-reduce for large buffers, and with as many
    /// steps for small ones.
    #[test]
    fn rooted_reductions_take_a_chain() {
        let n = network("paro-a100-roce");
        let wide = Span::strided(32, 1, 8);
        assert!((n.reduce(wide, 8e12) / (8e12 / 80e9) - 1.0).abs() < 1e-3);
        assert!((n.reduce(wide, 1e-3) - (START + 31.0 * 75e-6)).abs() < 1e-9);
        assert_eq!(n.reduce(Span::strided(1, 1, 8), 1e9), 0.0);
    }

    /// Rings that take several GPUs of each node are crowded, those of one GPU of each are not. In two steps, an all-gather is one between nodes
    /// and one in the node for every node's part.
    #[test]
    fn crowded_rings_and_gathers_in_two_steps() {
        let n = network("paro-a100-roce");
        let crowded = Network { crowding: 0.5, ..n };
        let wide = Span::strided(32, 1, 8);
        assert!((crowded.gather(wide, 8e12) / n.gather(wide, 8e12) - 1.375).abs() < 1e-3);
        let narrow = Span::strided(4, 8, 8);
        assert_eq!(crowded.gather(narrow, 1e9), n.gather(narrow, 1e9));
        let steps = n.gather(narrow, 1e9) + 4.0 * n.gather(Span::strided(8, 1, 8), 2e9);
        assert_eq!(crowded.gather_in_two_steps(wide, 8e9), steps);
        assert!(steps > n.gather_in_two_levels(wide, 8e9));
        assert_eq!(n.gather_in_two_steps(narrow, 1e9), n.gather(narrow, 1e9));
    }

    /// Bus bandwidths of all-gathers over 16 to 512 GPUs that runs of the Ultra-Scale Playbook measured over EFA, if
    /// with buffers of 1.5 GB: no size is stated, and this one makes the latency of a step the same at every scale.
    #[test]
    fn bandwidth_falls_with_ranks_as_measured_over_efa() {
        let n = network("p5");
        for (ranks, measured) in [(16u64, 224.0), (32, 208.0), (64, 175.0), (128, 124.0), (256, 75.0), (512, 44.0)] {
            let bytes = 1.5e9;
            let seconds = n.gather(Span::strided(ranks, 1, 8), bytes);
            let bus = bytes * (ranks - 1) as f64 / ranks as f64 / seconds / 1e9;
            assert!((bus / measured - 1.0).abs() < 0.1, "{ranks}: {bus}");
        }
    }
}
