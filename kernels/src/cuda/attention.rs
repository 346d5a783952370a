//! Launches of attention: tensor-core kernels where element type, head width and alignment allow them, plain ones elsewhere.

use super::launches::address;
use super::machine::{Argument, Kernel, Launch};
use crate::call::AttentionShape;
use crate::device::{DType, KernelError, View};
use smallvec::{SmallVec, smallvec};

/// Warps of a block, in both families of kernels.
const WARPS: u32 = 4;
const THREADS: u32 = 32 * WARPS;
/// Widest head of the plain kernels: eight elements per lane.
const WIDEST: u32 = 256;

/// Tiles of the kernels of one head width, as in the last lines of `cuda/attention.cu`.
struct Tiles {
    width: u32,
    /// Forward: queries of a warp over 16, and keys at a time.
    queries: u32,
    keys: u32,
    /// Backward: queries at a time where a block owns keys, keys at a time where it owns queries.
    backward_queries: u32,
    backward_keys: u32,
}

const TILES: [Tiles; 4] = [
    Tiles { width: 32, queries: 2, keys: 64, backward_queries: 64, backward_keys: 64 },
    Tiles { width: 64, queries: 2, keys: 64, backward_queries: 64, backward_keys: 64 },
    Tiles { width: 96, queries: 2, keys: 32, backward_queries: 32, backward_keys: 64 },
    Tiles { width: 128, queries: 2, keys: 64, backward_queries: 32, backward_keys: 64 },
];

impl Tiles {
    /// Queries of a block of the forward pass.
    fn block_queries(&self) -> u32 {
        WARPS * self.queries * 16
    }

    /// Bytes of rows with their padding.
    fn rows(&self, rows: u32) -> u32 {
        rows * (self.width + 8) * 2
    }

    fn forward_shared(&self) -> u32 {
        self.rows(self.block_queries() + 4 * self.keys)
    }

    fn keys_shared(&self) -> u32 {
        self.rows(2 * WARPS * 16 + 4 * self.backward_queries) + 4 * self.backward_queries * 4
    }

    fn queries_shared(&self) -> u32 {
        self.rows(2 * WARPS * 16 + 4 * self.backward_keys)
    }

    fn most_shared(&self) -> u32 {
        self.forward_shared().max(self.keys_shared()).max(self.queries_shared())
    }

    /// The tiles for these operands, if tensor-core kernels can work on them.
    fn find(shared_limit: u32, values: &[View], shape: &AttentionShape) -> Option<&'static Tiles> {
        let aligned = values.iter().all(|view| view.dtype() == DType::BF16 && view.address().is_multiple_of(16));
        TILES.iter().find(|tiles| aligned && tiles.width == shape.head_dim && tiles.most_shared() <= shared_limit)
    }
}

fn sizes(shape: &AttentionShape) -> [Argument; 3] {
    [shape.seq, shape.heads, shape.kv_heads].map(Argument::U32)
}

fn scale(shape: &AttentionShape) -> f64 {
    1.0 / f64::from(shape.head_dim).sqrt()
}

fn refuse_wide(device: &str, call: &'static str, shape: &AttentionShape) -> Result<(), KernelError> {
    if shape.head_dim <= WIDEST {
        return Ok(());
    }
    let what = format!("head_dim is {}, at most {WIDEST} is possible", shape.head_dim);
    Err(KernelError::Unsupported { call, device: device.to_owned(), what })
}

fn plain(
    base: &'static str,
    dtype: DType,
    rows: u32,
    heads: u32,
    batch: u32,
    arguments: SmallVec<[Argument; 16]>,
) -> Launch {
    Launch {
        kernel: Kernel::of("attention_plain", base, dtype),
        grid: [rows.div_ceil(WARPS), heads, batch],
        block: [THREADS, 1, 1],
        shared: 0,
        arguments,
    }
}

/// `views`: qkv, out, lse.
pub(super) fn forward(
    shared_limit: u32,
    device: &str,
    views: [View; 3],
    shape: &AttentionShape,
) -> Result<Launch, KernelError> {
    let [qkv, out, _] = views;
    let mut arguments: SmallVec<[Argument; 16]> = views.into_iter().map(address).collect();
    arguments.extend(sizes(shape));
    if let Some(tiles) = Tiles::find(shared_limit, &[qkv, out], shape) {
        arguments.push(Argument::F32((scale(shape) * std::f64::consts::LOG2_E) as f32));
        return Ok(Launch {
            kernel: Kernel { width: Some(tiles.width), ..Kernel::plain("attention", "attention_forward") },
            grid: [shape.seq.div_ceil(tiles.block_queries()), shape.heads, shape.batch],
            block: [THREADS, 1, 1],
            shared: tiles.forward_shared(),
            arguments,
        });
    }
    refuse_wide(device, "Attention", shape)?;
    arguments.extend([Argument::U32(shape.head_dim), Argument::F32(scale(shape) as f32)]);
    Ok(plain("plain_forward", qkv.dtype(), shape.seq, shape.heads, shape.batch, arguments))
}

/// `views`: qkv, out, lse, d_out, d_qkv, scratch. The launches in order.
pub(super) fn backward(
    shared_limit: u32,
    device: &str,
    views: [View; 6],
    shape: &AttentionShape,
) -> Result<[Launch; 3], KernelError> {
    let [qkv, out, lse, d_out, d_qkv, scratch] = views;
    refuse_wide(device, "AttentionBackward", shape)?;
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = *shape;
    let dtype = qkv.dtype();
    let sizes_of_sums = [seq, heads, head_dim].map(Argument::U32);
    let mut of_sums: SmallVec<[Argument; 16]> = smallvec![address(out), address(d_out), address(scratch)];
    of_sums.extend(sizes_of_sums);
    let row_sums = plain("row_sums", dtype, seq, heads, batch, of_sums);
    let mut arguments: SmallVec<[Argument; 16]> = [qkv, d_out, lse, scratch, d_qkv].into_iter().map(address).collect();
    arguments.extend(sizes(shape));
    if let Some(tiles) = Tiles::find(shared_limit, &[qkv, out, d_out, d_qkv], shape) {
        arguments.push(Argument::F32(scale(shape) as f32));
        let launch = |base, heads, shared| Launch {
            kernel: Kernel { width: Some(tiles.width), ..Kernel::plain("attention", base) },
            grid: [seq.div_ceil(WARPS * 16), heads, batch],
            block: [THREADS, 1, 1],
            shared,
            arguments: arguments.clone(),
        };
        return Ok([
            row_sums,
            launch("attention_backward_keys", kv_heads, tiles.keys_shared()),
            launch("attention_backward_queries", heads, tiles.queries_shared()),
        ]);
    }
    arguments.extend([Argument::U32(head_dim), Argument::F32(scale(shape) as f32)]);
    Ok([
        row_sums,
        plain("plain_backward_keys", dtype, seq, kv_heads, batch, arguments.clone()),
        plain("plain_backward_queries", dtype, seq, heads, batch, arguments),
    ])
}
