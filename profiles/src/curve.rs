//! Time as a function of shape, through measured points.

use crate::fit::{Line, Point};
use crate::profile::ProfileError;
use smallvec::SmallVec;

/// A measured point with its place among the shapes of its operator.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub point: Point,
    /// Logarithms of the dimensions.
    pub place: SmallVec<[f64; 5]>,
}

/// Time as a function of the bytes that are moved: straight lines between measured points in logarithms of both, so that
/// the knees where a cache ends are followed. Never falls with size. Beyond its ends it runs on as the fitted line does.
#[derive(Debug, Clone)]
pub(crate) struct Ladder {
    pub line: Line,
    /// (ln bytes, ln seconds), ascending in both.
    rungs: Vec<(f64, f64)>,
}

impl Ladder {
    pub fn new(what: &str, samples: &[Sample]) -> Result<Ladder, ProfileError> {
        let points: Vec<Point> = samples.iter().map(|s| s.point).collect();
        let line = Line::fit(what, &points)?;
        let mut places: Vec<(f64, f64)> = points.iter().map(|p| (p.bytes.ln(), p.seconds.ln())).collect();
        places.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut blocks: Vec<Block> = Vec::with_capacity(places.len());
        for (x, y) in places {
            match blocks.last_mut() {
                // Shapes of equal size: between them (as a mean of logarithms) lies what is known of that size.
                Some(block) if block.last == x => block.join(&Block::one(x, y)),
                _ => blocks.push(Block::one(x, y)),
            }
        }
        // Pool adjacent violators: the best non-decreasing values in least squares.
        let mut pooled: Vec<Block> = Vec::with_capacity(blocks.len());
        for block in blocks {
            pooled.push(block);
            while let [.., before, last] = &pooled[..]
                && before.mean() > last.mean()
            {
                let merged = last.clone();
                pooled.pop();
                if let Some(before) = pooled.last_mut() {
                    before.join(&merged);
                }
            }
        }
        let mut rungs = Vec::with_capacity(2 * pooled.len());
        for block in &pooled {
            rungs.push((block.first, block.mean()));
            if block.last > block.first {
                rungs.push((block.last, block.mean()));
            }
        }
        Ok(Ladder { line, rungs })
    }

    pub fn seconds(&self, bytes: f64) -> f64 {
        let x = bytes.max(1.0).ln();
        let above = self.rungs.partition_point(|rung| rung.0 < x);
        let beyond = |rung: (f64, f64)| {
            rung.1.exp() * self.line.seconds(0.0, bytes.max(1.0)) / self.line.seconds(0.0, rung.0.exp())
        };
        match (above.checked_sub(1).map(|below| self.rungs[below]), self.rungs.get(above)) {
            (_, Some(&rung)) if rung.0 == x => rung.1.exp(),
            (Some(low), Some(&high)) => (low.1 + (high.1 - low.1) * (x - low.0) / (high.0 - low.0)).exp(),
            (None, Some(&first)) => beyond(first),
            (Some(last), None) => beyond(last),
            (None, None) => self.line.seconds(0.0, bytes),
        }
    }
}

/// Neighbouring points that share one value.
#[derive(Debug, Clone)]
struct Block {
    first: f64,
    last: f64,
    sum: f64,
    count: f64,
}

impl Block {
    fn one(x: f64, y: f64) -> Block {
        Block { first: x, last: x, sum: y, count: 1.0 }
    }

    fn mean(&self) -> f64 {
        self.sum / self.count
    }

    fn join(&mut self, next: &Block) {
        self.last = next.last;
        self.sum += next.sum;
        self.count += next.count;
    }
}

/// Time as a function of several dimensions: the fitted line, corrected by what it misses at the measured points
/// nearby (inverse square of the distance in logarithms of the dimensions).
#[derive(Debug, Clone)]
pub(crate) struct Surface {
    pub line: Line,
    /// Place, and log of measured over fitted time.
    misses: Vec<(SmallVec<[f64; 5]>, f64)>,
}

impl Surface {
    pub fn new(what: &str, samples: &[Sample]) -> Result<Surface, ProfileError> {
        let points: Vec<Point> = samples.iter().map(|s| s.point).collect();
        let line = Line::fit(what, &points)?;
        let miss = |s: &Sample| (s.point.seconds / line.seconds(s.point.flops, s.point.bytes)).ln();
        Ok(Surface { misses: samples.iter().map(|s| (s.place.clone(), miss(s))).collect(), line })
    }

