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

/// Tiles of the kernels of one head width, as in the last lines of `cuda/attention.cu`: what a warp owns, in sixteens of rows, and
/// how many rows of the other side it meets at a time.
#[derive(Debug, PartialEq, Eq)]
struct Tiles {
    width: u32,
    forward: Tile,
    /// Backward, where blocks own keys.
    keys: Tile,
    /// Backward, where blocks own queries.
    queries: Tile,
}

#[derive(Debug, PartialEq, Eq)]
struct Tile {
    owned: u32,
    met: u32,
}

impl Tile {
    const fn new(owned: u32, met: u32) -> Tile {
        Tile { owned, met }
    }

    /// Rows that a block owns.
    fn block(&self) -> u32 {
        WARPS * self.owned * 16
    }
}

const TILES: [Tiles; 4] = [
    Tiles { width: 32, forward: Tile::new(2, 64), keys: Tile::new(2, 64), queries: Tile::new(2, 64) },
    Tiles { width: 64, forward: Tile::new(2, 64), keys: Tile::new(2, 32), queries: Tile::new(2, 32) },
    Tiles { width: 96, forward: Tile::new(2, 32), keys: Tile::new(1, 32), queries: Tile::new(2, 32) },
    Tiles { width: 128, forward: Tile::new(2, 64), keys: Tile::new(1, 32), queries: Tile::new(2, 32) },
];

impl Tiles {
    /// Bytes of rows with their padding.
    fn rows(&self, rows: u32) -> u32 {
        rows * (self.width + 8) * 2
    }

    /// Queries, and keys and values twice.
    fn forward_shared(&self) -> u32 {
        self.rows(self.forward.block() + 4 * self.forward.met)
    }

    /// Keys and values, queries and slopes twice with their statistics.
    fn keys_shared(&self) -> u32 {
        self.rows(2 * self.keys.block() + 4 * self.keys.met) + 4 * self.keys.met * 4
    }

    /// Queries and slopes, keys and values twice.
    fn queries_shared(&self) -> u32 {
        self.rows(2 * self.queries.block() + 4 * self.queries.met)
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
            grid: [shape.seq.div_ceil(tiles.forward.block()), shape.heads, shape.batch],
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
        let launch = |base, heads, tile: &Tile, shared| Launch {
            kernel: Kernel { width: Some(tiles.width), ..Kernel::plain("attention", base) },
            grid: [seq.div_ceil(tile.block()), heads, batch],
            block: [THREADS, 1, 1],
            shared,
            arguments: arguments.clone(),
        };
        return Ok([
            row_sums,
            launch("attention_backward_keys", kv_heads, &tiles.keys, tiles.keys_shared()),
            launch("attention_backward_queries", heads, &tiles.queries, tiles.queries_shared()),
        ]);
    }
    arguments.extend([Argument::U32(head_dim), Argument::F32(scale(shape) as f32)]);
    Ok([
        row_sums,
        plain("plain_backward_keys", dtype, seq, kv_heads, batch, arguments.clone()),
        plain("plain_backward_queries", dtype, seq, heads, batch, arguments),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_those_of_the_source() {
        let source = include_str!("../../cuda/attention.cu");
        let lines = source.lines().filter_map(|line| line.strip_prefix("ATTENTION(")?.strip_suffix(')'));
        let tiles = lines.map(|line| {
            let numbers: Vec<u32> = line.split(", ").map(|number| number.parse().unwrap()).collect();
            let &[width, m, k, mk, q, mq, kq] = &numbers[..] else { panic!("{line}") };
            Tiles { width, forward: Tile::new(m, k), keys: Tile::new(mk, q), queries: Tile::new(mq, kq) }
        });
        assert_eq!(tiles.collect::<Vec<_>>(), TILES);
        // Two blocks share a multiprocessor of compute capability 9.0 (228 KiB, 1 KiB of each block's is the system's).
        assert!(TILES.iter().all(|tiles| 2 * (tiles.most_shared() + 1024) <= 228 * 1024), "two blocks at a time");
    }
}
