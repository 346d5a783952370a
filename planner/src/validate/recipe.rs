//! What training frameworks do by default, where a file of runs leaves it open: facts about the frameworks' code, not about the runs.

use super::row::Row;
use super::words::{any, letters};
use paceline_profiles::{Generation, find_gpu};
use paceline_sim::cluster::{
    AttentionKernel, ContextExchange, Launches, LossKernel, MessageBuffers, Numerics, Overlap, Partition,
    VocabularyPasses,
};
use paceline_sim::partition::StatePartition;

/// Defaults of a framework.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// Number formats of the states.
    pub numerics: Numerics,
    /// Logits and loss.
    pub loss: LossKernel,
    /// Blocks over stages.
    pub partition: Partition,
    /// What runs beside computation.
    pub overlap: Overlap,
    /// As [`paceline_sim::cluster::Layout::slices`].
    pub slices: bool,
    /// As [`paceline_sim::cluster::Layout::fused_norms`].
    pub fused_norms: bool,
    /// As [`paceline_sim::cluster::Layout::scatters`].
    pub scatters: bool,
    /// What is sharded when nothing is stated.
    pub sharding: StatePartition,
    /// Bytes of gradients that are reduced at a time.
    pub bucket_bytes: Option<f64>,
    /// Dropout in GPT models.
    pub dropout: bool,
    /// Fused attention when nothing is stated.
    pub flash: bool,
    /// Kernel of fused attention.
    pub attention: AttentionKernel,
    /// As [`paceline_sim::cluster::Layout::messages`].
    pub messages: MessageBuffers,
    /// As [`paceline_sim::cluster::Layout::vocabulary`].
    pub vocabulary: VocabularyPasses,
    /// As [`paceline_sim::cluster::Layout::fused_kernels`].
    pub fused_kernels: bool,
    /// Sequence parallelism when nothing is stated.
    pub sequence_parallel: bool,
    /// Selective recomputation is by operator.
    pub by_operator: bool,
    /// How kernels reach the GPU.
    pub launches: Launches,
    /// How context-parallel ranks exchange.
    pub context: ContextExchange,
}

const NONE: Overlap =
    Overlap { gradients: false, tensor: false, input_gradients: false, parameters: false, experts: false };
const DATA: Overlap = Overlap { gradients: true, input_gradients: true, parameters: true, ..NONE };
const ALL: Overlap = Overlap { tensor: true, ..DATA };

