//! Training data: where the tokens come from, and which sequences a step sees.
//!
//! A text is its bytes (vocabulary 256). A `.bin` file is little-endian `uint16` tokens as nanoGPT writes them, or as llm.c
//! does, with a header of 256 `int32` (magic, version, number of tokens). Files are memory-mapped.
//!
//! The tokens are cut into blocks; every tenth block is held out. A training sequence is a pure function of (seed,
//! step, number of the sequence in the global batch), so every layout of the same job sees the same batch.

use crate::error::DataError;
use memmap2::Mmap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The sources and documents of this repository.
static BUNDLED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bundled.txt"));

const LLMC_MAGIC: u32 = 20_240_520;
const LLMC_MAGIC_UINT32: u32 = 20_240_801;
const LLMC_HEADER_BYTES: usize = 256 * 4;
/// One block in this many is held out.
const HELD_OUT_ONE_IN: u64 = 10;
/// Sequences in a block, where the data is long enough: long blocks lose few windows at their ends.
const SEQUENCES_PER_BLOCK: u64 = 8;
/// Tokens whose range is checked before training; later ones are checked as they are read.
const CHECKED_AHEAD: u64 = 1 << 26;

/// A stream of tokens.
#[derive(Debug)]
pub struct Dataset {
    name: String,
    width: Width,
    segments: Vec<Segment>,
    tokens: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Byte,
    Uint16,
}

/// A contiguous piece of the stream.
#[derive(Debug)]
struct Segment {
    first: u64,
    tokens: u64,
    bytes: Bytes,
    /// Bytes before the first token.
    header: usize,
}

#[derive(Debug)]
enum Bytes {
    Static(&'static [u8]),
    Owned(Vec<u8>),
    Mapped(Mmap),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Static(bytes) => bytes,
            Bytes::Owned(bytes) => bytes,
            Bytes::Mapped(map) => map,
        }
    }
}

impl Dataset {
    /// The sources and documents of this repository, as bytes.
    pub fn bundled() -> Dataset {
        Dataset::new("bundled".into(), Width::Byte, vec![(Bytes::Static(BUNDLED), 0)])
    }

    /// A text given in memory.
    pub fn from_text(name: &str, text: Vec<u8>) -> Dataset {
        Dataset::new(name.into(), Width::Byte, vec![(Bytes::Owned(text), 0)])
    }

    /// Tokens given in memory.
    pub fn from_tokens(name: &str, tokens: &[u16]) -> Dataset {
        let bytes = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        Dataset::new(name.into(), Width::Uint16, vec![(Bytes::Owned(bytes), 0)])
    }

    /// A text file, a `.bin` token file, or a directory with files of one of these kinds (below it, in order of path;
    /// hidden files and files with NUL bytes are left out).
    pub fn open(path: &Path) -> Result<Dataset, DataError> {
        let unreadable = |source| DataError::Unreadable { path: path.into(), source };
        let metadata = fs::metadata(path).map_err(unreadable)?;
        let mut files = Vec::new();
        if metadata.is_dir() {
            walk(path, &mut files)?;
        } else {
            files.push(path.to_path_buf());
        }
        // A directory that holds token files is a tokenized data set; what else lies there describes it.
        let is_bin = |file: &PathBuf| file.extension().is_some_and(|e| e == "bin");
        let width = if files.iter().any(is_bin) { Width::Uint16 } else { Width::Byte };
        if width == Width::Uint16 {
            files.retain(is_bin);
        }
        let mut parts = Vec::new();
        for file in &files {
            let map = map(file)?;
            match width {
                Width::Uint16 => {
                    let header = token_header(file, &map)?;
                    parts.push((map, header));
                }
                // Within a directory, a file with NUL bytes is a picture or a binary that lies among the texts.
                Width::Byte if metadata.is_dir() && map.iter().take(8192).any(|&b| b == 0) => {}
                Width::Byte => parts.push((map, 0)),
            }
        }
        let dataset = Dataset::new(path.display().to_string(), width, parts);
        if dataset.tokens == 0 {
            return Err(DataError::Empty { path: path.into() });
        }
        Ok(dataset)
    }

    fn new(name: String, width: Width, parts: Vec<(Bytes, usize)>) -> Dataset {
        let mut segments = Vec::with_capacity(parts.len());
        let mut first = 0;
        for (bytes, header) in parts {
            let tokens = ((bytes.len() - header) / width.bytes()) as u64;
            if tokens > 0 {
                segments.push(Segment { first, tokens, bytes, header });
            }
            first += tokens;
        }
        Dataset { name, width, segments, tokens: first }
    }

