//! Hand-computed timelines, and every way in which an order can be wrong.

use super::*;
use crate::schedules::{Request, action, build, looped};

fn two_ranks() -> ComputeOrder {
    ComputeOrder {
        name: "by hand".into(),
        microbatches: 2,
        placement: looped(2, 1),
        actions: vec![
            vec![
                action(Pass::F, 0, 0),
                action(Pass::F, 0, 1),
                action(Pass::B, 0, 0),
                action(Pass::W, 0, 0),
                action(Pass::BW, 0, 1),
            ],
            vec![
                action(Pass::F, 1, 0),
                action(Pass::BW, 1, 0),
                action(Pass::F, 1, 1),
                action(Pass::B, 1, 1),
                action(Pass::W, 1, 1),
            ],
        ],
    }
}

#[test]
fn a_timeline_by_hand() {
    let times = StageTimes { f: vec![2.0, 3.0], b: vec![4.0, 5.0], w: vec![1.0, 2.0], comm: 0.5 };
    let timing = replay(&two_ranks(), &times).unwrap();
    // Rank 1: F0 waits for 2 + 0.5; BW0 ends at 12.5; F1 and B1 follow at once.
    assert_eq!(timing.start[1], [2.5, 5.5, 12.5, 15.5, 20.5]);
    // Rank 0: B0 waits for 12.5 + 0.5; BW1 for the end of rank 1's B (20.5), not of its W.
    assert_eq!(timing.start[0], [0.0, 2.0, 13.0, 17.0, 21.0]);
    assert_eq!(timing.end[0], [2.0, 4.0, 17.0, 18.0, 26.0]);
    assert_eq!(timing.makespan(), 26.0);
    assert_eq!(timing.totals.longest_span, 26.0);
    assert_eq!(timing.totals.work, 14.0 + 20.0);
    assert_eq!(timing.bubble_makespan(), 1.0 - 17.0 / 26.0);
}

#[test]
fn span_and_makespan_differ_for_a_parallelogram() {
    // schedules.md: p = 8, m = 32, unit times: ZB-H2 has no span bubble and 6.8 % makespan bubble.
    let order = build("zb-h2", &Request::new(8, 32)).unwrap();
    let timing = replay(&order, &StageTimes::unit(8)).unwrap();
    assert_eq!(timing.bubble_span(), 0.0);
    assert!((timing.bubble_makespan() - 7.0 / 103.0).abs() < 1e-12);
}

#[test]
fn memory_is_freed_at_b_and_at_w() {
    let memory = StageMemory { until_b: vec![10.0, 7.0], until_w: vec![4.0, 9.0], checkpoint: vec![1.0, 1.0] };
    let curve = memory_curve(&two_ranks(), &memory);
    assert_eq!(curve[0], [10.0, 20.0, 20.0, 14.0, 10.0]);
    // On rank 1, B leaves more than F did.
    assert_eq!(curve[1], [7.0, 7.0, 7.0, 9.0, 9.0]);
    let peaks = peaks(&two_ranks(), &memory);
    assert_eq!(peaks.peak, [20.0, 9.0]);
    assert_eq!(peaks.peak_unsplit, [20.0, 7.0]);
}

#[test]
fn recomputation_holds_checkpoints_until_r() {
    let order = build("1f1b-r", &Request::new(4, 8)).unwrap();
    order.validate().unwrap();
    let memory = StageMemory::microbatch_stages(&order.placement, 4, 0.0);
    let peak = peaks(&order, &memory).peak_unsplit;
    for (i, peak) in peak.iter().enumerate() {
        assert!((peak - (1.0 + (3 - i) as f64 * StageMemory::CHECKPOINT)).abs() < 1e-12, "device {i}: {peak}");
    }
    // R hides in the wait for the gradient: the makespan grows by less than m + p - 1 forwards.
    let timing = replay(&order, &StageTimes::unit(4)).unwrap();
    assert!(timing.makespan() < 11.0 * 4.0, "{}", timing.makespan());
}

