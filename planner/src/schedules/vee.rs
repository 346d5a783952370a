//! V placement: stage `s < p` on device `s`, stage `2p-1-s` on the same device, so that long and short lifespans meet
//! on every device. V-Min, V-Half, V-ZB and 1F1B-V come from building blocks (arXiv 2405.15362); ZB-V is written by hand
//! (arXiv 2401.10241, section 6).

use super::{action, v_shape};
use crate::blocks::{Block, Enough, Goal, extend, justify_until};
use crate::bounds::lower_bound;
use crate::order::{Action, ComputeOrder};
use crate::replay::{StageMemory, StageTimes, peaks};
use paceline_sim::program::Pass;

/// Least memory: peak `floor((p+4)/3)` microbatch-stages (at most `p`) when everything is freed at W; in unit time a bubble of `6p-1-3k` chunk
/// slots at a peak of `k` chunks.
pub fn v_min(p: u32, m: u32) -> ComputeOrder {
    // Up to two devices the least memory is all that 1F1B takes, and the block without bubble fits it.
    let block = if p <= 2 { Block::v_zb(p) } else { Block::v_min(p) };
    rearranged(&block, p, m, p.min((p + 4) / 3))
}

/// Half the memory of 1F1B: peak `floor((p+2)/2)` microbatch-stages when everything is freed at W; in unit time a bubble of `6p-1-3k` chunk
/// slots at a peak of `k` chunks.
pub fn v_half(p: u32, m: u32) -> ComputeOrder {
    rearranged(&Block::v_half(p), p, m, p.min((p + 2) / 2))
}

/// Peak `p` microbatch-stages when everything is freed at W; no span bubble in unit time.
pub fn v_zb(p: u32, m: u32) -> ComputeOrder {
    rearranged(&Block::v_zb(p), p, m, p)
}

/// Peak about two thirds of `p` microbatch-stages: what the repeated block takes.
pub fn one_f_one_b_v(p: u32, m: u32) -> ComputeOrder {
    rearranged(&Block::one_f_one_b_v(p), p, m, 0)
}

/// The repeated block with its ends rearranged in unit time, at most `peak` microbatch-stages per device or what the
/// fullest device of the block takes.
fn rearranged(block: &Block, p: u32, m: u32, peak: u32) -> ComputeOrder {
    // Warm-up and cool-down do not depend on m once there is a steady phase between them: half as many microbatches again as a
    // block takes in turn, and a few more in which the order shows its period; never more than what suffices every block.
    let slots = block.offsets.iter().flat_map(|offsets| offsets.passes()).map(|(_, slot, length)| slot + length);
    let under_way = slots.max().unwrap_or(0).div_ceil(block.interval);
    let times = StageTimes::unit(block.placement.stages());
    let short = (under_way + under_way / 2).min(2 * p) + STEADY;
    if m > short + p
        && let Some(longer) = extend(&at_its_ends(block, p, short, peak, &times), &times, m - short)
    {
        return longer;
    }
    at_its_ends(block, p, m, peak, &times)
}

/// Microbatches in which an order shows that it repeats itself.
const STEADY: u32 = 8;

/// [`rearranged`] for the number of microbatches at hand.
fn at_its_ends(block: &Block, p: u32, m: u32, peak: u32, times: &StageTimes) -> ComputeOrder {
    let order = block.repeat(m).order;
    let memory = StageMemory::microbatch_stages(&order.placement, p as usize, 0.0);
    let fullest = peaks(&order, &memory).peak_unsplit.into_iter().fold(f64::from(peak), f64::max);
    let limit = vec![fullest; p as usize];
    // The least span of a V with this many chunk activations (arXiv 2405.15362, appendix: `6n + 6p - 3k - 1`), and of any order.
    let work = 6.0 * f64::from(m);
    let enough = Enough {
        span: work.max(work + f64::from(6 * p) - 1.0 - 6.0 * fullest),
        makespan: lower_bound(&order.placement, m, times, &memory, Some(&limit)).makespan,
    };
    match justify_until(&order, times, &memory, &limit, Goal::Span, enough) {
        Ok(better) => better,
        // A repeated block can always be replayed; if it could not, validation would say more than an error here.
        Err(_) => order,
    }
}

/// ZB-V by hand: `2(p-i)-1` forwards of chunk 0, `i` pairs of forwards, `p-i` groups F1 B1 W1, then groups of F, B and W of
/// both chunks in turn, and the weights last. Peak `p` microbatch-stages, no span bubble in unit time (with enough microbatches).
pub fn zb_v(p: u32, m: u32) -> ComputeOrder {
    // The pattern needs 2p-1 microbatches; with fewer, the absent ones are left out.
    let padded = m.max(2 * p - 1);
    let list = |i: u32| {
        let stage = [i, 2 * p - 1 - i];
        let mut list: Vec<Action> = Vec::with_capacity(6 * padded as usize);
        let (mut f, mut b, mut w) = ([0u32; 2], [0u32; 2], [0u32; 2]);
        let mut push = |pass, chunk: usize, count: &mut [u32; 2]| {
            list.push(action(pass, stage[chunk], count[chunk]));
            count[chunk] += 1;
        };
        for _ in 0..2 * (p - i) - 1 {
            push(Pass::F, 0, &mut f);
        }
        for _ in 0..i {
            push(Pass::F, 1, &mut f);
            push(Pass::F, 0, &mut f);
        }
        for _ in 0..p - i {
            push(Pass::F, 1, &mut f);
            push(Pass::B, 1, &mut b);
            push(Pass::W, 1, &mut w);
        }
        while f[1] < padded {
            if f[0] < padded {
                push(Pass::F, 0, &mut f);
            }
            push(Pass::B, 0, &mut b);
            push(Pass::W, 0, &mut w);
            push(Pass::F, 1, &mut f);
            push(Pass::B, 1, &mut b);
            push(Pass::W, 1, &mut w);
        }
        for _ in 0..i {
            push(Pass::B, 0, &mut b);
            push(Pass::B, 1, &mut b);
        }
        for _ in 0..p - i {
            push(Pass::B, 0, &mut b);
            push(Pass::W, 0, &mut w);
        }
        for chunk in [1, 0] {
            while w[chunk] < b[chunk] {
                push(Pass::W, chunk, &mut w);
            }
        }
        list
    };
    ComputeOrder {
        name: String::new(),
        microbatches: padded,
        placement: v_shape(p),
        actions: (0..p).map(list).collect(),
    }
    .truncated(m)
}
