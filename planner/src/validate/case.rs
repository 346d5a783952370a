//! A measured run as a model, a layout and a cluster. What a file leaves open is filled with documented defaults; what
//! cannot be filled is a reason to skip.

use super::recipe::{Recipe, recipe};
use super::row::Row;
use super::words::{self, any, letters};
use crate::predict::{ClusterPrediction, PredictError, predict_cluster};
use crate::schedules;
use paceline_profiles::{Cluster, Fabric, Generation, find_cluster, find_gpu};
use paceline_sim::cluster::{
    Adapters, Architecture, Attention, AttentionKernel, Compute, Experts, Layout, Numerics, Partition, Physics,
    PositionTable, Recompute,
};

/// A run to be predicted, and what was measured.
#[derive(Debug, Clone)]
pub struct Case {
    /// The run's id.
    pub id: String,
    /// Where it was published.
    pub source: String,
    /// What trained it, as far as it is known.
    pub framework: String,
    /// The model.
    pub model: Architecture,
    /// The layout.
    pub layout: Layout,
    /// The cluster.
    pub cluster: Cluster,
    /// Seconds of an iteration, where they were measured and may be scored.
    pub seconds: Option<f64>,
    /// Why the time is not scored although there is one.
    pub time_skipped: Option<&'static str>,
    /// Peak memory in GiB, where it was measured.
    pub peak_gib: Option<f64>,
    /// The peak is what was allocated, not what the allocator reserved.
    pub allocated: bool,
    /// Whether it ran out of memory.
    pub oom: bool,
    /// Nothing is said about recomputation: what fits is assumed, the least first.
    pub recompute_open: bool,
    /// Scored, but not fitted to: so slow that something else than its layout must have held it up, or a runtime whose extra
    /// passes are not modelled.
    pub doubtful: bool,
}

impl Case {
    /// Predicts the run. Where nothing is said about recomputation, with the least that fits: what would not fit is not run.
    ///
    /// # Errors
    /// When the layout or its schedule is impossible.
    pub fn predict(&self, physics: &Physics) -> Result<ClusterPrediction, PredictError> {
        let predicted = match predict_cluster(&self.model, &self.layout, &self.cluster, physics) {
            // A schedule that cannot be had with these sizes was not the one that ran.
            Err(PredictError::Schedule(_) | PredictError::Order(_)) if self.layout.schedule != "1f1b" => {
                let plain = Layout { schedule: "1f1b".into(), chunks: 1, ..self.layout.clone() };
                return Case { layout: plain, ..self.clone() }.predict(physics);
            }
            other => other?,
        };
        if !self.recompute_open || predicted.memory.fits {
            return Ok(predicted);
        }
        for recompute in [Recompute::Selective, Recompute::Full] {
            let layout = Layout { recompute, ..self.layout.clone() };
            let again = predict_cluster(&self.model, &layout, &self.cluster, physics)?;
            if again.memory.fits {
                return Ok(again);
            }
        }
        Ok(predicted)
    }
}

/// Builds a case, or says in a few words why not.
///
/// # Errors
/// The reason to skip the run.
pub fn case(row: &Row) -> Result<Case, String> {
    let recipe = recipe(row);
    let outcome = row.text("outcome").to_ascii_lowercase();
    let oom = outcome.contains("oom") || outcome.contains("out of memory");
    if !oom && !["", "ok", "success", "completed"].contains(&outcome.as_str()) {
        return Err(format!("outcome {outcome:?}"));
    }
    let model = architecture(row, &recipe)?;
    let layout = layout(row, &recipe, &model)?;
    let cluster = cluster(row)?;
    let (seconds, time_skipped) = if oom { (None, None) } else { seconds(row, &model, &layout, &cluster) };
    let id = match row.text("id") {
        "" => format!("line {}", row.line),
        id => id.to_owned(),
    };
    Ok(Case {
        source: match row.text("source") {
            "" => id.rsplit_once('-').map_or("unnamed", |(s, _)| s).to_owned(),
            s => s.to_owned(),
        },
        id,
        framework: row.text("framework").to_owned(),
        seconds,
        time_skipped,
        peak_gib: if oom { None } else { row.number("peak_mem_gib") },
        allocated: row.noted("max_allocated") || row.noted("allocated peak") || row.noted("peak allocated"),
        oom,
        recompute_open: row.text("recompute").is_empty(),
        doubtful: row.noted("very low MFU") || layout.partition == Partition::VocabularySpread,
        model,
        layout,
        cluster,
    })
}

