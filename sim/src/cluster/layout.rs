//! How a model is cut over ranks, and the numerics and kernels that it runs with.

use super::{Adapters, Experts, Numerics, Runtime};
use crate::partition::StatePartition;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A five-dimensional layout with its batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layout {
    /// Tensor-parallel ranks.
    pub tp: u64,
    /// Norms and dropout cut along the sequence over the tensor-parallel ranks.
    pub sp: bool,
    /// Context-parallel ranks.
    pub cp: u64,
    /// Pipeline ranks.
    pub pp: u64,
    /// Stages of each pipeline rank.
    pub chunks: u64,
    /// Replicas.
    pub dp: u64,
    /// How context-parallel ranks exchange.
    #[serde(default)]
    pub context: ContextExchange,
    /// Expert-parallel ranks, out of `dp * cp * tp`.
    pub ep: u64,
    /// How evenly tokens go to experts.
    #[serde(default)]
    pub routing: Routing,
    /// What the data-parallel ranks share out.
    pub sharding: StatePartition,
    /// Data-parallel ranks of a group, where states are cut within groups; those of a node without.
    #[serde(default)]
    pub group: Option<u64>,
    /// Gathered parameters stay until their last pass of the iteration: they are gathered once, and held whole until then.
    #[serde(default)]
    pub keep_gathered: bool,
    /// How the exchanges of states are carried out.
    #[serde(default)]
    pub runtime: Runtime,
    /// Share of the parameters that are trained; the others have neither gradients nor optimizer states.
    #[serde(default = "all")]
    pub trainable: f64,
    /// The adapters that these are; without, they are parameters of the model itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<Adapters>,
    /// Last blocks of the model that the backward pass goes through, where what lies before them is frozen; all without. Times only:
    /// memory is that of a backward pass through all.
    #[serde(default)]
    pub backward_blocks: Option<u64>,
    /// How blocks are spread over the stages.
    pub partition: Partition,
    /// Name of the pipeline schedule, as the registry of the planner knows it.
    pub schedule: String,
    /// Tokens of a sequence.
    pub seq: u64,
    /// Sequences of a microbatch.
    pub micro_batch: u64,
    /// Microbatches of a replica in one iteration.
    pub microbatches: u64,
    /// What the forward pass throws away and computes again.
    pub recompute: Recompute,
    /// Blocks of each stage of which that holds, its first ones (Megatron-LM's `block` method); all without.
    #[serde(default)]
    pub recomputed_blocks: Option<u64>,
    /// Kernel of the attention.
    pub attention: AttentionKernel,
    /// Kernels of logits and loss.
    pub loss: LossKernel,
    /// How kernels reach the GPU.
    #[serde(default)]
    pub launches: Launches,
    /// When the memory of the tensor ranks' messages can be used again.
    #[serde(default)]
    pub messages: MessageBuffers,
    /// How ranks work together on a vocabulary that is spread over them.
    #[serde(default)]
    pub vocabulary: VocabularyPasses,
    /// One kernel for gate, activation and product, which keeps its input and output only, and one for the rotary embedding.
    pub fused_kernels: bool,
    /// Norms in one kernel each. Apart, they compute and keep 32-bit copies.
    pub fused_norms: bool,
    /// Tensor ranks send different parts of a message between stages instead of the whole each (Megatron-LM's scatter/gather
    /// optimisation, arXiv 2104.04473, section 4.1).
    pub scatters: bool,
    /// A sharded optimizer that cuts every parameter over the replicas, where others cut one flat array of them: a small copy for
    /// each part before gradients are reduced, and after parameters are gathered.
    #[serde(default)]
    pub slices: bool,
    /// Number formats.
    pub numerics: Numerics,
    /// Which communication runs beside computation.
    pub overlap: Overlap,
    /// Bytes of gradients that are reduced at a time; all at once without.
    pub bucket_bytes: Option<f64>,
    /// Bytes of parameters that are gathered at a time; a whole block without.
    #[serde(default)]
    pub gather_bytes: Option<f64>,
    /// Most bytes that a rank may hold; what its GPU has for the allocator where that is less.
    #[serde(default)]
    pub memory_limit: Option<f64>,
}

/// How blocks are spread over the stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Partition {
    /// Equal numbers; where they do not divide, the first and the last stage hold fewer.
    Even,
    /// Equal arithmetic, the output projection included: a stage ends where the running sum has passed its share.
    ByCost,
    /// The same, ended at the block border nearest to its share.
    Balanced,
    /// Equal numbers, and an equal part of the vocabulary on every rank (Yeung et al., arXiv 2411.05288).
    VocabularySpread,
}

