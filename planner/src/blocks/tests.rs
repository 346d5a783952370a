//! Collisions, peaks and bubbles of the named blocks, and laws of the algebra.

use super::*;
use crate::replay::{StageMemory, StageTimes, peaks, replay};
use crate::schedules::{Request, build};
use paceline_sim::program::Pass;
use proptest::prelude::*;

fn unsplit_chunks(order: &crate::order::ComputeOrder) -> Vec<u32> {
    let stages = order.placement.stages();
    let memory = StageMemory { until_b: vec![1.0; stages], until_w: vec![1.0; stages], checkpoint: vec![0.0; stages] };
    peaks(order, &memory).peak_unsplit.into_iter().map(|peak| peak as u32).collect()
}

#[test]
fn named_blocks_are_legal() {
    for p in 1..=32 {
        let named = [
            ("1f1b", Block::one_f_one_b(p)),
            ("eager-1f1b", Block::eager_one_f_one_b(p)),
            ("zb-h1", Block::zb_h1(p)),
            ("zb-h2", Block::zb_h2(p)),
            ("v-min", Block::v_min(p)),
            ("v-half", Block::v_half(p)),
            ("v-zb", Block::v_zb(p)),
            ("1f1b-v", Block::one_f_one_b_v(p)),
        ];
        for (name, block) in named {
            block.check().unwrap_or_else(|e| panic!("{name} p={p}: {e}"));
            assert_eq!(block.collision(), None, "{name} p={p}");
            let repeated = block.repeat(3 * p);
            repeated.order.validate().unwrap_or_else(|e| panic!("{name} p={p}: {e}"));
            for (have, most) in unsplit_chunks(&repeated.order).into_iter().zip(block.predicted_peak()) {
                assert!(have <= most, "{name} p={p}: {have} > {most}");
            }
            let before = repeated.makespan();
            assert!(repeated.try_squeeze().unwrap().makespan() <= before, "{name} p={p}");
        }
    }
}

#[test]
fn repeated_blocks_are_the_listed_orders() {
    for p in 1..=9 {
        for m in [1, p, 2 * p - 1, 4 * p] {
            let pairs = [
                ("1f1b", Block::one_f_one_b(p)),
                ("eager-1f1b", Block::eager_one_f_one_b(p)),
                ("zb-h1", Block::zb_h1(p)),
                ("zb-h2", Block::zb_h2(p)),
            ];
            for (name, block) in pairs {
                if name == "zb-h2" && m < 2 * p {
                    continue; // The listed order keeps fewer W back there.
                }
                let listed = build(name, &Request::new(p, m)).unwrap();
                assert_eq!(block.repeat(m).order.actions, listed.actions, "{name} p={p} m={m}");
            }
        }
    }
}

/// Bubble of the longest device span and of the makespan, in chunk slots, and the peak in chunks of each device.
fn measure(order: &crate::order::ComputeOrder) -> (f64, f64, Vec<u32>) {
    let totals = replay(order, &StageTimes::unit(order.placement.stages())).unwrap().totals;
    let work = totals.work / f64::from(totals.devices);
    (totals.longest_span - work, totals.makespan - work, unsplit_chunks(order))
}

/// The unit-time frontier of V schedules: the least bubble with `k` chunk activations per device (schedules.md, section on
/// V-shape blocks).
fn frontier(p: i64, k: i64) -> f64 {
    (6 * p - 1 - 3 * k).max(4 * p - 3 * k + 2 * ((k + 1) / 2)) as f64
}

#[test]
fn v_schedules_reach_the_frontier() {
    for p in 1..=32u32 {
        for (name, chunks) in [("v-min", 2 * ((p + 4) / 3)), ("v-half", 2 * ((p + 2) / 2)), ("v-zb", 2 * p)] {
            for m in [2 * p, 2 * p + 3, 4 * p + 20] {
                let order = build(name, &Request::new(p, m)).unwrap();
                order.validate().unwrap();
                let (span, makespan, peak) = measure(&order);
                let label = format!("{name} p={p} m={m}");
                assert!(peak.iter().all(|held| *held <= chunks), "{label}: {peak:?} > {chunks}");
                assert_eq!(peak.iter().max(), Some(&chunks), "{label}");
                assert_eq!(span, frontier(i64::from(p), i64::from(chunks.min(2 * p))), "{label}");
                // No device but the first can start at once, so a parallelogram ends p-1 slots late.
                assert!(makespan <= span.max(f64::from(p - 1)) + 0.5, "{label}: makespan {makespan}, span {span}");
            }
        }
    }
}

