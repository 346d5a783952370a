//! Arithmetic that the compiler turns into vector instructions: the exponential and what is made of it, sums and maxima
//! over slices. All of it is inlined into functions that [`vectorised!`] compiles for several instruction sets.

/// Compiles functions for AVX-512, for AVX2 with FMA, and for the baseline; which one runs is decided once, by what the
/// machine has. Loops within are plain Rust: the compiler vectorises them for each.
macro_rules! vectorised {
    ($($function:item)*) => {
        $(
            #[multiversion::multiversion(targets(
                "x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma",
                "x86_64+avx2+fma",
            ))]
            $function
        )*
    };
}
pub(super) use vectorised;

/// Elements that reductions keep apart: four registers of the widest kind, so that additions overlap.
const LANES: usize = 64;

/// `e^x`, within two units in the last place of the exact value for results in the normal range; 0 below it, infinity
/// above, NaN of NaN.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, a minimax polynomial for `e^r`, and `2^n` by its exponent bits.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// Ln 2 in two parts, the first with trailing zero bits: `n` times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Logarithms of the least normal number and of the largest.
    const LEAST: f32 = -87.336_54;
    const MOST: f32 = 88.722_83;

    // Comparisons that keep NaN, unlike `f32::clamp` of the bounds.
    let clamped = if x < LEAST { LEAST } else { x };
    let clamped = if clamped > MOST { MOST } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_HIGH, clamped);
    let r = n.mul_add(-LN2_LOW, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors, because n reaches 128.
    let bits = shifted.to_bits() as i32 - ROUND.to_bits() as i32;
    let half = bits >> 1;
    let power = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    let y = p * power(half) * power(bits - half);
    let y = if x < LEAST { 0.0 } else { y };
    if x > MOST { f32::INFINITY } else { y }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn fold<const LANES: usize>(lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = combine(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Sums over the elements of `M` slices of the length of the first, `N` at once: `term` maps the elements at one index to
/// the `N` terms. Terms are added in an order that depends on the length alone.
#[inline(always)]
pub(super) fn sums<const N: usize, const M: usize>(
    slices: [&[f32]; M],
    term: impl Fn([f32; M]) -> [f32; N],
) -> [f32; N] {
    let len = slices[0].len();
    let split = slices.map(|slice| slice[..len].as_chunks::<LANES>());
    let mut lanes = [[0.0f32; LANES]; N];
    for chunk in 0..len / LANES {
        let chunks = split.map(|(whole, _)| &whole[chunk]);
        // One sum after the other: loops over neighbouring lanes are what the compiler vectorises.
        for (n, lanes) in lanes.iter_mut().enumerate() {
            for (lane, sum) in lanes.iter_mut().enumerate() {
                *sum += term(chunks.map(|chunk| chunk[lane]))[n];
            }
        }
    }
    for lane in 0..len % LANES {
        let terms = term(split.map(|(_, rest)| rest[lane]));
        for (lanes, term) in lanes.iter_mut().zip(terms) {
            lanes[lane] += term;
        }
    }
    lanes.map(|lanes| fold(lanes, |a, b| a + b))
}

/// The largest element, negative infinity of none. NaN elements are ignored.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, value);
    }
    fold(lanes, larger)
}
