//! Turns on a device that ranks share: who could go on first computes first, whichever thread the system lets run.

use crate::heap::Heap;
use crate::toy::{Layout, Toy, program};
use crate::training::{data, settings};
use paceline_exec::{Silent, run_passes};
use paceline_sim::program::{OpKind, Pass};

/// Forward passes wait for nothing, so every rank asks for its next turn as soon as it has had one: they go round, from the first on.
#[test]
fn ranks_that_never_wait_take_turns_in_order() {
    let layout = Layout { data: 4, pipeline: 1, devices: 1, microbatches: 2, gpipe: true, ..Layout::SINGLE };
    let program = program(&layout);
    let report = run_passes(&program, &Toy::new(&layout), &Heap, &settings(5), &data(), &mut Silent).unwrap();
    let mut turns: Vec<(u64, usize)> = Vec::new();
    for (rank, traced) in report.trace.ranks.iter().enumerate() {
        let forward = |kind: &OpKind| matches!(kind, OpKind::Compute { pass: Pass::F, .. });
        turns.extend(traced.events.iter().filter(|event| forward(&event.kind)).map(|event| (event.start.0, rank)));
    }
    turns.sort_unstable();
    let each = turns.len() / 4;
    assert_eq!(each, 2 * usize::from(layout.stages));
    let ranks: Vec<usize> = turns.into_iter().map(|(_, rank)| rank).collect();
    let expected: Vec<usize> = (0..4).cycle().take(4 * each).collect();
    assert_eq!(ranks, expected);
}
