//! Bytes that a layer keeps for its backward pass, tensor by tensor, per microbatch and rank.
//!
//! The list is that of Korthikanti et al. (arXiv 2205.05198, section 4), of which the dense GPT block with naive
//! attention is a special case (`34 sbh + 5 a s^2 b` at 2 bytes per element), extended to fused attention, gated MLPs, grouped and
//! latent attention, experts and context parallelism.

use super::{Architecture, Attention, AttentionKernel, ContextExchange, Layout, LossKernel, Recompute};

/// A kept tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// What it is.
    pub tensor: &'static str,
    /// Its size.
    pub bytes: f64,
    /// Belongs to the attention core, which selective recomputation throws away.
    pub core: bool,
}

/// The tensors of one block.
pub fn block(model: &Architecture, layout: &Layout, layer: u64) -> Vec<Kept> {
    let tokens = layout.tokens();
    let element = layout.numerics.activation;
    let (tp, cut) = (layout.tp as f64, layout.sequence_cut());
    let hidden = model.hidden as f64;
    let row = element * tokens * hidden;
    let mut list = Vec::with_capacity(20);
    let mut keep = |tensor, bytes: f64| list.push(Kept { tensor, bytes, core: false });

    keep("input of the first norm", row / cut);
    // Only what is trained keeps its input: a matrix, or an adapter beside it.
    let inputs_of = |names: &[&str]| {
        let kept = layout.adapters.as_ref().is_none_or(|adapters| names.iter().any(|name| adapters.stand_beside(name)));
        if kept { 1.0 } else { 0.0 }
    };
    keep("input of attention", inputs_of(&["q", "k", "v", "qkv", "q_down", "kv_down"]) * row / cut);
    let (query, key, value) = model.attention.widths();
    keep("queries", element * tokens * query as f64 / tp);
    // Fewer key and value heads than ranks are repeated.
    let kv_cut = match model.attention {
        Attention::Grouped { kv_heads, .. } => tp.min(kv_heads as f64),
        Attention::Latent { .. } => tp,
    };
    keep("keys and values", element * tokens * (key + value) as f64 / kv_cut);
    if let Attention::Latent { query_rank, kv_rank, rope_dim, heads, nope_dim, value_dim } = model.attention {
        // Before and after the norms of the compressed vectors, and the expanded keys before the rotary part is joined.
        keep("compressed queries", 2.0 * element * tokens * query_rank as f64 / cut);
        keep("compressed keys and values", element * tokens * (2 * kv_rank + rope_dim) as f64 / cut);
        keep("expanded keys and values", element * tokens * (heads * (nope_dim + value_dim)) as f64 / tp);
    }
    keep("input of the output projection", element * tokens * model.attention.output_width() as f64 / tp);
    if model.dropout {
        keep("dropout mask after attention", tokens * hidden / cut);
    }
    keep("input of the second norm", row / cut);
    keep("input of the MLP", inputs_of(&["gate", "up", "gate_up"]) * row / cut);

    if !layout.fused_norms {
        keep("32-bit copies in the norms", 2.0 * 4.0 * tokens * hidden / cut);
    }

    let up = if model.gated { 2.0 } else { 1.0 };
    // Unfused, the activated gate is a tensor of its own.
    let apart = if model.gated && !layout.fused_kernels { 1.0 } else { 0.0 };
    let mlp = |width: f64, rows: f64| (element * rows * width * (up + apart) / tp, element * rows * width / tp);
    match model.experts {
        Some(experts) if model.routed(layer) => {
            let visits = layout.routing.load() * tokens * experts.top_k as f64;
            keep("router logits and probabilities", 8.0 * tokens * experts.count as f64 / cut);
            keep("tokens in the order of experts", element * visits * hidden / tp);
            let (before, after) = mlp(experts.ffn as f64, visits);
            keep("input of the experts' activation", before);
            keep("output of the experts' activation", after);
            keep("output of the experts", element * visits * hidden / tp);
            if experts.shared_ffn > 0 {
                let (before, after) = mlp(experts.shared_ffn as f64, tokens);
                keep("input of the shared activation", before);
                keep("output of the shared activation", after);
            }
        }
        _ => {
            let (before, after) = mlp(model.ffn as f64, tokens);
            keep("input of the activation", before);
            keep("output of the activation", inputs_of(&["down"]) * after);
        }
    }
    if model.dropout {
        keep("dropout mask after the MLP", tokens * hidden / cut);
    }
    if let Some(adapters) = &layout.adapters {
        let narrow = model.adapters_of(layout, layer).iter().map(|beside| beside.rows * beside.count).sum::<f64>();
        keep("narrow products of adapters", element * narrow * adapters.rank as f64);
    }

    let heads = model.attention.heads() as f64 / tp;
    let scores = heads * tokens * layout.seq as f64;
    let mut core = |tensor, bytes| list.push(Kept { tensor, bytes, core: true });
    match layout.attention {
        AttentionKernel::Naive | AttentionKernel::FusedSoftmax => {
            core("probabilities", element * scores);
            if model.dropout {
                core("dropout mask of the probabilities", scores);
                core("dropped probabilities", element * scores);
            }
        }
        _ => core("log-sum-exp of the scores", 4.0 * heads * tokens),
    }
    list
}

