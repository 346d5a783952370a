//! Output projection and cross-entropy in parts that the scratch holds: products around the kernels of `head.cu`.
//!
//! The loss, and the gradient of the input alone, take some rows at a time with the whole vocabulary. The gradient of the matrix
//! takes all rows at a time with some of the vocabulary: each of its elements is then one sum, added and rounded once, and it is read
//! and written once. (Logits need no whole rows there, as their log-sum-exp is known.)

use super::launches::{address, by_row, cast, dense};
use super::machine::{Argument, Epilogue, Kernel, Layout, Machine, Product, ProductShape};
use crate::call::{Call, HEAD_ALIGNMENT};
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
                let part = Part::of_rows(scratch, &chunk, vocab);
                // SAFETY: the caller's promise; slices stay within the views that were checked.
                unsafe { machine.multiply(&part.project(chunk.of(x, cols), weight, cols)) }?;
                let [logits, targets, lse] = [part.logits, chunk.of(targets, 1), chunk.of(lse, 1)].map(address);
                let arguments = smallvec![logits, targets, lse, Argument::U32(vocab), Argument::U32(part.stride)];
                // SAFETY: as above, with the arguments of the kernel.
                unsafe { machine.launch(&by_row(kernel("cross_entropy"), chunk.rows, THREADS, arguments)) }?;
                let arguments = smallvec![
                    logits,
                    address(loss),
                    Argument::U32(chunk.rows),
                    Argument::U32(part.stride),
                    Argument::F32((1.0 / f64::from(rows)) as f32),
                    Argument::U32(u32::from(chunk.first == 0)),
                ];
                // SAFETY: as above.
                unsafe { machine.launch(&by_row(kernel("add_losses"), 1, THREADS, arguments)) }?;
            }
            Ok(())
        }
        Call::HeadBackward { x, weight, targets, lse, dx, d_weight, scratch, rows, cols, vocab, chunk, scale } => {
            let narrow = x.dtype() == DType::BF16;
            let backward = Backward { machine, x, weight, targets, lse, scratch, cols, vocab, scale };
            // SAFETY: the caller's promise.
            unsafe {
                match d_weight.and_then(|_| slab_width(scratch, dx.filter(|_| narrow), [rows, vocab])) {
                    None => backward.by_rows(chunks(rows, chunk), dx, d_weight),
                    Some(width) => backward.by_tokens(&Rows { first: 0, rows }, width, dx, d_weight),
                }
            }
        }
        _ => Ok(()),
    }
}

/// How much of the vocabulary fits the scratch with all rows, beside 32-bit sums for `dx` where these are needed; `None` where
/// that is next to nothing.
fn slab_width(scratch: View, dx: Option<View>, [rows, vocab]: [u32; 2]) -> Option<u32> {
    let whole = u64::from(vocab.next_multiple_of(HEAD_ALIGNMENT)) * u64::from(rows);
    if whole <= scratch.len() as u64 {
        return Some(vocab);
    }
    let room = scratch.len().checked_sub(dx.map_or(0, |dx| dx.len()))?;
    let width = (room / rows as usize) as u32 / HEAD_ALIGNMENT * HEAD_ALIGNMENT;
    (width > 0).then_some(width.min(vocab))
}

/// What every part of the backward pass needs.
struct Backward<'m, M> {
    machine: &'m M,
    x: View,
    weight: View,
    targets: View,
    lse: View,
    scratch: View,
    cols: u32,
    vocab: u32,
    scale: f32,
}

