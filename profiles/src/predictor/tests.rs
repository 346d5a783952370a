use super::*;
use crate::context::Recomputed;
use crate::row::Machine;
use proptest::prelude::*;

fn key(op: KernelOp, dims: &[u32]) -> KernelKey {
    KernelKey::new(op, dims).unwrap()
}

fn row(subject: Subject, busy_devices: u32, source: Source, median_seconds: f64) -> Row {
    Row {
        subject,
        busy_devices,
        context: None,
        median_seconds,
        spread_seconds: 0.0,
        repetitions: 10,
        source,
        date: "2026-11-21".into(),
        versions: "test".into(),
    }
}

fn profile(rows: Vec<Row>) -> Profile {
    Profile { machine: Machine { device: "cpu".into(), host: "test".into(), cores: 2 }, rows }
}

fn add(elements: u32) -> KernelKey {
    key(KernelOp::Add, &[elements])
}

/// Adds at 12 bytes an element and 10 GB/s, matrix products at 100 GFLOP/s.
fn measured(busy: u32) -> Vec<Row> {
    let adds = [10u32, 14, 18].map(|n| (add(1 << n), 12.0 * f64::from(1u32 << n) / 1e10));
    let products =
        [64u32, 128, 256].map(|m| (key(KernelOp::MatmulNt, &[m, 256, 256]), 2.0 * f64::from(m) * 256.0 * 256.0 / 1e11));
    let all = adds.into_iter().chain(products);
    all.map(|(key, seconds)| row(Subject::Kernel(key), busy, Source::Measured, seconds)).collect()
}

fn close(found: f64, expected: f64) -> bool {
    (found / expected - 1.0).abs() < 1e-6
}

#[test]
fn measured_shapes_are_exact_and_others_say_that_they_are_not() {
    let predictor = Predictor::new(&profile(measured(2))).unwrap();
    for row in measured(2) {
        let Subject::Kernel(key) = row.subject else { unreachable!() };
        let found = predictor.kernel(&key, 2);
        assert_eq!(found, Estimate { seconds: row.median_seconds, provenance: Provenance::Measured });
        // Nothing is known about fewer devices at work.
        assert_eq!(predictor.kernel(&key, 1), found);
    }
    let between = predictor.kernel(&add(1 << 16), 2);
    assert_eq!(between.provenance, Provenance::Fitted);
    assert!(close(between.seconds, 12.0 * 65536.0 / 1e10), "{between:?}");
    let product = predictor.kernel(&key(KernelOp::MatmulNt, &[192, 256, 256]), 2);
    assert_eq!(product.provenance, Provenance::Fitted);
    assert!((product.seconds / (2.0 * 192.0 * 65536.0 / 1e11) - 1.0).abs() < 0.05, "{product:?}");
    // Never measured: as fast as the rest of its family.
    let sum = predictor.kernel(&key(KernelOp::Sum, &[1 << 16]), 2);
    assert_eq!(sum.provenance, Provenance::Assumed);
    assert!((sum.seconds / between.seconds - 1.0).abs() < 0.05, "{sum:?}");
    // And where the family is unknown too, all that is known.
    let attention = predictor.kernel(&key(KernelOp::Attention, &[1, 256, 4, 4, 64]), 2);
    assert_eq!(attention.provenance, Provenance::Assumed);
    assert!(attention.seconds > 0.0);
}

#[test]
fn fewer_devices_at_work_scale_what_was_not_measured_for_them() {
    let mut rows = measured(2);
    // Alone, adds are twice as fast, as one of them shows.
    rows.push(row(Subject::Kernel(add(1 << 18)), 1, Source::Measured, 12.0 * f64::from(1u32 << 18) / 2e10));
    let predictor = Predictor::new(&profile(rows)).unwrap();
    assert_eq!(predictor.kernel(&add(1 << 18), 1).provenance, Provenance::Measured);
    let scaled = predictor.kernel(&add(1 << 14), 1);
    assert_eq!(scaled.provenance, Provenance::Fitted);
    assert!(close(scaled.seconds, predictor.kernel(&add(1 << 14), 2).seconds / 2.0));
    // More devices than were ever tried: as with the most that were.
    assert!(close(predictor.kernel(&add(1 << 14), 8).seconds, predictor.kernel(&add(1 << 14), 2).seconds));
}

