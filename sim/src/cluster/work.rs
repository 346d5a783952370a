//! What a rank computes in one layer for one microbatch: matrix products by shape, attention, traffic of memory-bound
//! operators, kernel launches, and the messages between ranks of the same layer.

use super::adapters::Beside;
use super::{Architecture, Attention, AttentionKernel, ContextExchange, Launches, Layout};

/// A matrix product `m x k` by `k x n`, `count` of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Product {
    /// Rows of the result.
    pub m: f64,
    /// Columns of the result.
    pub n: f64,
    /// Summed dimension.
    pub k: f64,
    /// How many.
    pub count: f64,
}

impl Product {
    /// Multiplications and additions.
    pub fn flops(&self) -> f64 {
        2.0 * self.m * self.n * self.k * self.count
    }
}

/// Fused attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Core {
    /// FLOPs that the kernel does in the forward pass.
    pub flops: f64,
    /// Bytes that it must read and write.
    pub bytes: f64,
    /// Tokens of the sequence.
    pub seq: f64,
    /// The kernel.
    pub kernel: AttentionKernel,
}

/// Messages of one pass of one layer, in bytes of the whole buffer.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Messages {
    /// All-reduces over the tensor-parallel ranks.
    pub tensor_all_reduce: f64,
    /// All-gathers, or reduce-scatters, over them.
    pub tensor_gather: f64,
    /// How many tensor-parallel collectives these are.
    pub tensor_calls: f64,
    /// Keys and values of one context-parallel rank; where sequence and heads are exchanged, queries and outputs too.
    pub context: f64,
    /// What a rank sends to the experts' ranks and back.
    pub experts: f64,
}

impl Messages {
    /// Both.
    pub fn plus(&self, other: &Messages) -> Messages {
        Messages {
            tensor_all_reduce: self.tensor_all_reduce + other.tensor_all_reduce,
            tensor_gather: self.tensor_gather + other.tensor_gather,
            tensor_calls: self.tensor_calls + other.tensor_calls,
            context: self.context + other.context,
            experts: self.experts + other.experts,
        }
    }
}

/// One pass over a layer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Work {
    /// Matrix products.
    pub products: Vec<Product>,
    /// Fused attention; naive attention is in `products` and `traffic`.
    pub core: Option<Core>,
    /// Bytes read and written by memory-bound operators.
    pub traffic: f64,
    /// Kernel launches.
    pub kernels: f64,
    /// Messages.
    pub messages: Messages,
}

/// Forward kernels of a block beside products and attention: norms, rotary embedding, activation, residuals, casts, copies.
const ELEMENTWISE_KERNELS: f64 = 30.0;
/// The same where neighbours are fused.
const FUSED_KERNELS: f64 = 14.0;
/// Kernels more where rotary embedding and gate are written as separate operators: casts, halves, products, sums and joins of queries
/// and keys.
const APART_KERNELS: f64 = 12.0;
/// Experts from which on their products are launched together.
const GROUPED: f64 = 8.0;
/// Launches of one gather or reduce-scatter: the kernel, copies into and out of contiguous buffers, and the events that order it. An
/// all-reduce in place is one.
const KERNELS_PER_GATHER: f64 = 5.0;

fn product(m: f64, n: f64, k: f64) -> Product {
    Product { m, n, k, count: 1.0 }
}

