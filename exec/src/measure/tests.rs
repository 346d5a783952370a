use super::*;
use paceline_kernels::CpuDevice;
use paceline_profiles::{Class, CollectiveRound, DType, KernelOp, Overhead, Predictor};
use std::collections::BTreeMap;

fn key(op: KernelOp, dims: &[u32]) -> KernelKey {
    KernelKey::new(op, dims).unwrap()
}

fn settings(devices: u32) -> MeasureSettings {
    MeasureSettings {
        devices,
        budget: Duration::from_millis(400),
        working_set_bytes: 8 << 20,
        ..MeasureSettings::default()
    }
}

/// As many as this machine has, two at most.
fn devices() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32).min(2)
}

/// Every operator at a small shape.
fn every_operator() -> Vec<KernelKey> {
    let dims = |op: KernelOp| -> &[u32] {
        match op.dimensions().len() {
            1 => &[4096],
            2 => &[64, 96],
            3 => &[64, 96, 32],
            4 => &[64, 32, 256, 16],
            _ => &[2, 32, 4, 2, 16],
        }
    };
    let of = |op| key(op, dims(op)).with(if op == KernelOp::Cast { DType::Bf16 } else { DType::F32 });
    KernelOp::ALL.into_iter().map(of).collect()
}

/// The keys of narrow calls: of all operators with narrow results, and of those that add to 32-bit gradients of parameters.
fn every_narrow_operator() -> Vec<KernelKey> {
    use KernelOp as Op;
    let to_gradients = [
        Op::MatmulTn,
        Op::BiasGradient,
        Op::RmsNormBackwardWeight,
        Op::LayerNormBackwardWeight,
        Op::EmbeddingBackward,
        Op::HeadBackwardWeight,
        Op::HeadBackward,
    ];
    let wide = every_operator().into_iter().filter(|key| to_gradients.contains(&key.op));
    let wide: Vec<KernelKey> = wide.map(|key| key.with(DType::Bf16F32)).collect();
    every_operator().into_iter().map(|key| key.with(DType::Bf16)).chain(wide).collect()
}

#[test]
fn every_operator_becomes_a_call_of_its_key() {
    let keys: Vec<KernelKey> = every_operator().into_iter().chain(every_narrow_operator()).collect();
    let references: Vec<&KernelKey> = keys.iter().collect();
    let context = case::Context::of(&references);
    for key in &keys {
        let call = kernels::sketch(key, &context);
        call.check().unwrap_or_else(|error| panic!("{key}: {error}"));
        assert_eq!(crate::kernel_key(&call), *key);
    }
}

#[test]
fn narrow_operators_are_measured_as_such() {
    let keys = every_narrow_operator();
    let profile = calibrate(&CpuDevice::new(), &keys, &[], &settings(1), &mut |_| {}, None).unwrap();
    for key in &keys {
        let of_key = |row: &Row| row.median_seconds > 0.0 && row.subject == Subject::Kernel(key.clone());
        assert!(profile.rows.iter().any(of_key), "{key}");
    }
}

