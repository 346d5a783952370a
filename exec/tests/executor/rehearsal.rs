//! Rehearsals keep the pace of their cost model: makespans are those worked out by hand, however many ranks share the few
//! cores of this machine.

use crate::toy::{Layout, program};
use paceline_exec::{Rehearsal, rehearse};
use paceline_sim::cost::{CostModel, Exchange, Pauses, Round};
use paceline_sim::engine::simulate;
use paceline_sim::program::{Group, Op, OpKind, Pass, Program};
use paceline_sim::trace::{Origin, Trace, WaitReason};
use paceline_sim::units::{Nanos, RankId};
use smallvec::{SmallVec, smallvec};
use std::sync::atomic::AtomicBool;

const MS: u64 = 1_000_000;

/// Given times: forward, backward, wire of a message, work of a message, one round of a collective.
struct Given {
    f: u64,
    bw: u64,
    wire: u64,
    work: u64,
    round: u64,
}

/// Given times, and a pause of this before each op that had to wait and each copy that finds its device idle.
struct Pausing(Given, u64);

impl CostModel for Pausing {
    fn compute(&self, program: &Program, rank: RankId, op: &Op) -> Nanos {
        self.0.compute(program, rank, op)
    }

    fn transfer(&self, program: &Program, from: RankId, to: RankId, bytes: u64) -> Round {
        Round { late: Nanos(self.1), ..self.0.transfer(program, from, to, bytes) }
    }

    fn collective(&self, program: &Program, exchange: Exchange, group: &Group) -> SmallVec<[Round; 2]> {
        self.0.collective(program, exchange, group)
    }

    fn pauses(&self, _: &Program, _: RankId) -> Pauses {
        Pauses { turn: Nanos(self.1), wake: Nanos(self.1) }
    }
}

impl CostModel for Given {
    fn compute(&self, _: &Program, _: RankId, op: &Op) -> Nanos {
        Nanos(match op.kind {
            OpKind::Compute { pass: Pass::F, .. } => self.f,
            OpKind::Compute { pass: Pass::BW, .. } => self.bw,
            _ => 0,
        })
    }

    fn transfer(&self, _: &Program, _: RankId, _: RankId, _: u64) -> Round {
        Round { wire: Nanos(self.wire), work: Nanos(self.work), ..Round::default() }
    }

    fn collective(&self, _: &Program, exchange: Exchange, _: &Group) -> SmallVec<[Round; 2]> {
        // The norm is free: what is timed is the gradients.
        if exchange.bytes == 8 {
            return SmallVec::new();
        }
        let round = Round { wire: Nanos(self.round), ..Round::default() };
        smallvec![round, round]
    }
}

/// Rehearses a step and holds it against the milliseconds worked out by hand. Starts are exact: they follow from causes, not
/// from wake-ups. The clock may only be late.
fn assert_pace(layout: &Layout, costs: &Given, milliseconds: u64) -> Rehearsal {
    let rehearsal = rehearse(&program(layout), costs, 1, None).unwrap();
    let last = rehearsal.trace.ranks.iter().map(|rank| rank.events.last().unwrap().start).max().unwrap();
    assert_eq!(last, Nanos(milliseconds * MS));
    assert_eq!(rehearsal.trace.origin, Origin::Measured);
    assert_eq!(rehearsal.trace.makespan, Nanos::from_seconds(rehearsal.iteration_seconds[0]));
    assert!(rehearsal.trace.makespan >= last, "the step ended before its last op began");
    rehearsal
}

#[test]
fn one_f_one_b_with_sixteen_ranks() {
    let layout = Layout { pipeline: 16, stages: 16, devices: 16, microbatches: 20, gpipe: false, ..Layout::SINGLE };
    // (m + p - 1) (f + bw) without transfer times.
    let costs = Given { f: 2 * MS, bw: 4 * MS, wire: 0, work: 0, round: 0 };
    assert_pace(&layout, &costs, 35 * 6);
}

#[test]
fn the_wire_lengthens_every_hop_of_a_single_microbatch() {
    let layout = Layout { pipeline: 4, stages: 4, devices: 4, microbatches: 1, ..Layout::SINGLE };
    // 4 f + 4 bw + 6 hops.
    let costs = Given { f: 10 * MS, bw: 20 * MS, wire: 15 * MS, work: 0, round: 0 };
    assert_pace(&layout, &costs, 40 + 80 + 90);
}