    /// For people: the path, or `bundled`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length of the stream.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The smallest vocabulary that is sure to hold every token: 256 for text, 65536 for token files.
    pub fn vocab(&self) -> u32 {
        match self.width {
            Width::Byte => 256,
            Width::Uint16 => 65536,
        }
    }

    /// Copies tokens from a position on. The range lies within the stream.
    fn read(&self, mut position: u64, mut out: &mut [u32]) {
        let mut index = self.segments.partition_point(|s| s.first + s.tokens <= position);
        while !out.is_empty() {
            let segment = &self.segments[index];
            let skip = position - segment.first;
            let take = (segment.tokens - skip).min(out.len() as u64) as usize;
            let width = self.width.bytes();
            let bytes = &segment.bytes[segment.header + skip as usize * width..][..take * width];
            let (now, later) = out.split_at_mut(take);
            match self.width {
                Width::Byte => now.iter_mut().zip(bytes).for_each(|(to, &from)| *to = u32::from(from)),
                Width::Uint16 => now
                    .iter_mut()
                    .zip(bytes.as_chunks::<2>().0)
                    .for_each(|(to, &from)| *to = u32::from(u16::from_le_bytes(from))),
            }
            out = later;
            position += take as u64;
            index += 1;
        }
    }

    fn check_range(&self, first: u64, tokens: &[u32], vocab: u32) -> Result<(), DataError> {
        match tokens.iter().position(|&token| token >= vocab) {
            None => Ok(()),
            Some(at) => Err(DataError::TokenOutOfRange {
                name: self.name.clone(),
                token: tokens[at],
                position: first + at as u64,
                vocab,
            }),
        }
    }

    /// Prepares the sampling of sequences of `seq` tokens for a model with `vocab` tokens.
    pub fn sampler(&self, seq: u32, vocab: u32, seed: u64) -> Result<Sampler<'_>, DataError> {
        let window = u64::from(seq) + 1;
        let needed = 2 * window;
        if self.tokens < needed {
            return Err(DataError::TooShort { name: self.name.clone(), tokens: self.tokens, seq, needed });
        }
        if vocab < self.vocab() {
            let mut buffer = vec![0; 1 << 16];
            let mut position = 0;
            while position < self.tokens.min(CHECKED_AHEAD) {
                let take = (self.tokens - position).min(buffer.len() as u64) as usize;
                self.read(position, &mut buffer[..take]);
                self.check_range(position, &buffer[..take], vocab)?;
                position += take as u64;
            }
        }
        let long = SEQUENCES_PER_BLOCK * u64::from(seq) + 1;
        let block = (self.tokens / HELD_OUT_ONE_IN).clamp(window, long);
        let blocks = self.tokens / block;
        Ok(Sampler { data: self, seq, vocab, seed, block, blocks })
    }
}

impl Width {
    fn bytes(self) -> usize {
        match self {
            Width::Byte => 1,
            Width::Uint16 => 2,
        }
    }
}

fn map(path: &Path) -> Result<Bytes, DataError> {
    let unreadable = |source| DataError::Unreadable { path: path.into(), source };
    let file = File::open(path).map_err(unreadable)?;
    if file.metadata().map_err(unreadable)?.len() == 0 {
        return Ok(Bytes::Static(&[]));
    }
    // SAFETY: the map is read-only; a file that another process shortens while training runs is outside any promise.
    let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
    Ok(Bytes::Mapped(map))
}

