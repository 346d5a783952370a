//! What repeated timings say.

/// Median and spread of repeated timings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Summary {
    /// Seconds.
    pub median: f64,
    /// Distance between the quartiles, in seconds.
    pub spread: f64,
    /// How many.
    pub count: u64,
}

impl Summary {
    /// Of at least one timing in seconds; `None` without any.
    pub fn of(mut seconds: Vec<f64>) -> Option<Summary> {
        seconds.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let place = part * (seconds.len() - 1) as f64;
            let (below, above) = (seconds[place.floor() as usize], seconds[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        if seconds.is_empty() {
            return None;
        }
        // The clock counts nanoseconds: what took less than one did take time.
        Some(Summary { median: at(0.5).max(1e-9), spread: at(0.75) - at(0.25), count: seconds.len() as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_quartiles() {
        assert_eq!(Summary::of(vec![]), None);
        assert_eq!(Summary::of(vec![2.0]), Some(Summary { median: 2.0, spread: 0.0, count: 1 }));
        let summary = Summary::of(vec![5.0, 1.0, 3.0, 2.0, 100.0]).unwrap();
        assert_eq!((summary.median, summary.spread, summary.count), (3.0, 3.0, 5));
        assert_eq!(Summary::of(vec![1.0, 2.0]).unwrap().median, 1.5);
    }
}
