//! Token and position embedding: rows of a table, and their gradient.

use super::pointwise::{add, sum};
use crate::device::KernelError;

/// Refuses indices that a table of `limit` rows does not have.
pub(super) fn check_indices(
    call: &'static str,
    operand: &str,
    indices: &[u32],
    limit: usize,
) -> Result<(), KernelError> {
    match indices.iter().enumerate().find(|&(_, &index)| index as usize >= limit) {
        None => Ok(()),
        Some((row, index)) => Err(KernelError::Value {
            call,
            what: format!("{operand}[{row}] is {index}, must be below {limit}, the rows of the table"),
        }),
    }
}

/// `out[row] = table[tokens[row]]`, plus `positions[row % seq]`.
pub(super) fn embed(
    tokens: &[u32],
    table: &[f32],
    positions: Option<&[f32]>,
    out: &mut [f32],
    cols: usize,
    seq: usize,
) -> Result<(), KernelError> {
    check_indices("Embedding", "tokens", tokens, table.len() / cols)?;
    for (row, (&token, out)) in tokens.iter().zip(out.chunks_exact_mut(cols)).enumerate() {
        let embedding = &table[token as usize * cols..][..cols];
        match positions {
            Some(positions) => sum(embedding, &positions[row % seq * cols..][..cols], out),
            None => out.copy_from_slice(embedding),
        }
    }
    Ok(())
}

/// Adds each row of `d_out` to its rows of `d_table` and `d_positions`, in order of rows.
pub(super) fn embed_backward(
    tokens: &[u32],
    d_out: &[f32],
    d_table: &mut [f32],
    mut d_positions: Option<&mut [f32]>,
    cols: usize,
    seq: usize,
) -> Result<(), KernelError> {
    check_indices("EmbeddingBackward", "tokens", tokens, d_table.len() / cols)?;
    for (row, (&token, d_out)) in tokens.iter().zip(d_out.chunks_exact(cols)).enumerate() {
        add(d_out, &mut d_table[token as usize * cols..][..cols]);
        if let Some(d_positions) = d_positions.as_deref_mut() {
            add(d_out, &mut d_positions[row % seq * cols..][..cols]);
        }
    }
    Ok(())
}
