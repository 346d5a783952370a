//! Arenas by order: buffers are placed greedily, each into the smallest gap that fits, in several orders; then those that stick out are
//! placed earlier, again and again.

use super::Life;

/// Pairs of lives that are looked at in search of a better order: some hundredths of a second.
const EFFORT: usize = 6_000_000;
/// Rounds of the search, where the effort allows them.
const ROUNDS: usize = 400;
/// As long as the arena is larger than the bound by more than one part in this, both are so many times as large.
const GOAL: u64 = 100;
const PATIENCE: usize = 4;

/// Offsets of all lives, and the bytes that they take together, at least `bound`.
pub(super) fn pack(lives: &[Life], bound: u64) -> (Vec<u64>, u64) {
    let length = |n: usize| u64::from(lives[n].until - lives[n].from) + 1;
    let size = |n: usize| lives[n].bytes;
    let mut all: Vec<usize> = (0..lives.len()).collect();
    let mut best: Option<(Vec<usize>, Vec<u64>, u64)> = None;
    let mut consider = |order: &[usize]| {
        let (places, bytes) = place(lives, order);
        if best.as_ref().is_none_or(|&(_, _, least)| bytes < least) {
            best = Some((order.to_vec(), places, bytes));
        }
        best.as_ref().is_some_and(|&(_, _, least)| least == bound)
    };
    // What lives longest lies at the bottom; what is largest is hardest to place; early ones first is what a run without a plan
    // would do.
    all.sort_by_key(|&n| (std::cmp::Reverse(size(n)), std::cmp::Reverse(length(n)), lives[n].from));
    let mut done = consider(&all);
    all.sort_by_key(|&n| (std::cmp::Reverse(length(n)), std::cmp::Reverse(size(n)), lives[n].from));
    done = done || consider(&all);
    all.sort_by_key(|&n| (std::cmp::Reverse(u128::from(length(n)) * u128::from(size(n))), lives[n].from));
    done = done || consider(&all);
    all.sort_by_key(|&n| (lives[n].from, std::cmp::Reverse(size(n))));
    done = done || consider(&all);
    let Some((mut order, mut places, mut bytes)) = best else { return (Vec::new(), 0) };
    let mut least = (order.clone(), places.clone(), bytes);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let usual = ROUNDS.min(EFFORT / (lives.len() * lives.len()).max(1));
    for round in 0..usual * PATIENCE {
        if done || (round >= usual && least.2 <= bound + bound / GOAL) {
            break;
        }
        // Those at the very top are placed before the first that they meet, or, as that often leads in circles, anywhere before.
        let top = |n: usize| places[n] + lives[n].bytes == bytes;
        let out: Vec<usize> = order.iter().copied().filter(|&n| top(n)).collect();
        order.retain(|&n| !top(n));
        let met = order.iter().position(|&n| out.iter().any(|&o| lives[o].meets(&lives[n]))).unwrap_or(0);
        let last = order.iter().rposition(|&n| out.iter().any(|&o| lives[o].meets(&lives[n]))).unwrap_or(0);
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let first = if round % 4 == 0 { met } else { met + (random >> 33) as usize % (last - met + 1) };
        order.splice(first..first, out);
        (places, bytes) = place(lives, &order);
        if bytes < least.2 {
            least = (order.clone(), places.clone(), bytes);
            done = bytes == bound;
        } else if bytes > least.2 + least.2 / 32 || round % 32 == 31 {
            (order, places, bytes) = least.clone();
        }
    }
    (least.1, least.2)
}

/// Places lives one after the other, each at the begin of the smallest gap between those that it meets.
fn place(lives: &[Life], order: &[usize]) -> (Vec<u64>, u64) {
    let mut places = vec![0u64; lives.len()];
    // Placed lives in order of their offsets.
    let mut placed: Vec<usize> = Vec::with_capacity(lives.len());
    let mut bytes = 0;
    for &n in order {
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
    (places, bytes)
}
