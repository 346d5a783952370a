//! Arenas by order: buffers are placed greedily, each into the smallest gap that fits, in several orders; then those that stick out are
//! placed earlier, again and again.

use super::Life;
use std::cmp::Reverse;

/// Pairs of lives that are looked at in search of a better order: some hundredths of a second.
const EFFORT: usize = 6_000_000;
/// Rounds of the search, where the effort allows them.
const ROUNDS: usize = 400;
/// As long as the arena is larger than the bound by more than one part in this, both are so many times as large.
const GOAL: u64 = 100;
const PATIENCE: usize = 4;

/// An order of lives, their places in it, and the bytes that they take together.
#[derive(Clone)]
struct Placed {
    order: Vec<usize>,
    places: Vec<u64>,
    bytes: u64,
}

/// Offsets of all lives, and the bytes that they take together, at least `bound`.
pub(super) fn pack(lives: &[Life], bound: u64) -> (Vec<u64>, u64) {
    let mut best: Option<Placed> = None;
    for order in first_orders(lives) {
        let placed = place(lives, order);
        if best.as_ref().is_none_or(|best| placed.bytes < best.bytes) {
            best = Some(placed);
        }
        if best.as_ref().is_some_and(|best| best.bytes == bound) {
            break;
        }
    }
    best.map_or((Vec::new(), 0), |best| {
        let best = improve(lives, best, bound);
        (best.places, best.bytes)
    })
}

/// What is largest is hardest to place; what lives longest lies at the bottom; then both together; early ones first is what a run without a
/// plan would do. Among equals, each keeps the order before.
fn first_orders(lives: &[Life]) -> [Vec<usize>; 4] {
    let length = |n: usize| u64::from(lives[n].until - lives[n].from) + 1;
    let size = |n: usize| lives[n].bytes;
    let mut by_size: Vec<usize> = (0..lives.len()).collect();
    by_size.sort_by_key(|&n| (Reverse(size(n)), Reverse(length(n)), lives[n].from));
    let mut by_length = by_size.clone();
    by_length.sort_by_key(|&n| (Reverse(length(n)), Reverse(size(n)), lives[n].from));
    let mut by_area = by_length.clone();
    by_area.sort_by_key(|&n| (Reverse(u128::from(length(n)) * u128::from(size(n))), lives[n].from));
    let mut by_begin = by_area.clone();
    by_begin.sort_by_key(|&n| (lives[n].from, Reverse(size(n))));
    [by_size, by_length, by_area, by_begin]
}

/// The best of the orders that come of placing earlier what sticks out.
fn improve(lives: &[Life], first: Placed, bound: u64) -> Placed {
    let mut least = first.clone();
    let mut now = first;
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let usual = ROUNDS.min(EFFORT / (lives.len() * lives.len()).max(1));
    for round in 0..usual * PATIENCE {
        if least.bytes == bound || (round >= usual && least.bytes <= bound + bound / GOAL) {
            break;
        }
        // Those at the very top are placed before the first that they meet, or, as that often leads in circles, anywhere before the last.
        let (out, mut order): (Vec<usize>, Vec<usize>) =
            now.order.iter().copied().partition(|&n| now.places[n] + lives[n].bytes == now.bytes);
        let meets = |&n: &usize| out.iter().any(|&o| lives[o].meets(&lives[n]));
        let first = order.iter().position(meets).unwrap_or(0);
        let last = order.iter().rposition(meets).unwrap_or(0);
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let before = if round % 4 == 0 { first } else { first + (random >> 33) as usize % (last - first + 1) };
        order.splice(before..before, out);
        now = place(lives, order);
        if now.bytes < least.bytes {
            least = now.clone();
        } else if now.bytes > least.bytes + least.bytes / 32 || round % 32 == 31 {
            now = least.clone();
        }
    }
    least
}

/// Places lives one after the other, each at the begin of the smallest gap between those that it meets.
fn place(lives: &[Life], order: Vec<usize>) -> Placed {
    let mut places = vec![0u64; lives.len()];
    // Placed lives in order of their offsets.
    let mut placed: Vec<usize> = Vec::with_capacity(lives.len());
    let mut bytes = 0;
    for &n in &order {
        let life = &lives[n];
        let mut free_from = 0u64;
        let mut found: Option<(u64, u64)> = None;
        for &other in placed.iter().filter(|&&other| lives[other].meets(life)) {
            let gap = places[other].saturating_sub(free_from);
            if gap >= life.bytes && found.is_none_or(|(least, _)| gap < least) {
                found = Some((gap, free_from));
            }
            free_from = free_from.max(places[other] + lives[other].bytes);
        }
        let at = found.map_or(free_from, |(_, at)| at);
        places[n] = at;
        bytes = bytes.max(at + life.bytes);
        let index = placed.partition_point(|&other| places[other] <= at);
        placed.insert(index, n);
    }
    Placed { order, places, bytes }
}