/// Forward pass of a block.
pub fn block(model: &Architecture, layout: &Layout, layer: u64) -> Work {
    let tokens = layout.tokens();
    let (tp, cut) = (layout.tp as f64, layout.sequence_cut());
    let element = layout.numerics.activation;
    let hidden = model.hidden as f64;
    let row = element * tokens * hidden;
    let mut work = Work::default();

    let matrices = model.attention.matrices(model.hidden);
    let last = matrices.len() - 1;
    for (i, (input, output, cut)) in matrices.into_iter().enumerate() {
        let ways = if cut { tp } else { 1.0 };
        let (input, output) = (input as f64, output as f64);
        // The output projection is cut by rows, the others by columns.
        work.products.push(if i == last {
            product(tokens, output, input / ways)
        } else {
            product(tokens, output / ways, input)
        });
    }

    // Norm, norm, two residuals (two reads, one write each); dropout adds a mask.
    work.traffic += (2.0 * 2.0 + 2.0 * 3.0) * row / cut + if model.dropout { 2.0 * tokens * hidden / cut } else { 0.0 };
    if !layout.fused_norms {
        // Cast, square, mean, scale and cast back: five reads and writes more for each norm, half of them in 32 bits.
        work.traffic += 2.0 * 8.0 * row / cut;
        work.kernels += 8.0;
    }
    let (query, key, value) = model.attention.widths();
    let projected = (query + key + value) as f64;
    // Rotary embedding: one read and one write; as separate operations in 32 bits and with copies, three times that.
    let passes = if layout.fused_kernels { 2.0 } else { 6.0 };
    work.traffic += passes * element * tokens * projected / tp;
    work.kernels += if layout.launches == Launches::Eager { ELEMENTWISE_KERNELS } else { FUSED_KERNELS };
    if !layout.fused_kernels {
        work.kernels += APART_KERNELS;
    }
    if let Attention::Latent { .. } = model.attention {
        // Plain and rotary parts of queries and keys are split and joined again, the shared rotary part repeated for every head.
        work.traffic += 4.0 * element * tokens * (query + key) as f64 / tp;
        work.kernels += 6.0;
    }

    attention_core(model, layout, &mut work);
    mlp(model, layout, layer, &mut work);

    if layout.tp > 1 {
        if layout.sp {
            work.messages.tensor_gather += 4.0 * row;
            work.messages.tensor_calls += 4.0;
        } else {
            work.messages.tensor_all_reduce += 2.0 * row;
            work.messages.tensor_calls += 2.0;
        }
    }
    if layout.cp > 1 {
        let kv_cut = match model.attention {
            Attention::Grouped { kv_heads, .. } => tp.min(kv_heads as f64),
            Attention::Latent { .. } => tp,
        };
        work.messages.context = match layout.context {
            ContextExchange::AllToAll => {
                element * tokens * (query + key + value + model.attention.output_width()) as f64 / tp
            }
            _ => element * tokens * (key + value) as f64 / kv_cut,
        };
    }
    let per_call = if layout.sp { KERNELS_PER_GATHER } else { 1.0 };
    work.kernels += work.products.len() as f64 + work.messages.tensor_calls * per_call;
    work
}

fn attention_core(model: &Architecture, layout: &Layout, work: &mut Work) {
    let tokens = layout.tokens();
    let tp = layout.tp as f64;
    let element = layout.numerics.activation;
    let heads = model.attention.heads() as f64 / tp;
    let (query, key, value) = model.attention.widths();
    let seq = layout.seq as f64;
    let widths = (query + model.attention.output_width()) as f64 / tp;
    match layout.attention {
        AttentionKernel::Naive | AttentionKernel::FusedSoftmax => {
            // Batched products, one per head and sequence.
            let count = heads * layout.micro_batch as f64;
            let rows = seq / layout.cp as f64;
            let width = query as f64 / model.attention.heads() as f64;
            let out = model.attention.output_width() as f64 / model.attention.heads() as f64;
            work.products.push(Product { m: rows, n: seq, k: width, count });
            work.products.push(Product { m: rows, n: out, k: seq, count });
            // Naive: scale, mask, softmax, dropout, one read and one write each; fused: softmax and dropout.
            let passes = if layout.attention == AttentionKernel::Naive { 4.0 } else { 2.0 };
            work.traffic += passes * 2.0 * element * heads * tokens * seq;
            work.kernels += passes;
        }
        kernel => {
            // Only the causal half is computed; of one stretch after the other, the last rank has the most.
            let cp = layout.cp as f64;
            let uneven = if layout.context == ContextExchange::Ring { 2.0 - 1.0 / cp } else { 1.0 };
            let flops = uneven * 2.0 * tokens * seq * widths / 2.0;
            let bytes = element * tokens * ((query + key + value + query) as f64) / tp;
            work.core = Some(Core { flops, bytes, seq, kernel });
            work.kernels += 1.0;
        }
    }
}

fn mlp(model: &Architecture, layout: &Layout, layer: u64, work: &mut Work) {
    let tokens = layout.tokens();
    let tp = layout.tp as f64;
    let element = layout.numerics.activation;
    let hidden = model.hidden as f64;
    let up = if model.gated { 2.0 } else { 1.0 };
    let dense = |width: f64, work: &mut Work| {
        work.products.push(product(tokens, up * width / tp, hidden));
        work.products.push(product(tokens, hidden, width / tp));
        // Apart, the activated gate is written and read once more.
        let apart = if model.gated && !layout.fused_kernels { 2.0 } else { 0.0 };
        work.traffic += element * tokens * width * (up + 1.0 + apart) / tp;
    };
    match model.experts {
        Some(experts) if model.routed(layer) => {
            work.products.push(product(tokens / layout.sequence_cut(), experts.count as f64, hidden));
            if experts.shared_ffn > 0 {
                dense(experts.shared_ffn as f64, work);
            }
            let (rows, local) = layout.expert_rows(experts);
            let visits = rows * local;
            let width = experts.ffn as f64;
            work.products.push(Product { m: rows, n: up * width, k: hidden, count: local });
            work.products.push(Product { m: rows, n: hidden, k: width, count: local });
            // Into the order of experts and back, each a read and a write; activation; the weighted sum.
            work.traffic += element * visits * (hidden * 6.0 + width * (up + 1.0));
            work.kernels += 10.0 + 2.0 * local.min(GROUPED);
            if layout.ep > 1 {
                work.messages.experts += 2.0 * element * visits * hidden;
            }
        }
        _ => dense(model.ffn as f64, work),
    }
}

