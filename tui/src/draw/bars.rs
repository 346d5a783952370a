//! Stacked bars of cells.

/// Cells of each part of a bar in which `scale` makes `width` cells. Ends of parts are rounded, not their lengths, so that
/// the whole is as long as its sum; a whole that is longer than the bar is cut.
pub fn stack(parts: &[f64], scale: f64, width: usize) -> Vec<usize> {
    if scale.is_nan() || scale <= 0.0 {
        return vec![0; parts.len()];
    }
    let end = |sum: f64| ((sum / scale * width as f64).round() as usize).min(width);
    let mut sum = 0.0;
    parts
        .iter()
        .map(|part| {
            let from = end(sum);
            sum += part.max(0.0);
            end(sum) - from
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_is_as_long_as_its_sum() {
        assert_eq!(stack(&[1.0, 1.0, 2.0], 4.0, 8), [2, 2, 4]);
        assert_eq!(stack(&[0.4, 0.4, 0.4], 4.0, 4), [0, 1, 0]);
        assert_eq!(stack(&[3.0, 3.0], 4.0, 4), [3, 1]);
        assert_eq!(stack(&[1.0], 0.0, 4), [0]);
        let thirds = stack(&[1.0; 3], 3.0, 10);
        assert_eq!(thirds.iter().sum::<usize>(), 10);
    }
}
