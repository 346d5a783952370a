//! One stage per device: GPipe, the 1F1B family, and the hand-made zero-bubble orders ZB-H1 and ZB-H2
//! (arXiv 2401.10241, section 2.2). `p` devices, numbered `i = 0..p`, and `m` microbatches.

use super::{action, looped};
use crate::order::{Action, ComputeOrder};
use paceline_sim::program::Pass;

fn order(p: u32, m: u32, list: impl Fn(u32) -> Vec<Action>) -> ComputeOrder {
    ComputeOrder { name: String::new(), microbatches: m, placement: looped(p, 1), actions: (0..p).map(list).collect() }
}

/// All forwards, then all fused backwards. Peak `m` on every device.
pub fn gpipe(p: u32, m: u32) -> ComputeOrder {
    order(p, m, |i| {
        let forwards = (0..m).map(|b| action(Pass::F, i, b));
        forwards.chain((0..m).map(|b| action(Pass::BW, i, b))).collect()
    })
}

/// `p-1-i` forwards, then pairs of forward and fused backward, then the backwards left. Peak `p-i`.
pub fn one_f_one_b(p: u32, m: u32) -> ComputeOrder {
    order(p, m, |i| alternate(i, m, p - i, &[Pass::BW]))
}

/// 1F1B with `2(p-1-i)` forwards ahead, so that every device has a forward to run while a message travels. Peak `2(p-i)-1`.
pub fn eager_one_f_one_b(p: u32, m: u32) -> ComputeOrder {
    order(p, m, |i| alternate(i, m, 2 * (p - i) - 1, &[Pass::BW]))
}

/// 1F1B whose backward runs the forward again first. R needs nothing from other devices, so it may start while the gradient
/// is still on its way.
pub fn recomputed_one_f_one_b(p: u32, m: u32) -> ComputeOrder {
    order(p, m, |i| alternate(i, m, p - i, &[Pass::R, Pass::BW]))
}

/// Forwards until `ahead` microbatches are in flight, then a backward and a forward in turn.
fn alternate(stage: u32, m: u32, ahead: u32, backward: &[Pass]) -> Vec<Action> {
    let ahead = ahead.min(m);
    let mut list: Vec<Action> = (0..ahead).map(|b| action(Pass::F, stage, b)).collect();
    for b in 0..m {
        list.extend(backward.iter().map(|pass| action(*pass, stage, b)));
        if b + ahead < m {
            list.push(action(Pass::F, stage, b + ahead));
        }
    }
    list
}

/// 1F1B with the backward split and W of device `i` kept back by `i` microbatches. Peak `p` on every device when
/// everything is freed at W; `(p-i) M_B + i M_W` otherwise. Bubble `(p-1)(F+B-W)`.
pub fn zb_h1(p: u32, m: u32) -> ComputeOrder {
    order(p, m, |i| delayed_weights(i, m, p - i, i))
}

/// Twice the warm-up of [`zb_h1`] and W kept back by `2i` microbatches. Peak `2p-1` on every device when everything is freed
/// at W; `(2p-2i-1) M_B + 2i M_W` otherwise. Bubble `(p-1)(F+B-2W)`. With fewer than `2p` microbatches there are not enough
/// forwards to fill the gaps, and W kept back would only pile up at the end: then fewer are kept.
pub fn zb_h2(p: u32, m: u32) -> ComputeOrder {
    order(p, m, |i| delayed_weights(i, m, 2 * (p - i) - 1, (2 * i).min(i + m.saturating_sub(p))))
}

/// `ahead` forwards, then B, one W when more than `kept` are pending, and a forward in turn; the pending W at the end.
fn delayed_weights(stage: u32, m: u32, ahead: u32, kept: u32) -> Vec<Action> {
    let ahead = ahead.min(m);
    let mut list: Vec<Action> = (0..ahead).map(|b| action(Pass::F, stage, b)).collect();
    let mut weights = 0;
    for b in 0..m {
        list.push(action(Pass::B, stage, b));
        if b + 1 - weights > kept {
            list.push(action(Pass::W, stage, weights));
            weights += 1;
        }
        if b + ahead < m {
            list.push(action(Pass::F, stage, b + ahead));
        }
    }
    list.extend((weights..m).map(|b| action(Pass::W, stage, b)));
    list
}
