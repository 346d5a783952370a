//! The blocks that have names. `p` devices; device `i` counts from 0. Checked against the official code's output for
//! collisions and peaks over many `p`.

use super::{Block, Offsets, fill_weights};
use crate::schedules::{looped, v_shape};

impl Block {
    /// One stage per device, interval 3, from the three offsets of device `i`.
    fn one_stage(p: u32, offsets: impl Fn(u32) -> Offsets) -> Block {
        Block { placement: looped(p, 1), offsets: (0..p).map(offsets).collect(), interval: 3 }
    }

    /// 1F1B: forwards go down one slot per device, fused backwards come up two slots per device.
    pub fn one_f_one_b(p: u32) -> Block {
        Block::one_stage(p, |i| Offsets { f: i, b: p + 2 * (p - 1 - i), w: None })
    }

    /// Eager 1F1B: twice the warm-up.
    pub fn eager_one_f_one_b(p: u32) -> Block {
        Block::one_stage(p, |i| Offsets { f: i, b: i + 6 * (p - i) - 5, w: None })
    }

    /// ZB-H1 (arXiv 2401.10241): W of device `i` is `i` microbatches late.
    pub fn zb_h1(p: u32) -> Block {
        Block::one_stage(p, |i| {
            let b = p + 2 * (p - 1 - i);
            Offsets { f: i, b, w: Some(b + 1 + 3 * i) }
        })
    }

    /// ZB-H2 (arXiv 2401.10241): twice the warm-up, W of device `i` is `2i` microbatches late.
    pub fn zb_h2(p: u32) -> Block {
        Block::one_stage(p, |i| {
            let b = i + 6 * (p - i) - 5;
            Offsets { f: i, b, w: Some(b + 1 + 6 * i) }
        })
    }

    /// V placement, interval 6, two distances: forwards of chunk 0 and backwards of chunk 1 descend the devices `down`
    /// slots apart, forwards of chunk 1 and backwards of chunk 0 ascend `up` slots apart; see [`Block::v_uneven`].
    /// Asymptotic peak `(down + up) / 6` of `p` microbatch-stages.
    pub fn v(p: u32, down: u32, up: u32, turns: [u32; 3]) -> Block {
        let between = p as usize - 1;
        Block::v_uneven(&vec![down; between], &vec![up; between], turns)
    }

    /// [`Block::v`] with a distance of its own between each pair of neighbour devices: `down[i]` and `up[i]` between devices `i` and
    /// `i + 1`. Two values of `down` make the two-phase blocks that fill the memories between the named ones. `turns` are the distances at
    /// the three turns: F to F on the last device, F to B on device 0, B to B on the last device. W goes into the first free slot after its B.
    /// The block may collide: ask [`Block::collision`].
    ///
    /// # Panics
    /// When `down` and `up` differ in length.
    pub fn v_uneven(down: &[u32], up: &[u32], turns: [u32; 3]) -> Block {
        assert_eq!(down.len(), up.len(), "one distance each way between neighbour devices");
        let p = down.len() + 1;
        let [turn_f, turn_middle, turn_b] = turns;
        // Slots from device 0 to device i going down, and from the last device to device i going up.
        let descent = |i: usize| down[..i].iter().sum::<u32>();
        let ascent = |i: usize| up[i..].iter().sum::<u32>();
        let f1 = descent(p - 1) + turn_f;
        let b1 = f1 + ascent(0) + turn_middle;
        let b0 = b1 + descent(p - 1) + turn_b;
        let first = (0..p).map(|i| Offsets { f: descent(i), b: b0 + ascent(i), w: None });
        let second = (0..p).rev().map(|i| Offsets { f: f1 + ascent(i), b: b1 + descent(i), w: None });
        fill_weights(Block { placement: v_shape(p as u32), offsets: first.chain(second).collect(), interval: 6 })
    }

    /// V-Min: the least memory, `floor((p+4)/3)` microbatch-stages. Its bubble repeats as soon as F, B and W differ.
    pub fn v_min(p: u32) -> Block {
        Block::v(p, 1, 1, [1, if p.is_multiple_of(3) { 3 } else { 1 }, 1])
    }

    /// V-Half: half the memory of 1F1B, `floor((p+2)/2)` microbatch-stages.
    pub fn v_half(p: u32) -> Block {
        Block::v(p, 2, 1, [1, if p.is_multiple_of(2) { 4 } else { 1 }, 2])
    }

    /// V-ZB: no bubble in unit time at the memory of 1F1B, `p` microbatch-stages on every device.
    pub fn v_zb(p: u32) -> Block {
        Block::v(p, 4, 2, [1, 1, 1])
    }

    /// 1F1B-V: V placement with the fused backward. Forwards are one slot apart; the backwards come back two slots apart, with three
    /// slots more after every third, so that the block tiles; where the count of three begins depends on `p mod 3`. About two
    /// thirds of the memory of 1F1B.
    pub fn one_f_one_b_v(p: u32) -> Block {
        let stages = 2 * p;
        let (late, phase) = match p % 3 {
            0 => (3, 1),
            1 => (0, 0),
            _ => (0, 2),
        };
        let offsets = (0..stages)
            .map(|stage| {
                let backward = stages - 1 - stage;
                Offsets { f: stage, b: stages + late + 2 * backward + 3 * ((backward + phase) / 3), w: None }
            })
            .collect();
        Block { placement: v_shape(p), offsets, interval: 6 }
    }
}
