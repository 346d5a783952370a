//! Shapes around those of a job, so that what is nearly measured is well interpolated.

use paceline_profiles::{Family, KernelKey, KernelOp};
use std::collections::BTreeSet;

/// Shapes next to `keys` and not among them: with half and twice the tokens, and for operators whose time is that of
/// moving bytes, a quarter and four times as many. In order, without repetition.
pub fn grid_around(keys: &[KernelKey]) -> Vec<KernelKey> {
    let known: BTreeSet<&KernelKey> = keys.iter().collect();
    let mut around = BTreeSet::new();
    for key in keys {
        let factors: &[(u64, u64)] =
            if key.op.family() == Family::Memory { &[(1, 4), (1, 2), (2, 1), (4, 1)] } else { &[(1, 2), (2, 1)] };
        for &(times, over) in factors {
            let mut near = key.clone();
            let scale = |dim: &mut u32| {
                let scaled = u64::from(*dim) * times;
                // Rounding would invent shapes that no job has.
                let exact = scaled.is_multiple_of(over).then_some(scaled / over);
                exact.and_then(|d| u32::try_from(d).ok()).filter(|&d| d > 0).map(|d| *dim = d).is_some()
            };
            if scale(&mut near.dims[tokens(key.op)]) && !known.contains(&near) {
                around.insert(near);
            }
        }
    }
    around.into_iter().collect()
}

/// The dimension that grows with the microbatch.
fn tokens(op: KernelOp) -> usize {
    match op {
        // Weight gradients sum over tokens.
        KernelOp::MatmulTn => 2,
        // Sequences of one microbatch.
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(op: KernelOp, dims: &[u32]) -> KernelKey {
        KernelKey::new(op, dims).unwrap()
    }

    #[test]
    fn tokens_vary_and_weights_do_not() {
        let around = grid_around(&[
            key(KernelOp::MatmulNt, &[256, 768, 64]),
            key(KernelOp::MatmulNt, &[512, 768, 64]),
            key(KernelOp::MatmulTn, &[768, 64, 256]),
            key(KernelOp::Attention, &[1, 256, 4, 4, 64]),
        ]);
        let expected = [
            key(KernelOp::MatmulNt, &[128, 768, 64]),
            key(KernelOp::MatmulNt, &[1024, 768, 64]),
            key(KernelOp::MatmulTn, &[768, 64, 128]),
            key(KernelOp::MatmulTn, &[768, 64, 512]),
            key(KernelOp::Attention, &[2, 256, 4, 4, 64]),
        ];
        assert_eq!(around, expected);
    }

    #[test]
    fn sizes_that_do_not_exist_are_left_out() {
        assert_eq!(grid_around(&[key(KernelOp::Add, &[6])]), [3, 12, 24].map(|n| key(KernelOp::Add, &[n])));
        let huge = grid_around(&[key(KernelOp::Zero, &[u32::MAX])]);
        assert!(huge.is_empty(), "{huge:?}");
    }
}