/// More parameters than any model has, by far.
const MOST_PARAMETERS: f64 = 1e15;
/// The same for heads' widths times blocks times the sequence.
const MOST_ATTENTION: f64 = 1e16;

/// Whether the product of counts that are each possible is; beyond, the arithmetic would not hold.
fn plausible(model: &Architecture, row: &Row) -> Result<(), String> {
    let (query, key, value) = model.attention.widths();
    let width = query as f64 + key as f64 + value as f64 + model.attention.output_width() as f64;
    let (hidden, layers) = (model.hidden as f64, model.layers as f64);
    let experts = model.experts.map_or(0.0, |e| e.count.max(e.top_k) as f64 * e.ffn as f64 + e.shared_ffn as f64);
    let parameters = layers * hidden * (width + 3.0 * (model.ffn as f64 + experts)) + 2.0 * model.vocab as f64 * hidden;
    let attention = layers * width * row.number("seq").unwrap_or(0.0);
    if parameters > MOST_PARAMETERS || attention > MOST_ATTENTION {
        return Err(format!("a model of some {parameters:.0e} parameters; are the columns shifted?"));
    }
    Ok(())
}

fn need(row: &Row, column: &str) -> Result<u64, String> {
    row.count(column).filter(|n| *n > 0).ok_or_else(|| format!("{column} not known"))
}

/// The largest width or number of blocks that notes may name.
const MOST_IN_NOTES: u64 = 1_000_000;

fn number_in(row: &Row, keys: &[&str]) -> Option<u64> {
    keys.iter().find_map(|key| row.note(key)).and_then(|text| {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok().filter(|n| *n <= MOST_IN_NOTES)
    })
}

