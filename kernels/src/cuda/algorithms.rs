//! Which algorithm a library has chosen for a product, kept from one run to the next: asking its heuristics takes long, and they
//! need not give the same answer twice.
//!
//! One text file per device and version of the library, beside the machine code of the kernels. A line has a product, what was chosen
//! for it, and a checksum; lines that are damaged, and files of another device or version, are as if they were not there.

use super::compile::keep;
use super::machine::{Epilogue, Layout, ProductShape};
use super::sources::digest;
use crate::device::DType;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// First word of the file.
const FORMAT: &str = "paceline.algorithms/1";

/// An algorithm as the library serializes it, which is for its own version alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chosen {
    pub words: [u64; 8],
    /// Bytes of workspace that it uses.
    pub workspace: u64,
}

/// The choices for one device.
#[derive(Debug)]
pub(super) struct Algorithms {
    path: PathBuf,
    header: String,
    known: HashMap<String, Chosen>,
}

impl Algorithms {
    /// What earlier runs left in the folder `cache`.
    pub fn open(cache: &Path, device: &str, version: &str) -> Algorithms {
        let header = format!("{FORMAT} {version} {device}");
        let path = cache.join(format!("algorithms-{:016x}.txt", digest([header.as_str()])));
        let mut algorithms = Algorithms { path, header, known: HashMap::new() };
        algorithms.read();
        algorithms
    }

    pub fn get(&self, key: &str) -> Option<Chosen> {
        self.known.get(key).copied()
    }

    /// Keeps a choice. What other processes have kept meanwhile stays; without a place to keep it, the next run asks again.
    pub fn keep(&mut self, key: String, chosen: Chosen) {
        self.read();
        self.known.insert(key, chosen);
        let _ = self.write();
    }

    /// Takes over what the file has and this does not.
    fn read(&mut self) {
        let Ok(text) = std::fs::read_to_string(&self.path) else { return };
        let mut lines = text.lines();
        if lines.next() != Some(&self.header) {
            return;
        }
        for (key, chosen) in lines.filter_map(parse) {
            self.known.entry(key.to_owned()).or_insert(chosen);
        }
    }

    fn write(&self) -> std::io::Result<()> {
        let mut keys: Vec<&String> = self.known.keys().collect();
        keys.sort();
        let mut text = format!("{}\n", self.header);
        for key in keys {
            text += &line(key, &self.known[key]);
        }
        keep(&self.path, text.as_bytes())
    }
}

/// Key, eight words, workspace, checksum of what stands before it.
fn line(key: &str, chosen: &Chosen) -> String {
    let mut text = format!("{key}\t");
    for word in chosen.words {
        let _ = write!(text, "{word:x} ");
    }
    let _ = write!(text, "{}", chosen.workspace);
    let sum = digest([text.as_str()]);
    let _ = writeln!(text, "\t{sum:016x}");
    text
}

fn parse(line: &str) -> Option<(&str, Chosen)> {
    let (text, sum) = line.rsplit_once('\t')?;
    if u64::from_str_radix(sum, 16).ok()? != digest([text]) {
        return None;
    }
    let (key, numbers) = text.split_once('\t')?;
    let mut numbers = numbers.split(' ');
    let mut words = [0; 8];
    for word in &mut words {
        *word = u64::from_str_radix(numbers.next()?, 16).ok()?;
    }
    let workspace = numbers.next()?.parse().ok()?;
    numbers.next().is_none().then_some((key, Chosen { words, workspace }))
}