/// Forward pass of final norm, output projection and loss on a rank that holds a share of the vocabulary.
pub fn head(model: &Architecture, layout: &Layout, share: f64) -> Work {
    let tokens = layout.tokens();
    let tp = layout.tp as f64;
    let vocab = share * model.vocab as f64 / tp;
    let logits = tokens * vocab;
    let row = layout.numerics.activation * tokens * model.hidden as f64;
    let mut work = Work {
        products: vec![product(tokens, vocab, model.hidden as f64)],
        // Norm; the 32-bit copy, the maximum, the exponentials and their sum.
        traffic: 2.0 * row / layout.sequence_cut() + logits * (layout.numerics.activation + 4.0 + 4.0 + 8.0),
        kernels: 10.0,
        ..Work::default()
    };
    if layout.tp > 1 {
        if layout.sp {
            work.messages.tensor_gather = row;
        }
        // The maxima, the sums and the logits of the targets.
        work.messages.tensor_all_reduce = 3.0 * 4.0 * tokens;
        work.messages.tensor_calls = 4.0;
    }
    work
}

/// Forward pass of the embedding.
pub fn embedding(model: &Architecture, layout: &Layout) -> Work {
    let row = layout.numerics.activation * layout.tokens() * model.hidden as f64;
    let mut work = Work { traffic: 2.0 * row, kernels: 4.0, ..Work::default() };
    if layout.tp > 1 {
        if layout.sp {
            work.messages.tensor_gather = row;
        } else {
            work.messages.tensor_all_reduce = row;
        }
        work.messages.tensor_calls = 1.0;
    }
    work
}

/// What adapters add to the passes over a block.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterWork {
    /// To the forward pass.
    pub forward: Work,
    /// To the backward pass for the input.
    pub backward: Work,
    /// Their gradients.
    pub weights: Work,
}

/// The adapters of a block (LoRA, arXiv 2106.09685, section 4.1): `y += s (x A^T) B^T`, and backward `dx += s (dy B) A`. As
/// separate operators, scaling and adding read and write whole outputs; fused kernels scale in the product, and where neighbours are
/// fused the next one adds. Between tensor ranks the
/// narrow product of every adapter is exchanged once each way.
pub fn adapters(model: &Architecture, layout: &Layout, layer: u64) -> AdapterWork {
    let Some(rank) = layout.adapters.as_ref().map(|adapters| adapters.rank as f64) else {
        return AdapterWork::default();
    };
    let element = layout.numerics.activation;
    let mut all = AdapterWork::default();
    // Scaled, a read and a write, and added, two reads and a write; scaled by the product itself; or read by the neighbour too.
    let (scaled, added, operators) = match (layout.launches, layout.fused_kernels) {
        (Launches::Eager, false) => (2.0, 3.0, 2.0),
        (Launches::Eager, true) => (0.0, 3.0, 1.0),
        _ => (0.0, 1.0, 0.0),
    };
    for Beside { rows, inputs, outputs, count } in model.adapters_of(layout, layer) {
        let by = |m, n, k| Product { m, n, k, count };
        let cells = element * rows * count;
        // Many experts' products are grouped.
        let launches = 2.0 * count.min(GROUPED);
        all.forward.products.extend([by(rows, rank, inputs), by(rows, outputs, rank)]);
        all.forward.traffic += cells * outputs * (scaled + added);
        all.forward.kernels += launches + operators;
        all.backward.products.extend([by(rows, rank, outputs), by(rows, inputs, rank)]);
        all.backward.traffic += cells * (outputs * scaled + inputs * added);
        all.backward.kernels += launches + operators;
        all.weights.products.extend([by(outputs, rank, rows), by(rank, inputs, rows)]);
        all.weights.kernels += launches;
        if layout.tp > 1 {
            let narrow = cells * rank;
            if layout.sp {
                all.forward.messages.tensor_gather += narrow
            } else {
                all.forward.messages.tensor_all_reduce += narrow
            }
            all.forward.messages.tensor_calls += 1.0;
        }
    }
    all
}

impl Work {
    /// The backward pass for the input: as many product FLOPs as forward, twice the traffic (gradient in, input, gradient out).
    pub fn backward_input(&self) -> Work {
        let products = self.products.iter().map(|p| Product { n: p.k, k: p.n, ..*p }).collect();
        Work { products, core: None, traffic: 1.6 * self.traffic, kernels: 1.2 * self.kernels, messages: self.messages }
    }

