//! Output projection and cross-entropy in chunks of rows: products around the kernels of `head.cu`.

use super::launches::{address, by_row, dense};
use super::machine::{Argument, Kernel, Layout, Machine, Product, ProductShape};
use crate::call::Call;
use crate::device::{DType, KernelError, View};
use smallvec::smallvec;

/// Threads of every kernel of `head.cu`.
const THREADS: u32 = 512;

/// Runs [`Call::HeadLoss`] or [`Call::HeadBackward`]; other calls do nothing.
///
/// # Safety
/// As for [`super::launches::run`].
pub(super) unsafe fn run(machine: &impl Machine, call: &Call) -> Result<(), KernelError> {
    match *call {
        Call::HeadLoss { x, weight, targets, lse, loss, scratch, rows, cols, vocab, chunk } => {
            for chunk in chunks(rows, chunk) {
                let logits = scratch.slice(0, chunk.rows as usize * vocab as usize);
                let x = chunk.of(x, cols);
                let product = dense([x, weight, logits], [chunk.rows, vocab, cols], [false, true], false);
                // SAFETY: the caller's promise; slices stay within the views that were checked.
                unsafe { machine.multiply(&product) }?;
                let statistics = [logits, chunk.of(targets, 1), chunk.of(lse, 1)].map(address);
                let [logits, targets, lse] = statistics;
                let arguments = smallvec![logits, targets, lse, Argument::U32(vocab)];
                // SAFETY: as above, with the arguments of the kernel.
                unsafe { machine.launch(&by_row(kernel("cross_entropy"), chunk.rows, THREADS, arguments)) }?;
                let arguments = smallvec![
                    logits,
                    address(loss),
                    Argument::U32(chunk.rows),
                    Argument::U32(vocab),
                    Argument::F32((1.0 / f64::from(rows)) as f32),
                    Argument::U32(u32::from(chunk.first == 0)),
                ];
                // SAFETY: as above.
                unsafe { machine.launch(&by_row(kernel("add_losses"), 1, THREADS, arguments)) }?;
            }
        }
        Call::HeadBackward { x, weight, targets, lse, dx, d_weight, scratch, rows, cols, vocab, chunk, scale } => {
            let narrow = x.dtype() == DType::BF16;
            for chunk in chunks(rows, chunk) {
                let logits = scratch.slice(0, chunk.rows as usize * vocab as usize);
                let x = chunk.of(x, cols);
                let product = dense([x, weight, logits], [chunk.rows, vocab, cols], [false, true], false);
                // SAFETY: as above.
                unsafe { machine.multiply(&product) }?;
                let [data, targets, lse] = [logits, chunk.of(targets, 1), chunk.of(lse, 1)].map(address);
                let arguments = smallvec![data, targets, lse, Argument::U32(vocab), Argument::F32(scale)];
                let gradient_kernel = Kernel::of("head", "logit_gradient", x.dtype());
                // SAFETY: as above.
                unsafe { machine.launch(&by_row(gradient_kernel, chunk.rows, THREADS, arguments)) }?;
                // Gradients in bf16 fill the first half of the row that their logits filled.
                let gradient = |transposed| Layout {
                    dtype: x.dtype(),
                    stride: u64::from(vocab) * if narrow { 2 } else { 1 },
                    transposed,
                };
                let plain = |view: View| Layout { dtype: view.dtype(), stride: u64::from(cols), transposed: false };
                if let Some(dx) = dx {
                    let dx = chunk.of(dx, cols);
                    let (a, b, c) = (gradient(false), plain(weight), plain(dx));
                    let shape = ProductShape { m: chunk.rows, n: cols, k: vocab, a, b, c, accumulate: false };
                    let product = Product { shape, a: logits.address(), b: weight.address(), c: dx.address() };
                    // SAFETY: as above.
                    unsafe { machine.multiply(&product) }?;
                }
                if let Some(d_weight) = d_weight {
                    let (a, b, c) = (gradient(true), plain(x), plain(d_weight));
                    let shape = ProductShape { m: vocab, n: cols, k: chunk.rows, a, b, c, accumulate: true };
                    let product = Product { shape, a: logits.address(), b: x.address(), c: d_weight.address() };
                    // SAFETY: as above.
                    unsafe { machine.multiply(&product) }?;
                }
            }
        }
        _ => {}
    }
    Ok(())
}

fn kernel(base: &'static str) -> Kernel {
    Kernel::plain("head", base)
}

/// Some neighbouring rows.
struct Chunk {
    first: u32,
    rows: u32,
}

impl Chunk {
    /// Their part of a view with `cols` elements per row.
    fn of(&self, view: View, cols: u32) -> View {
        view.slice(self.first as usize * cols as usize, self.rows as usize * cols as usize)
    }
}

fn chunks(rows: u32, chunk: u32) -> impl Iterator<Item = Chunk> {
    (0..rows).step_by(chunk as usize).map(move |first| Chunk { first, rows: chunk.min(rows - first) })
}
