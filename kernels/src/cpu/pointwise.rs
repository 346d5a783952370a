//! Sums of equal shapes and biases, and casts.

use super::memory::Narrow;
use super::vector::vectorised;

/// Rows that [`bias_gradient`] adds before it touches the result: fewer passes over it, and shorter chains of rounding.
const ROWS: usize = 8;

vectorised! {
    /// `into += x`.
    pub(super) fn add(x: &[f32], into: &mut [f32]) {
        for (into, &x) in into.iter_mut().zip(x) {
            *into += x;
        }
    }

    /// `into += x`.
    pub(super) fn add_f64(x: &[f64], into: &mut [f64]) {
        for (into, &x) in into.iter_mut().zip(x) {
            *into += x;
        }
    }

    /// Rounds to nearest even; what is not a number stays so.
    pub(super) fn narrow(from: &[f32], to: &mut [Narrow]) {
        for (to, from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            *to = Narrow((if from.is_nan() { 0x7fff_0000 } else { rounded } >> 16) as u16);
        }
    }

    pub(super) fn widen(from: &[Narrow], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.0) << 16);
        }
    }

    /// `out = a + b`.
    pub(super) fn sum(a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
            *out = a + b;
        }
    }

    /// Each row of `x` plus `bias`.
    pub(super) fn add_bias(x: &mut [f32], bias: &[f32]) {
        for row in x.chunks_exact_mut(bias.len()) {
            for (x, &bias) in row.iter_mut().zip(bias) {
                *x += bias;
            }
        }
    }

    /// `d_bias +=` the sum of the rows of `dy`.
    pub(super) fn bias_gradient(dy: &[f32], d_bias: &mut [f32]) {
        let cols = d_bias.len();
        let (groups, rest) = dy.split_at(dy.len() - dy.len() % (ROWS * cols));
        for group in groups.chunks_exact(ROWS * cols) {
            let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &group[row * cols..(row + 1) * cols]);
            for (col, d_bias) in d_bias.iter_mut().enumerate() {
                let pairs = [
                    rows[0][col] + rows[1][col],
                    rows[2][col] + rows[3][col],
                    rows[4][col] + rows[5][col],
                    rows[6][col] + rows[7][col],
                ];
                *d_bias += (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
            }
        }
        for row in rest.chunks_exact(cols) {
            for (d_bias, &dy) in d_bias.iter_mut().zip(row) {
                *d_bias += dy;
            }
        }
    }
}
