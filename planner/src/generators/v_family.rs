//! The family of V blocks in unit time: every pattern of device 0, one or two spacings of the descending passes, one spacing of the
//! ascending ones (arXiv 2405.15362, section 4 and appendix on the adaptive scheduler).

use crate::blocks::Block;

/// Spacings of the descending passes between neighbour devices: `first` up to device `phase`, `rest` after it.
#[derive(Debug, Clone, Copy)]
struct Descent {
    first: u32,
    rest: u32,
    phase: usize,
}

/// Every block of the family for `p` devices that tiles and that `fits`.
pub(super) fn blocks(p: u32, fits: impl Fn(&Block) -> bool) -> Vec<Block> {
    let between = p as usize - 1;
    let mut found = Vec::new();
    let mut down = vec![0; between];
    for descent in descents(between) {
        for (place, spacing) in down.iter_mut().enumerate() {
            *spacing = if place < descent.phase { descent.first } else { descent.rest };
        }
        for ascent in 1..=2 {
            let up = vec![ascent; between];
            for pattern in PATTERNS {
                let turns = turns(pattern, &down, &up);
                if tiles(&down, &up, pattern) {
                    let block = Block::v_uneven(&down, &up, turns);
                    if fits(&block) {
                        found.push(block);
                    }
                }
            }
        }
    }
    found
}

/// Slots (modulo 6) of F1, B1 and B0 on device 0, whose F0 has slot 0.
type Pattern = [u32; 3];

/// All choices of three different slots.
const PATTERNS: [Pattern; 60] = {
    let mut patterns = [[0; 3]; 60];
    let mut count = 0;
    let mut number = 0;
    while number < 125 {
        let (a, b, c) = (number / 25 + 1, number / 5 % 5 + 1, number % 5 + 1);
        if a != b && a != c && b != c {
            patterns[count] = [a, b, c];
            count += 1;
        }
        number += 1;
    }
    patterns
};

fn descents(between: usize) -> impl Iterator<Item = Descent> {
    let pairs = (1..=5).flat_map(|first| (1..=5).map(move |rest| (first, rest)));
    pairs.flat_map(move |(first, rest)| {
        let phases = if first == rest { between..between + 1 } else { 1..between.max(1) };
        phases.map(move |phase| Descent { first, rest, phase })
    })
}

/// The shortest turns that put device 0's passes on the slots of the pattern.
fn turns([f1, b1, b0]: Pattern, down: &[u32], up: &[u32]) -> [u32; 3] {
    let way: u32 = down.iter().sum::<u32>() + up.iter().sum::<u32>();
    let shortest = |slots: u32| (slots + 5) % 6 + 1;
    let back = 6 * way;
    [shortest(f1 + back - way), shortest(b1 + 6 - f1), shortest(b0 + 6 - b1 + back - way)]
}

/// Whether F and B of both chunks keep apart on every device; W fill the two slots left.
fn tiles(down: &[u32], up: &[u32], [f1, b1, b0]: Pattern) -> bool {
    // Relative to device 0, F0 and B1 come later by the way down, F1 and B0 earlier by the way up.
    let (mut descent, mut ascent) = (0, 0);
    down.iter().zip(up).all(|(d, u)| {
        descent += d;
        ascent += u;
        let slots = [descent % 6, (f1 + 5 * ascent) % 6, (b1 + descent) % 6, (b0 + 5 * ascent) % 6];
        slots.iter().fold(0u32, |taken, slot| taken | 1 << slot).count_ones() == 4
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_tiles_and_the_named_ones_are_there() {
        for p in 1..=9 {
            let family = blocks(p, |_| true);
            for block in &family {
                assert_eq!((block.check(), block.collision()), (Ok(()), None), "p={p}");
            }
            let named = [("v-min", Block::v_min(p)), ("v-half", Block::v_half(p)), ("v-zb", Block::v_zb(p))];
            for (name, block) in named {
                assert!(family.contains(&block), "{name} p={p}");
            }
        }
    }
}