/// The model. GELU, biases, learned positions and tied embeddings for the GPT family; gated MLPs without biases, rotary
/// positions and an own output projection for all others; corrected where a published parameter count says so.
fn architecture(row: &Row, recipe: &Recipe) -> Result<Architecture, String> {
    let name = row.text("model").to_ascii_lowercase();
    let known = ["layers", "hidden", "heads"].iter().any(|c| row.count(c).is_none_or(|n| n == 0));
    if let Some(preset) = known.then(|| Architecture::load(&name.replace([' ', '_'], "-")).ok()).flatten() {
        return Ok(preset);
    }
    let (layers, hidden, heads) = (need(row, "layers")?, need(row, "hidden")?, need(row, "heads")?);
    let gpt = any(&name, &["gpt", "mpt", "bloom", "opt-", "neox", "megatron", "turing", "starcoder", "pythia"])
        && !name.contains("gpt-oss");
    let alibi = any(&name, &["bloom", "falcon"]);
    // Nemotron's own models square a rectifier instead of gating.
    let plain = name.contains("nemotron") && !name.contains("llama");
    let head_dim = number_in(row, &["head_dim"]).or_else(|| head_width(&name)).unwrap_or(hidden.div_ceil(heads));
    let kv_heads = row.count("kv_heads").filter(|n| *n > 0).unwrap_or(heads);
    let latent =
        row.noted("MLA") || any(&letters(&name), &["deepseekv2", "deepseekv3", "deepseekr1", "kimik2", "moonlight"]);
    let attention = if latent {
        // DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437); the small models compress keys and values only.
        let query_rank = if name.contains("lite") { 0 } else { 1536 };
        Attention::Latent { heads, query_rank, kv_rank: 512, nope_dim: 128, rope_dim: 64, value_dim: 128 }
    } else {
        Attention::Grouped { heads, kv_heads, head_dim }
    };
    let vocab = row.count("vocab").filter(|n| *n > 0).unwrap_or(50_304);
    let count = row.count("experts").unwrap_or(0);
    let ffn = match row.count("ffn_hidden").filter(|n| *n > 0) {
        Some(ffn) => ffn,
        None if gpt => 4 * hidden,
        // Two thirds of four, as Llama has it.
        None => (hidden * 8).div_ceil(3),
    };
    let (known_ffn, known_shared, known_dense) = mixture(&name).unwrap_or((ffn, 0, 0));
    let experts = (count > 1).then(|| Experts {
        count,
        top_k: row.count("topk").filter(|n| *n > 0).unwrap_or(1).min(count),
        ffn: number_in(row, &["moe_ffn", "expert_ffn", "moe_ffn_hidden"]).unwrap_or(known_ffn),
        shared_ffn: number_in(row, &["shared ffn", "shared_ffn", "shared expert ffn"]).unwrap_or(known_shared),
        dense_layers: number_in(row, &["first dense layers", "first_dense_layers", "dense layers"])
            .unwrap_or(known_dense)
            .min(layers),
    });
    let seq = need(row, "seq")?;
    let tied = if row.noted("tied_emb=True") || row.noted(" tied emb") {
        true
    } else if row.noted("tied_emb=False") || row.noted("untied") {
        false
    } else {
        gpt
    };
    let usual = Architecture {
        name: row.text("model").to_owned(),
        layers,
        hidden,
        attention,
        ffn,
        gated: !gpt && !alibi && !plain,
        experts,
        vocab,
        tied,
        biases: gpt,
        positions: if gpt && !alibi { PositionTable::Learned(seq) } else { PositionTable::None },
        dropout: recipe.dropout && gpt,
    };
    plausible(&usual, row)?;
    Ok(match row.number("params_b").filter(|b| *b > 0.0) {
        Some(billions) => agree(usual, billions * 1e9),
        None => usual,
    })
}

/// Width of a head in families where it is not the hidden width over the heads (their `config.json`).
fn head_width(name: &str) -> Option<u64> {
    let known =
        [("qwen3next", 256), ("qwen3", 128), ("gptoss", 64), ("mistralnemo", 128), ("glm45", 128), ("gemma", 256)];
    let plain = letters(name);
    known.into_iter().find(|(part, _)| plain.contains(part)).map(|(_, width)| width)
}

/// Width of an expert, of the shared expert, and number of dense layers of published mixtures whose runs are often listed with the
/// dense width only (their `config.json`).
fn mixture(name: &str) -> Option<(u64, u64, u64)> {
    let known = [
        ("deepseekv2lite", (1408, 2816, 1)),
        ("deepseekmoe16b", (1408, 2816, 1)),
        ("moonlight", (1408, 2816, 1)),
        ("deepseekv2", (1536, 3072, 1)),
        ("deepseekv3", (2048, 2048, 3)),
        ("deepseekr1", (2048, 2048, 3)),
        ("kimik2", (2048, 2048, 1)),
        ("qwen3next", (512, 512, 0)),
        ("qwen330b", (768, 0, 0)),
        ("qwen3vl30b", (768, 0, 0)),
        ("qwen3235b", (1536, 0, 0)),
        ("qwen3vl235b", (1536, 0, 0)),
        ("qwen257b", (2560, 20480, 0)),
        ("qwen15moe", (1408, 5632, 0)),
        ("gptoss", (2880, 0, 0)),
        ("olmoe", (1024, 0, 0)),
        ("llama4", (8192, 8192, 0)),
        ("glm45air", (1408, 1408, 1)),
        ("glm45", (1536, 1536, 3)),
        ("dbrx", (10752, 0, 0)),
    ];
    let plain = letters(name);
    known.into_iter().find(|(part, _)| plain.contains(part)).map(|(_, widths)| widths)
}

