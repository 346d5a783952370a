//! Calls as launches: which kernel, how many blocks, which arguments in which order.

use super::machine::{Argument, Epilogue, Kernel, Launch, Layout, Machine, Product, ProductShape, WORDS};
use super::{attention, head};
use crate::call::{AdamW, Call, Decays};
use crate::device::{DType, KernelError, View};
use smallvec::{SmallVec, smallvec};

/// Blocks of a sum of squares: the same on every GPU, so that the sum is.
pub(super) const PARTS: u32 = 1024;
/// Threads of a block, where a kernel leaves the choice.
const THREADS: u32 = 256;
/// Columns and rows of a block of `column_sums`.
const COLUMN_BLOCK: [u32; 3] = [32, 16, 1];
/// Rows that a block of `column_sums` adds up, where there is room for the sums of all and they are not too many to be added one by one.
const SLAB_ROWS: u32 = 256;
const MOST_SLABS: u64 = 128;
/// Bytes for parts of sums: [`PARTS`] doubles, or the sums of slabs of rows.
pub(super) const PARTS_BYTES: usize = 4 << 20;

pub(super) fn address(view: View) -> Argument {
    Argument::Address(view.address())
}

pub(super) fn address_or_null(view: Option<View>) -> Argument {
    Argument::Address(view.map_or(0, |view| view.address()))
}

/// Elements in 16 bytes.
fn wide_elements(dtype: DType) -> usize {
    16 / dtype.bytes()
}

/// Whether everything starts at a multiple of 16 bytes and rows of `cols` elements do, too.
fn is_wide(views: &[View], cols: usize) -> bool {
    views.iter().all(|view| view.address().is_multiple_of(16) && cols.is_multiple_of(wide_elements(view.dtype())))
}

/// Whether groups of four elements begin at multiples of their size.
fn in_fours(views: &[View]) -> bool {
    views
        .iter()
        .all(|view| view.address().is_multiple_of(4 * view.dtype().bytes() as u64) && view.len().is_multiple_of(4))
}

/// Threads for a row that each thread takes `elements` of at a time.
fn row_threads(cols: u32, elements: usize) -> u32 {
    cols.div_ceil(elements as u32).next_multiple_of(32).min(THREADS)
}

/// One thread per `elements` of `len`.
fn flat(kernel: Kernel, len: usize, elements: usize, arguments: SmallVec<[Argument; 16]>) -> Launch {
    let blocks = len.div_ceil(elements).div_ceil(THREADS as usize);
    Launch { kernel, grid: [blocks as u32, 1, 1], block: [THREADS, 1, 1], shared: 0, arguments }
}

/// One block per row.
pub(super) fn by_row(kernel: Kernel, rows: u32, threads: u32, arguments: SmallVec<[Argument; 16]>) -> Launch {
    Launch { kernel, grid: [rows, 1, 1], block: [threads, 1, 1], shared: 0, arguments }
}

/// A pointwise kernel over `len` elements, wide where views and row lengths allow it.
fn pointwise(
    base: &'static str,
    views: &[View],
    cols: usize,
    len: usize,
    arguments: SmallVec<[Argument; 16]>,
) -> Launch {
    let dtype = views[0].dtype();
    let wide = is_wide(views, cols);
    let elements = if wide { wide_elements(dtype) } else { 1 };
    flat(Kernel::of("pointwise", base, dtype).wide(wide), len, elements, arguments)
}

/// A product of matrices without gaps.
pub(super) fn dense(
    [a, b, c]: [View; 3],
    [m, n, k]: [u32; 3],
    [transpose_a, transpose_b]: [bool; 2],
    accumulate: bool,
) -> Product {
    let layout =
        |view: View, stride: u32, transposed| Layout { dtype: view.dtype(), stride: u64::from(stride), transposed };
    let shape = ProductShape {
        m,
        n,
        k,
        a: layout(a, if transpose_a { m } else { k }, transpose_a),
        b: layout(b, if transpose_b { k } else { n }, transpose_b),
        c: layout(c, n, false),
        accumulate,
        epilogue: Epilogue::None,
    };
    Product::new(shape, a.address(), b.address(), c.address())
}

