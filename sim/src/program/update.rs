//! What the optimizer and the gradient norm do to the buffers of a rank, as data: which tensors they read and write and
//! which elements of each. Simulator and executor read the same description.

use super::shares::without;
use super::{Buffer, Op, RankProgram, Tensor};
use crate::units::StageId;
use smallvec::SmallVec;
use std::ops::Range;

/// A buffer that holds a unit's array, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// What it is.
    pub tensor: Tensor,
    /// Which elements of the array it holds.
    pub holds: Range<usize>,
}

impl Piece {
    fn of(buffer: &Buffer) -> Piece {
        let start = buffer.start as usize / 4;
        Piece { tensor: buffer.tensor, holds: start..start + buffer.bytes as usize / 4 }
    }

    /// Where elements of the array lie in the buffer.
    pub fn place(&self, elements: &Range<usize>) -> Range<usize> {
        elements.start - self.holds.start..elements.end - self.holds.start
    }
}

/// An optimizer op.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// Elements of the unit's array that are updated: the moments hold exactly these.
    pub range: Range<usize>,
    /// The weights that are updated.
    pub parameters: Piece,
    /// The gradients that are read and zeroed.
    pub gradients: Piece,
    /// Gradients that hold leftovers after the reduction and are zeroed too: elements of the array.
    pub leftovers: (Piece, SmallVec<[Range<usize>; 2]>),
    /// Weights that passes keep, copied from the updated ones; of a step taken ahead, the weights that it guesses.
    pub kept: Option<Piece>,
}

/// The update that an optimizer op performs; `None` when the op lacks one of weights, gradients and moments.
pub fn update(rank: &RankProgram, op: &Op) -> Option<Update> {
    let moments =
        op.uses.iter().map(|buffer| &rank.buffers[buffer.index()]).find_map(|buffer| match buffer.tensor {
            Tensor::Moments { .. } => Some((buffer.start as usize / 4, buffer.bytes as usize / 8)),
            _ => None,
        })?;
    let range = moments.0..moments.0 + moments.1;
    let of = |is: fn(&Tensor) -> bool| pieces(rank, op).find(|piece| is(&piece.tensor));
    let master = of(|tensor| matches!(tensor, Tensor::Master { .. } | Tensor::Kept { .. }));
    let stored = of(|tensor| matches!(tensor, Tensor::ParameterShard { .. }))
        .or_else(|| of(|tensor| matches!(tensor, Tensor::Parameters { .. })));
    let (parameters, kept) = match master {
        Some(master) => (master, stored),
        None => (stored?, None),
    };
    let synced = of(|tensor| matches!(tensor, Tensor::SyncedGradients { .. }));
    let accumulated = of(|tensor| matches!(tensor, Tensor::GradientShard { .. }))
        .or_else(|| of(|tensor| matches!(tensor, Tensor::Gradients { .. })))?;
    let leftovers = match synced {
        Some(_) => SmallVec::from_iter([accumulated.holds.clone()].into_iter().filter(|held| !held.is_empty())),
        None => without(accumulated.holds.clone(), range.clone()).collect(),
    };
    let gradients = synced.unwrap_or_else(|| accumulated.clone());
    Some(Update { range, parameters, gradients, leftovers: (accumulated, leftovers), kept })
}

/// The gradients whose life begins with a pass: it zeroes them before it adds to them.
pub fn begun_gradients(rank: &RankProgram, op: &Op) -> impl Iterator<Item = Piece> {
    let begun = op.alloc.iter().map(|buffer| &rank.buffers[buffer.index()]);
    begun.filter(|buffer| matches!(buffer.tensor, Tensor::Gradients { .. })).map(Piece::of)
}

/// By unit, the reduced gradients that the norm op reads.
pub fn gradient_sources(rank: &RankProgram, op: &Op) -> impl Iterator<Item = ((StageId, u16), Piece)> {
    pieces(rank, op).filter_map(|piece| match piece.tensor {
        Tensor::Gradients { stage, unit }
        | Tensor::GradientShard { stage, unit }
        | Tensor::SyncedGradients { stage, unit } => Some(((stage, unit), piece)),
        _ => None,
    })
}

fn pieces(rank: &RankProgram, op: &Op) -> impl Iterator<Item = Piece> {
    op.uses.iter().map(|buffer| Piece::of(&rank.buffers[buffer.index()]))
}
