//! A pass as data: kernels in order, each with its operands as slices of named tensors.

use crate::program::{Element, Tensor};
use paceline_profiles::{KernelKey, Work};
use smallvec::SmallVec;
use std::ops::Range;

/// Part of a tensor. A tensor may hold pieces of different types; each begins at a multiple of its elements' size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Of which tensor.
    pub tensor: Tensor,
    /// Which elements: the first lies `range.start * element.bytes()` bytes from the begin of the tensor.
    pub range: Range<usize>,
    /// What they are.
    pub element: Element,
}

impl Slice {
    /// Where it ends, in bytes.
    pub fn end(&self) -> u64 {
        self.range.end as u64 * self.element.bytes()
    }
}

/// One kernel call. Operands come in the order of the operator's fields in the kernels' `Call`; optional ones (the shift of a
/// norm, learned positions, one of the two gradients of the head) are left out where the operator has none.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Operator and shape.
    pub key: KernelKey,
    /// What it reads and writes.
    pub operands: SmallVec<[Slice; 7]>,
    /// What shape and operands do not say.
    pub detail: Detail,
}

/// What an operator needs beside operands and shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Detail {
    /// Nothing.
    None,
    /// Epsilon of a norm.
    Epsilon(f64),
    /// Rotary embedding over this attention shape.
    Rotary {
        /// Shape of the attention whose queries and keys are turned.
        shape: AttentionDims,
        /// Base of the frequencies.
        theta: f64,
        /// Turns back.
        inverse: bool,
    },
    /// Tokens per sequence, for positions.
    Seq(u32),
    /// A product that is added to what is there.
    Accumulate,
}

/// Dimensions of an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionDims {
    /// Sequences.
    pub batch: u32,
    /// Tokens per sequence.
    pub seq: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
}

impl Step {
    /// Floating-point operations of its matrix products; causal attention counts the pairs that are computed.
    pub fn flops(&self) -> f64 {
        Work::of(&self.key).flops
    }

    /// Bytes moved, each operand once.
    pub fn bytes(&self) -> f64 {
        Work::of(&self.key).bytes
    }
}
