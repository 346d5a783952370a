//! Several chunks per device in loop placement: chunk `k` of device `i` is stage `k * p + i`.

use super::{Request, ScheduleError, action, looped};
use crate::order::{Action, ComputeOrder};
use paceline_sim::program::Pass;

/// Interleaved 1F1B as in Megatron (arXiv 2104.04473, section 2.2): chunks advance in groups of `p` microbatches; device `i`
/// runs `2(p-1-i) + (v-1)p` chunk forwards ahead. Bubble `(p-1)(F+B+W)/v` with F, B, W of a whole device; peak on device 0
/// `p(1 + (p-1)/(pv))` microbatch-stages.
pub fn depth_first(request: &Request, chunks: u32) -> Result<ComputeOrder, ScheduleError> {
    let (p, m) = (request.devices, request.microbatches);
    if !m.is_multiple_of(p) {
        return Err(ScheduleError::NotDivisible { schedule: "interleaved", microbatches: m, devices: p });
    }
    let total = m * chunks;
    // The n-th chunk pass of a device in group order, chunks ascending.
    let nth = |n: u32| ((n % (p * chunks)) / p, n / (p * chunks) * p + n % p);
    let list = |i: u32| {
        let forward = |n: u32| {
            let (chunk, microbatch) = nth(n);
            action(Pass::F, chunk * p + i, microbatch)
        };
        let backward = |n: u32| {
            let (chunk, microbatch) = nth(n);
            action(Pass::BW, (chunks - 1 - chunk) * p + i, microbatch)
        };
        let ahead = (2 * (p - 1 - i) + (chunks - 1) * p).min(total);
        let mut list: Vec<Action> = (0..ahead).map(forward).collect();
        for n in 0..total {
            if ahead + n < total {
                list.push(forward(ahead + n));
            }
            list.push(backward(n));
        }
        list
    };
    Ok(ComputeOrder {
        name: String::new(),
        microbatches: m,
        placement: looped(p, chunks),
        actions: (0..p).map(list).collect(),
    })
}

/// Breadth first (looped BFS, arXiv 2211.05953): every microbatch through one local stage before the next stage, so that
/// sharded parameters are gathered once per stage and step. Peak `m` on every device.
pub fn breadth_first(p: u32, m: u32, chunks: u32) -> ComputeOrder {
    let list = |i: u32| {
        let forward = (0..chunks).flat_map(|k| (0..m).map(move |b| action(Pass::F, k * p + i, b)));
        let backward = (0..chunks).rev().flat_map(|k| (0..m).map(move |b| action(Pass::BW, k * p + i, b)));
        forward.chain(backward).collect()
    };
    ComputeOrder {
        name: String::new(),
        microbatches: m,
        placement: looped(p, chunks),
        actions: (0..p).map(list).collect(),
    }
}