#[test]
fn runs_answer_for_their_shapes_and_scale_their_class() {
    let mut rows = measured(2);
    // In a run, adds take 1.2, 1.3 and 1.9 times as long: the median counts. One product takes 0.9.
    for (elements, ratio) in [(1u32 << 10, 1.2), (1 << 14, 1.3), (1 << 18, 1.9)] {
        let alone = 12.0 * f64::from(elements) / 1e10;
        rows.push(row(Subject::Kernel(add(elements)), 2, Source::Trace, ratio * alone));
    }
    let product = key(KernelOp::MatmulNt, &[128, 256, 256]);
    let alone = 2.0 * 128.0 * 65536.0 / 1e11;
    rows.push(row(Subject::Kernel(product.clone()), 2, Source::Trace, 0.9 * alone));
    rows.push(row(Subject::Transfer { bytes: 1 << 20 }, 2, Source::Measured, 1e-4));
    let before = Predictor::new(&profile(measured(2))).unwrap();
    let after = Predictor::new(&profile(rows)).unwrap();

    assert_eq!(after.kernel(&product, 2), Estimate { seconds: 0.9 * alone, provenance: Provenance::Measured });
    let unseen = after.kernel(&key(KernelOp::MatmulNt, &[256, 256, 256]), 2);
    assert!(close(unseen.seconds, 0.9 * 2.0 * 256.0 * 65536.0 / 1e11), "{unseen:?}");
    assert_eq!(unseen.provenance, Provenance::Fitted);
    let between = after.kernel(&add(1 << 16), 2).seconds / before.kernel(&add(1 << 16), 2).seconds;
    assert!(close(between, 1.3), "{between}");
    // Another product is of the family; a transfer is memory traffic as adds are.
    let backward = key(KernelOp::MatmulNn, &[128, 256, 256]);
    assert!(close(after.kernel(&backward, 2).seconds, 0.9 * before.kernel(&backward, 2).seconds));
    assert!(close(after.transfer(1 << 20, 2).seconds, 1.3e-4));
}

#[test]
fn a_profile_of_runs_alone_is_enough() {
    let rows = measured(2).into_iter().map(|row| Row { source: Source::Trace, ..row }).collect();
    let predictor = Predictor::new(&profile(rows)).unwrap();
    let found = predictor.kernel(&add(1 << 16), 2);
    assert!(close(found.seconds, 12.0 * 65536.0 / 1e10), "{found:?}");
    assert_eq!(predictor.kernel(&add(1 << 14), 2).provenance, Provenance::Measured);
}

#[test]
fn datasheet_figures_stay_datasheet_figures() {
    let rows = measured(1).into_iter().map(|row| Row { source: Source::Datasheet, ..row }).collect();
    let predictor = Predictor::new(&profile(rows)).unwrap();
    assert_eq!(predictor.kernel(&add(1 << 14), 1).provenance, Provenance::Datasheet);
    assert_eq!(predictor.kernel(&add(1 << 16), 1).provenance, Provenance::Datasheet);
    // Measured beats stated.
    let mut rows = measured(1);
    rows.push(row(Subject::Kernel(add(1 << 14)), 1, Source::Datasheet, 1.0));
    let predictor = Predictor::new(&profile(rows)).unwrap();
    assert!(predictor.kernel(&add(1 << 14), 1).seconds < 1e-3);
    assert!(predictor.kernel(&add(1 << 16), 1).seconds < 1e-3);
}