#[test]
fn one_f_one_b_v_has_the_known_peak_and_bubble() {
    for (p, stages) in [(4, 3), (8, 6), (16, 11)] {
        let order = build("1f1b-v", &Request::new(p, 4 * p)).unwrap();
        assert_eq!(measure(&order).2.into_iter().max(), Some(2 * stages), "p={p}");
    }
    let order = build("1f1b-v", &Request::new(4, 8)).unwrap();
    assert_eq!(unsplit_chunks(&order).into_iter().max(), Some(6));
    let timing = replay(&order, &StageTimes::unit(8)).unwrap();
    assert!((timing.bubble_makespan() - 0.238).abs() < 0.0005, "{}", timing.bubble_makespan());
    // Interleaved 1F1B on the same devices: less bubble, more memory.
    let order = build("interleaved", &Request::new(4, 8)).unwrap();
    assert_eq!(unsplit_chunks(&order), [11, 9, 7, 5]);
    let timing = replay(&order, &StageTimes::unit(8)).unwrap();
    assert!((timing.bubble_makespan() - 0.158).abs() < 0.0005);
}

#[test]
fn extension_keeps_the_bubble_and_the_peak() {
    for p in [2u32, 3, 8, 16] {
        for name in ["1f1b", "zb-h2", "v-min", "v-half", "v-zb", "1f1b-v"] {
            let short = build(name, &Request::new(p, 4 * p + 8)).unwrap();
            let times = StageTimes::unit(short.placement.stages());
            let longer = extend(&short, &times, 17).unwrap_or_else(|| panic!("{name} p={p}: no period found"));
            longer.validate().unwrap();
            assert_eq!(longer.microbatches, 4 * p + 25);
            assert_eq!(measure(&longer), measure(&short), "{name} p={p}");
        }
    }
    // GPipe has no steady phase.
    assert_eq!(extend(&build("gpipe", &Request::new(4, 8)).unwrap(), &StageTimes::unit(4), 1), None);
}

#[test]
fn with_as_many_microbatches_as_devices_only_the_ramp_is_added() {
    for p in 1..=16u32 {
        for (name, chunks) in [("v-min", 2 * ((p + 4) / 3)), ("v-half", 2 * ((p + 2) / 2)), ("v-zb", 2 * p)] {
            let (span, _, peak) = measure(&build(name, &Request::new(p, p)).unwrap());
            let least = frontier(i64::from(p), i64::from(chunks.min(2 * p))).max(f64::from(p - 1));
            assert_eq!(span, least, "{name} p={p}");
            assert_eq!(peak.into_iter().max(), Some(chunks.min(2 * p)), "{name} p={p}");
        }
    }
}

