//! No order beats a bound, and the bounds are reached where the best order is known.

use super::*;
use crate::replay::replay;
use crate::schedules::{Request, SCHEDULES, ScheduleError, build, looped, v_shape};
use proptest::prelude::*;

/// Makespan and bound of a named schedule, the limit being what the schedule itself takes.
fn check(name: &str, request: &Request, times: &dyn Fn(usize) -> StageTimes, freed_at_b: f64) {
    let order = match build(name, request) {
        Ok(order) => order,
        Err(ScheduleError::NotDivisible { .. } | ScheduleError::OddDevices { .. }) => return,
        Err(other) => panic!("{name}: {other}"),
    };
    let times = times(order.placement.stages());
    let memory = StageMemory::microbatch_stages(&order.placement, request.devices as usize, freed_at_b);
    let recomputes = order.actions.iter().flatten().any(|action| action.pass == Pass::R);
    let peaks = peaks(&order, &memory).peak;
    let limits = (!recomputes).then_some(peaks.as_slice());
    let makespan = replay(&order, &times).unwrap().makespan();
    let bound = lower_bound(&order.placement, request.microbatches, &times, &memory, limits);
    assert!(
        bound.makespan <= makespan * (1.0 + 1e-9),
        "{name} p={} m={}: {makespan} beats {bound:?}",
        request.devices,
        request.microbatches
    );
    assert!(lower_bound(&order.placement, request.microbatches, &times, &memory, None).makespan <= bound.makespan);
    if !recomputes {
        for (least, peak) in least_peaks(&order.placement, &memory).iter().zip(&peaks) {
            assert!(least <= peak, "{name}: {least} is not the least, {peak} suffices");
        }
    }
}

#[test]
fn no_named_schedule_beats_the_bound() {
    for schedule in SCHEDULES {
        for p in [2, 3, 4, 5, 8, 13, 16, 32].into_iter().filter(|p| schedule.fixed || *p <= 5) {
            for m in [1, 2, p - 1, p, 2 * p, 3 * p + 1, 4 * p] {
                let request = Request::new(p, m.max(1));
                check(schedule.name, &request, &StageTimes::unit, 0.0);
                check(schedule.name, &request, &|s| StageTimes::uniform(s, 18.5, 18.1, 9.3, 0.6), 2.0 / 34.0);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn no_schedule_beats_the_bound_with_uneven_stages(
        which in 0..SCHEDULES.len(),
        p in 1u32..9,
        m in 1u32..20,
        seeds in prop::collection::vec(1u32..30, 48),
        comm in 0u32..6,
        freed_at_b in 0.0f64..1.0,
    ) {
        let times = |stages: usize| {
            let pick = |from: usize| (0..stages).map(|s| f64::from(seeds[(from + s) % seeds.len()])).collect();
            StageTimes { f: pick(0), b: pick(16), w: pick(32), comm: f64::from(comm) }
        };
        check(SCHEDULES[which].name, &Request::new(p, m), &times, freed_at_b);
    }
}

/// The bound of a V placement in unit time with room for `chunks` stage activations per device.
fn v_bound(p: u32, m: u32, chunks: u32) -> LowerBound {
    let placement = v_shape(p);
    let memory = StageMemory::microbatch_stages(&placement, p as usize, 0.0);
    let limits = vec![f64::from(chunks) / 2.0; p as usize];
    lower_bound(&placement, m, &StageTimes::unit(2 * p as usize), &memory, Some(&limits))
}

#[test]
fn v_schedules_are_optimal_in_unit_time() {
    // The last device waits 3p-1 slots for its first B with k forwards to do, and has 3p slots after its last F with work for
    // 2k: 6p-1-3k idle slots. V-Min and V-Half reach it; V-ZB only waits for its first F.
    for p in 2..=32u32 {
        for (name, chunks) in [("v-min", 2 * ((p + 4) / 3)), ("v-half", 2 * ((p + 2) / 2)), ("v-zb", 2 * p)] {
            let m = 3 * p;
            let makespan = replay(&build(name, &Request::new(p, m)).unwrap(), &StageTimes::unit(2 * p as usize));
            let makespan = makespan.unwrap().makespan();
            let bound = v_bound(p, m, chunks.min(2 * p));
            let idle = (6 * p - 1).saturating_sub(3 * chunks.min(2 * p)).max(p - 1);
            assert!(bound.makespan >= f64::from(6 * m + idle), "p={p} {name}: {bound:?}");
            assert!(makespan <= bound.makespan + 0.5, "{name} p={p}: {makespan}, {bound:?}");
        }
    }
}

#[test]
fn hand_computed_bounds() {
    let memory = |placement: &Placement, p| StageMemory::microbatch_stages(placement, p, 0.0);
    // One stage per device, one microbatch: there and back, and one W.
    let line = looped(4, 1);
    let times = StageTimes::uniform(4, 2.0, 3.0, 1.0, 0.5);
    let bound = lower_bound(&line, 1, &times, &memory(&line, 4), None);
    assert_eq!((bound.makespan, bound.reason), (4.0 * 5.0 + 6.0 * 0.5 + 1.0, Reason::CriticalPath));
    // Many microbatches without a limit: the last device starts after three forwards, and three backwards and a W follow its last B;
    // W of other microbatches can run meanwhile.
    let bound = lower_bound(&line, 40, &times, &memory(&line, 4), None);
    assert_eq!((bound.makespan, bound.reason), (40.0 * 6.0 + 3.0 * 2.5, Reason::Device(3)));
    // Room for one microbatch: they follow each other, the first device between F and B waits for the rest.
    let bound = lower_bound(&line, 40, &times, &memory(&line, 4), Some(&[1.0; 4]));
    assert_eq!((bound.makespan, bound.reason), (40.0 * (4.0 * 5.0 + 6.0 * 0.5 + 1.0), Reason::Memory(0)));
    // Room for two and a half is room for two.
    let two = lower_bound(&line, 40, &times, &memory(&line, 4), Some(&[2.5; 4]));
    assert_eq!(two, lower_bound(&line, 40, &times, &memory(&line, 4), Some(&[2.0; 4])));
    assert_eq!(least_peaks(&v_shape(3), &memory(&v_shape(3), 3)), [1.0; 3]);
    assert_eq!(bound.gap(bound.makespan * 1.5), 0.5);
}