/// A product and what follows it: one kernel where the machine has it, else its parts one after the other. Other calls do nothing.
///
/// # Safety
/// As for [`run`].
unsafe fn project(machine: &impl Machine, call: &Call, parts: u64) -> Result<(), KernelError> {
    match *call {
        Call::Project { x, weight, bias, base, input, out, m, n, k } => {
            // Where there is an input, there is no base.
            let sum = input.unwrap_or(out);
            let product = Product {
                base: base.unwrap_or(sum).address(),
                ..dense([x, weight, sum], [m, n, k], [false, true], base.is_some())
            };
            let epilogue = match (bias, input) {
                (Some(_), Some(_)) => Epilogue::BiasGelu,
                (Some(_), None) => Epilogue::Bias,
                (None, _) => Epilogue::None,
            };
            let fused = Product {
                shape: ProductShape { epilogue, ..product.shape },
                c: out.address(),
                base: base.unwrap_or(out).address(),
                bias: bias.map_or(0, |view| view.address()),
                beside: input.map_or(0, |view| view.address()),
                ..product
            };
            // SAFETY: the caller's promise, for each part of the call.
            unsafe {
                if (bias.is_some() || input.is_none()) && machine.fuses(&fused)? {
                    return machine.multiply(&fused);
                }
                machine.multiply(&product)?;
                if let Some(bias) = bias {
                    run(machine, &Call::AddBias { x: sum, bias, rows: m, cols: n }, parts)?;
                }
                if input.is_some() { run(machine, &Call::Gelu { x: sum, out }, parts) } else { Ok(()) }
            }
        }
        Call::ProjectBackGelu { dy, weight, input, d_input, m, n, k } => {
            let product = dense([dy, weight, d_input], [m, n, k], [false; 2], false);
            let shape = ProductShape { epilogue: Epilogue::GeluSlope, ..product.shape };
            let fused = Product { shape, beside: input.address(), ..product };
            // SAFETY: as above; the kernel of the slope reads each element before it writes it.
            unsafe {
                if machine.fuses(&fused)? {
                    return machine.multiply(&fused);
                }
                machine.multiply(&product)?;
                run(machine, &Call::GeluBackward { x: input, d_out: d_input, d_x: d_input }, parts)
            }
        }
        _ => Ok(()),
    }
}

