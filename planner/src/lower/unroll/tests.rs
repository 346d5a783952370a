//! Steps without a barrier: they pass the check, hold what they must, and take the time that schedules promise.

use super::super::*;
use super::*;
use crate::schedules::{self, Request, SCHEDULES};
use paceline_sim::cost::FixedTimes;
use paceline_sim::engine::simulate;
use paceline_sim::memory::walk;
use paceline_sim::program::Unit;
use paceline_sim::units::Nanos;

const STAGE: AbstractStage = AbstractStage { parameters: 1000, message: 64, checkpoint: 2, until_b: 340, until_w: 320 };

fn step(order: &ComputeOrder, data: u32, states: paceline_sim::partition::StatePartition) -> Program {
    let stages = order.placement.stages();
    let devices = data * order.actions.len() as u32;
    let blueprint = Blueprint {
        order,
        substance: Substance::Abstract(vec![STAGE; stages]),
        stages: vec![Stage { units: vec![Unit { layers: vec![] }] }; stages],
        data,
        states: states.into(),
        devices: (0..devices).map(|n| Device { name: format!("gpu:{n}"), node: n / 8 }).collect(),
        form: Form::Full,
    };
    lower(&blueprint).unwrap()
}

const WHOLE: paceline_sim::partition::StatePartition = paceline_sim::partition::StatePartition::NONE;

#[test]
fn every_schedule_runs_on_without_a_barrier() {
    for (p, m, data) in [(1, 3, 2), (2, 1, 1), (2, 4, 2), (3, 6, 1), (4, 4, 1), (4, 8, 2), (8, 16, 1)] {
        for schedule in SCHEDULES {
            let Ok(order) = schedules::build(schedule.name, &Request::new(p, m)) else { continue };
            let one = step(&order, data, WHOLE);
            let three = unroll(one.clone(), 3).unwrap();
            check(&three).unwrap_or_else(|error| panic!("{} p={p} m={m}: {error}", schedule.name));
            assert_eq!((one.steps(), three.steps()), (1, 3));
            let costs = FixedTimes {
                optimizer: Nanos(5),
                collective: Nanos(3),
                ..FixedTimes::uniform(Nanos(100), Nanos(120), Nanos(80), Nanos(9))
            };
            let [barrier, free] = [&one, &three].map(|program| simulate(program, &costs).unwrap().makespan.0);
            // What validations cost at most: each unit's update a second time, after each of two steps.
            let validated = 2 * 5 * order.placement.stages() as u64;
            assert!(free <= 3 * barrier + validated, "{} p={p} m={m}: {free} {barrier}", schedule.name);
            for (number, rank) in (0..).zip(&three.ranks) {
                let count = |is: fn(&OpKind) -> bool| rank.ops.iter().filter(|op| is(&op.kind)).count();
                let units = one.ranks[number as usize].stages.len();
                assert_eq!(count(|kind| matches!(kind, OpKind::OptimizerAhead { .. })), 2 * units);
                assert_eq!(count(|kind| matches!(kind, OpKind::Validate { .. })), 2 * units);
                assert_eq!(count(|kind| matches!(kind, OpKind::Optimizer { .. })), units);
                // The kept weights are the only thing that is held besides.
                let [alone, on] = [&one, &three].map(|program| walk(program, RankId(number)).peak_bytes);
                assert!((alone..=alone + 1000 * units as u64 + 8).contains(&on), "{}: {alone} {on}", schedule.name);
            }
        }
    }
}