/// The defaults of a run's framework.
pub fn recipe(row: &Row) -> Recipe {
    let framework = row.text("framework").to_ascii_lowercase();
    let sharding = row.text("zero_stage_or_fsdp").to_ascii_lowercase();
    let has = |word: &str| framework.contains(word);
    let generation = find_gpu(row.text("gpu")).map(|gpu| gpu.generation);
    let blackwell = matches!(generation, Ok(Generation::Blackwell));
    let recent = blackwell || matches!(generation, Ok(Generation::Hopper));
    let flash = if recent && (has("bridge") || has("nemo") || has("te ") || (has("megatron") && !has("deepspeed"))) {
        AttentionKernel::Flash3
    } else {
        AttentionKernel::Flash2
    };
    let base = Recipe {
        numerics: Numerics::MIXED,
        loss: LossKernel::InPlace,
        partition: Partition::Even,
        overlap: NONE,
        bucket_bytes: None,
        dropout: false,
        flash: true,
        attention: flash,
        messages: MessageBuffers::Shared,
        vocabulary: VocabularyPasses::default(),
        fused_kernels: true,
        slices: false,
        fused_norms: true,
        scatters: true,
        sharding: StatePartition::ZERO1,
        sequence_parallel: false,
        by_operator: false,
        launches: Launches::Eager,
        context: ContextExchange::ZigZag,
    };
    let mut recipe = if has("nanotron") {
        Recipe {
            numerics: Numerics::MIXED_FP32_ACCUMULATION,
            partition: Partition::ByCost,
            // PyTorch's distributed data parallel; its sharded optimizer reduces everything at once.
            bucket_bytes: (!sharding.contains('1')).then_some(25.0 * (1 << 20) as f64),
            // Its asynchronous mode overlaps the gathering with nothing but itself, and sharded optimizers reduce at the end.
            overlap: Overlap { gradients: !sharding.contains('1'), ..NONE },
            sequence_parallel: true,
            // Until a fix, the host waited for every message between stages. After it, it waits once an iteration.
            messages: if row.noted("after_pp_fix=True") {
                MessageBuffers::FreedLate
            } else if row.noted("after_pp_fix=False") && matches!(row.text("pp"), "" | "1") {
                MessageBuffers::FreedLateAcrossIterations
            } else {
                MessageBuffers::Shared
            },
            fused_kernels: false,
            slices: true,
            ..base
        }
    } else if has("fsdp") || has("torchtitan") || has("composer") || sharding.contains("fsdp") {
        // Composer's recipes take the fused loss of FlashAttention.
        let loss = if has("composer") { LossKernel::Fused } else { LossKernel::InPlace };
        // Its models carry linear biases, which only the Triton port of the first FlashAttention took.
        let attention = if has("composer") { AttentionKernel::Flash1 } else { flash };
        // torchtitan compiles its blocks and gathers keys and values.
        let (launches, context) =
            if has("titan") { (Launches::Fused, ContextExchange::AllGather) } else { (base.launches, base.context) };
        let by_operator = has("titan");
        Recipe {
            numerics: Numerics::GATHERED_16_BIT,
            overlap: DATA,
            loss,
            attention,
            launches,
            context,
            by_operator,
            ..base
        }
    } else if has("deepspeed") {
        // 16-bit gradients, reduced in 16 bits; no FlashAttention in the Megatron-DeepSpeed of its time.
        let summed = row.noted("fp32 grad") || row.noted("fp32 accumul");
        let numerics = if summed { Numerics::MIXED_FP32_ACCUMULATION } else { Numerics::MIXED };
        // Fully sharded, it fetches ahead and reduces behind.
        let overlap = if sharding.contains('3') { DATA } else { base.overlap };
        // No kernel of its own for rotary embeddings and gates, in the models that have them.
        let fused_kernels = !any(&letters(row.text("model")), &["neox", "pythia", "glm", "llama", "gptj", "falcon"]);
        Recipe { numerics, dropout: true, flash: false, scatters: false, overlap, fused_kernels, ..base }
    } else if has("bridge") || has("nemo") {
        // Its recipes reduce gradients in 16 bits; on Blackwell they record graphs.
        let launches = if has("bridge") && blackwell { Launches::Graph } else { Launches::Fused };
        Recipe { overlap: ALL, sequence_parallel: true, launches, ..base }
    } else if has("intern") {
        Recipe { overlap: DATA, ..base }
    } else if has("megatron") {
        // Until 2022: dropout, no FlashAttention, nothing of the data-parallel communication overlapped. Its releases for Hopper and
        // later run Transformer Engine's layers.
        let old = has("2021") || has("2022") || (row.text("flash_attn").is_empty() && !recent);
        // It sums gradients in 32 bits with bf16, and not with fp16 unless told so.
        let bf16 = row.text("precision").eq_ignore_ascii_case("bf16") || row.noted("fp32 grad");
        let numerics = if bf16 { Numerics::MIXED_FP32_GRADIENTS } else { Numerics::MIXED };
        let inputs = Overlap { input_gradients: !has("2021") && !row.text("flash_attn").is_empty(), ..NONE };
        let overlap = if recent { ALL } else { inputs };
        let engine = recent || has("te ") || has("transformer engine");
        let launches = if engine { Launches::Fused } else { Launches::Eager };
        let sharding = if recent { StatePartition::ZERO1 } else { StatePartition::NONE };
        // Sequence parallelism came in 2022 and costs nothing (arXiv 2205.05198).
        let sequence_parallel = !old;
        Recipe { dropout: old, flash: !old, numerics, overlap, launches, sharding, sequence_parallel, ..base }
    } else {
        Recipe { overlap: DATA, ..base }
    };
    if letters(row.text("schedule")).contains("dualpipe") {
        // Its purpose: a microbatch's dispatch to experts and back beside another's passes (arXiv 2412.19437, section 3.2.1).
        recipe.overlap.experts = true;
    }
    if row.noted("overlap off") {
        recipe.overlap = NONE;
    }
    match row.note("method") {
        Some("redis") => recipe.partition = Partition::Balanced,
        Some(method @ ("vocab-1" | "vocab-2" | "interlaced")) => {
            recipe.partition = Partition::VocabularySpread;
            recipe.vocabulary = match method {
                "vocab-1" => VocabularyPasses::TwoBarriers,
                "vocab-2" => VocabularyPasses::OneBarrier,
                _ => VocabularyPasses::Interlaced,
            };
        }
        _ => {}
    }
    if let Some(kernel) = row.note("kernel").map(str::to_ascii_lowercase) {
        // Sweeps over attention kernels say which one; a fused norm is one of the things that they try.
        recipe.fused_norms = kernel.contains("rms");
        recipe.attention = match kernel.as_str() {
            k if k.contains("flash") && k.contains("1.0") => AttentionKernel::Flash1,
            k if k.contains("flash_attn1") || k.contains("flash1") => AttentionKernel::Flash1,
            k if k.contains("flash") => recipe.attention,
            k if k.contains("torch") || k.contains("naive") => AttentionKernel::Naive,
            _ => AttentionKernel::FusedSoftmax,
        };
        recipe.flash = kernel.contains("flash");
    }
    let told = format!("{framework}; {}", row.text("notes").to_ascii_lowercase());
    let says = |words: &[&str]| words.iter().any(|word| told.contains(word));
    if says(&["torch.compile", "compiled", "compile=true", "+ compile"]) && recipe.launches == Launches::Eager {
        recipe.launches = Launches::Fused;
    }
    if says(&["cuda graph", "cudagraph", "cuda-graph"]) && !says(&["no cuda graph", "graphs off", "graph off"]) {
        recipe.launches = Launches::Graph;
    }
    if says(&["cp=a2a", "cp=alltoall", "cp=all-to-all", "ulysses"]) {
        recipe.context = ContextExchange::AllToAll;
    } else if says(&["cp=allgather", "cp=all-gather", "cp=all_gather"]) {
        recipe.context = ContextExchange::AllGather;
    } else if says(&["cp=p2p", "cp=ring", "zigzag", "zig-zag"]) {
        recipe.context = ContextExchange::ZigZag;
    }
    if row.noted("CE fusion") {
        recipe.loss = LossKernel::Fused;
    }
    recipe
}
