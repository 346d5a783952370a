use super::*;
use crate::kernel_key::{KernelKey, KernelOp};
use crate::row::{Machine, Overhead};

fn row(op: KernelOp, elements: u32, source: Source, median_seconds: f64, repetitions: u64) -> Row {
    Row {
        subject: Subject::Kernel(KernelKey::new(op, &[elements]).unwrap()),
        busy_devices: 2,
        context: None,
        median_seconds,
        spread_seconds: 0.0,
        repetitions,
        source,
        date: "2026-11-21".into(),
        versions: "test".into(),
    }
}

fn measured() -> Profile {
    let machine = Machine { device: "cpu".into(), host: "test".into(), cores: 2 };
    let rows = [1u32 << 12, 1 << 16, 1 << 20]
        .map(|n| row(KernelOp::Add, n, Source::Measured, f64::from(n) * 1e-9, 10))
        .to_vec();
    Profile { machine, rows }
}

#[test]
fn errors_before_and_after() {
    // Two runs saw one shape at 1.5 and 1.2 times its time, with 1 and 3 calls out of 4, and one run another at 1.1.
    let alone = f64::from(1u32 << 16) * 1e-9;
    let traced = [
        row(KernelOp::Add, 1 << 16, Source::Trace, 1.5 * alone, 100),
        row(KernelOp::Add, 1 << 16, Source::Trace, 1.2 * alone, 300),
        row(KernelOp::Add, 1 << 12, Source::Trace, 1.1 * f64::from(1u32 << 12) * 1e-9, 50),
    ];
    let result = recalibrate(&measured(), &traced).unwrap();
    assert_eq!(result.profile.rows.len(), 5, "three measured, two of runs");
    let after = Predictor::new(&result.profile).unwrap();
    let at = |n: u32| after.kernel(&KernelKey::new(KernelOp::Add, &[n]).unwrap(), 2).seconds / (f64::from(n) * 1e-9);
    assert!((at(1 << 16) - 1.275).abs() < 1e-9, "the mean weighs calls");
    assert!((at(1 << 20) - (1.275 + 1.1) / 2.0).abs() < 1e-9, "the median ratio of the class");
    let adds = &result.classes[0];
    let seen = (150.0 + 360.0) * alone + 55.0 * f64::from(1u32 << 12) * 1e-9;
    let foretold = 400.0 * alone + 50.0 * f64::from(1u32 << 12) * 1e-9;
    assert_eq!(adds.count, 450);
    assert!((adds.error_before() - (foretold / seen - 1.0)).abs() < 1e-9);
    assert!(adds.error_after().abs() < 1e-9);
}

#[test]
fn a_later_run_replaces_an_earlier_one_and_leaves_other_shapes() {
    let first =
        [row(KernelOp::Add, 1 << 16, Source::Trace, 1.0, 10), row(KernelOp::Add, 1 << 12, Source::Trace, 0.5, 10)];
    let once = recalibrate(&measured(), &first).unwrap().profile;
    let second = [row(KernelOp::Add, 1 << 16, Source::Trace, 2.0, 10)];
    let twice = recalibrate(&once, &second).unwrap().profile;
    let traced: Vec<f64> = twice.rows.iter().filter(|r| r.source == Source::Trace).map(|r| r.median_seconds).collect();
    assert_eq!(traced, [0.5, 2.0]);
}

#[test]
fn runs_alone_make_a_profile() {
    let empty = Profile::new(measured().machine);
    let traced = [row(KernelOp::Add, 1 << 16, Source::Trace, 1e-4, 10)];
    let result = recalibrate(&empty, &traced).unwrap();
    assert_eq!(result.profile.rows.len(), 1);
    assert_eq!(result.classes[0].before_seconds, 0.0);
    assert!((result.classes[0].after_seconds - 1e-3).abs() < 1e-12);
    let overhead = Row { subject: Subject::Overhead(Overhead::Op), ..traced[0].clone() };
    assert!(matches!(recalibrate(&empty, &[overhead]), Err(ProfileError::Incomplete { .. })));
}

#[test]
fn disturbed_runs_are_left_out() {
    let alone = f64::from(1u32 << 16) * 1e-9;
    let of_runs = |times: &[f64]| {
        let traced: Vec<Row> =
            times.iter().map(|times| row(KernelOp::Add, 1 << 16, Source::Trace, times * alone, 100)).collect();
        let corrected = recalibrate(&measured(), &traced).unwrap().profile;
        let found = corrected.rows.iter().find(|row| row.source == Source::Trace).unwrap();
        (found.median_seconds / alone, found.repetitions)
    };
    let (seconds, repetitions) = of_runs(&[1.0, 4.0, 1.2]);
    assert!((seconds - 1.1).abs() < 1e-9 && repetitions == 200, "{seconds} {repetitions}");
    // Different caches, and no disturbance.
    assert!((of_runs(&[1.0, 1.3]).0 - 1.15).abs() < 1e-9);
    // Of two that disagree, the one that nothing held up.
    assert_eq!(of_runs(&[5.0, 1.0]).1, 100);
    assert!((of_runs(&[5.0, 1.0]).0 - 1.0).abs() < 1e-9);
}