    pub fn seconds(&self, flops: f64, bytes: f64, place: &[f64]) -> f64 {
        let (mut sum, mut weights) = (0.0, 0.0);
        for (there, miss) in &self.misses {
            let distance: f64 = there.iter().zip(place).map(|(a, b)| (a - b).powi(2)).sum();
            // At a measured point its own miss outweighs all others by far.
            let weight = 1.0 / (distance + 1e-12);
            sum += weight * miss;
            weights += weight;
        }
        let correction = if weights > 0.0 { (sum / weights).exp() } else { 1.0 };
        self.line.seconds(flops, bytes) * correction
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(flops: f64, bytes: f64, seconds: f64) -> Sample {
        Sample { point: Point { flops, bytes, seconds }, place: SmallVec::from_slice(&[bytes.ln()]) }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_ladder_meets_rising_points_and_never_falls(
            steps in prop::collection::vec((0.05f64..2.0, 0.0f64..2.0), 1..12),
            at in 0.0f64..1.0,
        ) {
            let mut samples = Vec::new();
            let (mut x, mut y) = (8.0f64, -14.0f64);
            for (dx, dy) in steps {
                (x, y) = (x + dx, y + dy);
                samples.push(sample(0.0, x.exp(), y.exp()));
            }
            let ladder = Ladder::new("test", &samples).unwrap();
            for s in &samples {
                prop_assert!((ladder.seconds(s.point.bytes) / s.point.seconds - 1.0).abs() < 1e-9);
            }
            // From well below the first point to well above the last.
            let mut before = 0.0;
            for n in 0..200 {
                let seconds = ladder.seconds((6.0 + (x - 4.0) * (f64::from(n) + at) / 200.0).exp());
                prop_assert!(seconds >= before * (1.0 - 1e-12) && seconds > 0.0);
                before = seconds;
            }
        }
    }

    #[test]
    fn between_two_points_a_ladder_is_straight_in_logarithms() {
        let ladder = Ladder::new("test", &[sample(0.0, 1e4, 1e-6), sample(0.0, 1e6, 1e-4)]).unwrap();
        assert!((ladder.seconds(1e5) / 1e-5 - 1.0).abs() < 1e-9);
    }

    #[test]
    fn noise_that_falls_is_pooled() {
        let samples = [(1e4, 1e-6), (2e4, 4e-6), (3e4, 1e-6), (4e4, 8e-6)].map(|(b, s)| sample(0.0, b, s));
        let ladder = Ladder::new("test", &samples).unwrap();
        // The geometric mean of 4 and 1 microseconds.
        assert!((ladder.seconds(2e4) / 2e-6 - 1.0).abs() < 1e-9);
        assert!((ladder.seconds(2.5e4) / 2e-6 - 1.0).abs() < 1e-9);
        assert!((ladder.seconds(4e4) / 8e-6 - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_surface_meets_its_points_and_carries_their_miss_to_neighbours() {
        // Arithmetic at 1e11 flop/s, but twice as slow in one corner.
        let mut samples = Vec::new();
        for m in [64.0f64, 256.0, 1024.0] {
            for k in [64.0f64, 256.0, 1024.0] {
                let (flops, bytes) = (2.0 * m * 256.0 * k, 4.0 * (m * k + 256.0 * k + m * 256.0));
                let slow = if m < 100.0 && k < 100.0 { 2.0 } else { 1.0 };
                let point = Point { flops, bytes, seconds: slow * flops / 1e11 };
                samples.push(Sample { point, place: SmallVec::from_slice(&[m.ln(), k.ln()]) });
            }
        }
        let surface = Surface::new("test", &samples).unwrap();
        for s in &samples {
            let found = surface.seconds(s.point.flops, s.point.bytes, &s.place);
            assert!((found / s.point.seconds - 1.0).abs() < 1e-6, "{s:?} {found}");
        }
        let at = |m: f64, k: f64| {
            let (flops, bytes) = (2.0 * m * 256.0 * k, 4.0 * (m * k + 256.0 * k + m * 256.0));
            surface.seconds(flops, bytes, &[m.ln(), k.ln()]) / (flops / 1e11)
        };
        assert!(at(70.0, 70.0) > 1.7, "{}", at(70.0, 70.0));
        assert!((at(700.0, 700.0) - 1.0).abs() < 0.15, "{}", at(700.0, 700.0));
    }
}
