//! Output projection and cross-entropy, a chunk of rows at a time, so that the logits of all rows never exist together.

use super::embedding::check_indices;
use super::matmul::{Matrix, MatrixMut, multiply};
use super::vector::{exp, max, sums, vectorised};
use crate::device::KernelError;

/// Sizes of the head.
#[derive(Clone, Copy)]
pub(super) struct HeadShape {
    pub cols: usize,
    pub vocab: usize,
    /// Rows at a time.
    pub chunk: usize,
}

/// What both passes read.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub targets: &'a [u32],
    pub shape: HeadShape,
}

impl<'a> Head<'a> {
    /// Chunks of rows with their targets.
    fn chunks(&self) -> impl Iterator<Item = (&'a [f32], &'a [u32])> {
        let HeadShape { cols, chunk, .. } = self.shape;
        self.x.chunks(chunk * cols).zip(self.targets.chunks(chunk))
    }

    /// `logits = x * weight^T`.
    fn project<'s>(&self, x: &[f32], scratch: &'s mut [f32]) -> &'s mut [f32] {
        let HeadShape { cols, vocab, .. } = self.shape;
        let rows = x.len() / cols;
        let logits = &mut scratch[..rows * vocab];
        let weight = Matrix::dense(self.weight, vocab, cols).transposed();
        multiply(Matrix::dense(x, rows, cols), weight, MatrixMut::dense(logits, rows, vocab), false);
        logits
    }
}

/// Writes the logarithm of the sum of exponentials per row, and returns the mean loss.
pub(super) fn loss(head: Head, lse: &mut [f32], scratch: &mut [f32]) -> Result<f32, KernelError> {
    let HeadShape { vocab, chunk, .. } = head.shape;
    check_indices("HeadLoss", "targets", head.targets, vocab)?;
    let mut total = 0.0;
    for ((x, targets), lse) in head.chunks().zip(lse.chunks_mut(chunk)) {
        let logits = head.project(x, scratch);
        log_sum_exp(logits, lse);
        for ((logits, &target), &lse) in logits.chunks_exact(vocab).zip(targets).zip(&*lse) {
            total += f64::from(lse) - f64::from(logits[target as usize]);
        }
    }
    Ok((total / head.targets.len() as f64) as f32)
}

/// The gradients of `scale *` the sum of row losses: `d_logits = scale * (softmax - onehot)`.
pub(super) fn backward(
    head: Head,
    lse: &[f32],
    mut dx: Option<&mut [f32]>,
    mut d_weight: Option<&mut [f32]>,
    scratch: &mut [f32],
    scale: f32,
) -> Result<(), KernelError> {
    let HeadShape { cols, vocab, chunk } = head.shape;
    check_indices("HeadBackward", "targets", head.targets, vocab)?;
    for (n, ((x, targets), lse)) in head.chunks().zip(lse.chunks(chunk)).enumerate() {
        let rows = targets.len();
        let logits = head.project(x, scratch);
        logit_gradient(logits, lse, targets, scale);
        let gradient = Matrix::dense(logits, rows, vocab);
        if let Some(dx) = dx.as_deref_mut() {
            let dx = &mut dx[n * chunk * cols..][..rows * cols];
            multiply(gradient, Matrix::dense(head.weight, vocab, cols), MatrixMut::dense(dx, rows, cols), false);
        }
        if let Some(d_weight) = d_weight.as_deref_mut() {
            let d_weight = MatrixMut::dense(d_weight, vocab, cols);
            multiply(gradient.transposed(), Matrix::dense(x, rows, cols), d_weight, true);
        }
    }
    Ok(())
}

vectorised! {
    fn log_sum_exp(logits: &[f32], lse: &mut [f32]) {
        for (logits, lse) in logits.chunks_exact(logits.len() / lse.len()).zip(lse) {
            let largest = max(logits);
            let [sum] = sums([logits], |[logit]| [exp(logit - largest)]);
            *lse = largest + sum.ln();
        }
    }

    /// Replaces logits by their gradient.
    fn logit_gradient(logits: &mut [f32], lse: &[f32], targets: &[u32], scale: f32) {
        let vocab = logits.len() / lse.len();
        for ((logits, &lse), &target) in logits.chunks_exact_mut(vocab).zip(lse).zip(targets) {
            for logit in logits.iter_mut() {
                *logit = scale * exp(*logit - lse);
            }
            logits[target as usize] -= scale;
        }
    }
}
