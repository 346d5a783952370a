//! Rotary position embedding (Su et al. 2021, section 3.4.2): pair `i` of a head turns by `position * theta^(-2 i / dim)`.
//! Pairs are `(i, i + dim / 2)`, as in Hugging Face's llama.

use super::vector::vectorised;
use crate::call::AttentionShape;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// Cosines and sines of one head width and base: per position `dim / 2` cosines, then `dim / 2` sines.
type Table = Arc<[f32]>;

/// The tables that were needed so far, so that a call reads memory instead of computing angles.
#[derive(Debug, Default)]
pub(super) struct Rotations {
    /// By head width and bits of `theta`; each for the longest sequence seen.
    tables: RwLock<HashMap<(u32, u32), Table>>,
}

impl Rotations {
    fn table(&self, shape: &AttentionShape, theta: f32) -> Table {
        let key = (shape.head_dim, theta.to_bits());
        let needed = shape.seq as usize * shape.head_dim as usize;
        // A table is complete before it is inserted, so a panic elsewhere leaves the map sound.
        let known = self.tables.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some(table) = known.filter(|table| table.len() >= needed) {
            return table;
        }
        let table: Table = angles(shape, theta).into();
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have inserted a longer one meanwhile.
        let kept = tables.entry(key).or_insert_with(|| table.clone());
        if kept.len() < table.len() {
            *kept = table.clone();
        }
        table
    }

    /// Turns queries and keys, or turns them back.
    pub fn rotate(&self, qkv: &mut [f32], shape: &AttentionShape, theta: f32, inverse: bool) {
        let table = self.table(shape, theta);
        let head_dim = shape.head_dim as usize;
        let turned = (shape.heads + shape.kv_heads) as usize * head_dim;
        let row = turned + shape.kv_heads as usize * head_dim;
        let sequence = shape.seq as usize * row;
        for sequence in qkv.chunks_exact_mut(sequence) {
            turn(sequence, &table, row, turned, head_dim, if inverse { -1.0 } else { 1.0 });
        }
    }
}

/// In double precision: at long sequences a rounded angle is a wrong angle.
fn angles(shape: &AttentionShape, theta: f32) -> Vec<f32> {
    let half = shape.head_dim as usize / 2;
    let frequencies: Vec<f64> =
        (0..half).map(|i| f64::from(theta).powf(-2.0 * i as f64 / f64::from(shape.head_dim))).collect();
    let mut table = Vec::with_capacity(2 * half * shape.seq as usize);
    for position in 0..shape.seq {
        table.extend(frequencies.iter().map(|frequency| (f64::from(position) * frequency).cos() as f32));
        table.extend(frequencies.iter().map(|frequency| (f64::from(position) * frequency).sin() as f32));
    }
    table
}

vectorised! {
    /// One sequence: the first `turned` columns of each row, head by head.
    fn turn(sequence: &mut [f32], table: &[f32], row: usize, turned: usize, head_dim: usize, direction: f32) {
        for (row, angles) in sequence.chunks_exact_mut(row).zip(table.chunks_exact(head_dim)) {
            let (cosines, sines) = angles.split_at(head_dim / 2);
            for head in row[..turned].chunks_exact_mut(head_dim) {
                let (low, high) = head.split_at_mut(head_dim / 2);
                for (((low, high), &cosine), &sine) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
                    let (x, y) = (*low, *high);
                    let sine = direction * sine;
                    *low = x * cosine - y * sine;
                    *high = y * cosine + x * sine;
                }
            }
        }
    }
}