#[test]
fn a_profile_of_every_operator() {
    let device = CpuDevice::new();
    let keys = every_operator();
    let around = grid_around(&keys[..3]);
    let mut fractions = Vec::new();
    let profile =
        calibrate(&device, &keys, &around, &settings(devices()), &mut |p| fractions.push(p.fraction), None).unwrap();
    assert!(fractions.is_sorted() && fractions[0] == 0.0 && (fractions[fractions.len() - 1] - 1.0).abs() < 1e-9);
    assert!(profile.rows.iter().all(|row| row.median_seconds > 0.0 && row.repetitions >= 3));

    let mut seen: BTreeMap<(Class, u32), usize> = BTreeMap::new();
    for row in &profile.rows {
        *seen.entry((Class::of(&row.subject), row.busy_devices)).or_default() += 1;
    }
    for key in &keys {
        assert!(seen.contains_key(&(Class::Kernel(key.op, key.dtype), devices())), "{key}");
        assert!(seen.contains_key(&(Class::Kernel(key.op, key.dtype), 1)), "{key}");
    }
    let of_class = |class| seen.iter().filter(|((c, _), _)| *c == class).map(|(_, n)| n).sum::<usize>();
    assert!(of_class(Class::Transfer) >= 5);
    assert!(CollectiveRound::ALL.into_iter().all(|round| of_class(Class::Collective(round)) >= 10));
    for overhead in [Overhead::Op, Overhead::SharedOp, Overhead::Call, Overhead::SharedMessage] {
        assert_eq!(of_class(Class::Overhead(overhead)), 1, "{overhead:?}");
    }
    for overhead in [Overhead::Message, Overhead::Round] {
        assert_eq!(of_class(Class::Overhead(overhead)), usize::from(devices() > 1), "{overhead:?}");
    }
    for busy in [1, devices()] {
        assert_eq!(seen[&(Class::Overhead(Overhead::Interference), busy)], 1, "{busy}");
    }

    // More work takes longer, within one measurement.
    let predictor = Predictor::new(&profile).unwrap();
    let busy = devices();
    let (small, large) = (4 << 10, 16 << 20);
    assert!(predictor.transfer(small, busy).seconds < predictor.transfer(large, busy).seconds);
    for round in CollectiveRound::ALL {
        let seconds = |bytes| predictor.collective(round, 2, bytes, busy).seconds;
        assert!(seconds(small) < seconds(large), "{round:?}");
    }

    // The file of it leads back to the same figures.
    let mut file = Vec::new();
    profile.write(&mut file).unwrap();
    assert_eq!(Profile::read(&file[..]).unwrap().rows.len(), profile.rows.len());
}

#[test]
fn larger_shapes_take_longer() {
    let device = CpuDevice::new();
    let (small, large) = (key(KernelOp::MatmulNt, &[16, 32, 32]), key(KernelOp::MatmulNt, &[256, 256, 256]));
    let (few, many) = (key(KernelOp::Add, &[1 << 10]), key(KernelOp::Add, &[1 << 20]));
    let keys = [small.clone(), large.clone(), few.clone(), many.clone()];
    let profile = calibrate(&device, &keys, &[], &settings(1), &mut |_| {}, None).unwrap();
    let predictor = Predictor::new(&profile).unwrap();
    let seconds = |key| predictor.kernel(key, 1).seconds;
    assert!(seconds(&small) * 4.0 < seconds(&large), "{} {}", seconds(&small), seconds(&large));
    assert!(seconds(&few) * 4.0 < seconds(&many), "{} {}", seconds(&few), seconds(&many));
}

#[test]
fn bad_wishes_are_refused() {
    let device = CpuDevice::new();
    let refused = |keys: &[KernelKey], settings: &MeasureSettings| {
        calibrate(&device, keys, &[], settings, &mut |_| {}, None).unwrap_err().to_string()
    };
    let add = [key(KernelOp::Add, &[64])];
    let all = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    for devices in [0, all + 1] {
        let message = refused(&add, &MeasureSettings { devices, ..settings(1) });
        assert!(message.contains(&format!("from 1 to {all}")), "{message}");
    }
    assert_eq!(refused(&[], &settings(1)), "no kernels to measure");
    let huge = [key(KernelOp::MatmulNn, &[u32::MAX, u32::MAX, u32::MAX])];
    assert!(refused(&huge, &settings(1)).contains("m=4294967295"));
    let uneven = [key(KernelOp::Attention, &[1, 8, 3, 2, 4])];
    assert!(refused(&uneven, &settings(1)).contains("multiple of kv_heads"));
    let stop = AtomicBool::new(true);
    let stopped = calibrate(&device, &add, &[], &settings(1), &mut |_| {}, Some(&stop));
    assert!(matches!(stopped, Err(MeasureError::Stopped)));
}
