//! Causal grouped-query attention by blocks with an online softmax (Dao et al. 2022, algorithm 1; Dao 2023, section 3.1),
//! and its backward pass, which recomputes probabilities from the stored logarithms of their sums (Dao 2023, algorithm 2).
//!
//! A block of queries meets a panel of keys: one product for the scores, one pass over them, one product with the values.
//! Panels are wide, so that products are large and outputs are rarely rescaled; what lies beyond the diagonal is left
//! out to the width of a query block. Scores live in two panels per thread, whatever the sequence length.

use super::matmul::{Matrix, MatrixMut, multiply};
use super::vector::{exp, max, sums, vectorised};
use crate::call::AttentionShape;
use std::cell::RefCell;

/// Queries at a time.
const QUERIES: usize = 64;
/// Keys at a time.
const KEYS: usize = 256;
// So that no panel starts within a query block, and every query of a block sees the first key of each panel.
const _: () = assert!(KEYS.is_multiple_of(QUERIES));

/// Scores of a block of queries and a panel of keys, aligned for the widest registers.
#[repr(C, align(64))]
struct Panel([f32; QUERIES * KEYS]);

struct Panels {
    probabilities: Panel,
    gradients: Panel,
}

thread_local! {
    static PANELS: RefCell<Box<Panels>> = RefCell::new(Box::new(Panels {
        probabilities: Panel([0.0; QUERIES * KEYS]),
        gradients: Panel([0.0; QUERIES * KEYS]),
    }));
}

/// Where things lie in the fused projection and in the output.
#[derive(Clone, Copy)]
struct Layout {
    seq: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Width of a row of `qkv`.
    fused: usize,
    /// Width of a row of `out`.
    attended: usize,
    /// What scores are multiplied by.
    scale: f32,
}

impl Layout {
    fn new(shape: &AttentionShape) -> Layout {
        let (heads, kv_heads) = (shape.heads as usize, shape.kv_heads as usize);
        let head_dim = shape.head_dim as usize;
        Layout {
            seq: shape.seq as usize,
            heads,
            kv_heads,
            head_dim,
            fused: (heads + 2 * kv_heads) * head_dim,
            attended: heads * head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
        }
    }

    /// Column of the queries of a head, also in `out`.
    fn query(&self, head: usize) -> usize {
        head * self.head_dim
    }

    /// Column of the keys that a head attends to.
    fn key(&self, head: usize) -> usize {
        (self.heads + head / (self.heads / self.kv_heads)) * self.head_dim
    }

    /// Column of the values that a head attends to.
    fn value(&self, head: usize) -> usize {
        self.key(head) + self.kv_heads * self.head_dim
    }

    /// One head's columns of some rows of a sequence.
    fn part<'a>(&self, sequence: &'a [f32], width: usize, first: usize, rows: usize, column: usize) -> Matrix<'a> {
        Matrix::new(&sequence[first * width + column..], rows, self.head_dim, width)
    }

    /// One head's columns of some rows of a sequence, to write.
    fn part_mut<'a>(
        &self,
        sequence: &'a mut [f32],
        width: usize,
        first: usize,
        rows: usize,
        column: usize,
    ) -> MatrixMut<'a> {
        MatrixMut::new(&mut sequence[first * width + column..], rows, self.head_dim, width)
    }
}

/// Query blocks of a sequence: first row and number of rows.
fn blocks(seq: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..seq).step_by(QUERIES).map(move |first| (first, QUERIES.min(seq - first)))
}

/// Key panels that some query before `end` sees: first row and number of rows.
fn panels(end: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..end).step_by(KEYS).map(move |first| (first, KEYS.min(end - first)))
}

/// Forward: `out` and the logarithms `lse` of the sums of exponentials.
pub(super) fn attention(qkv: &[f32], out: &mut [f32], lse: &mut [f32], shape: &AttentionShape) {
    let layout = Layout::new(shape);
    let Layout { seq, heads, .. } = layout;
    let sequences = qkv.chunks_exact(seq * layout.fused).zip(out.chunks_exact_mut(seq * layout.attended));
    PANELS.with_borrow_mut(|panels| {
        for ((qkv, out), lse) in sequences.zip(lse.chunks_exact_mut(heads * seq)) {
            for (head, lse) in lse.chunks_exact_mut(seq).enumerate() {
                attend(&layout, head, qkv, out, lse, &mut panels.probabilities);
            }
        }
    });
}

