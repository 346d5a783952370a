//! One arena per rank: every buffer gets its place before the run, so that what is predicted is one allocation.
//!
//! Buffers are intervals of issue order ([`crate::memory`]); two that live together must not share a byte. The smallest arena for
//! given intervals is hard to find (it is dynamic storage allocation, Garey and Johnson 1979, problem SR2); no arena is smaller than
//! the peak of live bytes, and the overhead over it is reported. Two searches complement each other: over orders in which buffers are
//! placed ([`order`]), and over places in the order of time ([`time`]), which is tried where the first leaves more than one part in a
//! hundred. Both end after a number of steps, not by a clock: the same program gets the same arena.

mod order;
mod time;

use crate::program::RankProgram;
use time::Taste;

/// The time that a piece of memory is needed, and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// First moment.
    pub from: u32,
    /// Last moment, included.
    pub until: u32,
    /// Size.
    pub bytes: u64,
}

impl Life {
    fn meets(&self, other: &Life) -> bool {
        self.from <= other.until && other.from <= self.until
    }
}

/// Where everything lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arena {
    /// Offsets by buffer; `None` for those that never live.
    pub offsets: Vec<Option<u64>>,
    /// Size of the arena.
    pub bytes: u64,
    /// Highest sum of live bytes, without alignment: no arena is smaller.
    pub peak: u64,
}

impl Arena {
    /// The part of the arena that the peak does not need, relative to the peak.
    pub fn overhead(&self) -> f64 {
        if self.peak == 0 { 0.0 } else { (self.bytes - self.peak) as f64 / self.peak as f64 }
    }
}

/// Places the buffers of a rank at multiples of `alignment` (a power of two).
pub fn plan(rank: &RankProgram, alignment: u64) -> Arena {
    let end = rank.ops.len() as u32;
    let mut lives: Vec<Option<Life>> = vec![None; rank.buffers.len()];
    let mut begin = |buffer: usize, from| {
        lives[buffer] = Some(Life { from, until: end, bytes: rank.buffers[buffer].bytes });
    };
    // Persistent buffers live before the first op, too: nothing may be put in their place between steps.
    rank.persistent.iter().for_each(|buffer| begin(buffer.index(), 0));
    for (number, op) in (0..).zip(&rank.ops) {
        op.alloc.iter().for_each(|buffer| begin(buffer.index(), number));
    }
    for (number, op) in (0..).zip(&rank.ops) {
        for buffer in &op.free {
            if let Some(life) = &mut lives[buffer.index()] {
                life.until = number;
            }
        }
    }
    let present: Vec<usize> = (0..lives.len()).filter(|&buffer| lives[buffer].is_some()).collect();
    let (places, bytes) = pack(&lives.iter().flatten().copied().collect::<Vec<_>>(), alignment);
    let mut offsets = vec![None; lives.len()];
    for (&buffer, place) in present.iter().zip(places) {
        offsets[buffer] = Some(place);
    }
    Arena { offsets, bytes, peak: peak(lives.iter().flatten().copied()) }
}

/// Highest sum of bytes that live at one moment.
pub fn peak(lives: impl Iterator<Item = Life>) -> u64 {
    // Of one moment all begins come before all ends.
    let mut changes: Vec<(u32, bool, u64)> =
        lives.flat_map(|life| [(life.from, false, life.bytes), (life.until, true, life.bytes)]).collect();
    changes.sort_unstable();
    let (mut live, mut peak) = (0, 0);
    for (_, ends, bytes) in changes {
        if ends {
            live -= bytes;
        } else {
            live += bytes;
            peak = peak.max(live);
        }
    }
    peak
}

/// Beyond this part of the arena, the search by order is followed by one by time.
const ENOUGH: u64 = 100;
/// How many arenas that search builds side by side, and what counts in them.
const SEARCHES: [(usize, Taste); 4] =
    [(16, Taste::Gaps), (16, Taste::Neighbours), (64, Taste::Gaps), (64, Taste::Neighbours)];
/// It tries rooms that grow by one part in this of the arena.
const STEPS: u64 = 400;

/// Of the search by time: some tenths of a second.
const EFFORT: u64 = 80_000_000;