/// When memory that a collective has read or written can be used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MessageBuffers {
    /// At once: all collectives share buffers that stay (Megatron-LM), or the host waits for each.
    #[default]
    Shared,
    /// When the GPU has passed the collective, not when the host has: PyTorch's process groups work on streams of their own and hold
    /// back what these have touched (`record_stream`). A host that runs ahead of the GPU takes new memory each time.
    FreedLate,
    /// The same, and nothing makes the host wait at the end of an iteration: it launches the next while the GPU still reduces
    /// gradients, and is ahead from the first pass on.
    FreedLateAcrossIterations,
}

/// How pipeline ranks work together on the output projection and loss of a microbatch, if each has a part of the vocabulary (Yeung
/// et al., arXiv 2411.05288).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VocabularyPasses {
    /// Passes of their own in the schedule, of which the second waits for maxima and sums of all ranks (algorithm 1): the backward
    /// pass begins two intervals later.
    TwoBarriers,
    /// The input's gradient is scaled afterwards, so that one wait is left (algorithm 2): one interval later.
    #[default]
    OneBarrier,
    /// All ranks stop for the output of every microbatch; its place in the schedule lengthens the life of activations by half
    /// (section 6.2; nnScaler's interlaced pipeline).
    Interlaced,
}

impl VocabularyPasses {
    /// Microbatches in flight beyond those of the plain schedule, on `ranks` pipeline ranks.
    pub fn microbatches(self, ranks: u64) -> f64 {
        match self {
            VocabularyPasses::TwoBarriers => 2.0,
            VocabularyPasses::OneBarrier => 1.0,
            VocabularyPasses::Interlaced => ranks as f64 / 2.0,
        }
    }
}

fn all() -> f64 {
    1.0
}

/// How context-parallel ranks bring queries together with the keys and values of other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContextExchange {
    /// Each rank holds one stretch of the sequence and passes keys and values on, beside attention (Ring Attention, arXiv
    /// 2310.01889). Under a causal mask the last rank has nearly twice the mean work, and the others wait.
    Ring,
    /// The same with a stretch from the front and one from the back for each rank, which evens the work out.
    #[default]
    ZigZag,
    /// Keys and values of all ranks are gathered before attention (Llama 3, arXiv 2407.21783, section 3.3.2).
    AllGather,
    /// Ranks exchange the sequence for heads before attention and back after it (DeepSpeed-Ulysses, arXiv 2309.14509).
    AllToAll,
}

/// How tokens spread over the experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Routing {
    /// Tokens of the busiest expert-parallel rank over the mean; 1 for forced balance.
    pub skew: f64,
    /// Capacity factor: tokens beyond this multiple of the mean are dropped.
    pub capacity: Option<f64>,
}

impl Default for Routing {
    fn default() -> Routing {
        Routing { skew: 1.0, capacity: None }
    }
}

impl Routing {
    /// Tokens that the busiest rank computes over the mean.
    pub fn load(&self) -> f64 {
        self.capacity.map_or(self.skew, |most| self.skew.min(most))
    }
}

/// How kernels reach the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Launches {
    /// One by one, every elementwise operator for itself.
    #[default]
    Eager,
    /// One by one, neighbouring elementwise operators fused (Transformer Engine's layers, `torch.compile`).
    Fused,
    /// Fused and recorded in CUDA graphs: the host replays them at once.
    Graph,
}

/// What is computed again in the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// Nothing.
    None,
    /// The attention core (Korthikanti et al., arXiv 2205.05198, section 5).
    Selective,
    /// Every second matrix product and all that is elementwise (selective checkpointing by operator of PyTorch, as torchtitan sets
    /// it): queries, values, the result of attention, one of gate and up, and the block's output stay.
    Operators,
    /// Whole blocks; only their inputs are kept.
    Full,
}

/// Kernels of the attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionKernel {
    /// One kernel per operation.
    Naive,
    /// Scale, mask and softmax in one kernel.
    FusedSoftmax,
    /// FlashAttention 1 (arXiv 2205.14135).
    Flash1,
    /// FlashAttention 2 (arXiv 2307.08691).
    Flash2,
    /// FlashAttention 3 or cuDNN on Hopper and later.
    Flash3,
}

/// Kernels of logits and loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossKernel {
    /// Logits, a 32-bit copy and its exponentials all stay.
    Eager,
    /// The exponentials overwrite the 32-bit copy.
    InPlace,
    /// Fused: the logits only, and their gradients in place.
    Fused,
}

/// Which communication runs beside computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Overlap {
    /// Gradient reduction beside the last backward pass.
    pub gradients: bool,
    /// Tensor-parallel communication beside the products of the same layer (pipelined in chunks).
    pub tensor: bool,
    /// The sum of input gradients over tensor ranks, or the gathering of inputs again, beside the products of the weights'
    /// gradients.
    pub input_gradients: bool,
    /// Parameter gathering beside the forward pass.
    pub parameters: bool,
    /// Dispatch of tokens to experts and their return beside the passes of another microbatch (DeepSeek-V3, arXiv 2412.19437,
    /// section 3.2.1: forward and backward passes of two microbatches in one).
    #[serde(default)]
    pub experts: bool,
}

