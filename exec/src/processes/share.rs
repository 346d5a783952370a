//! Arrays that several processes hold parts of, put together in one of them: checkpoints, and weights for evaluation.

use super::error::ProcessError;
use super::mesh::Mesh;
use super::{Matter, tag};
use std::collections::BTreeMap;

/// What an element is that this process does not hold: a NaN that no computation makes.
pub(crate) const UNKNOWN: f32 = f32::from_bits(0x7fde_ad01);

/// Whether an element is [`UNKNOWN`].
pub(crate) fn is_unknown(value: f32) -> bool {
    value.to_bits() == UNKNOWN.to_bits()
}

/// Gives the known elements of all processes to process `to`, which fills its arrays with them (and adds arrays that it lacks). All
/// processes do this in the same order.
pub(crate) fn put_together(mesh: &Mesh, to: u32, arrays: &mut BTreeMap<String, Vec<f32>>) -> Result<(), ProcessError> {
    if mesh.rank() != to {
        return mesh.send(to, tag(Matter::State, to), &encode(arrays));
    }
    for from in (0..mesh.size()).filter(|&from| from != to) {
        let bytes = mesh.receive(from, tag(Matter::State, to))?;
        if decode(&bytes, arrays).is_none() {
            return Err(ProcessError::System { doing: "reading the state of another process", why: "damaged".into() });
        }
    }
    Ok(())
}

/// By array: its name, its length, and its runs of known elements.
fn encode(arrays: &BTreeMap<String, Vec<f32>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let word = |bytes: &mut Vec<u8>, number: usize| bytes.extend((number as u64).to_le_bytes());
    for (name, values) in arrays {
        let runs: Vec<&[f32]> = values.chunk_by(|&a, &b| is_unknown(a) == is_unknown(b)).collect();
        word(&mut bytes, name.len());
        bytes.extend(name.as_bytes());
        word(&mut bytes, values.len());
        word(&mut bytes, runs.iter().filter(|run| !is_unknown(run[0])).count());
        let mut start = 0;
        for run in runs {
            if !is_unknown(run[0]) {
                word(&mut bytes, start);
                word(&mut bytes, run.len());
                bytes.extend(run.iter().flat_map(|value| value.to_le_bytes()));
            }
            start += run.len();
        }
    }
    bytes
}

/// Fills arrays; `None` where the bytes do not fit.
fn decode(mut bytes: &[u8], arrays: &mut BTreeMap<String, Vec<f32>>) -> Option<()> {
    fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
        let (head, rest) = bytes.split_at_checked(count)?;
        *bytes = rest;
        Some(head)
    }
    fn word(bytes: &mut &[u8]) -> Option<usize> {
        Some(u64::from_le_bytes(*take(bytes, 8)?.first_chunk()?) as usize)
    }
    while !bytes.is_empty() {
        let length = word(&mut bytes)?;
        let name = String::from_utf8(take(&mut bytes, length)?.to_vec()).ok()?;
        let (len, runs) = (word(&mut bytes)?, word(&mut bytes)?);
        let values = arrays.entry(name).or_insert_with(|| vec![UNKNOWN; len]);
        if values.len() != len {
            return None;
        }
        for _ in 0..runs {
            let (start, count) = (word(&mut bytes)?, word(&mut bytes)?);
            let known = take(&mut bytes, count.checked_mul(4)?)?.as_chunks::<4>().0;
            let to = values.get_mut(start..start.checked_add(count)?)?;
            to.iter_mut().zip(known).for_each(|(to, &from)| *to = f32::from_le_bytes(from));
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::super::mesh::tests::meshes;
    use super::*;
    use std::time::Duration;

    const U: f32 = UNKNOWN;

    fn arrays(of: &[(&str, &[f32])]) -> BTreeMap<String, Vec<f32>> {
        of.iter().map(|(name, values)| ((*name).to_owned(), values.to_vec())).collect()
    }

    #[test]
    fn parts_of_three_processes_come_together_in_one() {
        let meshes = meshes(3, Duration::from_secs(20), Duration::from_secs(20));
        let mut held = [
            arrays(&[("a", &[U, U, 3.0, 4.0]), ("mine", &[7.0])]),
            arrays(&[("a", &[1.0, U, U, U]), ("b", &[U, f32::NAN])]),
            arrays(&[("a", &[U, 2.0, U, U]), ("b", &[5.0, U]), ("empty", &[])]),
        ];
        std::thread::scope(|scope| {
            for (mesh, arrays) in meshes.iter().zip(&mut held) {
                scope.spawn(move || put_together(mesh, 1, arrays).unwrap());
            }
        });
        let whole = &held[1];
        assert_eq!(whole["a"], [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(whole["mine"], [7.0]);
        assert!(whole["b"][0] == 5.0 && whole["b"][1].is_nan() && !is_unknown(whole["b"][1]));
        assert_eq!(whole["empty"], [0.0; 0]);
    }

    #[test]
    fn damaged_bytes_are_refused() {
        let bytes = encode(&arrays(&[("a", &[1.0, U, 2.0])]));
        for end in 1..bytes.len() {
            assert_eq!(decode(&bytes[..end], &mut BTreeMap::new()), None, "{end}");
        }
        assert_eq!(decode(&bytes, &mut arrays(&[("a", &[U, U])])), None, "another length");
        let mut whole = BTreeMap::new();
        assert_eq!(decode(&bytes, &mut whole), Some(()));
        assert_eq!(encode(&whole), bytes);
    }
}