/// Everything that a choice depends on beside device and library: shape, element types, strides and transpositions, what happens to the
/// result, alignment of the addresses in bytes, and the most workspace there is.
pub(super) fn key(shape: &ProductShape, alignments: [u32; 3], workspace: usize) -> String {
    let layout = |layout: &Layout| {
        let dtype = if layout.dtype == DType::BF16 { "bf16" } else { "f32" };
        format!("{dtype}/{}{}", layout.stride, if layout.transposed { "t" } else { "" })
    };
    let ProductShape { m, n, k, a, b, c, accumulate, epilogue } = shape;
    let [a, b, c] = [a, b, c].map(layout);
    let [for_a, for_b, for_c] = alignments;
    let sign = if *accumulate { "+=" } else { "=" };
    let then = match epilogue {
        Epilogue::None => "",
        Epilogue::Bias => " bias",
        Epilogue::BiasGelu => " bias gelu",
        Epilogue::GeluSlope => " gelu-slope",
    };
    format!("{m}x{n}x{k} {c}@{for_c} {sign} {a}@{for_a} {b}@{for_b}{then} within {workspace}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(n: u64) -> Chosen {
        Chosen { words: std::array::from_fn(|i| n << 32 | i as u64), workspace: 1 << n }
    }

    #[test]
    fn choices_last_and_belong_to_a_device_and_a_version() {
        let cache = tempfile::tempdir().unwrap();
        let open = |device, version| Algorithms::open(&cache.path().join("new"), device, version);
        let mut first = open("H200", "13.1");
        assert_eq!(first.get("a"), None);
        first.keep("a".into(), chosen(1));
        let (mut second, other) = (open("H200", "13.1"), open("H200", "13.2"));
        assert_eq!(second.get("a"), Some(chosen(1)));
        assert_eq!((other.get("a"), open("H100", "13.1").get("a")), (None, None));
        // Two processes keep what each has found.
        second.keep("b".into(), chosen(2));
        first.keep("c".into(), chosen(3));
        let all = open("H200", "13.1");
        assert_eq!(["a", "b", "c"].map(|key| all.get(key)), [1, 2, 3].map(|n| Some(chosen(n))));
    }

    #[test]
    fn damage_is_as_if_nothing_were_there() {
        let cache = tempfile::tempdir().unwrap();
        let open = || Algorithms::open(cache.path(), "H200", "13.1");
        let mut whole = open();
        whole.keep("a".into(), chosen(1));
        whole.keep("b".into(), chosen(2));
        let text = std::fs::read_to_string(&whole.path).unwrap();
        let damaged = text.replacen("200000000", "200000001", 1);
        assert_ne!(damaged, text);
        std::fs::write(&whole.path, &damaged).unwrap();
        assert_eq!((open().get("a"), open().get("b")), (Some(chosen(1)), None), "a changed digit");
        std::fs::write(&whole.path, &text[..text.len() - 9]).unwrap();
        assert_eq!((open().get("a"), open().get("b")), (Some(chosen(1)), None), "an end that is missing");
        for other in ["", "paceline.algorithms/2 13.1 H200\n", "\u{0}\u{1}\n\n\t\t"] {
            std::fs::write(&whole.path, other).unwrap();
            assert_eq!(open().get("a"), None);
        }
        std::fs::write(&whole.path, [0xff, 0xfe, b'\n']).unwrap();
        let mut new = open();
        new.keep("a".into(), chosen(4));
        assert_eq!(open().get("a"), Some(chosen(4)), "it is written anew");
    }

    #[test]
    fn keys_tell_apart_all_that_matters() {
        let layout = Layout { dtype: DType::BF16, stride: 8, transposed: false };
        let shape = ProductShape {
            m: 2,
            n: 3,
            k: 4,
            a: layout,
            b: layout,
            c: layout,
            accumulate: false,
            epilogue: Epilogue::None,
        };
        let transposed = Layout { transposed: true, ..layout };
        let wide = Layout { dtype: DType::F32, ..layout };
        let others = [
            ProductShape { m: 3, n: 2, ..shape },
            ProductShape { k: 5, ..shape },
            ProductShape { a: transposed, ..shape },
            ProductShape { b: transposed, ..shape },
            ProductShape { c: wide, ..shape },
            ProductShape { b: Layout { stride: 9, ..layout }, ..shape },
            ProductShape { accumulate: true, ..shape },
            ProductShape { epilogue: Epilogue::Bias, ..shape },
            ProductShape { epilogue: Epilogue::BiasGelu, ..shape },
            ProductShape { epilogue: Epilogue::GeluSlope, ..shape },
        ];
        let mut keys: Vec<String> = others.iter().map(|other| key(other, [16; 3], 1024)).collect();
        keys.extend([key(&shape, [16; 3], 1024), key(&shape, [16, 8, 16], 1024), key(&shape, [16; 3], 2048)]);
        assert!(keys.iter().all(|key| !key.contains('\t')));
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }
}
