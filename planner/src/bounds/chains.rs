//! The way of one microbatch through the stages: how early each pass can start, and how much must follow it.

use crate::order::Placement;
use crate::replay::StageTimes;

/// Heads (the earliest start) and tails (the least time from the end of a pass to the end of everything), by stage.
pub(super) struct Chains {
    /// Earliest start of F.
    pub head_f: Vec<f64>,
    /// Earliest start of B.
    pub head_b: Vec<f64>,
    /// From the end of F to the end.
    pub tail_f: Vec<f64>,
    /// From the end of B to the end.
    pub tail_b: Vec<f64>,
    shortest: f64,
}

impl Chains {
    pub fn new(placement: &Placement, times: &StageTimes) -> Chains {
        let stages = placement.stages();
        let per_copy = placement.stages_per_copy();
        let transfer = |a: usize, b: usize| {
            if placement.device_of_stage[a] == placement.device_of_stage[b] { 0.0 } else { times.comm }
        };
        let mut chains = Chains {
            head_f: vec![0.0; stages],
            head_b: vec![0.0; stages],
            tail_f: vec![0.0; stages],
            tail_b: vec![0.0; stages],
            shortest: f64::INFINITY,
        };
        for copy in 0..placement.copies as usize {
            let (first, last) = (copy * per_copy, (copy + 1) * per_copy - 1);
            for s in first + 1..=last {
                chains.head_f[s] = chains.head_f[s - 1] + times.f[s - 1] + transfer(s - 1, s);
            }
            chains.head_b[last] = chains.head_f[last] + times.f[last];
            for s in (first..last).rev() {
                chains.head_b[s] = chains.head_b[s + 1] + times.b[s + 1] + transfer(s + 1, s);
            }
            // After B come its W, and the B of the stage before with all that follows.
            chains.tail_b[first] = times.w[first];
            for s in first + 1..=last {
                let before = transfer(s, s - 1) + times.b[s - 1] + chains.tail_b[s - 1];
                chains.tail_b[s] = before.max(times.w[s]);
            }
            chains.tail_f[last] = times.b[last] + chains.tail_b[last];
            for s in (first..last).rev() {
                chains.tail_f[s] = transfer(s, s + 1) + times.f[s + 1] + chains.tail_f[s + 1];
            }
            chains.shortest = chains.shortest.min(times.f[first] + chains.tail_f[first]);
        }
        chains
    }

    /// The least time from the first F of a microbatch to its last W; over copies, the quicker one.
    pub fn shortest_way(&self) -> f64 {
        self.shortest
    }
}