impl Layout {
    /// One GPU, one microbatch, 16-bit mixed precision.
    pub fn single(seq: u64, micro_batch: u64) -> Layout {
        Layout {
            tp: 1,
            sp: false,
            cp: 1,
            pp: 1,
            chunks: 1,
            dp: 1,
            context: ContextExchange::default(),
            ep: 1,
            routing: Routing::default(),
            sharding: StatePartition::NONE,
            group: None,
            keep_gathered: false,
            runtime: Runtime::FUSED,
            trainable: 1.0,
            adapters: None,
            backward_blocks: None,
            partition: Partition::Even,
            schedule: "1f1b".into(),
            seq,
            micro_batch,
            microbatches: 1,
            recompute: Recompute::None,
            recomputed_blocks: None,
            attention: AttentionKernel::Flash2,
            loss: LossKernel::InPlace,
            launches: Launches::default(),
            messages: MessageBuffers::default(),
            vocabulary: VocabularyPasses::default(),
            fused_kernels: true,
            fused_norms: true,
            scatters: true,
            slices: false,
            numerics: Numerics::MIXED_FP32_GRADIENTS,
            overlap: Overlap {
                gradients: false,
                tensor: false,
                input_gradients: true,
                parameters: false,
                experts: false,
            },
            bucket_bytes: None,
            gather_bytes: None,
            memory_limit: None,
        }
    }

    /// GPUs of the job.
    pub fn gpus(&self) -> u64 {
        self.tp * self.cp * self.pp * self.dp
    }

    /// Sequences of one iteration.
    pub fn global_batch(&self) -> u64 {
        self.micro_batch * self.microbatches * self.dp
    }

    /// Tokens of a microbatch on one rank of the context-parallel group.
    pub fn tokens(&self) -> f64 {
        (self.seq * self.micro_batch) as f64 / self.cp as f64
    }

    /// Rows that each of the busiest rank's experts gets, which share evenly, and how many experts these are.
    pub fn expert_rows(&self, experts: Experts) -> (f64, f64) {
        let visits = self.routing.load() * self.tokens() * experts.top_k as f64 / self.tp as f64;
        let local = (experts.count as f64 / self.ep as f64).max(1.0);
        (visits / local, local)
    }

    /// Share of the model's own parameters that have gradients.
    pub fn trained_share(&self) -> f64 {
        if self.adapters.is_some() { 0.0 } else { self.trainable }
    }

    /// Data-parallel ranks, those of context parallelism included: they hold the same parameters.
    pub fn data_ranks(&self) -> u64 {
        self.dp * self.cp
    }

    /// Data-parallel ranks of a group, on nodes of `node` GPUs: as asked, or the most of a node that divide the ranks.
    pub fn group_ranks(&self, node: u64) -> u64 {
        let ranks = self.data_ranks();
        let most = self.group.unwrap_or_else(|| (node / self.tp.max(1)).clamp(1, ranks));
        (1..=most.min(ranks)).rev().find(|m| ranks.is_multiple_of(*m)).unwrap_or(1)
    }

    /// Blocks of a stage of `blocks` that are computed again.
    pub fn recomputed(&self, blocks: u64) -> u64 {
        match self.recompute {
            Recompute::None => 0,
            _ => self.recomputed_blocks.map_or(blocks, |most| most.min(blocks)),
        }
    }

    /// Of a model of `layers` blocks, the first ones that the backward pass does not go through.
    pub fn frozen_blocks(&self, layers: u64) -> u64 {
        layers - self.backward_blocks.unwrap_or(layers).min(layers)
    }

    /// By how much the norms' tensors are cut.
    pub fn sequence_cut(&self) -> f64 {
        if self.sp { self.tp as f64 } else { 1.0 }
    }

