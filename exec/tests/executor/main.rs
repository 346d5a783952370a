//! The executor with a toy model: real threads, meetings, memory, data and checkpoints, and results worked out by hand.

mod heap;
mod rehearsal;
mod toy;
mod training;
mod turns;