/// The variant of a model, gated or not, that comes close to a published count, if the usual one does not.
fn agree(usual: Architecture, published: f64) -> Architecture {
    let error = |model: &Architecture| (model.parameters() as f64 / published - 1.0).abs();
    if error(&usual) < 0.04 {
        return usual;
    }
    if let Some(experts) = usual.experts {
        // The width that makes the count, in steps of 64.
        let without = Architecture { experts: Some(Experts { ffn: 0, ..experts }), ..usual.clone() };
        let routed = (usual.layers - experts.dense_layers) * experts.count;
        let each = (published - without.parameters() as f64) / (routed * usual.hidden * 3).max(1) as f64;
        let ffn = (each / 64.0).round() * 64.0;
        if ffn < 64.0 {
            return usual;
        }
        let fitted = Architecture { experts: Some(Experts { ffn: ffn as u64, ..experts }), ..usual.clone() };
        return if error(&fitted) < 0.04 { fitted } else { usual };
    }
    let other = Architecture { gated: !usual.gated, ..usual.clone() };
    if error(&other) < 0.02 { other } else { usual }
}

fn layout(row: &Row, recipe: &Recipe, model: &Architecture) -> Result<Layout, String> {
    let or_one = |column| row.count(column).filter(|n| *n > 0).unwrap_or(1);
    let gpus = need(row, "gpus")?;
    let (tp, cp, pp, ep) = (or_one("tp"), or_one("cp"), or_one("pp"), or_one("ep"));
    let dp = row.count("dp").filter(|n| *n > 0).unwrap_or((gpus / (tp * cp * pp)).max(1));
    if tp * cp * pp * dp != gpus {
        return Err("gpus is not tp x cp x pp x dp; leave dp empty to have it computed".into());
    }
    // Where nothing is said the models are large, and large models run one sequence at a time.
    let mbs = or_one("mbs");
    let gbs =
        row.count("gbs").filter(|n| *n > 0).ok_or("gbs not known: sequences of an iteration over all replicas")?;
    let microbatches = gbs / (mbs * dp);
    if microbatches == 0 || microbatches * mbs * dp != gbs {
        return Err("gbs is not a multiple of mbs x dp; leave mbs empty where it is not known".into());
    }
    let chunks = or_one("vpp");
    let schedule = words::schedule(row.text("schedule"), chunks);
    let schedule = schedule.as_str();
    let found = schedules::find(schedule).map_err(|_| format!("schedule {schedule:?} not known"))?;
    let chunks = found.chunks_for((chunks > 1).then_some(chunks as u32)).map_err(|e| e.to_string())?;
    let chunks = if pp == 1 { 1 } else { u64::from(chunks) };
    let schedule = if pp == 1 || (schedule == "interleaved" && !microbatches.is_multiple_of(pp)) {
        // Without rounds of full groups Megatron refuses interleaving; the run was one.
        "1f1b"
    } else {
        schedule
    };
    let chunks = if schedule == "1f1b" { 1 } else { chunks };
    let recompute = words::recompute(row.text("recompute"), recipe.by_operator);
    let flash = words::fused_attention(row.text("flash_attn")).unwrap_or(recipe.flash);
    let attention = match (flash, recipe.attention) {
        (true, AttentionKernel::Naive | AttentionKernel::FusedSoftmax) => AttentionKernel::Flash2,
        (true, kernel) => kernel,
        (false, AttentionKernel::Naive) => AttentionKernel::Naive,
        (false, _) => AttentionKernel::FusedSoftmax,
    };
    let sharding = words::sharding(row.text("zero_stage_or_fsdp"), recipe.sharding);
    let sp = match row.text("sp") {
        "" => recipe.sequence_parallel,
        text => words::yes_or_no(text).unwrap_or(false),
    };
    let compute = words::compute(row.text("precision"));
    let numerics = if compute == Compute::Fp32 { Numerics::FP32 } else { Numerics { compute, ..recipe.numerics } };
    let (trainable, adapters) = trainable(row, recipe, model)?;
    let layout = Layout {
        tp,
        sp: sp && tp > 1,
        cp,
        pp,
        chunks,
        dp,
        context: recipe.context,
        ep,
        sharding,
        partition: recipe.partition,
        schedule: schedule.into(),
        seq: need(row, "seq")?,
        micro_batch: mbs,
        microbatches,
        recompute,
        trainable,
        adapters,
        attention,
        loss: recipe.loss,
        launches: recipe.launches,
        messages: recipe.messages,
        vocabulary: recipe.vocabulary,
        fused_kernels: recipe.fused_kernels,
        fused_norms: recipe.fused_norms,
        slices: recipe.slices,
        scatters: recipe.scatters,
        numerics,
        overlap: recipe.overlap,
        bucket_bytes: recipe.bucket_bytes,
        ..Layout::single(1, 1)
    };
    layout.check().map_err(|e| e.to_string())?;
    if pp * layout.chunks > model.layers + 2 {
        return Err(format!("more stages than blocks: pp x vpp = {} of {}", pp * layout.chunks, model.layers));
    }
    Ok(layout)
}

