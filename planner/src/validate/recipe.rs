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
    /// Names of the matrices beside which adapters stand, if any are trained; nothing for all.
    pub adapters_beside: &'static str,
}

const NONE: Overlap =
    Overlap { gradients: false, tensor: false, input_gradients: false, parameters: false, experts: false };
const DATA: Overlap = Overlap { gradients: true, input_gradients: true, parameters: true, ..NONE };
const ALL: Overlap = Overlap { tensor: true, ..DATA };

/// The defaults of a run's framework, and what the run says of itself.
pub fn recipe(row: &Row) -> Recipe {
    let mut recipe = Told::of(row).defaults();
    if letters(row.text("schedule")).contains("dualpipe") {
        // Its purpose: a microbatch's dispatch to experts and back beside another's passes (arXiv 2412.19437, section 3.2.1).
        recipe.overlap.experts = true;
    }
    if row.noted("overlap off") {
        recipe.overlap = NONE;
    }
    recipe.take_method(row);
    recipe.take_kernel(row);
    recipe.take_launches(row);
    if row.noted("CE fusion") {
        recipe.loss = LossKernel::Fused;
    }
    recipe
}

/// What the defaults of frameworks hang on.
struct Told<'r> {
    row: &'r Row,
    /// In lower case.
    framework: String,
    /// In lower case.
    sharding: String,
    blackwell: bool,
    /// Hopper or later.
    recent: bool,
}

impl Told<'_> {
    fn of(row: &Row) -> Told<'_> {
        let generation = find_gpu(row.text("gpu")).map(|gpu| gpu.generation);
        let blackwell = matches!(generation, Ok(Generation::Blackwell));
        Told {
            row,
            framework: row.text("framework").to_ascii_lowercase(),
            sharding: row.text("zero_stage_or_fsdp").to_ascii_lowercase(),
            blackwell,
            recent: blackwell || matches!(generation, Ok(Generation::Hopper)),
        }
    }

    fn has(&self, word: &str) -> bool {
        self.framework.contains(word)
    }

    fn defaults(&self) -> Recipe {
        let fsdp = ["fsdp", "torchtitan", "composer"].iter().any(|name| self.has(name));
        if self.has("nanotron") {
            self.nanotron()
        } else if ["transformers", "hugging", "peft"].iter().any(|name| self.has(name)) {
            self.hugging_face()
        } else if fsdp || self.sharding.contains("fsdp") {
            self.fsdp()
        } else if self.has("deepspeed") {
            self.deepspeed()
        } else if self.has("bridge") || self.has("nemo") {
            // Its recipes reduce gradients in 16 bits; on Blackwell they record graphs.
            let launches = if self.has("bridge") && self.blackwell { Launches::Graph } else { Launches::Fused };
            // Its measured recipes adapt the fused matrix of queries, keys and values only.
            Recipe { overlap: ALL, sequence_parallel: true, launches, adapters_beside: "qkv", ..self.base() }
        } else if self.has("megatron") && !self.has("intern") {
            self.megatron()
        } else {
            Recipe { overlap: DATA, ..self.base() }
        }
    }

    /// What holds where a framework does nothing else.
    fn base(&self) -> Recipe {
        let megatron = self.has("megatron") && !self.has("deepspeed");
        let newest = self.recent && (megatron || ["bridge", "nemo", "te "].iter().any(|name| self.has(name)));
        Recipe {
            numerics: Numerics::MIXED,
            loss: LossKernel::InPlace,
            partition: Partition::Even,
            overlap: NONE,
            bucket_bytes: None,
            dropout: false,
            flash: true,
            attention: if newest { AttentionKernel::Flash3 } else { AttentionKernel::Flash2 },
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
            adapters_beside: "",
        }
    }

    /// Models of Hugging Face's library as they come: rotary embedding, norms, gate and loss are operators of PyTorch one by one.
    fn hugging_face(&self) -> Recipe {
        let sharded = self.sharding.contains("fsdp");
        let numerics = if sharded { Numerics::GATHERED_16_BIT } else { Numerics::MIXED };
        Recipe {
            numerics,
            loss: LossKernel::Eager,
            overlap: DATA,
            fused_kernels: false,
            fused_norms: false,
            ..self.base()
        }
    }

    fn nanotron(&self) -> Recipe {
        // PyTorch's distributed data parallel; its sharded optimizer reduces everything at once, at the end.
        let buckets = !self.sharding.contains('1');
        Recipe {
            numerics: Numerics::MIXED_FP32_ACCUMULATION,
            partition: Partition::ByCost,
            bucket_bytes: buckets.then_some(25.0 * (1 << 20) as f64),
            // Its asynchronous mode overlaps the gathering with nothing but itself.
            overlap: Overlap { gradients: buckets, ..NONE },
            sequence_parallel: true,
            // Until a fix, the host waited for every message between stages. After it, it waits once an iteration.
            messages: if self.row.noted("after_pp_fix=True") {
                MessageBuffers::FreedLate
            } else if self.row.noted("after_pp_fix=False") && matches!(self.row.text("pp"), "" | "1") {
                MessageBuffers::FreedLateAcrossIterations
            } else {
                MessageBuffers::Shared
            },
            fused_kernels: false,
            slices: true,
            ..self.base()
        }
    }

    fn fsdp(&self) -> Recipe {
        let mut recipe = Recipe { numerics: Numerics::GATHERED_16_BIT, overlap: DATA, ..self.base() };
        if self.has("composer") {
            // Its recipes take the fused loss of FlashAttention. Its models carry linear biases, which only the Triton port of the first
            // FlashAttention took.
            (recipe.loss, recipe.attention) = (LossKernel::Fused, AttentionKernel::Flash1);
        }
        if self.has("titan") {
            // torchtitan compiles its blocks and gathers keys and values.
            (recipe.launches, recipe.context) = (Launches::Fused, ContextExchange::AllGather);
            recipe.by_operator = true;
        }
        recipe
    }

    fn deepspeed(&self) -> Recipe {
        // 16-bit gradients, reduced in 16 bits; no FlashAttention in the Megatron-DeepSpeed of its time.
        let summed = self.row.noted("fp32 grad") || self.row.noted("fp32 accumul");
        let numerics = if summed { Numerics::MIXED_FP32_ACCUMULATION } else { Numerics::MIXED };
        // Fully sharded, it fetches ahead and reduces behind.
        let overlap = if self.sharding.contains('3') { DATA } else { NONE };
        // No kernel of its own for rotary embeddings and gates, in the models that have them.
        let gated = ["neox", "pythia", "glm", "llama", "gptj", "falcon"];
        let fused_kernels = !any(&letters(self.row.text("model")), &gated);
        Recipe { numerics, dropout: true, flash: false, scatters: false, overlap, fused_kernels, ..self.base() }
    }

    fn megatron(&self) -> Recipe {
        let (row, recent) = (self.row, self.recent);
        let unsaid = row.text("flash_attn").is_empty();
        // Until 2022: dropout, no FlashAttention, nothing of the data-parallel communication overlapped. Its releases for Hopper and
        // later run Transformer Engine's layers.
        let old = self.has("2021") || self.has("2022") || (unsaid && !recent);
        // It sums gradients in 32 bits with bf16, and not with fp16 unless told so.
        let bf16 = row.text("precision").eq_ignore_ascii_case("bf16") || row.noted("fp32 grad");
        let inputs = Overlap { input_gradients: !self.has("2021") && !unsaid, ..NONE };
        let engine = recent || self.has("te ") || self.has("transformer engine");
        Recipe {
            numerics: if bf16 { Numerics::MIXED_FP32_GRADIENTS } else { Numerics::MIXED },
            overlap: if recent { ALL } else { inputs },
            dropout: old,
            flash: !old,
            launches: if engine { Launches::Fused } else { Launches::Eager },
            sharding: if recent { StatePartition::ZERO1 } else { StatePartition::NONE },
            // Sequence parallelism came in 2022 and costs nothing (arXiv 2205.05198).
            sequence_parallel: !old,
            ..self.base()
        }
    }
}