fn attend(layout: &Layout, head: usize, qkv: &[f32], out: &mut [f32], lse: &mut [f32], scores: &mut Panel) {
    let &Layout { fused, attended, .. } = layout;
    for (first, rows) in blocks(layout.seq) {
        let queries = layout.part(qkv, fused, first, rows, layout.query(head));
        let mut state = [Row { largest: f32::NEG_INFINITY, sum: 0.0, rescale: 1.0 }; QUERIES];
        for (start, keys) in panels(first + rows) {
            let scores = &mut scores.0[..rows * keys];
            let transposed = layout.part(qkv, fused, start, keys, layout.key(head)).transposed();
            multiply(queries, transposed, MatrixMut::dense(scores, rows, keys), false);
            online_softmax(scores, &mut state[..rows], keys, first - start, layout.scale);
            if start > 0 {
                let out = &mut out[first * attended + layout.query(head)..];
                rescale(out, &state[..rows], attended, layout.head_dim);
            }
            multiply(
                Matrix::dense(scores, rows, keys),
                layout.part(qkv, fused, start, keys, layout.value(head)),
                layout.part_mut(out, attended, first, rows, layout.query(head)),
                start > 0,
            );
        }
        for (lse, row) in lse[first..][..rows].iter_mut().zip(&mut state) {
            *lse = row.largest + row.sum.ln();
            row.rescale = 1.0 / row.sum;
        }
        rescale(&mut out[first * attended + layout.query(head)..], &state[..rows], attended, layout.head_dim);
    }
}

/// The softmax of one query so far.
#[derive(Clone, Copy)]
struct Row {
    /// Largest score.
    largest: f32,
    /// Sum of exponentials of scores minus the largest.
    sum: f32,
    /// What the output so far is to be multiplied by.
    rescale: f32,
}

vectorised! {
    /// Replaces scores by exponentials. Query `row` sees the keys up to `diagonal + row` of the panel.
    fn online_softmax(scores: &mut [f32], state: &mut [Row], keys: usize, diagonal: usize, scale: f32) {
        for (row, (scores, state)) in scores.chunks_exact_mut(keys).zip(state).enumerate() {
            let (seen, hidden) = scores.split_at_mut((diagonal + row + 1).min(keys));
            hidden.fill(0.0);
            let largest = scale * max(seen);
            let largest = if state.largest > largest { state.largest } else { largest };
            for score in seen.iter_mut() {
                *score = exp(score.mul_add(scale, -largest));
            }
            state.rescale = exp(state.largest - largest);
            let [sum] = sums([seen], |[probability]| [probability]);
            state.sum = state.sum.mul_add(state.rescale, sum);
            state.largest = largest;
        }
    }

    /// Multiplies each row of one head's output.
    fn rescale(out: &mut [f32], state: &[Row], width: usize, head_dim: usize) {
        for (row, state) in state.iter().enumerate() {
            for x in &mut out[row * width..][..head_dim] {
                *x *= state.rescale;
            }
        }
    }
}

/// What the backward pass reads.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    pub qkv: &'a [f32],
    pub out: &'a [f32],
    pub lse: &'a [f32],
    pub d_out: &'a [f32],
}

/// Backward: overwrites `d_qkv`. `row_sums` gets the sums of `d_out * out` per head and query.
pub(super) fn attention_backward(saved: Saved, d_qkv: &mut [f32], row_sums: &mut [f32], shape: &AttentionShape) {
    let layout = Layout::new(shape);
    let Layout { seq, heads, fused, attended, .. } = layout;
    let sequences = saved.qkv.chunks_exact(seq * fused).zip(saved.out.chunks_exact(seq * attended));
    let sequences = sequences.zip(saved.d_out.chunks_exact(seq * attended));
    let sums_and_lse = row_sums.chunks_exact_mut(heads * seq).zip(saved.lse.chunks_exact(heads * seq));
    PANELS.with_borrow_mut(|panels| {
        let all = sequences.zip(sums_and_lse).zip(d_qkv.chunks_exact_mut(seq * fused));
        for ((((qkv, out), d_out), (row_sums, lse)), d_qkv) in all {
            products_of_rows(out, d_out, row_sums, seq, layout.head_dim);
            // Keys and values gather from all queries of all heads of their group.
            clear_columns(d_qkv, fused, attended);
            for (head, (row_sums, lse)) in row_sums.chunks_exact(seq).zip(lse.chunks_exact(seq)).enumerate() {
                attend_backward(&layout, head, Rows { qkv, d_out, row_sums, lse }, d_qkv, panels);
            }
        }
    });
}