/// What one block keeps from its forward to its backward pass, under the layout's recomputation.
pub fn kept_by_block(model: &Architecture, layout: &Layout, layer: u64) -> f64 {
    kept_under(model, layout, layer, layout.recompute)
}

/// The same under some recomputation.
pub fn kept_under(model: &Architecture, layout: &Layout, layer: u64, recompute: Recompute) -> f64 {
    match recompute {
        Recompute::None => block(model, layout, layer).iter().map(|k| k.bytes).sum(),
        Recompute::Selective => block(model, layout, layer).iter().filter(|k| !k.core).map(|k| k.bytes).sum(),
        Recompute::Operators => kept_products(model, layout, layer),
        Recompute::Full => layout.numerics.activation * layout.tokens() * model.hidden as f64 / layout.sequence_cut(),
    }
}

/// Every second product's result, that of attention, and the input of the block. Grouped products of experts are not among
/// those that are kept.
fn kept_products(model: &Architecture, layout: &Layout, layer: u64) -> f64 {
    let (tp, rows) = (layout.tp as f64, layout.numerics.activation * layout.tokens());
    let (query, _, value) = model.attention.widths();
    let attention = (query + value + model.attention.output_width()) as f64 / tp;
    let scale = 4.0 * layout.tokens() * model.attention.heads() as f64 / tp;
    let width = match model.experts {
        Some(experts) if model.routed(layer) => experts.shared_ffn,
        _ => model.ffn,
    } as f64;
    // The last product of a gated block is an odd one, its seventh; of a plain one the sixth.
    let outer = if model.gated { 2.0 } else { 1.0 };
    rows * (outer * model.hidden as f64 / layout.sequence_cut() + attention + width / tp) + scale
}

/// What exists beside the kept tensors while one block runs backward: what is recomputed, and the gradients of its widest
/// tensors.
pub fn working_set(model: &Architecture, layout: &Layout, layer: u64) -> f64 {
    let all = block(model, layout, layer);
    let recomputed: f64 = match layout.recompute {
        Recompute::None => 0.0,
        Recompute::Selective => all.iter().filter(|k| k.core).map(|k| k.bytes).sum(),
        Recompute::Operators => {
            (all.iter().map(|k| k.bytes).sum::<f64>() - kept_products(model, layout, layer)).max(0.0)
        }
        Recompute::Full => all.iter().map(|k| k.bytes).sum(),
    };
    let tokens = layout.tokens();
    let element = layout.numerics.activation;
    let tp = layout.tp as f64;
    let width = match model.experts {
        Some(e) if model.routed(layer) => e.ffn * e.top_k,
        _ => model.ffn,
    } as f64;
    let up = if model.gated { 2.0 } else { 1.0 };
    let row = element * tokens * model.hidden as f64;
    let mlp = element * tokens * width * (1.0 + up) / tp;
    let (query, key, value) = model.attention.widths();
    let mut attention = element * tokens * (query + key + value + query) as f64 / tp;
    if layout.cp > 1 {
        // Keys and values on the way, or those of all ranks, with their gradients; or everything in its other order.
        let others = element * tokens * (key + value) as f64 / tp;
        attention += match layout.context {
            ContextExchange::Ring | ContextExchange::ZigZag => 2.0 * others,
            ContextExchange::AllGather => 2.0 * others * layout.cp as f64,
            ContextExchange::AllToAll => element * tokens * (query + key + value) as f64 / tp,
        };
    }
    if matches!(layout.attention, AttentionKernel::Naive | AttentionKernel::FusedSoftmax) {
        attention += 2.0 * element * model.attention.heads() as f64 / tp * tokens * layout.seq as f64;
    }
    // The gradient that comes in and the one that goes out. Cut along the sequence, both are gathered or whole before they are
    // scattered beside what is cut, and the input is gathered again.
    let whole = if layout.sp && layout.tp > 1 { 4.0 } else { 2.0 };
    recomputed + mlp.max(attention) + whole * row
}

/// What the last stage holds for logits and loss of one microbatch, at its highest.
pub fn loss(model: &Architecture, layout: &Layout) -> f64 {
    let logits = layout.tokens() * model.vocab as f64 / layout.tp as f64;
    let row = layout.numerics.activation * layout.tokens() * model.hidden as f64 / layout.sequence_cut();
    let per_logit = match layout.loss {
        // Logits, 32-bit copy, exponentials, and their gradient.
        LossKernel::Eager => layout.numerics.activation + 12.0,
        LossKernel::InPlace => layout.numerics.activation + 8.0,
        LossKernel::Fused => 2.0 * layout.numerics.activation,
    };
    logits * per_logit + 2.0 * row
}

