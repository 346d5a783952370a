//! Closed forms of every named schedule over many sizes, and the published bubble table.

use super::*;
use crate::replay::{peaks, replay};

const DEVICES: std::ops::RangeInclusive<u32> = 1..=32;

/// Microbatches from 1 to 4p: all of them for small p, else the corners.
fn microbatches(p: u32) -> Vec<u32> {
    if p <= 5 {
        return (1..=4 * p).collect();
    }
    let mut list = vec![1, 2, p / 2, p - 1, p, p + 1, 2 * p - 1, 2 * p, 3 * p + 1, 4 * p];
    list.dedup();
    list
}

#[test]
fn every_schedule_is_valid_at_every_size() {
    for schedule in SCHEDULES {
        // Generators do far more than listing; their own tests have the large sizes.
        for p in DEVICES.filter(|p| schedule.fixed || *p <= 6) {
            for m in microbatches(p) {
                match build(schedule.name, &Request::new(p, m)) {
                    Ok(order) => order.validate().unwrap_or_else(|e| panic!("{} p={p} m={m}: {e}", schedule.name)),
                    Err(ScheduleError::NotDivisible { .. }) => {
                        assert!(schedule.name == "interleaved" && m % p != 0)
                    }
                    Err(ScheduleError::OddDevices { .. }) => assert!(p % 2 == 1),
                    Err(other) => panic!("{} p={p} m={m}: {other}", schedule.name),
                }
            }
        }
    }
}

fn unsplit_peaks(order: &ComputeOrder) -> Vec<f64> {
    peaks(order, &StageMemory::microbatch_stages(&order.placement, order.actions.len(), 0.0)).peak_unsplit
}

#[test]
fn one_stage_peaks() {
    for p in DEVICES {
        for m in microbatches(p) {
            let check = |name: &str, expected: &dyn Fn(u32) -> u32| {
                let order = build(name, &Request::new(p, m)).unwrap();
                for (i, peak) in unsplit_peaks(&order).into_iter().enumerate() {
                    assert_eq!(peak, f64::from(expected(i as u32)), "{name} p={p} m={m} device {i}");
                }
            };
            check("gpipe", &|_| m);
            check("1f1b", &|i| m.min(p - i));
            check("eager-1f1b", &|i| m.min(2 * (p - i) - 1));
            check("zb-h1", &|_| m.min(p));
            check("zb-h2", &|_| m.min(2 * p - 1));
            check("interleaved-bf", &|_| m);
        }
    }
}

#[test]
fn zero_bubble_peaks_when_part_is_freed_at_b() {
    let (until_b, until_w) = (3.0, 2.0);
    for p in DEVICES {
        let memory = StageMemory {
            until_b: vec![until_b; p as usize],
            until_w: vec![until_w; p as usize],
            checkpoint: vec![0.0; p as usize],
        };
        let h1 = peaks(&build("zb-h1", &Request::new(p, 4 * p)).unwrap(), &memory).peak;
        let h2 = peaks(&build("zb-h2", &Request::new(p, 4 * p)).unwrap(), &memory).peak;
        for i in 0..p {
            let (whole, waiting) = (f64::from(p - i), f64::from(i));
            assert_eq!(h1[i as usize], whole * until_b + waiting * until_w);
            assert_eq!(h2[i as usize], (2.0 * whole - 1.0) * until_b + 2.0 * waiting * until_w);
        }
    }
}

#[test]
fn one_stage_bubbles() {
    let (f, b, w) = (5.0, 6.0, 4.0);
    for p in DEVICES {
        for m in [2 * p, 4 * p] {
            let bubble = |name: &str| {
                let order = build(name, &Request::new(p, m)).unwrap();
                let timing = replay(&order, &StageTimes::uniform(p as usize, f, b, w, 0.0)).unwrap();
                timing.totals.longest_span - f64::from(m) * (f + b + w)
            };
            let q = f64::from(p - 1);
            assert_eq!(bubble("gpipe"), q * (f + b + w));
            assert_eq!(bubble("1f1b"), q * (f + b + w));
            assert_eq!(bubble("eager-1f1b"), q * (f + b + w));
            assert_eq!(bubble("zb-h1"), q * (f + b - w));
            assert_eq!(bubble("zb-h2"), q * (f + b - 2.0 * w));
        }
    }
}

#[test]
fn few_microbatches_take_the_closed_time() {
    let (f, b, w) = (5.0, 5.0, 4.0);
    for p in DEVICES {
        for m in 1..=p {
            let makespan = |name: &str| {
                let order = build(name, &Request::new(p, m)).unwrap();
                replay(&order, &StageTimes::uniform(p as usize, f, b, w, 0.0)).unwrap().makespan()
            };
            let steps = f64::from(m + p - 1);
            assert_eq!(makespan("1f1b"), steps * (f + b + w));
            assert_eq!(makespan("zb-h1"), steps * (f + b) + w);
            assert_eq!(makespan("zb-h2"), steps * (f + b) + w);
        }
    }
}

#[test]
fn interleaving_divides_the_bubble() {
    for p in [2, 3, 4, 8] {
        for v in [2, 3, 4] {
            for m in [p, 2 * p, 4 * p] {
                let request = Request::new(p, m).chunks(v);
                let order = build("interleaved", &request).unwrap();
                order.validate().unwrap();
                let timing = replay(&order, &StageTimes::unit((p * v) as usize)).unwrap();
                // Chunk passes take one unit, so the device's F+B+W over v is 3.
                let bubble = timing.makespan() - f64::from(3 * m * v);
                assert_eq!(bubble, f64::from(3 * (p - 1)), "p={p} v={v} m={m}");
                if m > p {
                    let expected = f64::from(p) * (1.0 + f64::from(p - 1) / f64::from(p * v));
                    assert!((unsplit_peaks(&order)[0] - expected).abs() < 1e-9);
                }
                let wide = build("interleaved-bf", &request).unwrap();
                let timing = replay(&wide, &StageTimes::unit((p * v) as usize)).unwrap();
                assert_eq!(timing.makespan() - f64::from(3 * m * v), f64::from(3 * (p - 1)));
            }
        }
    }
}