    /// The backward pass for the weights.
    pub fn backward_weights(&self) -> Work {
        let products: Vec<Product> = self.products.iter().map(|p| Product { m: p.k, k: p.m, ..*p }).collect();
        Work { kernels: products.len() as f64, products, ..Work::default() }
    }

    /// FLOPs of the pass.
    pub fn flops(&self) -> f64 {
        self.products.iter().map(Product::flops).sum::<f64>() + self.core.map_or(0.0, |c| c.flops)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Adapters, PositionTable};

    fn llama() -> Architecture {
        Architecture {
            name: String::new(),
            layers: 32,
            hidden: 4096,
            attention: Attention::Grouped { heads: 32, kv_heads: 8, head_dim: 128 },
            ffn: 14336,
            gated: true,
            experts: None,
            vocab: 128256,
            tied: false,
            biases: false,
            positions: PositionTable::None,
            dropout: false,
        }
    }

    /// The parts of all layers make the FLOPs per token, however the layout cuts them.
    #[test]
    fn parts_make_the_flops_of_the_model() {
        let model = llama();
        for (tp, cp, causal, attention) in [
            (1, 1, true, AttentionKernel::Flash2),
            (4, 1, false, AttentionKernel::Naive),
            (2, 2, true, AttentionKernel::Flash2),
        ] {
            let layout = Layout { tp, sp: true, cp, attention, ..Layout::single(4096, 2) };
            let layers: f64 = (0..model.layers).map(|l| block(&model, &layout, l).flops()).sum();
            let forward = layers + head(&model, &layout, 1.0).flops();
            let per_token = 3.0 * forward * tp as f64 / layout.tokens();
            let expected = model.flops_per_token(4096, causal);
            assert!((per_token / expected - 1.0).abs() < 1e-9, "{tp} {cp}: {per_token} {expected}");
        }
    }

    /// `2 rows rank (inputs + outputs)` in each of three passes, over all tensor ranks; nothing without adapters.
    #[test]
    fn adapters_add_three_narrow_passes() {
        let model = llama();
        for (tp, beside) in [(1, vec![]), (4, vec![]), (2, vec!["q".to_owned(), "down".to_owned()])] {
            let lora = Adapters { rank: 16, beside };
            let parameters = model.adapter_parameters(&lora).unwrap() as f64 / 32.0;
            let layout = Layout { tp, sp: true, adapters: Some(lora), ..Layout::single(4096, 2) };
            let work = adapters(&model, &layout, 0);
            // The sides that tensor ranks do not cut are on all of them.
            let whole = model.adapters_of(&layout, 0).iter().map(|b| tp as f64 * (b.inputs + b.outputs)).sum::<f64>();
            assert!(tp == 1 || whole * 16.0 > parameters);
            for pass in [&work.forward, &work.backward, &work.weights] {
                let flops = 2.0 * 8192.0 * 16.0 * whole;
                assert!((tp as f64 * pass.flops() / flops - 1.0).abs() < 1e-12);
                assert!(tp > 1 || (pass.flops() / (2.0 * 8192.0 * parameters) - 1.0).abs() < 1e-12);
            }
            let calls = if tp > 1 { model.adapters_of(&layout, 0).len() as f64 } else { 0.0 };
            let messages = work.forward.messages;
            assert_eq!((messages.tensor_calls, messages.tensor_gather), (calls, calls * 8192.0 * 16.0 * 2.0));
        }
        assert_eq!(adapters(&model, &Layout::single(4096, 2), 0), AdapterWork::default());
    }

    /// Beside one matrix of 4,096 to 1,024: scaled and added apart, 2 + 3 of the output forward, 2 of the output and 3 of the input back.
    #[test]
    fn fused_kernels_spare_what_separate_operators_read_and_write() {
        let model = llama();
        let of = |fused_kernels, launches| {
            let lora = Some(Adapters { rank: 8, beside: vec!["k".into()] });
            let layout = Layout { fused_kernels, launches, adapters: lora, ..Layout::single(1000, 1) };
            let work = adapters(&model, &layout, 0);
            [work.forward.traffic, work.backward.traffic, work.forward.kernels]
        };
        let (k, n) = (2.0 * 1000.0 * 4096.0, 2.0 * 1000.0 * 1024.0);
        assert_eq!(of(false, Launches::Eager), [5.0 * n, 2.0 * n + 3.0 * k, 4.0]);
        assert_eq!(of(true, Launches::Eager), [3.0 * n, 3.0 * k, 3.0]);
        assert_eq!(of(true, Launches::Fused), [n, k, 2.0]);
    }

    #[test]
    fn backward_doubles_the_products() {
        let model = llama();
        let forward = block(&model, &Layout::single(4096, 1), 0);
        let products: f64 = forward.products.iter().map(Product::flops).sum();
        assert_eq!(forward.backward_input().flops(), products);
        assert_eq!(forward.backward_weights().flops(), products);
    }
}