/// Length of the header of a token file in bytes.
fn token_header(path: &Path, bytes: &[u8]) -> Result<usize, DataError> {
    let wrong = |what: String| Err(DataError::Format { path: path.into(), what });
    let int = |index: usize| bytes.as_chunks::<4>().0.get(index).map(|&b| u32::from_le_bytes(b));
    let header = match int(0) {
        Some(LLMC_MAGIC) if bytes.len() >= LLMC_HEADER_BYTES => {
            let (version, tokens) = (int(1).unwrap_or(0), int(2).unwrap_or(0) as usize);
            if version != 1 {
                return wrong(format!("llm.c header of version {version}; version 1 is known"));
            }
            let present = (bytes.len() - LLMC_HEADER_BYTES) / 2;
            if tokens != present {
                return wrong(format!("the header promises {tokens} tokens and {present} are there: truncated?"));
            }
            LLMC_HEADER_BYTES
        }
        Some(LLMC_MAGIC_UINT32) => {
            return wrong("llm.c tokens of 32 bits; write them as uint16 (vocabularies up to 65536)".into());
        }
        _ => 0,
    };
    if !bytes.len().is_multiple_of(2) {
        return wrong(format!("{} bytes are not a whole number of uint16 tokens", bytes.len()));
    }
    Ok(header)
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    let unreadable = |source| DataError::Unreadable { path: folder.into(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    paths.sort();
    for path in paths {
        // Links are not followed into folders: they may lead in a circle.
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => walk(&path, files)?,
            _ if path.is_file() => files.push(path),
            _ => {}
        }
    }
    Ok(())
}

/// Cuts sequences out of a data set.
#[derive(Debug)]
pub struct Sampler<'a> {
    data: &'a Dataset,
    seq: u32,
    vocab: u32,
    seed: u64,
    /// Tokens of a block.
    block: u64,
    blocks: u64,
}