/// Rank of adapters, where none is stated (the default of NeMo's and PEFT's recipes lies between 8 and 32).
const ADAPTER_RANK: u64 = 16;

/// Share of the parameters that is trained, and the adapters that these are: beside the matrices that the notes name
/// (`lora_beside=q v`), or those of the framework's recipe.
fn trainable(row: &Row, recipe: &Recipe, model: &Architecture) -> Result<(f64, Option<Adapters>), String> {
    let cells = ["model", "framework", "zero_stage_or_fsdp", "precision", "notes"];
    if !cells.iter().any(|cell| letters(row.text(cell)).contains("lora")) {
        return Ok((1.0, None));
    }
    let rank = number_in(row, &["lora_rank", "lora rank", "rank"]).filter(|r| *r > 0).unwrap_or(ADAPTER_RANK);
    let named = row.note("lora_beside").unwrap_or(recipe.adapters_beside);
    let beside = named.split([' ', '+', '/']).filter(|name| !name.is_empty()).map(str::to_owned).collect();
    let adapters = Adapters { rank, beside };
    let parameters = model.adapter_parameters(&adapters).map_err(|error| error.to_string())?;
    Ok(((parameters as f64 / model.parameters() as f64).clamp(1e-6, 1.0), Some(adapters)))
}

/// The cluster: its GPU by name, its network from the words of `interconnect`, otherwise the usual one of its generation.
fn cluster(row: &Row) -> Result<Cluster, String> {
    let gpu = find_gpu(row.text("gpu")).map_err(|e| e.to_string())?;
    let text = row.text("interconnect");
    let lower = text.to_ascii_lowercase();
    let mut cluster = Cluster::usual(gpu);
    if let Some(node) = row.count("gpus_per_node").filter(|n| *n > 0) {
        // A rack of NVLink-joined trays is one node to the network.
        cluster.gpus_per_node = if gpu.nvlink_domain > 8 { gpu.nvlink_domain } else { node as u32 };
    }
    if lower.contains("efa") {
        let recent = matches!(gpu.generation, Generation::Hopper | Generation::Blackwell);
        let name = if recent { "p5" } else { "p4d" };
        if let Ok(known) = find_cluster(name) {
            cluster.fabric = Fabric::Efa;
            cluster.paced = known.paced;
            cluster.inter_gbps = known.inter_gbps;
            cluster.inter_latency_us = known.inter_latency_us;
        }
    } else if lower.contains("roce") || lower.contains("ethernet") {
        cluster.fabric = Fabric::Roce;
        cluster.inter_latency_us = 20.0;
    }
    if let Some(per_node) = gigabits_per_node(&lower) {
        cluster.inter_gbps = per_node / 8.0 / f64::from(cluster.gpus_per_node);
    }
    measured_network(row, &mut cluster);
    if lower.contains("pcie") && !lower.contains("nvlink") {
        cluster = cluster.over_pcie();
    }
    Ok(cluster)
}