/// Queues a call. `parts` is the address of [`PARTS_BYTES`] bytes that calls of this machine alone use, one after the other.
///
/// # Safety
/// The call has passed its check, its views come from living memory of this machine, and nobody else touches them until it has ended.
pub(super) unsafe fn run(machine: &impl Machine, call: &Call, parts: u64) -> Result<(), KernelError> {
    use Argument::{F32, F64, U32, U64};
    // SAFETY: the arguments follow the kernels' declarations, and the caller promises the rest.
    let launch = |launch: Launch| unsafe { machine.launch(&launch) };
    match *call {
        Call::MatMul { a, b, c, m, n, k, transpose_a, transpose_b, accumulate } => {
            // SAFETY: as above.
            unsafe { machine.multiply(&dense([a, b, c], [m, n, k], [transpose_a, transpose_b], accumulate)) }
        }
        // SAFETY: as above.
        Call::Project { .. } | Call::ProjectBackGelu { .. } => unsafe { project(machine, call, parts) },
        Call::AddBias { x, bias, cols, .. } => {
            let arguments = smallvec![address(x), address(bias), U32(cols), U64(x.len() as u64)];
            launch(pointwise("add_bias", &[x, bias], cols as usize, x.len(), arguments))
        }
        Call::BiasGradient { dy, d_bias, rows, cols } => {
            column_sums(parts, None, dy, [None, Some(d_bias)], [rows, cols]).into_iter().try_for_each(launch)
        }
        Call::Norm { x, gamma, beta, out, stats, rows, cols, epsilon } => {
            let mut views: SmallVec<[View; 4]> = smallvec![x, gamma, out];
            views.extend(beta);
            let wide = is_wide(&views, cols as usize);
            let threads = row_threads(cols, if wide { wide_elements(x.dtype()) } else { 1 });
            let kernel = Kernel::of("norm", "norm_forward", x.dtype()).wide(wide);
            let [x, gamma, out, stats] = [x, gamma, out, stats].map(address);
            let arguments = smallvec![x, gamma, address_or_null(beta), out, stats, U32(cols), F32(epsilon)];
            launch(by_row(kernel, rows, threads, arguments))
        }
        Call::NormBackwardInput { x, gamma, stats, dy, dx, rows, cols, layer_norm } => {
            let wide = is_wide(&[x, gamma, dy, dx], cols as usize);
            let threads = row_threads(cols, if wide { wide_elements(x.dtype()) } else { 1 });
            let kernel = Kernel::of("norm", "norm_backward_input", x.dtype()).wide(wide);
            let [x, gamma, stats, dy, dx] = [x, gamma, stats, dy, dx].map(address);
            let arguments = smallvec![x, gamma, stats, dy, dx, U32(cols), U32(u32::from(layer_norm))];
            launch(by_row(kernel, rows, threads, arguments))
        }
        Call::NormBackwardWeight { x, stats, dy, d_gamma, d_beta, rows, cols } => {
            let into = [Some(d_gamma), d_beta];
            column_sums(parts, Some((x, stats)), dy, into, [rows, cols]).into_iter().try_for_each(launch)
        }
        Call::Rotary { qkv, shape, theta, inverse } => {
            const ROTARY_THREADS: u32 = 128;
            let tokens = shape.batch * shape.seq;
            let pairs = u64::from(tokens) * u64::from(shape.head_dim / 2);
            launch(Launch {
                kernel: Kernel::of("rotary", "rotary", qkv.dtype()),
                grid: [pairs.div_ceil(u64::from(ROTARY_THREADS)) as u32, 1, 1],
                block: [ROTARY_THREADS, 1, 1],
                shared: 0,
                arguments: smallvec![
                    address(qkv),
                    U32(tokens),
                    U32(shape.seq),
                    U32(shape.heads),
                    U32(shape.kv_heads),
                    U32(shape.head_dim),
                    F64(f64::from(theta).log2()),
                    F32(if inverse { -1.0 } else { 1.0 }),
                ],
            })
        }
        Call::Attention { qkv, out, lse, shape } => {
            attention::forward(machine.shared_limit(), &machine.name(), [qkv, out, lse], &shape).and_then(launch)
        }
        Call::AttentionBackward { qkv, out, lse, d_out, d_qkv, scratch, shape } => {
            let views = [qkv, out, lse, d_out, d_qkv, scratch];
            let launches = attention::backward(machine.shared_limit(), &machine.name(), views, &shape)?;
            launches.into_iter().try_for_each(launch)
        }
        Call::SwiGlu { gate_up, out, cols, .. } => {
            let arguments = smallvec![address(gate_up), address(out), U32(cols), U64(out.len() as u64)];
            launch(pointwise("swiglu", &[gate_up, out], cols as usize, out.len(), arguments))
        }
        Call::SwiGluBackward { gate_up, d_out, d_gate_up, cols, .. } => {
            let len = d_out.len();
            let arguments = smallvec![address(gate_up), address(d_out), address(d_gate_up), U32(cols), U64(len as u64)];
            launch(pointwise("swiglu_backward", &[gate_up, d_out, d_gate_up], cols as usize, len, arguments))
        }
        Call::Gelu { x, out } if !x.is_empty() => {
            let arguments = smallvec![address(x), address(out), U64(x.len() as u64)];
            launch(pointwise("gelu", &[x, out], x.len(), x.len(), arguments))
        }
        Call::GeluBackward { x, d_out, d_x } if !x.is_empty() => {
            let arguments = smallvec![address(x), address(d_out), address(d_x), U64(x.len() as u64)];
            launch(pointwise("gelu_backward", &[x, d_out, d_x], x.len(), x.len(), arguments))
        }
        Call::Embedding { tokens, table, positions, out, rows, cols, seq } => {
            let limit = (table.len() / cols as usize) as u32;
            let arguments = smallvec![
                address(tokens),
                address(table),
                address_or_null(positions),
                address(out),
                U32(cols),
                U32(seq),
                U32(limit),
            ];
            launch(by_row(Kernel::of("embedding", "embed", out.dtype()), rows, THREADS, arguments))
        }
        Call::EmbeddingBackward { tokens, d_out, d_table, d_positions, rows, cols, seq } => {
            let limit = (d_table.len() / cols as usize) as u32;
            let kernel = |base: [&'static str; 2], gradient: View| {
                let narrow = gradient.dtype() == DType::BF16;
                Kernel::of("embedding", base[usize::from(narrow)], d_out.dtype())
            };
            let [tokens, slopes, table] = [tokens, d_out, d_table].map(address);
            launch(Launch {
                kernel: kernel(["embed_backward", "embed_backward_narrow"], d_table),
                // As TOKENS and HELD in the source have it.
                grid: [rows, cols.div_ceil(256 * 8), 1],
                block: [256, 1, 1],
                shared: 0,
                arguments: smallvec![tokens, slopes, table, U32(rows), U32(cols), U32(limit)],
            })?;
            let Some(positions) = d_positions else { return Ok(()) };
            let kernel = kernel(["positions_backward", "positions_backward_narrow"], positions);
            let len = seq as usize * cols as usize;
            launch(flat(kernel, len, 1, smallvec![slopes, address(positions), U32(rows), U32(cols), U32(seq)]))
        }
        Call::HeadLoss { .. } | Call::HeadBackward { .. } => {
            // SAFETY: as above.
            unsafe { head::run(machine, call) }
        }
        Call::Add { x, into } if x.dtype() == DType::F64 && !x.is_empty() => {
            let arguments = smallvec![address(x), address(into), U64(x.len() as u64)];
            launch(flat(Kernel::plain("optimizer", "add_f64"), x.len(), 1, arguments))
        }
        Call::Add { x, into } if !x.is_empty() => launch(sum([into, x, into])),
        Call::Sum { a, b, out } if !a.is_empty() => launch(sum([a, b, out])),
        Call::Cast { from, to } if from.dtype() != to.dtype() && !from.is_empty() => launch(cast(from, to)),
        Call::Copy { from, to } | Call::Cast { from, to } if !from.is_empty() => {
            // SAFETY: as above.
            unsafe { machine.copy(from.address(), to.address(), from.bytes()) }
        }
        Call::Zero { x } if !x.is_empty() => {
            // SAFETY: as above.
            unsafe { machine.clear(x.address(), x.bytes()) }
        }
        Call::SumSquares { x, out } if !x.is_empty() => {
            let blocks = PARTS.min(x.len().div_ceil(THREADS as usize) as u32);
            let partial = Argument::Address(parts);
            let wide = is_wide(&[x], x.len());
            launch(Launch {
                kernel: Kernel::of("optimizer", "square_parts", x.dtype()).wide(wide),
                grid: [blocks, 1, 1],
                block: [THREADS, 1, 1],
                shared: 0,
                arguments: smallvec![address(x), partial, U64(x.len() as u64)],
            })?;
            let arguments = smallvec![partial, address(out), U32(blocks)];
            launch(by_row(Kernel::plain("optimizer", "add_parts"), 1, THREADS, arguments))
        }
        Call::AdamW { parameters, gradients, first, second, rounded, norm, decays, with } if !parameters.is_empty() => {
            let mut views: SmallVec<[View; 5]> = smallvec![parameters, gradients, first, second];
            let mut arguments: SmallVec<[Argument; 16]> = views.iter().copied().map(address).collect();
            views.extend(rounded);
            arguments.extend([address_or_null(rounded), address(norm), U32(parameters.len() as u32)]);
            arguments.push(F32(with.clip.unwrap_or(-1.0)));
            arguments.push(runs(&decays));
            arguments.extend(factors(&with));
            let wide = in_fours(&views);
            let kernel = Kernel::of("optimizer", "adamw", gradients.dtype()).wide(wide);
            launch(flat(kernel, parameters.len(), if wide { 4 } else { 1 }, arguments))
        }
        Call::AdamWAhead { parameters, kept, gradients, first, second, decays, with } if !parameters.is_empty() => {
            let views = [parameters, kept, gradients, first, second];
            let wide = in_fours(&views);
            let mut arguments: SmallVec<[Argument; 16]> = views.into_iter().map(address).collect();
            arguments.extend([U32(parameters.len() as u32), runs(&decays)]);
            arguments.extend(factors(&with));
            let kernel = Kernel::of("optimizer", "adamw_ahead", gradients.dtype()).wide(wide);
            launch(flat(kernel, parameters.len(), if wide { 4 } else { 1 }, arguments))
        }
        // Nothing to do for no elements.
        Call::Gelu { .. }
        | Call::GeluBackward { .. }
        | Call::Add { .. }
        | Call::Sum { .. }
        | Call::Copy { .. }
        | Call::Cast { .. }
        | Call::Zero { .. }
        | Call::SumSquares { .. }
        | Call::AdamW { .. }
        | Call::AdamWAhead { .. } => Ok(()),
    }
}

