//! Number formats: those of the program as those of the kernels, and bytes of either width as 32-bit values.

use half::bf16;
use paceline_kernels::DType;
use paceline_sim::program::Element;
use std::ops::AddAssign;

/// The kernels' name of an element.
pub(crate) fn dtype(element: Element) -> DType {
    match element {
        Element::F32 => DType::F32,
        Element::Bf16 => DType::BF16,
        Element::F64 => DType::F64,
        Element::U32 => DType::U32,
    }
}

/// The values in bytes of `F32` or `BF16`.
pub(crate) fn values(bytes: &[u8], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::BF16 => bytes.as_chunks::<2>().0.iter().map(|&b| bf16::from_ne_bytes(b).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_ne_bytes(b)).collect(),
    }
}

/// Values as bytes of `F32` or, rounded to nearest even, of `BF16`.
pub(crate) fn bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_ne_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_ne_bytes()).collect(),
    }
}

/// An element of a sum: narrow ones are added in 32 bits and rounded once, when the sum is whole.
pub trait Addend: Copy {
    /// What sums are made in.
    type Sum: Copy + Default + AddAssign;

    /// The element as a sum.
    fn widen(self) -> Self::Sum;

    /// A sum as an element.
    fn narrow(sum: Self::Sum) -> Self;
}

impl Addend for f32 {
    type Sum = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(sum: f32) -> f32 {
        sum
    }
}

impl Addend for f64 {
    type Sum = f64;

    #[inline(always)]
    fn widen(self) -> f64 {
        self
    }

    #[inline(always)]
    fn narrow(sum: f64) -> f64 {
        sum
    }
}

impl Addend for bf16 {
    type Sum = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn narrow(sum: f32) -> bf16 {
        bf16::from_f32(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_values_lead_back_and_wide_ones_are_rounded_to_even() {
        // 1 + 2^-8 lies between 1 and 1 + 2^-7: the even one is 1. 1 + 3 * 2^-8 goes up to 1 + 2^-6.
        let wide = [1.0, 1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8), -0.5, f32::INFINITY];
        let rounded = [1.0, 1.0, 1.0 + 2f32.powi(-6), -0.5, f32::INFINITY];
        assert_eq!(values(&bytes(&wide, DType::BF16), DType::BF16), rounded);
        assert_eq!(values(&bytes(&wide, DType::F32), DType::F32), wide);
        assert!(values(&bytes(&[f32::NAN], DType::BF16), DType::BF16)[0].is_nan());
    }
}