/// Buffer with which nanotron's start-up measurement of the network is read; see the test of `network.rs`.
const MEASURED_BYTES: f64 = 1.5e9;

/// Takes the latency of a step from bandwidths that a run measured of its own network before it began
/// (`measured GB/s inter AR/AG/RS=a/b/c intra=d/e/f`). What exceeds the latency of the network is the pace of the hosts.
fn measured_network(row: &Row, cluster: &mut Cluster) {
    let numbers = |text: &str| -> Vec<f64> { text.split('/').filter_map(|n| n.trim().parse().ok()).collect() };
    let Some(rest) = row.note("measured GB/s inter AR/AG/RS") else { return };
    let (inter, intra) = rest.split_once(" intra=").unwrap_or((rest, ""));
    let (inter, intra) = (numbers(inter), numbers(intra));
    let gpus = row.number("gpus").unwrap_or(0.0);
    let ([_, gather, ..], [_, inside, ..]) = (inter.as_slice(), intra.as_slice()) else { return };
    if gpus <= f64::from(cluster.gpus_per_node) || *gather <= 0.0 || *inside <= *gather {
        return;
    }
    let step = MEASURED_BYTES * (1.0 / gather - 1.0 / inside) / 1e9 / gpus * 1e6;
    cluster.host_pace_us = (step - cluster.inter_latency_us).clamp(0.0, 5000.0);
}

/// Finds `8x200Gbps`, `4 x 100 Gb/s` or `1600Gbps/node`.
fn gigabits_per_node(text: &str) -> Option<f64> {
    let at = text.find("gb")?;
    let before = text[..at].trim_end();
    let digits = |t: &str| {
        let start = t.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        t[start..].parse::<f64>().ok().filter(|n| *n > 0.0 && *n < 1e9).map(|n| (n, start))
    };
    let (rate, start) = digits(before)?;
    let rest = before[..start].trim_end();
    let adapters = rest.strip_suffix('x').and_then(|r| digits(r.trim_end())).map(|(n, _)| n);
    match adapters {
        Some(n) => Some(n * rate),
        None if text[at..].contains("/node") || text[at..].contains("per node") => Some(rate),
        None => None,
    }
}

