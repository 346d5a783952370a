//! What the optimizer and the gradient norm do to the buffers of a rank, as data: which tensors they read and write and
//! which elements of each. Simulator and executor read the same description.

use super::shares::without;
use super::{Buffer, Element, Op, RankProgram, Tensor};
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
    /// What they are.
    pub element: Element,
}

impl Piece {
    fn of(buffer: &Buffer) -> Piece {
        Piece { tensor: buffer.tensor, holds: buffer.holds(), element: buffer.element }
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
    /// Weights that take over what was updated, each from the one before it, with the elements of the array that both have: those
    /// that passes read, where these are narrower or cut otherwise; of a step taken ahead, first of all the weights that it
    /// guesses.
    pub copies: SmallVec<[(Piece, Range<usize>); 2]>,
}

impl Update {
    /// The copy that the update itself writes beside the 32-bit weights: the first, where it is a narrower one of every element.
    pub fn rounded(&self) -> Option<&Piece> {
        let (piece, both) = self.copies.first()?;
        let narrower = self.parameters.element == Element::F32 && piece.element == Element::Bf16;
        (narrower && *both == self.range).then_some(piece)
    }
}

/// The update that an optimizer op performs; `None` when the op lacks one of weights, gradients and moments.
pub fn update(rank: &RankProgram, op: &Op) -> Option<Update> {
    let moments =
        op.uses.iter().map(|buffer| &rank.buffers[buffer.index()]).find_map(|buffer| match buffer.tensor {
            Tensor::Moments { .. } => Some((buffer.start as usize, buffer.elements() / 2)),
            _ => None,
        })?;
    let range = moments.0..moments.0 + moments.1;
    let of = |is: fn(&Tensor) -> bool| pieces(rank, op).find(|piece| is(&piece.tensor));
    let before = of(|tensor| matches!(tensor, Tensor::Kept { .. }));
    let master = of(|tensor| matches!(tensor, Tensor::Master { .. }));
    let stored = of(|tensor| matches!(tensor, Tensor::ParameterShard { .. }))
        .or_else(|| of(|tensor| matches!(tensor, Tensor::Parameters { .. })));
    let mut weights = before.into_iter().chain(master).chain(stored);
    let parameters = weights.next()?;
    let mut copies = SmallVec::new();
    let mut from = parameters.holds.clone();
    for copy in weights {
        let both = from.start.max(copy.holds.start)..from.end.min(copy.holds.end);
        from = copy.holds.clone();
        copies.push((copy, both.start..both.end.max(both.start)));
    }
    let synced = of(|tensor| matches!(tensor, Tensor::SyncedGradients { .. }));
    let accumulated = of(|tensor| matches!(tensor, Tensor::GradientShard { .. }))
        .or_else(|| of(|tensor| matches!(tensor, Tensor::Gradients { .. })))?;
    let leftovers = match synced {
        Some(_) => SmallVec::from_iter([accumulated.holds.clone()].into_iter().filter(|held| !held.is_empty())),
        None => without(accumulated.holds.clone(), range.clone()).collect(),
    };
    let gradients = synced.unwrap_or_else(|| accumulated.clone());
    Some(Update { range, parameters, gradients, leftovers: (accumulated, leftovers), copies })
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