#[test]
fn who_waits_begins_after_a_pause() {
    // As without pauses, and two on each way of a single microbatch, before the copy and after it: three stages forward, three backward.
    let layout = Layout { pipeline: 4, stages: 4, devices: 4, microbatches: 1, ..Layout::SINGLE };
    let costs = Pausing(Given { f: 10 * MS, bw: 20 * MS, wire: 0, work: 15 * MS, round: 0 }, MS);
    let program = program(&layout);
    let rehearsal = rehearse(&program, &costs, 1, None).unwrap();
    let starts = |trace: &Trace| {
        trace.ranks.iter().flat_map(|rank| &rank.events).map(|event| (event.op, event.start)).collect::<Vec<_>>()
    };
    let simulated = simulate(&program, &costs).unwrap();
    assert_eq!(starts(&rehearsal.trace), starts(&simulated));
    let last = simulated.ranks[0]
        .events
        .iter()
        .filter(|event| matches!(event.kind, OpKind::Compute { pass: Pass::BW, .. }))
        .map(|e| e.end)
        .max();
    assert_eq!(last, Some(Nanos((40 + 80 + 90 + 12) * MS)));
}

#[test]
fn copies_take_the_receivers_device() {
    // GPipe on two ranks, m = 4, f = 10, bw = 20, copy = 5. The receiver alternates copy and forward (15 each) while the
    // sender runs ahead: its last forward ends at 10 + 4 * 15 = 70. Four backwards without pause (20 each, sent at 90,
    // 110, 130, 150). The first rank copies (5) and runs (20) at the pace of 25: 90 + 4 * 25 = 190.
    let layout = Layout { pipeline: 2, stages: 2, devices: 2, microbatches: 4, ..Layout::SINGLE };
    let costs = Given { f: 10 * MS, bw: 20 * MS, wire: 0, work: 5 * MS, round: 0 };
    assert_pace(&layout, &costs, 190);
}

#[test]
fn ranks_that_share_a_device_take_turns() {
    // Four ranks on one device: all the work in a row, whatever the order.
    let layout = Layout { pipeline: 4, stages: 4, devices: 1, microbatches: 3, gpipe: false, ..Layout::SINGLE };
    let costs = Given { f: 5 * MS, bw: 10 * MS, wire: 0, work: MS, round: 0 };
    assert_pace(&layout, &costs, 4 * 3 * 15 + 6 * 3);
}

#[test]
fn a_collective_waits_for_its_last_member_and_for_its_rounds() {
    // Replicas of one stage: 2 * (10 + 20), then two rounds of 30.
    let layout = Layout { data: 3, stages: 1, microbatches: 2, devices: 3, ..Layout::SINGLE };
    let costs = Given { f: 10 * MS, bw: 20 * MS, wire: 0, work: 0, round: 30 * MS };
    let rehearsal = assert_pace(&layout, &costs, 60 + 60);
    for rank in &rehearsal.trace.ranks {
        let norm = rank.events.iter().find(|event| event.kind == OpKind::GradientNorm).unwrap();
        let reduction = norm.op.index() - 1;
        assert_eq!(rank.events[reduction].start, norm.start - Nanos(60 * MS));
        assert_eq!(norm.wait, Some(WaitReason::Op(rank.events[reduction].op)));
    }
}

#[test]
fn a_rehearsal_stops_after_the_step_and_counts_bytes_it_does_not_hold() {
    let layout = Layout { pipeline: 2, stages: 2, devices: 2, microbatches: 2, ..Layout::SINGLE };
    let costs = Given { f: MS, bw: MS, wire: 0, work: 0, round: 0 };
    let mut huge = program(&layout);
    for rank in &mut huge.ranks {
        rank.buffers.iter_mut().for_each(|buffer| buffer.bytes <<= 40);
    }
    let rehearsal = rehearse(&huge, &costs, 100, Some(&AtomicBool::new(true))).unwrap();
    assert_eq!(rehearsal.iteration_seconds.len(), 1);
    assert!(rehearsal.memory.iter().all(|rank| rank.peak_bytes > 1 << 50));
    assert!(rehearse(&huge, &costs, 0, None).unwrap_err().to_string().contains("steps = 0"));
}

#[test]
fn ranks_that_wait_for_each_other_are_an_error() {
    // The last rank's receive comes after all it waits for: swap the first receive of rank 1 behind its forward.
    let layout = Layout { pipeline: 2, stages: 2, devices: 2, microbatches: 2, ..Layout::SINGLE };
    let mut deadlock = program(&layout);
    let ops = &mut deadlock.ranks[1].ops;
    assert!(matches!((ops[0].kind, ops[1].kind), (OpKind::Recv { .. }, OpKind::Compute { .. })));
    ops.swap(0, 1);
    ops[0].waits = smallvec![paceline_sim::units::OpId(1)];
    let costs = Given { f: MS, bw: MS, wire: 0, work: 0, round: 0 };
    let error = rehearse(&deadlock, &costs, 1, None).unwrap_err().to_string();
    assert!(error.contains("the ranks wait for each other") && error.contains("r0 op1 Send"), "{error}");
}