#[test]
fn requests_that_cannot_be_met_say_why() {
    let message = |name: &str, request: Request| build(name, &request).unwrap_err().to_string();
    assert_eq!(message("1f1b", Request::new(0, 4)), "1f1b: the number of devices is 0; it has to be at least 1");
    assert_eq!(message("1f1b", Request::new(4, 0)), "1f1b: the number of microbatches is 0; it has to be at least 1");
    assert_eq!(
        message("interleaved", Request::new(4, 6)),
        "interleaved: 6 microbatches on 4 devices, but they have to be a multiple of 4; take 4 or 8"
    );
    assert_eq!(
        message("interleaved", Request::new(4, 8).chunks(1)),
        "interleaved: 1 chunks per device asked, but the schedule needs at least 2"
    );
    assert!(message("2f2b", Request::new(4, 8)).starts_with("no schedule is called `2f2b`; known: gpipe, 1f1b, "));
    assert!(matches!(build("gpipe", &Request::new(u32::MAX, u32::MAX)), Err(ScheduleError::TooLarge { .. })));
    let short = Request { limit: Some(vec![1.0]), ..Request::new(4, 8) };
    assert_eq!(message("1f1b", short), "1f1b: 1 values given for memory limits, 4 needed");
}

#[test]
fn dual_pipes_have_the_published_peak_and_bubble() {
    // DualPipe's own table, with B the full backward and F&B a pair that ends as one: bubble (PP/2-1)(F&B + B - 3W), and
    // PP+1 activations. Replayed without overlap, F&B takes F+B, but F is out before the backward: so no more than
    // the table says, and no less than a zero-bubble warm-up of half a pipeline.
    let (f, b, w) = (5.0, 6.0, 4.0);
    for pp in [2u32, 4, 8, 16, 32] {
        let ramps = f64::from(pp / 2 - 1);
        let most = ramps * ((f + b + w) + (b + w) - 3.0 * w);
        let least = ramps * (f + b + w - 2.0 * w);
        for m in [2 * pp, 4 * pp] {
            let order = build("dualpipe", &Request::new(pp, m)).unwrap();
            let timing = replay(&order, &StageTimes::uniform(2 * pp as usize, f, b, w, 0.0)).unwrap();
            let bubble = timing.makespan() - f64::from(m) * (f + b + w);
            assert!((least..=most).contains(&bubble), "PP={pp} m={m}: {bubble} outside {least}..={most}");
            assert_eq!(unsplit_peaks(&order), vec![f64::from(pp + 1); pp as usize]);
            // Half of it in V placement: the same bubble and the same PP+1 stage activations, on half the devices.
            let halved = build("dualpipe-v", &Request::new(pp / 2, m)).unwrap();
            let timing = replay(&halved, &StageTimes::uniform(pp as usize, f, b, w, 0.0)).unwrap();
            assert_eq!(timing.makespan() - 2.0 * f64::from(m) * (f + b + w), bubble, "PP={pp} m={m}");
            assert_eq!(unsplit_peaks(&halved), vec![f64::from(pp + 1) / 2.0; pp as usize / 2]);
        }
    }
}

#[test]
fn dualpipe_splits_the_microbatches_over_two_copies() {
    let order = build("dualpipe", &Request::new(4, 9)).unwrap();
    let copies = |copy: u16| {
        let mut list: Vec<u32> =
            order.actions.iter().flatten().filter(|a| a.stage.0 / 4 == copy).map(|a| a.microbatch.0).collect();
        list.sort_unstable();
        list.dedup();
        list
    };
    assert_eq!((copies(0), copies(1)), ((0..5).collect(), (5..9).collect()));
    assert_eq!(
        build("dualpipe", &Request::new(5, 10)).unwrap_err().to_string(),
        "dualpipe: 5 devices, but two opposite pipelines need an even number; take 6"
    );
}

#[test]
fn hand_made_zb_v_has_no_span_bubble() {
    for p in DEVICES {
        for m in [2 * p, 4 * p] {
            let order = build("zb-v", &Request::new(p, m)).unwrap();
            let timing = replay(&order, &StageTimes::unit(2 * p as usize)).unwrap();
            assert_eq!(timing.bubble_span(), 0.0);
            assert_eq!(timing.makespan(), f64::from(6 * m + p - 1));
            assert_eq!(unsplit_peaks(&order), vec![f64::from(p); p as usize]);
        }
    }
}

#[test]
fn fewer_microbatches_never_raise_a_peak() {
    // A generator spends the memory it is given as it likes.
    for schedule in SCHEDULES.iter().filter(|schedule| schedule.name != "interleaved" && schedule.fixed) {
        let p = 6;
        let mut before = vec![0.0; p as usize];
        for m in 1..=4 * p {
            let peak = unsplit_peaks(&build(schedule.name, &Request::new(p, m)).unwrap());
            let most = unsplit_peaks(&build(schedule.name, &Request::new(p, 6 * p)).unwrap());
            for (now, most) in peak.iter().zip(&most) {
                assert!(now <= most, "{} m={m}", schedule.name);
            }
            // No schedule does worse than one microbatch after the other.
            assert!(peak.iter().zip(&before).any(|(now, before)| now >= before));
            before = peak;
        }
    }
}
