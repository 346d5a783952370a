//! `paceline-exec`: runs a [`Program`](paceline_sim::program::Program) with real kernels and real messages.
//!
//! A program goes through [`bind`] (who meets whom), then every rank's thread interprets its list ([`interpreter`]) while
//! the [`fabric`] brings sends, receives and groups together and gives the devices' [`slot`]s out in turn. What an
//! op does lies behind two small traits: [`cpu`] computes with kernels in shared memory, [`paced`] waits as long as a
//! cost model says. What a model computes lies behind [`seam`];
//! [`layers`] is the transformer.
//! [`measure`] makes the profile of a machine. [`processes`] lets every rank run in a process of its own, on one host or many.

mod bind;
mod checkpoint;
mod collectives;
mod cpu;
mod crew;
mod data;
mod device_exchange;
mod effects;
mod error;
mod evaluate;
mod exchange_times;
mod fabric;
mod host_effects;
mod initialise;
mod interpreter;
mod kernel_times;
mod layers;
mod learning_rate;
mod lines;
mod memory;
mod numbers;
mod paced;
mod record;
mod report;
mod run;
mod seam;
mod settings;
mod slot;
mod state;
mod timeline;

pub mod measure;
pub mod processes;

pub use data::{Dataset, Sampler};
pub use error::{CheckpointError, DataError, ExecError};
pub use exchange_times::ExchangeTimes;
pub use kernel_times::{KernelTimes, kernel_key};
pub use layers::{TransformerPasses, run};
pub use learning_rate::LearningRate;
pub use memory::MemoryReport;
pub use paced::{Rehearsal, rehearse};
pub use report::{Observer, RunReport, Silent, StepReport};
pub use run::run_passes;
pub use seam::{Launch, Operands, Parameter, Passes, Start, TiedCopy};
pub use settings::{CheckpointSettings, Evaluation, OptimizerSettings, RunSettings};