#[test]
fn collectives_of_unmeasured_groups_move_their_bytes_at_the_nearest_groups_pace() {
    let mut rows = measured(2);
    for (members, bytes) in [(2u32, 1u64 << 20), (2, 1 << 24), (4, 1 << 20), (4, 1 << 24)] {
        // 10 GB/s for reading all members' shards and writing one.
        let touched = bytes as f64 * (1.0 + 1.0 / f64::from(members));
        let subject = Subject::Collective { round: CollectiveRound::Reduce, members, bytes };
        rows.push(row(subject, 2, Source::Measured, touched / 1e10));
    }
    let predictor = Predictor::new(&profile(rows)).unwrap();
    let found = predictor.collective(CollectiveRound::Reduce, 3, 1 << 22, 2);
    assert!(close(found.seconds, f64::from(1u32 << 22) * (4.0 / 3.0) / 1e10), "{found:?}");
    assert_eq!(found.provenance, Provenance::Fitted);
    let gather = predictor.collective(CollectiveRound::Gather, 4, 1 << 22, 2);
    assert_eq!(gather.provenance, Provenance::Assumed);
    // 3/4 of the array, read and written, at about the 10 GB/s of the adds.
    assert!((gather.seconds / (1.5 * f64::from(1u32 << 22) / 1e10) - 1.0).abs() < 0.05, "{gather:?}");
    assert_eq!(predictor.collective(CollectiveRound::Reduce, 1, 1 << 22, 2).seconds, 0.0);
}

#[test]
fn overheads_come_from_runs_first_and_sharing_defaults_to_not_sharing() {
    let mut rows = measured(2);
    assert_eq!(
        Predictor::new(&profile(rows.clone())).unwrap().overhead(Overhead::Op, 2),
        Estimate { seconds: 0.0, provenance: Provenance::Assumed }
    );
    rows.push(row(Subject::Overhead(Overhead::Op), 2, Source::Measured, 2e-6));
    let predictor = Predictor::new(&profile(rows.clone())).unwrap();
    assert_eq!(predictor.overhead(Overhead::SharedOp, 1), predictor.overhead(Overhead::Op, 2));
    rows.push(row(Subject::Overhead(Overhead::Op), 2, Source::Trace, 3e-6));
    let predictor = Predictor::new(&profile(rows)).unwrap();
    assert_eq!(predictor.overhead(Overhead::Op, 1).seconds, 3e-6);
}

#[test]
fn a_profile_without_kernels_is_incomplete() {
    let rows = vec![row(Subject::Transfer { bytes: 64 }, 1, Source::Measured, 1e-6)];
    assert!(matches!(Predictor::new(&profile(rows)), Err(ProfileError::Incomplete { missing: "kernel times", .. })));
}

#[test]
fn residuals_are_of_points_not_seen() {
    let mut rows = measured(2);
    let residuals = Predictor::new(&profile(rows.clone())).unwrap().residuals().unwrap();
    let of = |residuals: &[Residual], op| {
        residuals.iter().find(|r| r.class == Class::Kernel(op, DType::F32)).cloned().unwrap()
    };
    let adds = of(&residuals, KernelOp::Add);
    assert_eq!(adds.points, 3);
    assert!(adds.worst_error.unwrap() < 0.2, "{adds:?}");
    // A point off by 3 is foretold badly by the others, and they are met badly through it.
    rows.push(row(Subject::Kernel(add(1 << 16)), 2, Source::Measured, 3.0 * 12.0 * 65536.0 / 1e10));
    let residuals = Predictor::new(&profile(rows)).unwrap().residuals().unwrap();
    assert!(of(&residuals, KernelOp::Add).worst_error.unwrap() > 0.6);
}