/// Offsets of all lives, and the bytes that they take together.
pub fn pack(lives: &[Life], alignment: u64) -> (Vec<u64>, u64) {
    let rounded: Vec<Life> =
        lives.iter().map(|life| Life { bytes: life.bytes.next_multiple_of(alignment), ..*life }).collect();
    // What meets everything lies at the bottom, and the rest is packed above.
    let first_end = rounded.iter().map(|life| life.until).min().unwrap_or(0);
    let last_begin = rounded.iter().map(|life| life.from).max().unwrap_or(0);
    let (mut places, mut bottom, mut rest) = (vec![0; lives.len()], 0, Vec::new());
    for (n, life) in rounded.iter().enumerate() {
        if life.from <= first_end && life.until >= last_begin {
            places[n] = bottom;
            bottom += life.bytes;
        } else {
            rest.push(n);
        }
    }
    let above: Vec<Life> = rest.iter().map(|&n| rounded[n]).collect();
    let bound = peak(above.iter().copied());
    let (mut found, mut bytes) = order::pack(&above, bound);
    let mut effort = EFFORT;
    for (width, taste) in SEARCHES {
        if bytes <= bound + (bottom + bound) / ENOUGH {
            break;
        }
        let rooms = (0..STEPS).map(|step| {
            let extra = (bottom + bound) * step / STEPS;
            bound + extra - extra % alignment
        });
        for room in rooms.take_while(|&room| room < bytes) {
            if let Some(places) = time::pack(&above, room, width, taste, &mut effort) {
                let ends = places.iter().zip(&above).map(|(place, life)| place + life.bytes);
                bytes = ends.max().unwrap_or(0);
                found = places;
                break;
            }
        }
    }
    rest.into_iter().zip(found).for_each(|(n, place)| places[n] = bottom + place);
    (places, bottom + bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn life(from: u32, until: u32, bytes: u64) -> Life {
        Life { from, until, bytes }
    }

    /// No two that live together share a byte, everything is aligned and inside, and the arena ends with something.
    fn check(lives: &[Life], alignment: u64) -> u64 {
        let (places, bytes) = pack(lives, alignment);
        assert_eq!(places.len(), lives.len());
        for (n, (a, &at)) in lives.iter().zip(&places).enumerate() {
            assert_eq!(at % alignment, 0);
            assert!(at + a.bytes <= bytes);
            for (b, &other) in lives[n + 1..].iter().zip(&places[n + 1..]) {
                assert!(
                    !a.meets(b) || at + a.bytes <= other || other + b.bytes <= at,
                    "{a:?} at {at}, {b:?} at {other}"
                );
            }
        }
        let end = lives.iter().zip(&places).map(|(life, at)| at + life.bytes.next_multiple_of(alignment)).max();
        assert_eq!(bytes, end.unwrap_or(0));
        assert!(bytes >= peak(lives.iter().copied()));
        bytes
    }

    #[test]
    fn the_peak_counts_what_one_moment_sees() {
        // At moment 2 the first two are still there when the third comes.
        let lives = [life(0, 2, 5), life(1, 2, 7), life(2, 4, 11), life(3, 3, 100)];
        assert_eq!(peak(lives.into_iter()), 111);
        assert_eq!(peak(lives[..3].iter().copied()), 23);
        assert_eq!(peak(std::iter::empty()), 0);
    }

    #[test]
    fn small_ones_fill_the_place_of_a_large_one() {
        assert_eq!(check(&[life(0, 1, 64), life(2, 5, 32), life(3, 6, 32)], 1), 64);
        assert_eq!(check(&[], 64), 0);
        assert_eq!(check(&[life(0, 0, 0), life(0, 0, 1)], 64), 64);
    }

    /// Forward then backward of a pipeline: activations of different sizes come and go in two orders, workspaces in between.
    #[test]
    fn activations_and_workspaces_of_a_pipeline_pack_without_loss() {
        for warm_up in 1..6u32 {
            let mut lives = vec![life(0, 400, 1000), life(0, 400, 3000)];
            for microbatch in 0..12u32 {
                let forward = 2 * microbatch;
                let backward = 2 * (microbatch + warm_up) + 1;
                lives.push(life(forward, backward, 700));
                lives.push(life(forward, backward, 130));
                lives.push(life(forward, forward, 400));
                lives.push(life(backward, backward, 900));
            }
            assert_eq!(check(&lives, 1), peak(lives.iter().copied()), "{warm_up}");
        }
    }

    proptest! {
        #[test]
        fn nothing_overlaps(
            lives in prop::collection::vec((0u32..40, 0u32..20, 0u64..2000), 0..60),
            shift in 0u32..9,
        ) {
            let lives: Vec<Life> = lives.into_iter().map(|(from, length, bytes)| life(from, from + length, bytes)).collect();
            check(&lives, 1 << shift);
        }

        /// A rectangle that was cut into pieces, so that an arena without gaps exists: it is found within half of it.
        #[test]
        fn what_can_be_packed_without_gaps_nearly_is(cuts in prop::collection::vec((0usize..1000, 1u64..100, any::<bool>()), 0..40)) {
            let mut pieces = vec![life(0, 63, 1 << 20)];
            for (which, percent, in_time) in cuts {
                let n = which % pieces.len();
                let piece = pieces[n];
                let span = piece.until - piece.from;
                if in_time && span > 0 {
                    let middle = piece.from + (u64::from(span) * percent / 100) as u32;
                    pieces[n].until = middle;
                    pieces.push(life(middle + 1, piece.until, piece.bytes));
                } else if piece.bytes > 1 {
                    let low = (piece.bytes * percent / 100).clamp(1, piece.bytes - 1);
                    pieces[n].bytes = low;
                    pieces.push(life(piece.from, piece.until, piece.bytes - low));
                }
            }
            prop_assert_eq!(peak(pieces.iter().copied()), 1 << 20);
            prop_assert!(check(&pieces, 1) <= (1 << 20) * 3 / 2);
        }
    }
}