fn seconds(row: &Row, model: &Architecture, layout: &Layout, cluster: &Cluster) -> (Option<f64>, Option<&'static str>) {
    if row.noted("throughput_suspect") {
        return (None, Some("throughput marked as suspect"));
    }
    let tokens = (layout.global_batch() * layout.seq) as f64;
    let gpus = layout.gpus() as f64;
    if let Some(seconds) = row.number("iter_time_s") {
        return (Some(seconds), None);
    }
    if let Some(rate) = row.number("tokens_per_sec_per_gpu").filter(|r| *r > 0.0) {
        return (Some(tokens / rate / gpus), None);
    }
    // Frozen weights have no gradients of their own: two of three parts.
    let mut flops = (2.0 + layout.trainable) / 3.0 * model.flops_per_token(layout.seq, false) * tokens;
    if let Some(rate) = row.number("tflops_per_gpu").filter(|r| *r > 0.0) {
        if row.noted("hardware TFLOPs") && layout.recompute == Recompute::Full {
            let head = 6.0 * (model.hidden * model.vocab) as f64 * tokens;
            flops = head + (flops - head) * 4.0 / 3.0;
        }
        return (Some(flops / (rate * 1e12 * gpus)), None);
    }
    if let Some(mfu) = row.number("mfu").filter(|r| *r > 0.0) {
        return (Some(flops / (mfu / 100.0 * cluster.gpu.bf16_tflops * 1e12 * gpus)), None);
    }
    (None, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate::row::read;

    #[test]
    fn bandwidth_of_a_node_from_its_words() {
        for (text, found) in [
            ("nvlink/nvswitch + 8x200gbps hdr ib per node (selene)", Some(1600.0)),
            ("nvlink + roce 1600gbps/node", Some(1600.0)),
            ("4 x 100 gb/s omni-path", Some(400.0)),
            ("nvlink + inter-node not stated", None),
            ("nvlink 600gb/s", None),
            ("infiniband \u{fffd}x400gbps", None),
            ("0x200gbps", None),
            ("", None),
        ] {
            assert_eq!(gigabits_per_node(text), found, "{text}");
        }
    }

    const HEAD: &str = "id,source,model,layers,hidden,ffn_hidden,heads,kv_heads,vocab,experts,topk,seq,params_b,gpu,gpus,tp,pp,dp,mbs,gbs,tflops_per_gpu,outcome,notes\n";

    fn one(line: &str) -> Result<Case, String> {
        case(&read(&format!("{HEAD}{line}\n")).unwrap()[0])
    }

    #[test]
    fn defaults_fill_what_is_open() {
        let case = one("x-1,,llama3-8b,32,4096,14336,32,8,128256,,,8192,8.03,H100,16,,,,1,32,400,ok,").unwrap();
        assert_eq!(case.source, "x");
        assert_eq!(case.model.parameters(), 8_030_261_248);
        assert_eq!((case.layout.dp, case.layout.microbatches, case.layout.tp), (16, 2, 1));
        let expected = case.model.flops_per_token(8192, false) * 32.0 * 8192.0 / (400e12 * 16.0);
        assert!((case.seconds.unwrap() / expected - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_published_count_decides_about_gates() {
        let case = one("x-1,s,mystery,32,4096,16384,32,32,32000,,,2048,6.7,A100,8,,,,1,8,100,ok,").unwrap();
        assert!(!case.model.gated, "{}", case.model.parameters());
    }

    #[test]
    fn widths_of_experts_follow_from_the_count_or_the_name() {
        let width = |line: &str| one(line).unwrap().model.experts.unwrap().ffn;
        assert_eq!(width("x-1,s,mystery-moe,32,4096,99999,32,8,32000,8,2,4096,46.7,H100,8,,,,1,8,100,ok,"), 14336);
        assert_eq!(width("x-2,s,deepseek-v2-L4,4,5120,12288,128,128,102400,160,6,4096,,A100,8,,,,1,8,100,ok,"), 1536);
        assert_eq!(width("x-3,s,mixtral,32,4096,14336,32,8,32000,8,2,4096,,H100,8,,,,1,8,100,ok,"), 14336);
    }

    #[test]
    fn reasons_to_skip() {
        for (line, reason) in [
            ("a,s,m,2,64,,4,,,,,128,,MI300X,1,,,,1,1,,ok,", "unknown GPU \"MI300X\""),
            ("a,s,m,2,64,,4,,,,,128,,A100,8,3,,,1,8,,ok,", "gpus is not"),
            ("a,s,m,2,64,,4,,,,,128,,A100,8,,,,1,,,ok,", "gbs not known"),
            ("a,s,m,2,64,,4,,,,,128,,A100,8,,,,3,8,,ok,", "multiple"),
            ("a,s,m,2,64,,4,,,,,128,,A100,8,,,,1,8,,crashed,", "outcome"),
            ("a,s,m,9000,200000,900000,4,,,9000,2,128,,A100,8,,,,1,8,,ok,", "e19 parameters"),
        ] {
            assert!(one(line).unwrap_err().contains(reason), "{line}");
        }
    }
}