#[test]
fn every_point_is_foretold_by_the_others() {
    let predictor = Predictor::new(&profile(measured(2))).unwrap();
    let points = predictor.foretold(Class::Kernel(KernelOp::Add, DType::F32)).unwrap();
    assert_eq!(points.len(), 3);
    let worst = points.iter().map(|point| point.error().abs()).fold(0.0, f64::max);
    let residual = predictor
        .residuals()
        .unwrap()
        .into_iter()
        .find(|r| r.class == Class::Kernel(KernelOp::Add, DType::F32))
        .unwrap();
    assert_eq!(Some(worst), residual.worst_error);
    // The largest times belong to the largest sizes.
    let largest = points.iter().max_by(|a, b| a.bytes.total_cmp(&b.bytes)).unwrap();
    assert!(points.iter().all(|point| point.seconds <= largest.seconds && point.bytes > 0.0));
    assert!(predictor.foretold(Class::Collective(CollectiveRound::Reduce)).unwrap().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn memory_bound_times_rise_with_size(
        steps in prop::collection::vec((1.1f64..8.0, 1.0f64..8.0), 1..8),
        sizes in prop::collection::vec(1u32..1 << 26, 2..50),
    ) {
        let mut rows = Vec::new();
        let (mut elements, mut seconds) = (100.0, 1e-7);
        for (larger, slower) in steps {
            (elements, seconds) = (elements * larger, seconds * slower);
            rows.push(row(Subject::Kernel(add(elements as u32)), 1, Source::Measured, seconds));
        }
        let predictor = Predictor::new(&profile(rows)).unwrap();
        let mut sizes = sizes;
        sizes.sort_unstable();
        let times: Vec<f64> = sizes.iter().map(|&n| predictor.kernel(&add(n), 1).seconds).collect();
        prop_assert!(times.is_sorted_by(|a, b| *a <= *b * (1.0 + 1e-12)), "{sizes:?} {times:?}");
    }
}

#[test]
fn times_inside_runs_are_told_apart_by_context() {
    let context = |recomputed, shared| Some(Context { recomputed, shared, ..Context::default() });
    let (kept, again) = (context(Recomputed::Nothing, false), context(Recomputed::Blocks, false));
    let alone = |n: u32| f64::from(n) * 1e-9;
    let traced = |n: u32, context, ratio: f64| Row {
        context,
        ..row(Subject::Kernel(add(n)), 2, Source::Trace, ratio * alone(n))
    };
    let mut rows: Vec<Row> = [1u32 << 10, 1 << 12, 1 << 14, 1 << 16]
        .map(|n| row(Subject::Kernel(add(n)), 2, Source::Measured, alone(n)))
        .to_vec();
    rows.extend([traced(1 << 10, kept, 1.2), traced(1 << 12, kept, 1.2), traced(1 << 14, kept, 1.5)]);
    rows.extend([traced(1 << 10, again, 0.8), traced(1 << 12, again, 0.8)]);
    let predictor = Predictor::new(&profile(rows)).unwrap();
    let ratio = |n: u32, context| {
        let found = predictor.kernel(&key(KernelOp::Add, &[n]), Conditions { busy: 2, context });
        (found.seconds / alone(n), found.provenance)
    };
    let is = |found: (f64, Provenance), expected: f64, provenance| close(found.0, expected) && found.1 == provenance;
    assert!(is(ratio(1 << 10, kept), 1.2, Provenance::Measured));
    assert!(is(ratio(1 << 10, again), 0.8, Provenance::Measured));
    // No run showed this shape: as its class in runs of the same context.
    assert!(is(ratio(1 << 16, kept), 1.2, Provenance::Fitted));
    assert!(is(ratio(1 << 16, again), 0.8, Provenance::Fitted));
    // Shown by the other context only: slower than its class there, and so a slower one of the class here. The median over
    // all runs is 1.2.
    assert!(is(ratio(1 << 14, again), 1.5 * 0.8 / 1.2, Provenance::Fitted));
    // A context that no run had: the nearest one, else all runs.
    assert!(is(ratio(1 << 16, context(Recomputed::Blocks, true)), 0.8, Provenance::Fitted));
    assert!(is(ratio(1 << 16, context(Recomputed::Some, false)), 1.2, Provenance::Fitted));
    assert!(is(ratio(1 << 16, None), 1.2, Provenance::Fitted));
}

#[test]
fn what_is_fused_into_a_product_costs_its_parts_until_it_is_measured() {
    let fused = key(KernelOp::ProjectAdd, &[128, 256, 256]);
    let before = Predictor::new(&profile(measured(1))).unwrap();
    let parts = [key(KernelOp::MatmulNt, &[128, 256, 256]), add(128 * 256)].map(|part| before.kernel(&part, 1).seconds);
    let estimate = before.kernel(&fused, 1);
    assert!((estimate.seconds - parts[0] - parts[1]).abs() < 1e-12, "{} and {parts:?}", estimate.seconds);
    assert_eq!(estimate.provenance, Provenance::Assumed);
    let mut rows = measured(1);
    rows.push(row(Subject::Kernel(fused.clone()), 1, Source::Measured, 0.75 * estimate.seconds));
    let after = Predictor::new(&profile(rows)).unwrap().kernel(&fused, 1);
    assert!((after.seconds / (0.75 * estimate.seconds) - 1.0).abs() < 1e-9);
    assert_eq!(after.provenance, Provenance::Measured);
}

#[test]
fn other_work_of_the_machine_lengthens_what_was_measured_alone_and_not_what_runs_showed() {
    let lost = |busy, share| row(Subject::Overhead(Overhead::Interference), busy, Source::Measured, share);
    let mut rows = measured(2);
    rows.extend(measured(1));
    rows.extend([lost(2, 0.05), lost(1, 0.01)]);
    let alone = 12.0 * f64::from(1u32 << 14) / 1e10;
    let predictor = Predictor::new(&profile(rows.clone())).unwrap();
    assert!(close(predictor.kernel(&add(1 << 14), 2).seconds, 1.05 * alone));
    assert!(close(predictor.kernel(&add(1 << 14), 1).seconds, 1.01 * alone));
    assert_eq!(predictor.kernel(&add(1 << 14), 2).provenance, Provenance::Measured);
    assert!(close(predictor.kernel(&add(1 << 16), 2).seconds, 1.05 * 4.0 * alone));
    // The nearest number of devices, where none was looked at.
    assert!(close(predictor.kernel(&add(1 << 14), 3).seconds, 1.05 * alone));
    // A run's mean has it in it; what it says of other shapes is relative to the mean.
    rows.push(row(Subject::Kernel(add(1 << 14)), 2, Source::Trace, 2.1 * alone));
    let predictor = Predictor::new(&profile(rows)).unwrap();
    assert!(close(predictor.kernel(&add(1 << 14), 2).seconds, 2.1 * alone));
    assert!(close(predictor.kernel(&add(1 << 16), 2).seconds, 2.1 * 4.0 * alone));
}

#[test]
fn contexts_differ_by_the_shapes_that_both_showed() {
    let context = |recomputed| Some(Context { recomputed, ..Context::default() });
    let (kept, again) = (context(Recomputed::Nothing), context(Recomputed::Blocks));
    let alone = |n: u32| f64::from(n) * 1e-9;
    let traced = |n: u32, context, ratio: f64| Row {
        context,
        ..row(Subject::Kernel(add(n)), 2, Source::Trace, ratio * alone(n))
    };
    let mut rows: Vec<Row> =
        [1u32 << 10, 1 << 12, 1 << 14].map(|n| row(Subject::Kernel(add(n)), 2, Source::Measured, alone(n))).to_vec();
    // The large shape is slow in every run; only the small one was seen in both contexts, and lasts as long in each.
    rows.extend([traced(1 << 10, kept, 0.6), traced(1 << 10, again, 0.6), traced(1 << 14, again, 1.0)]);
    let predictor = Predictor::new(&profile(rows)).unwrap();
    let found = predictor.kernel(&add(1 << 14), Conditions { busy: 2, context: kept });
    assert!(close(found.seconds, alone(1 << 14)), "{found:?}");

    // What adds say of two contexts is nothing to products: another product of the context asked about speaks for them.
    let [seen, other] = [128u32, 256].map(|m| key(KernelOp::MatmulNt, &[m, 256, 256]));
    let mut rows = measured(2);
    let run = |key: &KernelKey, context, ratio: f64| {
        let alone = rows.iter().find(|row| row.subject == Subject::Kernel(key.clone())).unwrap().median_seconds;
        Row { context, ..row(Subject::Kernel(key.clone()), 2, Source::Trace, ratio * alone) }
    };
    let add = add(1 << 10);
    let traced = [run(&add, kept, 0.5), run(&add, again, 1.0), run(&seen, again, 1.1), run(&other, kept, 0.9)];
    let alone = rows.iter().find(|row| row.subject == Subject::Kernel(seen.clone())).unwrap().median_seconds;
    rows.extend(traced);
    let predictor = Predictor::new(&profile(rows)).unwrap();
    let found = predictor.kernel(&seen, Conditions { busy: 2, context: kept });
    assert!(close(found.seconds, 0.9 * alone), "{found:?}");
}

/// What was measured while two devices worked is half as long again as it should be, as runs on two show; what was measured with one is right.
#[test]
fn what_runs_say_of_one_number_of_devices_is_not_said_of_another() {
    let context = |recomputed| Some(Context { recomputed, ..Context::default() });
    let (kept, again) = (context(Recomputed::Nothing), context(Recomputed::Blocks));
    let [small, large, unseen] = [1u32 << 10, 1 << 14, 1 << 16];
    let alone = |n: u32| f64::from(n) * 1e-9;
    let mut rows = Vec::new();
    for n in [small, large, unseen] {
        rows.push(row(Subject::Kernel(add(n)), 2, Source::Measured, 1.5 * alone(n)));
        rows.push(row(Subject::Kernel(add(n)), 1, Source::Measured, alone(n)));
    }
    let traced =
        |n: u32, busy, context, seconds| Row { context, ..row(Subject::Kernel(add(n)), busy, Source::Trace, seconds) };
    // Where blocks are computed again, adds take 0.9 of the time; no such run had one device.
    rows.extend([
        traced(small, 1, kept, alone(small)),
        traced(large, 2, kept, alone(large)),
        traced(large, 2, again, 0.9 * alone(large)),
    ]);
    let predictor = Predictor::new(&profile(rows)).unwrap();
    for n in [small, large, unseen] {
        let found = predictor.kernel(&add(n), Conditions { busy: 1, context: again });
        assert!(close(found.seconds, 0.9 * alone(n)), "{n}: {found:?}");
        let found = predictor.kernel(&add(n), Conditions { busy: 2, context: again });
        assert!(close(found.seconds, 0.9 * alone(n)), "{n} of two: {found:?}");
    }
}

#[test]
fn narrow_calls_follow_their_wide_twins() {
    let narrow = |key: KernelKey| key.with(DType::Bf16);
    let product = key(KernelOp::MatmulNt, &[128, 256, 256]);
    let wide = 2.0 * 128.0 * 65536.0 / 1e11;
    // Nothing narrow was measured: the host widens 1.5 times the bytes of the wide call, at the pace of the adds.
    let bare = Predictor::new(&profile(measured(2))).unwrap();
    let found = bare.kernel(&narrow(product.clone()), 2);
    let moved = 6.0 * f64::from(128 * 256 + 256 * 256 + 128 * 256) / 1e10;
    assert!((found.seconds / (wide + moved) - 1.0).abs() < 0.02, "{found:?}: {wide} {moved}");
    assert_eq!(found.provenance, Provenance::Assumed);
    // A GPU computes on what is narrow.
    let mut gpu = profile(measured(2));
    gpu.machine.device = "NVIDIA H100".into();
    let gpu = Predictor::new(&gpu).unwrap();
    assert!(close(gpu.kernel(&narrow(product.clone()), 2).seconds, wide));

    let mut rows = measured(2);
    let add_narrow = Subject::Kernel(narrow(add(1 << 14)));
    rows.push(row(add_narrow, 2, Source::Measured, 1.5 * 12.0 * f64::from(1u32 << 14) / 1e10));
    let some = Predictor::new(&profile(rows)).unwrap();
    assert_eq!(some.kernel(&narrow(add(1 << 14)), 2).provenance, Provenance::Measured);
    let another = some.kernel(&narrow(add(1 << 16)), 2);
    assert!(close(another.seconds, 1.5 * 12.0 * 65536.0 / 1e10), "{another:?}");
    assert_eq!(another.provenance, Provenance::Fitted, "of a class that was measured");
    let product = some.kernel(&narrow(product), 2);
    assert!(close(product.seconds, 1.5 * wide), "{product:?}");
    assert_eq!(product.provenance, Provenance::Assumed, "of another operator");
}

/// A run that keeps weights and gradients whole and one that cuts both tell of one that cuts gradients only: products that read weights are
/// as in the first, products that add to gradients as in the second.
#[test]
fn each_kernel_is_as_in_runs_that_hold_alike_what_it_touches() {
    let [forward, weight] = [KernelOp::MatmulNt, KernelOp::MatmulTn].map(|op| key(op, &[128, 256, 256]));
    let unseen = key(KernelOp::MatmulTn, &[256, 256, 256]);
    let whole = Context::default();
    let cut = Context { gathered: true, reduced: true, ..whole };
    let alone = 1e-4;
    let mut rows = measured(2);
    rows.retain(|row| ![&forward, &weight, &unseen].iter().any(|&key| row.subject == Subject::Kernel(key.clone())));
    for key in [&forward, &weight, &unseen] {
        rows.push(row(Subject::Kernel(key.clone()), 2, Source::Measured, alone));
    }
    let run = |key: &KernelKey, context: Context, ratio: f64| {
        let subject = Subject::Kernel(key.clone());
        let context = Some(context.met_by(Class::of(&subject)));
        Row { context, ..row(subject, 2, Source::Trace, ratio * alone) }
    };
    rows.extend([run(&forward, whole, 1.2), run(&weight, whole, 1.3), run(&forward, cut, 0.8), run(&weight, cut, 0.9)]);
    let predictor = Predictor::new(&profile(rows)).unwrap();
    let ratio = |key: &KernelKey, gathered, reduced| {
        let context = Some(Context { gathered, reduced, ..whole });
        predictor.kernel(key, Conditions { busy: 2, context }).seconds / alone
    };
    for (gathered, reduced) in [(false, false), (false, true), (true, false), (true, true)] {
        assert!(close(ratio(&forward, gathered, reduced), if gathered { 0.8 } else { 1.2 }));
        for key in [&weight, &unseen] {
            assert!(close(ratio(key, gathered, reduced), if reduced { 0.9 } else { 1.3 }));
        }
    }
}

/// What is measured alone of ops on a shared device has the pauses in it: they are added only where runs on shared devices told them apart.
#[test]
fn pauses_are_known_from_runs_like_the_one_asked_about() {
    let run = |shared| Some(Context { shared, ..Context::default() });
    let mut rows = measured(2);
    rows.push(Row { context: run(false), ..row(Subject::Overhead(Overhead::Wake), 2, Source::Trace, 3e-5) });
    rows.push(Row { context: run(false), ..row(Subject::Overhead(Overhead::Message), 2, Source::Trace, 2e-5) });
    let predictor = Predictor::new(&profile(rows)).unwrap();
    let seconds = |kind, shared| predictor.overhead(kind, Conditions { busy: 2, context: run(shared) }).seconds;
    assert_eq!([seconds(Overhead::Wake, false), seconds(Overhead::Wake, true)], [3e-5, 0.0]);
    assert_eq!([seconds(Overhead::Message, false), seconds(Overhead::Message, true)], [2e-5, 2e-5]);
}