impl<M: Machine> Backward<'_, M> {
    /// Some rows at a time, with the whole vocabulary.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn by_rows(
        &self,
        chunks: impl Iterator<Item = Rows>,
        dx: Option<View>,
        d_weight: Option<View>,
    ) -> Result<(), KernelError> {
        for chunk in chunks {
            let part = Part::of_rows(self.scratch, &chunk, self.vocab);
            let dx = dx.map(|dx| (chunk.of(dx, self.cols), false));
            // SAFETY: the caller's promise.
            unsafe { self.part(&part, &chunk, dx, d_weight) }?;
        }
        Ok(())
    }

    /// `width` tokens of the vocabulary at a time, with all rows. Gradients of the input add up over them: narrow ones in 32 bits, at the
    /// begin of the scratch.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn by_tokens(
        &self,
        all: &Rows,
        width: u32,
        dx: Option<View>,
        d_weight: Option<View>,
    ) -> Result<(), KernelError> {
        let (scratch, vocab) = (self.scratch, self.vocab);
        let apart = dx.filter(|_| self.x.dtype() == DType::BF16 && width < vocab);
        let (sums, logits) = match apart {
            Some(dx) => (Some(scratch.slice(0, dx.len())), scratch.slice(dx.len(), scratch.len() - dx.len())),
            None => (dx, scratch),
        };
        for first in (0..vocab).step_by(width as usize) {
            let tokens = width.min(vocab - first);
            let part = Part { logits, first, tokens, stride: width.next_multiple_of(HEAD_ALIGNMENT) };
            // SAFETY: the caller's promise.
            unsafe { self.part(&part, all, sums.map(|sums| (sums, first > 0)), d_weight) }?;
        }
        match (sums, apart) {
            // SAFETY: as above.
            (Some(sums), Some(dx)) => unsafe { self.machine.launch(&cast(sums, dx)) },
            _ => Ok(()),
        }
    }

    /// The gradients of a part: of its rows into `dx`, or added to it; of its tokens added to `d_weight`.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn part(
        &self,
        part: &Part,
        rows: &Rows,
        dx: Option<(View, bool)>,
        d_weight: Option<View>,
    ) -> Result<(), KernelError> {
        let Backward { machine, weight, cols, .. } = *self;
        let x = rows.of(self.x, cols);
        // SAFETY: the caller's promise; slices stay within the views that were checked.
        unsafe { machine.multiply(&part.project(x, weight, cols)) }?;
        let [data, targets, lse] = [part.logits, rows.of(self.targets, 1), rows.of(self.lse, 1)].map(address);
        let sizes = [part.tokens, part.stride, part.first].map(Argument::U32);
        let mut arguments = smallvec![data, targets, lse];
        arguments.extend(sizes);
        arguments.push(Argument::F32(self.scale));
        let gradient_kernel = Kernel::of("head", "logit_gradient", x.dtype());
        // SAFETY: as above, with the arguments of the kernel.
        unsafe { machine.launch(&by_row(gradient_kernel, rows.rows, THREADS, arguments)) }?;
        // Gradients in bf16 fill the first half of the row that their logits filled.
        let halves = if x.dtype() == DType::BF16 { 2 } else { 1 };
        let gradient = |transposed| Layout { dtype: x.dtype(), stride: u64::from(part.stride) * halves, transposed };
        let plain = |view: View| Layout { dtype: view.dtype(), stride: u64::from(cols), transposed: false };
        if let Some((dx, accumulate)) = dx {
            let tokens = part.of(weight, cols);
            let (a, b, c) = (gradient(false), plain(tokens), plain(dx));
            let epilogue = Epilogue::None;
            let shape = ProductShape { m: rows.rows, n: cols, k: part.tokens, a, b, c, accumulate, epilogue };
            let product = Product::new(shape, part.logits.address(), tokens.address(), dx.address());
            // SAFETY: as above.
            unsafe { machine.multiply(&product) }?;
        }
        if let Some(d_weight) = d_weight {
            let tokens = part.of(d_weight, cols);
            let (a, b, c) = (gradient(true), plain(x), plain(tokens));
            let (accumulate, epilogue) = (true, Epilogue::None);
            let shape = ProductShape { m: part.tokens, n: cols, k: rows.rows, a, b, c, accumulate, epilogue };
            let product = Product::new(shape, part.logits.address(), x.address(), tokens.address());
            // SAFETY: as above.
            unsafe { machine.multiply(&product) }?;
        }
        Ok(())
    }
}

fn kernel(base: &'static str) -> Kernel {
    Kernel::plain("head", base)
}

/// Logits of some neighbouring tokens of the vocabulary.
struct Part {
    logits: View,
    first: u32,
    tokens: u32,
    /// Elements from one row to the next: rows begin at multiples of 16 bytes, whatever the vocabulary.
    stride: u32,
}

impl Part {
    /// The whole vocabulary, for some rows.
    fn of_rows(scratch: View, rows: &Rows, vocab: u32) -> Part {
        let stride = vocab.next_multiple_of(HEAD_ALIGNMENT);
        Part { logits: scratch.slice(0, rows.rows as usize * stride as usize), first: 0, tokens: vocab, stride }
    }

    /// Its tokens' part of a matrix with a row per token.
    fn of(&self, matrix: View, cols: u32) -> View {
        matrix.slice(self.first as usize * cols as usize, self.tokens as usize * cols as usize)
    }

    /// `logits = x weight^T`.
    fn project(&self, x: View, weight: View, cols: u32) -> Product {
        let weight = self.of(weight, cols);
        let rows = (x.len() / cols as usize) as u32;
        let mut product = dense([x, weight, self.logits], [rows, self.tokens, cols], [false, true], false);
        product.shape.c.stride = u64::from(self.stride);
        product
    }
}

/// Some neighbouring rows.
struct Rows {
    first: u32,
    rows: u32,
}

impl Rows {
    /// Their part of a view with `cols` elements per row.
    fn of(&self, view: View, cols: u32) -> View {
        view.slice(self.first as usize * cols as usize, self.rows as usize * cols as usize)
    }
}

fn chunks(rows: u32, chunk: u32) -> impl Iterator<Item = Rows> {
    (0..rows).step_by(chunk as usize).map(move |first| Rows { first, rows: chunk.min(rows - first) })
}
