//! Which device holds which stage: loop, V, wave, and two opposite pipelines.

use crate::order::Placement;

/// Stage `k * p + i` on device `i` (chunk `k` of it), `devices * chunks` stages.
pub fn looped(devices: u32, chunks: u32) -> Placement {
    Placement { name: "loop".into(), device_of_stage: (0..chunks).flat_map(|_| 0..devices).collect(), copies: 1 }
}

/// Two stages per device: down the devices and back, so that the first and the last stage share device 0.
pub fn v_shape(devices: u32) -> Placement {
    Placement { name: "v".into(), device_of_stage: (0..devices).chain((0..devices).rev()).collect(), copies: 1 }
}

/// `chunks` stages per device, down and up the devices in turn (Hanayo's wave, arXiv 2308.15762): one V after the other. Of an
/// even number of chunks every device has the same sum of lifespans.
pub fn wave(devices: u32, chunks: u32) -> Placement {
    if chunks == 2 {
        return v_shape(devices);
    }
    let stage = |chunk: u32, place: u32| if chunk.is_multiple_of(2) { place } else { devices - 1 - place };
    let device_of_stage = (0..chunks).flat_map(|chunk| (0..devices).map(move |place| stage(chunk, place)));
    Placement { name: "wave".into(), device_of_stage: device_of_stage.collect(), copies: 1 }
}

/// Two copies of a pipeline of `devices` stages, the second one running from the last device to the first.
pub fn bidirectional(devices: u32) -> Placement {
    Placement {
        name: "bidirectional".into(),
        device_of_stage: (0..devices).chain((0..devices).rev()).collect(),
        copies: 2,
    }
}
