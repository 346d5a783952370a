//! Arenas built moment by moment: buffers get their places in the order in which they come, as in a run, but many arenas are built side by
//! side and those with the least broken-up room go on (a beam search). What repeats from microbatch to microbatch, as in a pipeline, is
//! packed well that way, because a pattern that fits once fits again.

use super::Life;
use std::cmp::Reverse;
use std::collections::HashSet;

/// What lives at a moment: begin and end of its place, and its last moment.
type Held = (u64, u64, u32);

/// An arena under construction.
struct Partial {
    /// In order of place.
    held: Vec<Held>,
    /// Its last decision.
    decision: usize,
}

/// An arena with one more life.
struct Grown {
    promise: (u64, u64),
    held: Vec<Held>,
    /// The decision before, and the place of the life.
    decision: (usize, u64),
}

/// What counts in an arena that goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taste {
    /// Large gaps.
    Gaps,
    /// Gaps as well as neighbours that go at about the same time, and so leave a large gap.
    Neighbours,
}

/// How good it is to go on from an arena with `room` bytes.
fn promise(held: &[Held], room: u64, taste: Taste) -> (u64, u64) {
    let (mut gaps, mut free) = (0, 0);
    for &(begin, end, _) in held.iter().chain([&(room, room, 0)]) {
        let gap = ((begin - free) as u128 * 65_536 / u128::from(room.max(1))) as u64;
        gaps += gap * gap;
        free = end;
    }
    let together = |pair: &[Held]| match pair[0].1 == pair[1].0 {
        true => 65_536 / (1 + u64::from(pair[0].2.abs_diff(pair[1].2))),
        false => 0,
    };
    let together: u64 = held.windows(2).map(together).sum();
    match taste {
        Taste::Gaps => (gaps, together),
        Taste::Neighbours => (gaps / 65_536 + together * 16, gaps),
    }
}

/// Places for all lives within `room` bytes, if `width` arenas side by side find them before the `effort` is used up: so many places
/// of what lives beside what are looked at.
pub(super) fn pack(lives: &[Life], room: u64, width: usize, taste: Taste, effort: &mut u64) -> Option<Vec<u64>> {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&n| (lives[n].from, Reverse(lives[n].bytes)));
    // Decisions: the one before, and the place that was chosen.
    let mut decisions: Vec<(usize, u64)> = vec![(0, 0)];
    let mut arenas = vec![Partial { held: Vec::new(), decision: 0 }];
    for &n in &order {
        let life = lives[n];
        let mut next: Vec<Grown> = Vec::new();
        let mut seen: HashSet<Vec<Held>> = HashSet::new();
        for arena in &arenas {
            let held: Vec<Held> = arena.held.iter().copied().filter(|held| held.2 >= life.from).collect();
            *effort = effort.checked_sub((held.len() * held.len() + 1) as u64)?;
            let mut free = 0;
            for (index, begin) in held.iter().map(|held| held.0).chain([room]).enumerate() {
                let gap = begin - free;
                // At either end of the gap.
                let ends = if gap > life.bytes { &[free, begin - life.bytes.min(gap)][..] } else { &[free][..] };
                for &at in ends.iter().filter(|_| gap >= life.bytes) {
                    let mut grown = held.clone();
                    grown.insert(index, (at, at + life.bytes, life.until));
                    if seen.insert(grown.clone()) {
                        let promise = promise(&grown, room, taste);
                        next.push(Grown { promise, held: grown, decision: (arena.decision, at) });
                    }
                }
                free = held.get(index).map_or(free, |held| held.1);
            }
        }
        next.sort_by_key(|grown| Reverse(grown.promise));
        next.truncate(width);
        arenas.clear();
        for Grown { held, decision, .. } in next {
            decisions.push(decision);
            arenas.push(Partial { held, decision: decisions.len() - 1 });
        }
    }
    let mut decision = arenas.first()?.decision;
    let mut places = vec![0; lives.len()];
    for &n in order.iter().rev() {
        (decision, places[n]) = decisions[decision];
    }
    Some(places)
}
