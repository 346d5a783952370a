//! What can go wrong in a run. Every message names the thing, the value, what is allowed and a way out.

use crate::processes::ProcessError;
use paceline_kernels::KernelError;
use paceline_sim::program::Tensor;
use paceline_sim::units::{OpId, RankId, show_bytes};
use std::path::PathBuf;
use thiserror::Error;

/// Why a run did not finish.
#[derive(Debug, Error)]
pub enum ExecError {
    /// The program cannot be run (by its static check, or because the executor lacks what it asks for).
    #[error("program cannot run: {0}")]
    Program(String),
    /// Settings that do not fit together.
    #[error("{key} = {value}: {allowed}")]
    Setting { key: &'static str, value: String, allowed: String },
    /// The training data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A checkpoint that could not be written, read or used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An op touches a tensor that its `uses` do not declare.
    #[error("{rank} {op} touches {tensor:?}, which its `uses` do not declare")]
    Undeclared { rank: RankId, op: OpId, tensor: Tensor },
    /// A buffer holds fewer bytes than an op needs.
    #[error("{rank} {op}: {tensor:?} holds {bytes} bytes, {needed} are needed")]
    BufferSize { rank: RankId, op: OpId, tensor: Tensor, bytes: u64, needed: u64 },
    /// A kernel refused or ran out of memory.
    #[error("{rank} {op}: {source}")]
    Kernel { rank: RankId, op: OpId, source: KernelError },
    /// The device failed outside of any op.
    #[error(transparent)]
    Device(KernelError),
    /// Ranks that do not fit into the memory of their device, found before any of it is taken.
    #[error(
        "{rank} needs {} ({classes}) on {device}, which has {} free of {}{}: choose a smaller micro_batch, recompute = 'full', more \
         partitioned states, or more devices",
        show_bytes(*bytes), show_bytes(*free), show_bytes(*total),
        if *before == 0 { String::new() } else { format!(", of which the ranks before it take {}", show_bytes(*before)) }
    )]
    NoRoom {
        rank: RankId,
        device: String,
        /// Of its arena.
        bytes: u64,
        /// Its classes at the peak, largest first.
        classes: String,
        /// What ranks before it on the same device take.
        before: u64,
        free: u64,
        total: u64,
    },
    /// Working with other processes.
    #[error(transparent)]
    Process(Box<ProcessError>),
    /// The loss or the gradient norm is not a number any more.
    #[error("step {step}: {what} is {value}; lower the learning rate, lengthen the warm-up or lower the clipping norm")]
    Diverged { step: u64, what: &'static str, value: f64 },
    /// Every rank waits for another.
    #[error("the ranks wait for each other: {standing}")]
    Stalled { standing: String },
    /// A thread of the executor panicked: a bug.
    #[error("{rank} panicked: {message}")]
    Panic { rank: RankId, message: String },
}

impl From<ProcessError> for ExecError {
    fn from(error: ProcessError) -> ExecError {
        ExecError::Process(Box::new(error))
    }
}

/// Why training data cannot be used.
#[derive(Debug, Error)]
pub enum DataError {
    /// A path that is not there or not readable.
    #[error("data {path}: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    /// Nothing to read.
    #[error("data {path} is empty: give a text file, a directory with text files, or a .bin file of uint16 tokens")]
    Empty { path: PathBuf },
    /// Too few tokens to cut one training and one held-out sequence.
    #[error(
        "data {name} has {tokens} tokens; sequences of {seq} tokens need at least {needed}: use more data or a shorter --seq"
    )]
    TooShort { name: String, tokens: u64, seq: u32, needed: u64 },
    /// A token that the model does not know.
    #[error(
        "data {name}: token {token} at position {position} is not below the vocabulary size {vocab}: use the model's own tokenizer"
    )]
    TokenOutOfRange { name: String, token: u32, position: u64, vocab: u32 },
    /// A token file whose shape or header is wrong.
    #[error("data {path}: {what}")]
    Format { path: PathBuf, what: String },
}

/// Why a checkpoint cannot be written, read or used.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The file system said no.
    #[error("checkpoint {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// Nothing to resume from.
    #[error("no checkpoint in {path}: it holds no `latest` file and no `manifest.json`")]
    Missing { path: PathBuf },
    /// Truncated, altered, or not a checkpoint of this program.
    #[error("checkpoint {path} is damaged: {what}; resume from an older one")]
    Damaged { path: PathBuf, what: String },
    /// Written by a newer version.
    #[error("checkpoint {path} has format {format}, this version reads up to {known}: update paceline")]
    Newer { path: PathBuf, format: String, known: &'static str },
    /// Of another model.
    #[error("checkpoint {path} is of another model: {key} is {found} there and {expected} here")]
    OtherModel { path: PathBuf, key: String, found: String, expected: String },
}