/// The embedding's gradient before it is added to the accumulated one: in the activations' format; where a second buffer sums
/// microbatches, once more in a bucket and in the buffer's format.
pub fn embedding_gradient(model: &Architecture, layout: &Layout) -> f64 {
    let n = &layout.numerics;
    let each = n.activation + if n.accumulated > 0.0 { n.activation + n.accumulated } else { 0.0 };
    each * (model.vocab * model.hidden) as f64 / layout.tp as f64
}

/// What the first stage keeps of one microbatch beside its blocks: the embedding's dropout mask.
pub fn embedding(model: &Architecture, layout: &Layout) -> f64 {
    if model.dropout { layout.tokens() * model.hidden as f64 / layout.sequence_cut() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::PositionTable;

    fn gpt() -> Architecture {
        Architecture {
            name: "GPT-3 175B".into(),
            layers: 96,
            hidden: 12288,
            attention: Attention::Grouped { heads: 96, kv_heads: 96, head_dim: 128 },
            ffn: 4 * 12288,
            gated: false,
            experts: None,
            vocab: 51200,
            tied: true,
            biases: true,
            positions: PositionTable::Learned(2048),
            dropout: true,
        }
    }

    fn layout(tp: u64, sp: bool, attention: AttentionKernel, recompute: Recompute) -> Layout {
        Layout { tp, sp, attention, recompute, ..Layout::single(2048, 2) }
    }

    /// Korthikanti et al., table 2: per layer `sbh` times the given factor.
    #[test]
    fn table_2_of_the_recomputation_paper() {
        let model = gpt();
        let (s, b, h, a) = (2048.0, 2.0, 12288.0, 96.0);
        let sbh = s * b * h;
        let quadratic = 5.0 * a * s / h;
        let t = 8.0;
        use AttentionKernel::Naive;
        use Recompute::{Full, None, Selective};
        for (tp, sp, recompute, factor) in [
            (1, false, None, 34.0 + quadratic),
            (8, false, None, 10.0 + 24.0 / t + quadratic / t),
            (8, true, None, (34.0 + quadratic) / t),
            (8, false, Selective, 10.0 + 24.0 / t),
            (8, true, Selective, 34.0 / t),
            (8, false, Full, 2.0),
        ] {
            let bytes = kept_by_block(&model, &layout(tp, sp, Naive, recompute), 0);
            assert!((bytes / (sbh * factor) - 1.0).abs() < 1e-12, "tp {tp} sp {sp} {recompute:?}: {}", bytes / sbh);
        }
    }

    /// Llama 3 8B, in rows of the hidden width: input and output, queries and the result of attention of one each, values of a quarter,
    /// the gate of 3.5.
    #[test]
    fn every_second_product_is_kept() {
        let model = Architecture::load("llama-3-8b").unwrap();
        let layout = layout(1, false, AttentionKernel::Flash2, Recompute::Operators);
        let row = 2.0 * 2.0 * 2048.0 * 4096.0;
        assert_eq!(kept_by_block(&model, &layout, 0), 7.75 * row + 4.0 * 32.0 * 4096.0);
    }

    /// Frozen matrices keep no input: with adapters beside queries and values, neither that of the MLP nor that of its second matrix
    /// is kept; each adapter keeps a narrow product.
    #[test]
    fn frozen_matrices_keep_no_input() {
        let model = Architecture::load("llama-3-8b").unwrap();
        let kept = |beside: Option<&[&str]>| {
            let beside = beside.map(|names| names.iter().map(|name| (*name).to_owned()).collect());
            let adapters = beside.map(|beside| crate::cluster::Adapters { rank: 16, beside });
            let layout = Layout { adapters, ..layout(1, false, AttentionKernel::Flash2, Recompute::None) };
            kept_by_block(&model, &layout, 0)
        };
        let (tokens, all) = (2.0 * 2048.0, kept(None));
        assert_eq!(kept(Some(&["q", "v"])), all - 2.0 * tokens * (4096.0 + 14336.0) + 2.0 * tokens * 2.0 * 16.0);
        assert_eq!(kept(Some(&[])), all + 7.0 * 2.0 * tokens * 16.0);
    }

    #[test]
    fn flash_attention_keeps_one_number_per_row() {
        let model = gpt();
        let bytes = kept_by_block(&model, &layout(1, false, AttentionKernel::Flash2, Recompute::None), 0);
        let sbh = 2048.0 * 2.0 * 12288.0;
        assert_eq!(bytes, 34.0 * sbh + 4.0 * 96.0 * 4096.0);
    }

    #[test]
    fn context_parallelism_cuts_every_tensor() {
        let model = gpt();
        let whole = layout(2, true, AttentionKernel::Flash2, Recompute::None);
        let cut = Layout { cp: 4, ..whole.clone() };
        for (a, b) in block(&model, &whole, 0).iter().zip(block(&model, &cut, 0)) {
            assert_eq!(a.bytes, 4.0 * b.bytes, "{}", a.tensor);
        }
    }
}