/// What is before a rank's validations can happen while all others stop at theirs: the program without everything behind
/// them, and without the messages that nobody takes any more, runs to its end.
#[test]
fn a_failed_validation_leaves_nobody_waiting() {
    for (p, m) in [(2, 2), (4, 8), (5, 10), (8, 8)] {
        for schedule in SCHEDULES {
            let Ok(order) = schedules::build(schedule.name, &Request::new(p, m)) else { continue };
            let mut program = unroll(step(&order, 1, WHOLE), 2).unwrap();
            let mut forwards = 0;
            for rank in &mut program.ranks {
                let last = rank.ops.iter().rposition(|op| matches!(op.kind, OpKind::Validate { .. })).unwrap();
                rank.ops.truncate(last + 1);
                let early = |op: &&Op| matches!(op.kind, OpKind::Compute { microbatch, .. } if microbatch.0 >= m);
                forwards += rank.ops.iter().filter(early).count();
            }
            let sent: HashSet<(usize, Message)> = messages(&program, |kind| match *kind {
                OpKind::Send { peer, message, .. } => Some((peer.index(), message)),
                _ => None,
            });
            let received: HashSet<(usize, Message)> = (0..)
                .zip(&program.ranks)
                .flat_map(|(number, rank)| {
                    rank.ops.iter().filter_map(move |op| match op.kind {
                        OpKind::Recv { message, .. } => Some((number, message)),
                        _ => None,
                    })
                })
                .collect();
            for (number, rank) in program.ranks.iter_mut().enumerate() {
                for op in &mut rank.ops {
                    let met = match op.kind {
                        OpKind::Send { peer, message, .. } => received.contains(&(peer.index(), message)),
                        OpKind::Recv { message, .. } => sent.contains(&(number, message)),
                        _ => true,
                    };
                    if !met {
                        // Whoever waits for it would wait for ever: such an op must not be here.
                        (op.kind, op.stream) = (OpKind::Join, Stream::COMPUTE);
                        op.waits.clear();
                        op.uses.clear();
                    }
                }
                let dropped: Vec<bool> = rank.ops.iter().map(|op| op.kind == OpKind::Join).collect();
                for op in
                    rank.ops.iter().filter(|op| matches!(op.kind, OpKind::Compute { .. } | OpKind::Validate { .. }))
                {
                    assert!(op.waits.iter().all(|wait| !dropped[wait.index()]), "{} p={p}: {op:?}", schedule.name);
                }
            }
            simulate(&program, &FixedTimes::default()).unwrap_or_else(|error| panic!("{}: {error}", schedule.name));
            assert!(forwards >= p as usize, "{} p={p} m={m}: {forwards} forwards ahead", schedule.name);
        }
    }
}

fn messages<T: std::hash::Hash + Eq>(program: &Program, of: fn(&OpKind) -> Option<T>) -> HashSet<T> {
    program.ranks.iter().flat_map(|rank| &rank.ops).filter_map(|op| of(&op.kind)).collect()
}

/// Nanoseconds that one more step takes, with the barrier and without.
fn step_times(name: &str, p: u32, m: u32, costs: &FixedTimes) -> [u64; 2] {
    let order = schedules::build(name, &Request::new(p, m)).unwrap();
    let one = step(&order, 1, WHOLE);
    let makespan = |program: &Program| simulate(program, costs).unwrap().makespan.0;
    let [five, four] = [5, 4].map(|steps| makespan(&unroll(one.clone(), steps).unwrap()));
    [makespan(&one), five - four]
}

#[test]
fn zero_bubble_schedules_are_without_bubbles_only_without_a_barrier() {
    let unit = FixedTimes::uniform(Nanos(1), Nanos(1), Nanos(1), Nanos(0));
    // Work of a step is 3 m (6 m chunk passes with two chunks); the barrier adds the way to the last rank.
    assert_eq!(step_times("zb-h2", 8, 32, &unit), [96 + 7, 96]);
    assert_eq!(step_times("zb-h2", 4, 12, &unit), [36 + 3, 36]);
    assert_eq!(step_times("zb-v", 8, 32, &unit), [192 + 7, 192]);
    assert_eq!(step_times("v-zb", 8, 32, &unit), [192 + 7, 192]);
    // Where the first rank works from the first pass to the last, there is nothing to gain.
    for (name, both) in [("1f1b", 117), ("zb-h1", 103), ("v-half", 209)] {
        assert_eq!(step_times(name, 8, 32, &unit), [both, both], "{name}");
    }
    // The sum of the norm and the optimizer of the last rank no longer stand between two steps either,
    // while the last rank has its update and its first forward pass to do; the validation costs a second update.
    let norm = |time| FixedTimes { collective: Nanos(time), optimizer: Nanos(1), ..unit.clone() };
    assert_eq!(step_times("zb-h2", 8, 32, &norm(2)), [96 + 7 + 2 + 1, 96 + 2]);
    assert_eq!(step_times("zb-h2", 8, 32, &norm(4)), [96 + 7 + 4 + 1, 96 + 2 + 2]);
}

#[test]
fn partitioned_states_need_the_barrier() {
    let order = schedules::build("zb-h1", &Request::new(2, 4)).unwrap();
    let program = step(&order, 2, paceline_sim::partition::StatePartition::ZERO1);
    assert_eq!(unroll(program, 4), Err(LowerError::Barrier { steps: 4 }));
}
