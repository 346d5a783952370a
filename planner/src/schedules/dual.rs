//! DualPipe and DualPipeV (DeepSeek-V3, arXiv 2412.19437, section 3.2.1): every device works on two streams of
//! microbatches, one that comes from its own end of the pipeline and one that comes from the far end, so that a forward
//! of one can overlap the backward of the other. Here the overlapped pair is a forward followed by a fused backward.

use super::{action, bidirectional, v_shape};
use crate::order::{Action, ComputeOrder};
use paceline_sim::program::Pass;

/// Two copies of the model run from opposite ends; `p` is even. The first half of the microbatches takes copy 0, the rest
/// copy 1.
pub fn dualpipe(p: u32, m: u32) -> ComputeOrder {
    let half = p / 2;
    // The pattern needs p microbatches from each end; with fewer, the absent ones are left out.
    let from_front = m.div_ceil(2);
    let per_end = from_front.max(p);
    let list = |device: u32| {
        let depth = device.min(p - 1 - device);
        let far = device >= half;
        let placed = streams(half, depth, per_end).into_iter().filter_map(|(pass, stream, n)| {
            // Stream 0 starts at this device's own end: copy 1 in the second half of the devices.
            let copy = u32::from((stream == 1) != far);
            let stage = if copy == 0 { device } else { p + (p - 1 - device) };
            let (count, offset) = if copy == 0 { (from_front, 0) } else { (m - from_front, from_front) };
            (n < count).then(|| action(pass, stage, offset + n))
        });
        placed.collect()
    };
    ComputeOrder {
        name: String::new(),
        microbatches: m,
        placement: bidirectional(p),
        actions: (0..p).map(list).collect(),
    }
}

/// One copy in V placement: chunk 0 of a device is stream 0, chunk 1 is stream 1.
pub fn dualpipe_v(p: u32, m: u32) -> ComputeOrder {
    let padded = m.max(2 * p);
    let list = |device: u32| -> Vec<Action> {
        let placed = streams(p, device, padded).into_iter();
        placed.map(|(pass, stream, n)| action(pass, if stream == 0 { device } else { 2 * p - 1 - device }, n)).collect()
    };
    ComputeOrder {
        name: String::new(),
        microbatches: padded,
        placement: v_shape(p),
        actions: (0..p).map(list).collect(),
    }
    .truncated(m)
}

/// The passes of a device that is `depth` devices away from the end where stream 0 enters, of `reach` devices in a half
/// pipeline, as (pass, stream, number within the stream). `count >= 2 * reach` microbatches per stream.
fn streams(reach: u32, depth: u32, count: u32) -> Vec<(Pass, usize, u32)> {
    let to_middle = reach - 1 - depth;
    let mut list = Device::default();
    // Warm-up: stream 0 alone, then both, then stream 1 with split backwards whose W fills the wait.
    for _ in 0..2 * to_middle {
        list.forward(0);
    }
    for _ in 0..=depth {
        list.forward(0);
        list.forward(1);
    }
    for _ in 0..to_middle {
        list.split_backward(1);
        list.weights();
        list.forward(1);
    }
    // Steady: a forward of one stream with a backward of the other.
    for _ in 0..count + depth + 1 - 2 * reach {
        list.forward(0);
        list.fused_backward(1);
        list.forward(1);
        list.fused_backward(0);
    }
    // Cool-down: in the second half of the last backwards W is kept back, to fill the waits of those that remain.
    for _ in 0..to_middle {
        list.fused_backward(1);
        list.forward(1);
        list.fused_backward(0);
    }
    let pairs = depth + 1;
    let mut split = false;
    for n in 0..pairs {
        for stream in [1, 0] {
            split |= n == pairs / 2 && (stream == 0 || depth % 2 == 1);
            if split {
                list.split_backward(stream);
            } else {
                list.fused_backward(stream);
            }
        }
    }
    for _ in 0..to_middle {
        list.weights();
        list.split_backward(0);
    }
    while !list.waiting.is_empty() {
        list.weights();
    }
    list.passes
}

/// The list of a device while it is written.
#[derive(Default)]
struct Device {
    passes: Vec<(Pass, usize, u32)>,
    forwards: [u32; 2],
    backwards: [u32; 2],
    /// Split backwards whose W is still to come, oldest first.
    waiting: std::collections::VecDeque<(usize, u32)>,
}

impl Device {
    fn forward(&mut self, stream: usize) {
        self.passes.push((Pass::F, stream, self.forwards[stream]));
        self.forwards[stream] += 1;
    }

    fn backward(&mut self, pass: Pass, stream: usize) {
        self.passes.push((pass, stream, self.backwards[stream]));
        self.backwards[stream] += 1;
    }

    fn fused_backward(&mut self, stream: usize) {
        self.backward(Pass::BW, stream);
    }

    fn split_backward(&mut self, stream: usize) {
        self.waiting.push_back((stream, self.backwards[stream]));
        self.backward(Pass::B, stream);
    }

    fn weights(&mut self) {
        if let Some((stream, n)) = self.waiting.pop_front() {
            self.passes.push((Pass::W, stream, n));
        }
    }
}