#[test]
fn every_wrong_order_has_its_error() {
    let good = two_ranks();
    good.validate().unwrap();
    let broken = |change: &dyn Fn(&mut ComputeOrder)| {
        let mut order = two_ranks();
        change(&mut order);
        order.validate().unwrap_err()
    };
    let missing = broken(&|o| {
        o.actions[0].pop();
    });
    assert_eq!(missing, OrderError::Missing { action: action(Pass::B, 0, 1), device: 0 });
    assert_eq!(missing.to_string(), "0B1 is missing on rank 0 (or a fused BW in its place)");
    assert_eq!(
        broken(&|o| {
            o.actions[0].remove(3);
        }),
        OrderError::Missing { action: action(Pass::W, 0, 0), device: 0 }
    );
    assert_eq!(
        broken(&|o| {
            o.actions[1].remove(2);
        }),
        OrderError::Missing { action: action(Pass::F, 1, 1), device: 1 }
    );
    assert_eq!(
        broken(&|o| o.actions[0].push(action(Pass::F, 0, 0))),
        OrderError::Doubled { action: action(Pass::F, 0, 0), device: 0 }
    );
    assert_eq!(
        broken(&|o| o.actions[0].push(action(Pass::W, 0, 1))),
        OrderError::BothBackwards { action: action(Pass::W, 0, 1), device: 0 }
    );
    assert_eq!(
        broken(&|o| o.actions[0].swap(2, 3)),
        OrderError::Reversed { earlier: action(Pass::B, 0, 0), later: action(Pass::W, 0, 0), device: 0 }
    );
    assert_eq!(
        broken(&|o| o.actions[0].swap(1, 4)),
        OrderError::Reversed { earlier: action(Pass::F, 0, 1), later: action(Pass::BW, 0, 1), device: 0 }
    );
    assert_eq!(
        broken(&|o| o.actions[0].push(action(Pass::F, 1, 0))),
        OrderError::WrongDevice { action: action(Pass::F, 1, 0), device: 0, expected: 1 }
    );
    assert!(matches!(broken(&|o| o.actions[0].push(action(Pass::F, 2, 0))), OrderError::Unknown { .. }));
    assert!(matches!(broken(&|o| o.actions[0].push(action(Pass::F, 0, 2))), OrderError::Unknown { .. }));
    assert!(matches!(broken(&|o| o.placement.copies = 0), OrderError::Copies { .. }));
    assert!(matches!(broken(&|o| o.placement.copies = 3), OrderError::Copies { .. }));
    assert!(matches!(broken(&|o| o.placement.device_of_stage[1] = 2), OrderError::NoSuchDevice { .. }));
    // Two copies of one stage each: both compute microbatch 0.
    assert_eq!(broken(&|o| o.placement.copies = 2), OrderError::TwoCopies { action: action(Pass::F, 1, 0), device: 1 });
}

#[test]
fn a_deadlock_names_the_actions() {
    let mut order = two_ranks();
    order.actions[0].swap(1, 3); // B0 and W0 change places with F1: 0F0 0W0 ...
    order.actions[0] = vec![
        action(Pass::F, 0, 0),
        action(Pass::B, 0, 0),
        action(Pass::W, 0, 0),
        action(Pass::F, 0, 1),
        action(Pass::BW, 0, 1),
    ];
    order.actions[1] = vec![
        action(Pass::F, 1, 0),
        action(Pass::F, 1, 1),
        action(Pass::BW, 1, 0),
        action(Pass::B, 1, 1),
        action(Pass::W, 1, 1),
    ];
    let error = order.validate().unwrap_err();
    assert_eq!(error.to_string(), "deadlock: rank 0 at 0B0 needs 1BW0 of rank 1; rank 1 at 1F1 needs 0F1 of rank 0");
}

#[test]
fn times_have_to_fit() {
    let order = two_ranks();
    let mut times = StageTimes::unit(2);
    times.b.pop();
    assert!(matches!(replay(&order, &times), Err(OrderError::TimesLength { what: "B", have: 1, stages: 2 })));
    times.b.push(f64::NAN);
    assert!(matches!(replay(&order, &times), Err(OrderError::BadTime { what: "B", .. })));
    let late = StageTimes { comm: -1.0, ..StageTimes::unit(2) };
    assert!(matches!(replay(&order, &late), Err(OrderError::BadTime { what: "transfer", .. })));
}

#[test]
fn a_replayer_forgets_the_last_run() {
    let mut replayer = Replayer::default();
    let big = build("zb-h1", &Request::new(8, 20)).unwrap();
    let small = two_ranks();
    let first = replayer.run(&small, &StageTimes::unit(2)).unwrap();
    replayer.run(&big, &StageTimes::unit(8)).unwrap();
    assert_eq!(replayer.run(&small, &StageTimes::unit(2)).unwrap(), first);
}
