//! Calls that do not fit together are refused before memory is touched, with the operand named.

use crate::machine::{Array, DEVICE, doubles, floats, indices, try_run};
use paceline_kernels::{AdamW, AttentionShape, Block, Call, DType, Decays, KernelError, View};

/// Numbers that no optimizer call refuses.
const WITH: AdamW = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0, step: 1, clip: None };

/// `len` floats of one shared block from `start` on, so that overlaps can be made.
pub struct Pool(Box<dyn Block>);

impl Pool {
    pub fn new() -> Pool {
        Pool(DEVICE.allocate(4 * 4096).unwrap())
    }

    pub fn at(&self, start: usize, len: usize) -> View {
        self.0.view(4 * start, len, DType::F32)
    }
}

#[track_caller]
pub fn refused(call: Call, words: &[&str]) {
    let Err(error @ (KernelError::Shape { .. } | KernelError::Value { .. })) = try_run(call) else {
        panic!("{call:?} was not refused");
    };
    let text = error.to_string();
    assert!(text.starts_with(call.name()), "{text}");
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

fn matmul(a: View, b: View, c: View) -> Call {
    let (m, n, k) = (2, 3, 4);
    Call::MatMul { a, b, c, m, n, k, transpose_a: false, transpose_b: false, accumulate: false }
}

#[test]
fn wrong_lengths() {
    let pool = Pool::new();
    let (a, b, c) = (pool.at(0, 8), pool.at(100, 12), pool.at(200, 6));
    try_run(matmul(a, b, c)).unwrap();
    refused(matmul(pool.at(0, 7), b, c), &["a has 7", "exactly 8"]);
    refused(matmul(a, pool.at(100, 13), c), &["b has 13", "exactly 12"]);
    refused(matmul(a, b, pool.at(200, 1)), &["c has 1", "exactly 6"]);
    refused(Call::Sum { a, b, out: pool.at(200, 8) }, &["b has 12", "exactly 8"]);
    refused(Call::Gelu { x: a, out: b }, &["out has 12", "exactly 8"]);
    let shape = AttentionShape { batch: 1, seq: 2, heads: 2, kv_heads: 1, head_dim: 2 };
    let call = Call::Attention { qkv: pool.at(0, 16), out: pool.at(100, 8), lse: pool.at(200, 3), shape };
    refused(call, &["lse has 3", "exactly 4"]);
    let (rows, cols, vocab, chunk) = (4, 2, 5, 3);
    let targets = indices(&[0; 4]);
    refused(
        Call::HeadLoss {
            x: pool.at(0, 8),
            weight: pool.at(100, 10),
            targets: targets.view(),
            lse: pool.at(200, 4),
            loss: pool.at(300, 1),
            scratch: pool.at(400, 23),
            rows,
            cols,
            vocab,
            chunk,
        },
        &["scratch has 23", "at least 24"],
    );
}

#[test]
fn lengths_that_overflow() {
    let pool = Pool::new();
    let most = u32::MAX;
    let shape = AttentionShape { batch: most, seq: most, heads: most, kv_heads: 1, head_dim: most };
    let call = Call::Attention { qkv: pool.at(0, 4), out: pool.at(100, 4), lse: pool.at(200, 4), shape };
    refused(call, &["qkv has 4"]);
    let call = Call::SwiGlu { gate_up: pool.at(0, 4), out: pool.at(100, 4), rows: most, cols: most };
    refused(call, &["gate_up has 4"]);
}

#[test]
fn wrong_types() {
    let pool = Pool::new();
    let numbers: Array = indices(&[0; 8]);
    refused(matmul(numbers.view(), pool.at(100, 12), pool.at(200, 6)), &["a holds U32", "F32"]);
    refused(Call::SumSquares { x: pool.at(0, 8), out: pool.at(100, 1) }, &["out holds F32", "F64"]);
    refused(Call::Copy { from: numbers.view(), to: pool.at(0, 8) }, &["to holds F32", "U32"]);
    refused(Call::Cast { from: numbers.view(), to: pool.at(0, 8) }, &["from holds U32", "F32"]);
    // Values of a call are of one type, and what it produces is not narrower.
    let half = crate::machine::halves(&[0.0; 12]);
    refused(matmul(pool.at(0, 8), half.view(), pool.at(200, 6)), &["b holds BF16", "F32"]);
    let narrow = half.view().slice(0, 6);
    refused(matmul(pool.at(0, 8), pool.at(100, 12), narrow), &["c holds BF16", "F32"]);
}

#[test]
fn overlaps() {
    let pool = Pool::new();
    let (a, b) = (pool.at(0, 8), pool.at(100, 12));
    refused(matmul(a, b, pool.at(7, 6)), &["c overlaps a"]);
    refused(matmul(a, b, pool.at(111, 6)), &["c overlaps b"]);
    try_run(matmul(a, b, pool.at(8, 6))).unwrap();
    // Reading the same memory twice is no conflict.
    try_run(Call::Sum { a, b: pool.at(4, 8), out: pool.at(200, 8) }).unwrap();
    refused(Call::Add { x: a, into: a }, &["into overlaps x"]);
    let norm = doubles(&[1.0]);
    let call = Call::AdamW {
        parameters: pool.at(0, 8),
        gradients: pool.at(8, 8),
        first: pool.at(16, 8),
        second: pool.at(20, 8),
        rounded: None,
        norm: norm.view(),
        decays: Decays::all(true),
        with: WITH,
    };
    refused(call, &["second overlaps first"]);
}

#[test]
fn dimensions() {
    let pool = Pool::new();
    let x = pool.at(0, 8);
    refused(Call::AddBias { x, bias: pool.at(100, 0), rows: 8, cols: 0 }, &["cols is 0"]);
    let shape = AttentionShape { batch: 1, seq: 1, heads: 3, kv_heads: 2, head_dim: 2 };
    refused(
        Call::Attention { qkv: pool.at(0, 14), out: pool.at(100, 6), lse: pool.at(200, 3), shape },
        &["heads is 3", "kv_heads (2)"],
    );
    let shape = AttentionShape { batch: 1, seq: 1, heads: 1, kv_heads: 1, head_dim: 3 };
    refused(Call::Rotary { qkv: pool.at(0, 9), shape, theta: 1e4, inverse: false }, &["head_dim is 3", "even"]);
}

#[test]
fn transfers_of_other_sizes() {
    let array = floats(&[1.0, 2.0]);
    // SAFETY: the array lives, and this thread alone uses it.
    let (up, down) = unsafe { (DEVICE.upload(&[0; 7], array.view()), DEVICE.download(array.view(), &mut [0; 9])) };
    assert_eq!(up.unwrap_err().to_string(), "upload: host has 7 bytes, the view 8");
    assert_eq!(down.unwrap_err().to_string(), "download: host has 9 bytes, the view 8");
}

#[test]
fn a_residual_after_an_activation() {
    let pool = Pool::new();
    let [x, weight, base, input, out] =
        [(0, 8), (100, 12), (200, 6), (300, 6), (400, 6)].map(|(at, len)| pool.at(at, len));
    let (base, input) = (Some(base), Some(input));
    let call = Call::Project { x, weight, bias: None, base, input, out, m: 2, n: 3, k: 4 };
    refused(call, &["both a base and an input"]);
    let short = Call::Project { x, weight, bias: Some(pool.at(500, 2)), base, input: None, out, m: 2, n: 3, k: 4 };
    refused(short, &["bias has 2", "exactly 3"]);
}

#[test]
fn runs_of_decaying_parameters_that_are_none() {
    assert_eq!(Decays::new(true, &[3, 3]), None, "empty runs");
    assert_eq!(Decays::new(true, &[5, 4]), None, "borders fall");
    assert_eq!(Decays::new(true, &(1..=Decays::MOST as u32 + 1).collect::<Vec<_>>()), None, "too many");
    let decays = Decays::new(false, &[2, 5]).unwrap();
    assert_eq!(decays.runs(8).collect::<Vec<_>>(), [(0..2, false), (2..5, true), (5..8, false)]);
    let pool = Pool::new();
    let call = Call::AdamWAhead {
        parameters: pool.at(0, 5),
        kept: pool.at(8, 5),
        gradients: pool.at(16, 5),
        first: pool.at(24, 5),
        second: pool.at(32, 5),
        decays,
        with: WITH,
    };
    refused(call, &["begins at 5", "5 parameters"]);
}

/// Whoever allocates memory for others asks a call what it touches.
#[test]
fn reads_and_writes() {
    let pool = Pool::new();
    let (a, b, c) = (pool.at(0, 8), pool.at(100, 12), pool.at(200, 6));
    let call = matmul(a, b, c);
    assert_eq!(call.reads().as_slice(), [a, b]);
    assert_eq!(call.writes().as_slice(), [c]);
    let call = Call::Add { x: a, into: pool.at(50, 8) };
    assert_eq!(call.reads().as_slice(), [a, pool.at(50, 8)]);
    assert_eq!(call.writes().as_slice(), [pool.at(50, 8)]);
}