/// What an update multiplies by, in the order of both kernels: as `cpu::optimizer` has it.
fn factors(with: &AdamW) -> [Argument; 6] {
    let correction = |beta: f32| 1.0 - f64::from(beta).powi(with.step.min(i32::MAX as u32) as i32);
    let decay = 1.0 - with.lr * with.weight_decay;
    let rate = (f64::from(with.lr) / correction(with.beta1)) as f32;
    let root = (1.0 / correction(with.beta2).sqrt()) as f32;
    [with.beta1, with.beta2, decay, rate, root, with.epsilon].map(Argument::F32)
}

/// Between 32 bits and bfloat16.
pub(super) fn cast(from: View, to: View) -> Launch {
    let base = if to.dtype() == DType::BF16 { "cast_to_bf16" } else { "cast_to_f32" };
    let wide = in_fours(&[from, to]);
    let arguments = smallvec![address(from), address(to), Argument::U64(from.len() as u64)];
    flat(Kernel::plain("pointwise", base).wide(wide), from.len(), if wide { 4 } else { 1 }, arguments)
}

/// `out = a + b`; `out` may be `a`.
fn sum([a, b, out]: [View; 3]) -> Launch {
    let arguments = smallvec![address(a), address(b), address(out), Argument::U64(a.len() as u64)];
    pointwise("sum", &[a, b, out], a.len(), a.len(), arguments)
}

