//! The `Program`: for each rank an ordered list of ops on streams. The simulator and the executor interpret the same one.
//!
//! # What an interpreter must do
//! A rank **issues** its ops in list order.
//! - An op on [`Stream::COMPUTE`] starts when the previous compute-stream op of the rank has ended, its waits have
//!   ended, and its device is free (ranks that share a device take turns, first come first served); the next op is
//!   issued when it has ended.
//! - An op on another stream is issued when the compute-stream op before it in the list has ended, and does not hold up
//!   the ops after it. It starts when the previous op of its own stream and its waits have ended and its peers have
//!   arrived (a send meets its receive, a collective its group).
//! - The local work of communication (the copy of a received message, the reduction of a chunk) takes the rank's
//!   device where the cost model says so (CPU: the core does the copying), first come first served with compute.
//!
//! # Memory
//! `alloc` happens when an op is issued, `free` when it has ended; only compute-stream ops free, and a buffer that an
//! asynchronous op uses is freed by a later compute-stream op that waits (directly or through others) for it. So the
//! walk over the list in issue order gives the same curve and the same peak in every interpreter, whatever the timing:
//! predicted and measured peaks are compared in bytes.

mod check;
mod links;
mod partners;
mod precision;
mod rounds;
mod shares;
mod types;
mod update;

pub use check::{CheckError, check};
pub use links::{Links, Way};
pub use partners::{Meeting, OpRef, PartnerError, Partners, Transfer};
pub use precision::{Element, Precision};
pub use rounds::{Algorithm, Step, rounds, tree_offsets, tree_parts};
pub use shares::{Shares, SharesError, shares};
pub use types::*;
pub use update::{Piece, Update, begun_gradients, gradient_sources, update};
