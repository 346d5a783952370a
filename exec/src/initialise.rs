//! First values of parameters: a pure function of the seed and the parameter's global name, so that every layout of a
//! model starts from the same bits. They are numbers that bfloat16 holds, so that every precision starts from the same model.

use crate::data::mix;
use crate::seam::Start;
use half::bf16;

/// Fills a parameter.
pub(crate) fn fill(start: Start, name: &str, seed: u64, out: &mut [f32]) {
    match start {
        Start::Constant(value) => out.fill(bf16::from_f32(value).to_f32()),
        Start::Normal { deviation } => {
            let stream = name.bytes().fold(mix(seed), |hash, byte| mix(hash ^ u64::from(byte)));
            // Box and Muller 1958: two uniform values give two normal ones.
            for (pair, values) in out.chunks_mut(2).enumerate() {
                let first = uniform(mix(stream ^ (2 * pair as u64)));
                let second = uniform(mix(stream ^ (2 * pair as u64 + 1)));
                let radius = deviation * (-2.0 * first.ln()).sqrt();
                let (sine, cosine) = (std::f64::consts::TAU * second).sin_cos();
                values
                    .iter_mut()
                    .zip([radius * cosine, radius * sine])
                    .for_each(|(v, x)| *v = bf16::from_f64(x).to_f32());
            }
        }
    }
}

/// 53 bits as a value in `(0, 1]`.
fn uniform(bits: u64) -> f64 {
    ((bits >> 11) + 1) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_values_have_their_moments_and_depend_on_name_and_seed() {
        let draw = |name: &str, seed| {
            let mut values = vec![0.0f32; 100_001];
            fill(Start::Normal { deviation: 0.02 }, name, seed, &mut values);
            values
        };
        let a = draw("blocks.0.mlp.up.weight", 1);
        let n = a.len() as f64;
        let moment = |k: i32| a.iter().map(|&x| (f64::from(x) / 0.02).powi(k)).sum::<f64>() / n;
        // Standard errors of the first four moments of n normal values are below 0.035.
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.03, "{} {}", moment(1), moment(2));
        assert!(moment(3).abs() < 0.06 && (moment(4) - 3.0).abs() < 0.2, "{} {}", moment(3), moment(4));
        assert_eq!(a, draw("blocks.0.mlp.up.weight", 1));
        assert_ne!(a[..100], draw("blocks.1.mlp.up.weight", 1)[..100]);
        assert_ne!(a[..100], draw("blocks.0.mlp.up.weight", 2)[..100]);
        assert!(a.iter().all(|&x| x.is_finite() && bf16::from_f32(x).to_f32() == x));
    }
}