impl Sampler<'_> {
    /// Sequence `index` of the global batch of a step: `seq` tokens, and the tokens that follow each of them.
    pub fn train(&self, step: u64, index: u64, tokens: &mut [u32], targets: &mut [u32]) -> Result<(), DataError> {
        let hash = mix(mix(mix(self.seed) ^ step) ^ index);
        let block = self.train_block(scale(hash, self.blocks - self.held_out_blocks()));
        let offset = scale(mix(hash), self.block - u64::from(self.seq));
        self.window(block * self.block + offset, tokens, targets)
    }

    /// Held-out sequences that do not overlap.
    pub fn held_out_sequences(&self) -> u64 {
        self.held_out_blocks() * self.sequences_per_block()
    }

    /// Held-out sequence `index`, in the order of the data.
    pub fn held_out(&self, index: u64, tokens: &mut [u32], targets: &mut [u32]) -> Result<(), DataError> {
        let per_block = self.sequences_per_block();
        let block = self.held_out_block(index / per_block);
        self.window(block * self.block + index % per_block * u64::from(self.seq), tokens, targets)
    }

    fn sequences_per_block(&self) -> u64 {
        (self.block - 1) / u64::from(self.seq)
    }

    fn held_out_blocks(&self) -> u64 {
        (self.blocks / HELD_OUT_ONE_IN).max(1)
    }

    /// The `n`-th training block: every tenth block (or the last of fewer than ten) is passed over.
    fn train_block(&self, n: u64) -> u64 {
        n + n / (HELD_OUT_ONE_IN - 1)
    }

    fn held_out_block(&self, n: u64) -> u64 {
        (n * HELD_OUT_ONE_IN + HELD_OUT_ONE_IN - 1).min(self.blocks - 1)
    }

    fn window(&self, first: u64, tokens: &mut [u32], targets: &mut [u32]) -> Result<(), DataError> {
        debug_assert!(tokens.len() == self.seq as usize && targets.len() == self.seq as usize);
        self.data.read(first, tokens);
        self.data.read(first + 1, targets);
        self.data.check_range(first, tokens, self.vocab)?;
        self.data.check_range(first + 1, targets, self.vocab)
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): a bijection that mixes all bits.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A uniform 64-bit value scaled to `0..n`.
fn scale(hash: u64, n: u64) -> u64 {
    ((u128::from(hash) * u128::from(n)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;
    use std::io::Write;

    fn file(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        File::create(&path).unwrap().write_all(bytes).unwrap();
        path
    }

    fn read_all(data: &Dataset) -> Vec<u32> {
        let mut tokens = vec![0; data.tokens() as usize];
        data.read(0, &mut tokens);
        tokens
    }

    fn llmc(tokens: &[u16], version: u32, promised: u32) -> Vec<u8> {
        let mut ints = [0u32; 256];
        (ints[0], ints[1], ints[2]) = (LLMC_MAGIC, version, promised);
        let mut bytes: Vec<u8> = ints.iter().flat_map(|i| i.to_le_bytes()).collect();
        bytes.extend(tokens.iter().flat_map(|t| t.to_le_bytes()));
        bytes
    }

    #[test]
    fn text_is_its_bytes_and_a_directory_is_its_files_in_order() {
        let folder = tempfile::tempdir().unwrap();
        file(folder.path(), "b.txt", b"world");
        file(folder.path(), "a/z.md", b"hello ");
        file(folder.path(), "c.png", b"\x89PNG\0\0");
        file(folder.path(), ".git/config", b"hidden");
        file(folder.path(), "empty.txt", b"");
        let data = Dataset::open(folder.path()).unwrap();
        assert_eq!(read_all(&data), b"hello world".map(u32::from));
        assert_eq!(data.vocab(), 256);
        // A read that starts in one file and ends in the next.
        let mut middle = [0; 4];
        data.read(4, &mut middle);
        assert_eq!(middle, [b'o', b' ', b'w', b'o'].map(u32::from));
    }

    #[test]
    fn token_files_with_and_without_the_llmc_header() {
        let folder = tempfile::tempdir().unwrap();
        let plain = file(folder.path(), "plain.bin", &[1, 0, 0xff, 0xff, 2, 1]);
        assert_eq!(read_all(&Dataset::open(&plain).unwrap()), [1, 0xffff, 0x0102]);
        let headed = file(folder.path(), "headed.bin", &llmc(&[7, 8, 50256], 1, 3));
        let data = Dataset::open(&headed).unwrap();
        assert_eq!((read_all(&data), data.vocab()), (vec![7, 8, 50256], 65536));
    }

    #[test]
    fn bad_files_say_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let message = |path: PathBuf| Dataset::open(&path).unwrap_err().to_string();
        assert!(message(folder.path().join("absent.txt")).contains("absent.txt"));
        assert!(message(file(folder.path(), "empty.txt", b"")).contains("is empty"));
        assert!(message(file(folder.path(), "odd.bin", &[1, 2, 3])).contains("3 bytes"));
        let short = message(file(folder.path(), "short.bin", &llmc(&[7, 8], 1, 3)));
        assert!(short.contains("promises 3 tokens and 2 are there"), "{short}");
        assert!(message(file(folder.path(), "new.bin", &llmc(&[7], 9, 1))).contains("version 9"));
        let wide = LLMC_MAGIC_UINT32.to_le_bytes();
        assert!(message(file(folder.path(), "wide.bin", &wide)).contains("32 bits"));
    }

    #[test]
    fn too_short_and_out_of_range_name_the_numbers() {
        let data = Dataset::from_text("t", vec![b'a'; 33]);
        let error = data.sampler(16, 256, 0).unwrap_err().to_string();
        assert!(error.contains("33 tokens") && error.contains("at least 34"), "{error}");
        let data = Dataset::from_tokens("t", &[1, 2, 3, 900, 5, 6, 7, 8]);
        let error = data.sampler(2, 512, 0).unwrap_err().to_string();
        assert!(error.contains("token 900 at position 3") && error.contains("512"), "{error}");
        assert!(data.sampler(2, 901, 0).is_ok());
    }

    #[test]
    fn bundled_text_is_there() {
        let data = Dataset::bundled();
        assert!(data.tokens() > 50_000, "{}", data.tokens());
        data.sampler(256, 256, 1).unwrap();
    }

    proptest! {
        /// Training windows never touch a held-out token, targets follow their tokens, and held-out windows lie in
        /// held-out blocks and do not share a predicted token.
        #[test]
        fn training_never_sees_held_out_tokens(length in 40u16..5000, seq in 1u32..19, seed: u64) {
            let tokens: Vec<u16> = (0..length).collect();
            let data = Dataset::from_tokens("t", &tokens);
            let sampler = data.sampler(seq, 65536, seed).unwrap();
            let (mut x, mut y) = (vec![0; seq as usize], vec![0; seq as usize]);
            let mut held = HashSet::new();
            for index in 0..sampler.held_out_sequences() {
                sampler.held_out(index, &mut x, &mut y).unwrap();
                prop_assert!(x.iter().zip(&y).all(|(a, b)| a + 1 == *b));
                for &target in &y {
                    prop_assert!(held.insert(target), "{target} is predicted twice");
                }
                held.insert(x[0]);
            }
            prop_assert!(held.len() as u64 * 25 >= u64::from(length), "a twentieth or so is held out");
            let mut starts = HashSet::new();
            for step in 0..8 {
                for index in 0..8 {
                    sampler.train(step, index, &mut x, &mut y).unwrap();
                    prop_assert!(x.iter().zip(&y).all(|(a, b)| a + 1 == *b));
                    prop_assert!(x.iter().chain(&y).all(|token| !held.contains(token)));
                    starts.insert(x[0]);
                }
            }
            prop_assert!(length < 500 || starts.len() > 16, "windows differ from step to step");
        }
    }
}
