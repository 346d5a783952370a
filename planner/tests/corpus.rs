//! Replays the corpus of the fuzz targets, and damages every file of it in some thousand ways that are the same each time.

use std::path::Path;

#[path = "../../fuzz/checks.rs"]
mod checks;

/// A linear congruential generator (Knuth's MMIX constants); its upper half is what is used.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit.max(1)
    }
}

/// What people, editors and full disks do to files.
fn damage(seed: &[u8], dice: &mut Dice) -> Vec<u8> {
    const WORDS: [&str; 14] =
        ["NaN", "-1", "1e308", "18446744073709551616", "", "0", "#", "\n", "\u{feff}", "inf", ",,", "\"", "[", "\r\n"];
    let mut bytes = seed.to_vec();
    for _ in 0..=dice.below(3) {
        let (from, to) = (dice.below(bytes.len()), dice.below(bytes.len()));
        let (from, to) = (from.min(to), from.max(to));
        match dice.below(5) {
            // A byte is another.
            0 if !bytes.is_empty() => bytes[from] = dice.below(256) as u8,
            // The end is lost.
            1 => bytes.truncate(to),
            // A stretch is lost, or there twice.
            2 => drop(bytes.drain(from..to)),
            3 => {
                let twice = bytes[from..to].to_vec();
                bytes.splice(from..from, twice);
            }
            // Something else is written over a cell.
            _ => {
                let cell = |b: &u8| b.is_ascii_whitespace() || b",:=\"".contains(b);
                let end = bytes[from..].iter().position(cell).map_or(bytes.len(), |n| from + n);
                bytes.splice(from..end, WORDS[dice.below(WORDS.len())].bytes());
            }
        }
    }
    bytes
}

fn replay(target: &str, check: fn(&[u8]), times: usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 5, "{} has {} files", folder.display(), files.len());
    let mut dice = Dice(files.len() as u64);
    for file in files {
        let seed = std::fs::read(&file).unwrap();
        check(&seed);
        for n in 0..times {
            let bytes = damage(&seed, &mut dice);
            let survived = std::panic::catch_unwind(|| check(&bytes));
            assert!(survived.is_ok(), "{} damaged, number {n}: {}", file.display(), String::from_utf8_lossy(&bytes));
        }
    }
}

#[test]
fn logs_of_nccl_tests() {
    replay("nccl_tests", checks::nccl_tests, 1000);
}

#[test]
fn traces_of_pytorch() {
    replay("torch_trace", checks::torch_trace, 1000);
}

#[test]
fn measured_runs() {
    replay("runs", checks::runs, 600);
}

#[test]
fn files_of_clusters() {
    replay("cluster", checks::cluster, 1000);
}