/// Sums over rows of `dy`, and of `dy` times the norm of `x` (with its statistics), added to d_gamma and d_beta: slabs of rows side by
/// side first, then their sums in order.
fn column_sums(
    parts: u64,
    norm: Option<(View, View)>,
    dy: View,
    [d_gamma, d_beta]: [Option<View>; 2],
    [rows, cols]: [u32; 2],
) -> [Launch; 2] {
    use Argument::U32;
    let room = PARTS_BYTES as u64 / (8 * u64::from(cols));
    let slabs = u64::from(rows.div_ceil(SLAB_ROWS)).min(room).clamp(1, MOST_SLABS) as u32;
    let sums = Argument::Address(parts);
    let layer_norm = norm.is_some() && d_beta.is_some();
    let (x, stats) = norm.unzip();
    let into = d_gamma.or(d_beta).map_or(DType::F32, |view| view.dtype());
    let add = smallvec![sums, address_or_null(d_gamma), address_or_null(d_beta), U32(slabs), U32(cols)];
    [
        Launch {
            kernel: Kernel::of("norm", "column_sums", dy.dtype()),
            grid: [cols.div_ceil(COLUMN_BLOCK[0]), slabs, 1],
            block: COLUMN_BLOCK,
            shared: 0,
            arguments: smallvec![
                address_or_null(x),
                address_or_null(stats),
                address(dy),
                sums,
                U32(rows),
                U32(cols),
                U32(u32::from(norm.is_some())),
                U32(u32::from(layer_norm)),
            ],
        },
        flat(Kernel::of("norm", "add_column_sums", into), cols as usize, 1, add),
    ]
}

/// Which elements decay, as the kernels' `Runs`.
fn runs(decays: &Decays) -> Argument {
    let mut words = [u32::MAX; WORDS];
    let borders = decays.borders();
    words[..borders.len()].copy_from_slice(borders);
    words[Decays::MOST] = u32::from(decays.first());
    Argument::Words(words)
}