/// Any V block that tiles, with its sizes.
fn v_blocks() -> impl Strategy<Value = (u32, Block)> {
    (1u32..8, 1u32..=5, 1u32..=3, prop::array::uniform3(1u32..6))
        .prop_map(|(p, down, up, turns)| (p, Block::v(p, down, up, turns)))
        .prop_filter("collides", |(_, block)| block.collision().is_none())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn blocks_that_tile_are_schedules((p, block) in v_blocks(), m in 1u32..24) {
        prop_assert_eq!(block.check(), Ok(()));
        let repeated = block.repeat(m);
        prop_assert_eq!(repeated.order.validate(), Ok(()));
        for (have, most) in unsplit_chunks(&repeated.order).into_iter().zip(block.predicted_peak()) {
            prop_assert!(have <= most, "{} chunks held, {} predicted", have, most);
        }
        let before = repeated.clone();
        let after = repeated.try_squeeze().unwrap();
        prop_assert_eq!(&before.order, &after.order);
        prop_assert!(after.start.iter().flatten().zip(before.start.iter().flatten()).all(|(a, b)| a <= b));
        prop_assert!(before.makespan() >= u64::from(6 * m), "{} devices", p);
    }

    #[test]
    fn justified_orders_keep_the_limit_and_are_never_longer(
        (p, block) in v_blocks(),
        m in 1u32..20,
        extra in 0u32..6,
        seeds in prop::collection::vec(1u32..20, 48),
        comm in 0u32..4,
        by_span in any::<bool>(),
    ) {
        let order = block.repeat(m).order;
        let stages = 2 * p as usize;
        let pick = |from: usize| (0..stages).map(|s| f64::from(seeds[(from + s) % seeds.len()])).collect::<Vec<f64>>();
        let times = StageTimes { f: pick(0), b: pick(16), w: pick(32), comm: f64::from(comm) };
        // Half is freed at B, half at W; sizes differ from stage to stage.
        let until_b: Vec<f64> = pick(7);
        let until_w = until_b.iter().map(|size| size / 2.0).collect();
        let memory = StageMemory { until_b, until_w, checkpoint: vec![0.0; stages] };
        let limit: Vec<f64> = peaks(&order, &memory).peak.iter().map(|own| own + f64::from(extra)).collect();
        let goal = if by_span { Goal::Span } else { Goal::Makespan };
        let better = justify(&order, &times, &memory, &limit, goal).unwrap();
        prop_assert_eq!(better.validate(), Ok(()));
        for (held, limit) in peaks(&better, &memory).peak.iter().zip(&limit) {
            prop_assert!(*held <= limit + 1e-6, "{} held, limit {}", held, limit);
        }
        let (before, after) = (replay(&order, &times).unwrap().totals, replay(&better, &times).unwrap().totals);
        let (before, after) = match goal {
            Goal::Span => (before.longest_span, after.longest_span),
            Goal::Makespan => (before.makespan, after.makespan),
        };
        prop_assert!(after <= before + 1e-9, "{} after {}", after, before);
    }
}

#[test]
fn mistakes_in_a_block_are_found() {
    let mut block = Block::zb_h1(3);
    block.offsets[1].w = Some(block.offsets[1].b + 4);
    assert_eq!(block.collision(), None);
    block.offsets[1].w = Some(block.offsets[1].b + 3);
    let collision = block.collision().unwrap();
    assert_eq!((collision.device, collision.first, collision.second), (1, (Pass::B, 1), (Pass::W, 1)));
    let mut block = Block::one_f_one_b(3);
    block.offsets[1].b = 3;
    assert_eq!(
        block.check().unwrap_err().to_string(),
        "B of stage 1 starts in slot 3, but its input is there from slot 5 only"
    );
    block.offsets.pop();
    assert!(matches!(block.check(), Err(BlockError::Shape { stages: 3, have: 2, interval: 3 })));
}

#[test]
fn two_distances_reach_what_one_misses() {
    // Near the memory of V-ZB no block with one distance each way gets to the frontier at p = 16.
    let p = 16;
    for (chunks, first, rest, up, turn_b) in
        [(29u32, [1; 3].as_slice(), 5, 1, 1), (30, &[1; 2], 4, 2, 2), (31, &[1; 2], 4, 2, 2)]
    {
        let mut down = first.to_vec();
        down.resize(p - 1, rest);
        let block = Block::v_uneven(&down, &vec![up; p - 1], [1, 1, turn_b]);
        assert_eq!((block.check(), block.collision()), (Ok(()), None));
        let order = block.repeat(2 * p as u32 + 3).order;
        let times = StageTimes::unit(2 * p);
        let memory = StageMemory { until_b: vec![1.0; 2 * p], until_w: vec![1.0; 2 * p], checkpoint: vec![0.0; 2 * p] };
        let order = justify(&order, &times, &memory, &vec![f64::from(chunks); p], Goal::Span).unwrap();
        let (span, _, peak) = measure(&order);
        assert_eq!(span, frontier(p as i64, i64::from(chunks)), "{chunks} chunks");
        assert!(peak.into_iter().all(|held| held <= chunks));
    }
}