    /// Whether the layout is one that ranks can run.
    ///
    /// # Errors
    /// The first violation.
    pub fn check(&self) -> Result<(), LayoutError> {
        let counts = [
            ("tp", self.tp),
            ("cp", self.cp),
            ("pp", self.pp),
            ("chunks", self.chunks),
            ("dp", self.dp),
            ("ep", self.ep),
            ("seq", self.seq),
            ("micro_batch", self.micro_batch),
            ("microbatches", self.microbatches),
        ];
        if let Some((what, _)) = counts.iter().find(|(_, n)| *n == 0) {
            return Err(LayoutError::Zero { what });
        }
        if !(self.dp * self.cp * self.tp).is_multiple_of(self.ep) {
            return Err(LayoutError::Experts { ep: self.ep, ranks: self.dp * self.cp * self.tp });
        }
        if let Some(group) = self.group.filter(|group| *group == 0 || !self.data_ranks().is_multiple_of(*group)) {
            return Err(LayoutError::Group { group, ranks: self.data_ranks() });
        }
        for (what, value) in [("expert_skew", Some(self.routing.skew)), ("expert_capacity", self.routing.capacity)] {
            if let Some(value) = value.filter(|v| !(*v >= 1.0 && v.is_finite())) {
                return Err(LayoutError::Routing { what, value });
            }
        }
        if !(self.trainable > 0.0 && self.trainable <= 1.0) {
            return Err(LayoutError::Trainable { ratio: self.trainable });
        }
        Ok(())
    }
}

/// A layout that no set of ranks can run.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum LayoutError {
    /// A count of zero.
    #[error("{what} is 0; it has to be at least 1")]
    Zero { what: &'static str },
    /// Expert groups that do not divide the ranks of a stage.
    #[error("ep = {ep} does not divide the {ranks} ranks of a pipeline stage (dp x cp x tp); choose a divisor")]
    Experts { ep: u64, ranks: u64 },
    /// A load that cannot be.
    #[error("{what} = {value}; it is a multiple of the mean load of an expert-parallel rank, at least 1")]
    Routing { what: &'static str, value: f64 },
    /// Groups that do not divide the data-parallel ranks.
    #[error("group_size = {group} does not divide the {ranks} data-parallel ranks (dp x cp); choose a divisor")]
    Group { group: u64, ranks: u64 },
    /// A share that is none.
    #[error(
        "trainable = {ratio}, but it is the share of the parameters that are trained: above 0, at most 1 (or full)"
    )]
    Trainable { ratio: f64 },
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The playbook's table of bytes per parameter (Ultra-Scale Playbook, memory for weights, gradients and optimizer states):
    /// 16 in full precision and in mixed precision, 20 with a 32-bit gradient beside the 16-bit one.
    #[test]
    fn bytes_per_parameter_of_the_recipes() {
        assert_eq!(Numerics::FP32.bytes_per_parameter(), 16.0);
        assert_eq!(Numerics::MIXED.bytes_per_parameter(), 16.0);
        assert_eq!(Numerics::MIXED_FP32_GRADIENTS.bytes_per_parameter(), 18.0);
        assert_eq!(Numerics::MIXED_FP32_ACCUMULATION.bytes_per_parameter(), 20.0);
        assert_eq!(Numerics::GATHERED_16_BIT.bytes_per_parameter(), 16.0);
        // The playbook's table of FP8 recipes, and its reductions from 20 bytes.
        for (recipe, bytes, percent) in [
            (Numerics::FP8_TRANSFORMER_ENGINE, 16.0, 20.0),
            (Numerics::FP8_LM, 9.0, 55.0),
            (Numerics::FP8_DEEPSEEK, 15.0, 25.0),
            (Numerics::FP8_NANOTRON, 10.0, 50.0),
        ] {
            assert_eq!(recipe.bytes_per_parameter(), bytes);
            let before = Numerics::MIXED_FP32_ACCUMULATION.bytes_per_parameter();
            assert_eq!(100.0 * (before - bytes) / before, percent);
        }
    }

    #[test]
    fn refuses_what_cannot_run() {
        let layout = Layout { tp: 0, ..Layout::single(128, 1) };
        assert_eq!(layout.check(), Err(LayoutError::Zero { what: "tp" }));
        let layout = Layout { dp: 4, ep: 3, ..Layout::single(128, 1) };
        assert_eq!(layout.check(), Err(LayoutError::Experts { ep: 3, ranks: 4 }));
        assert_eq!(Layout { dp: 4, ep: 2, ..Layout::single(128, 1) }.check(), Ok(()));
        let layout = Layout { dp: 12, group: Some(8), ..Layout::single(128, 1) };
        assert_eq!(layout.check(), Err(LayoutError::Group { group: 8, ranks: 12 }));
        let layout = Layout { trainable: 0.0, ..Layout::single(128, 1) };
        assert!(matches!(layout.check(), Err(LayoutError::Trainable { .. })));
    }

    #[test]
    fn a_group_is_what_a_node_has_of_the_ranks_unless_asked_otherwise() {
        let of = |dp, tp, group, node| Layout { dp, tp, group, ..Layout::single(128, 1) }.group_ranks(node);
        assert_eq!((of(32, 1, None, 8), of(32, 2, None, 8), of(16, 8, None, 8), of(4, 1, None, 8)), (8, 4, 1, 4));
        assert_eq!((of(32, 1, Some(16), 8), of(12, 1, None, 8)), (16, 6));
    }
}