impl Recipe {
    /// A paper's method, where the run is one of a comparison of methods.
    fn take_method(&mut self, row: &Row) {
        let spread = match row.note("method") {
            Some("redis") => {
                self.partition = Partition::Balanced;
                return;
            }
            Some("vocab-1") => VocabularyPasses::TwoBarriers,
            Some("vocab-2") => VocabularyPasses::OneBarrier,
            Some("interlaced") => VocabularyPasses::Interlaced,
            _ => return,
        };
        (self.partition, self.vocabulary) = (Partition::VocabularySpread, spread);
    }

    /// Sweeps over attention kernels say which one; a fused norm is one of the things that they try.
    fn take_kernel(&mut self, row: &Row) {
        let Some(kernel) = row.note("kernel").map(str::to_ascii_lowercase) else { return };
        self.fused_norms = kernel.contains("rms");
        self.flash = kernel.contains("flash");
        let first = any(&kernel, &["flash_attn1", "flash1"]) || kernel.contains("1.0");
        self.attention = match self.flash {
            true if first => AttentionKernel::Flash1,
            true => self.attention,
            false if any(&kernel, &["torch", "naive"]) => AttentionKernel::Naive,
            false => AttentionKernel::FusedSoftmax,
        };
    }

    /// How kernels reach the GPU and how contexts are exchanged, in the framework's name or the notes.
    fn take_launches(&mut self, row: &Row) {
        let told = format!("{}; {}", row.text("framework"), row.text("notes")).to_ascii_lowercase();
        let says = |words: &[&str]| any(&told, words);
        if says(&["torch.compile", "compiled", "compile=true", "+ compile"]) && self.launches == Launches::Eager {
            self.launches = Launches::Fused;
        }
        if says(&["cuda graph", "cudagraph", "cuda-graph"]) && !says(&["no cuda graph", "graphs off", "graph off"]) {
            self.launches = Launches::Graph;
        }
        if says(&["cp=a2a", "cp=alltoall", "cp=all-to-all", "ulysses"]) {
            self.context = ContextExchange::AllToAll;
        } else if says(&["cp=allgather", "cp=all-gather", "cp=all_gather"]) {
            self.context = ContextExchange::AllGather;
        } else if says(&["cp=p2p", "cp=ring", "zigzag", "zig-zag"]) {
            self.context = ContextExchange::ZigZag;
        }
    }
}