/// One sequence, and one head's `row_sums` and `lse` of it.
#[derive(Clone, Copy)]
struct Rows<'a> {
    qkv: &'a [f32],
    d_out: &'a [f32],
    row_sums: &'a [f32],
    lse: &'a [f32],
}

/// With `P` the probabilities: `dV += P^T dO`, `dS = P * (dO V^T - rowsum(dO * O)) * scale`, `dQ = dS K`, `dK += dS^T Q`.
fn attend_backward(layout: &Layout, head: usize, of: Rows, d_qkv: &mut [f32], panels_of_scores: &mut Panels) {
    let &Layout { fused, attended, scale, .. } = layout;
    let (query, key, value) = (layout.query(head), layout.key(head), layout.value(head));
    for (first, rows) in blocks(layout.seq) {
        let queries = layout.part(of.qkv, fused, first, rows, query);
        let d_out = layout.part(of.d_out, attended, first, rows, query);
        let (lse, row_sums) = (&of.lse[first..][..rows], &of.row_sums[first..][..rows]);
        for (start, keys) in panels(first + rows) {
            let probabilities = &mut panels_of_scores.probabilities.0[..rows * keys];
            let gradients = &mut panels_of_scores.gradients.0[..rows * keys];
            let keys_here = layout.part(of.qkv, fused, start, keys, key);
            let values_here = layout.part(of.qkv, fused, start, keys, value);
            multiply(queries, keys_here.transposed(), MatrixMut::dense(probabilities, rows, keys), false);
            multiply(d_out, values_here.transposed(), MatrixMut::dense(gradients, rows, keys), false);
            score_gradients(probabilities, gradients, lse, row_sums, keys, first - start, scale);
            let probabilities = Matrix::dense(probabilities, rows, keys);
            let gradients = Matrix::dense(gradients, rows, keys);
            multiply(probabilities.transposed(), d_out, layout.part_mut(d_qkv, fused, start, keys, value), true);
            multiply(gradients.transposed(), queries, layout.part_mut(d_qkv, fused, start, keys, key), true);
            multiply(gradients, keys_here, layout.part_mut(d_qkv, fused, first, rows, query), start > 0);
        }
    }
}

vectorised! {
    /// Replaces scores by probabilities, and gradients of probabilities by gradients of unscaled scores.
    fn score_gradients(
        scores: &mut [f32],
        gradients: &mut [f32],
        lse: &[f32],
        row_sums: &[f32],
        keys: usize,
        diagonal: usize,
        scale: f32,
    ) {
        let rows = scores.chunks_exact_mut(keys).zip(gradients.chunks_exact_mut(keys));
        for (row, ((scores, gradients), (&lse, &row_sum))) in rows.zip(lse.iter().zip(row_sums)).enumerate() {
            let seen = (diagonal + row + 1).min(keys);
            let (scores, hidden) = scores.split_at_mut(seen);
            hidden.fill(0.0);
            let (gradients, hidden) = gradients.split_at_mut(seen);
            hidden.fill(0.0);
            for (score, gradient) in scores.iter_mut().zip(gradients) {
                let probability = exp(score.mul_add(scale, -lse));
                *score = probability;
                *gradient = probability * scale * (*gradient - row_sum);
            }
        }
    }

    /// `row_sums[head, query]` = sum of `d_out * out` over the head's columns.
    fn products_of_rows(out: &[f32], d_out: &[f32], row_sums: &mut [f32], seq: usize, head_dim: usize) {
        let heads = row_sums.len() / seq;
        let rows = out.chunks_exact(heads * head_dim).zip(d_out.chunks_exact(heads * head_dim));
        for (row, (out, d_out)) in rows.enumerate() {
            for (head, (out, d_out)) in out.chunks_exact(head_dim).zip(d_out.chunks_exact(head_dim)).enumerate() {
                row_sums[head * seq + row] = sums([out, d_out], |[out, d_out]| [out * d_out])[0];
            }
        }
    }
}

/// Zeroes the columns from `from` on.
fn clear_columns(rows: &mut [f32], width: usize, from: usize) {
    for row in rows.chunks_exact_mut(width) {
        row[from..].fill(0.0);
    }
}
