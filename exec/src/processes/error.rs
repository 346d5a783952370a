//! Why several processes do not work together.

use thiserror::Error;

/// A fault in the environment, at the meeting of the processes, or in a peer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProcessError {
    /// Variables that a launcher sets are not there.
    #[error(
        "{} not set: torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun sets the first three under names of \
         its own (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID) and leaves the others to the job script: export \
         MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1) MASTER_PORT=29500",
        listed(names)
    )]
    Unset { names: Vec<&'static str> },
    /// A variable with a value that cannot be.
    #[error("{name} = {value:?}: {allowed}")]
    Value { name: &'static str, value: String, allowed: String },
    /// The first rank cannot listen.
    #[error(
        "rank 0 cannot listen on port {port}: {why}; choose a free one with MASTER_PORT (or PACELINE_MASTER_PORT, where the launcher \
         uses MASTER_PORT itself)"
    )]
    Port { port: u16, why: String },
    /// The first rank does not answer.
    #[error(
        "rank {rank} cannot reach rank 0 at {address} within {seconds} s: {last}; check MASTER_ADDR, MASTER_PORT, and that rank 0 was \
         started"
    )]
    Unreachable { rank: u32, address: String, seconds: u64, last: String },
    /// Not everybody came.
    #[error(
        "{} of {size} did not come within {seconds} s; were as many processes started as WORLD_SIZE says?",
        ranks(missing)
    )]
    Missing { missing: Vec<u32>, size: u32, seconds: u64 },
    /// Somebody brings something else than rank 0.
    #[error(transparent)]
    Disagreement(Box<Disagreement>),
    /// Two processes say that they are the same rank.
    #[error(
        "two processes say that they are rank {rank}, on {first} and on {second}: every process needs its own RANK"
    )]
    Twice { rank: u32, first: String, second: String },
    /// Rank 0 refused, for a reason that it tells all.
    #[error("{0}")]
    Refused(String),
    /// A peer is gone, or silent.
    #[error("rank {rank} on {host} is lost: {what}; resume all ranks from the last checkpoint")]
    Lost { rank: u32, host: String, what: String },
    /// A peer ended its run with an error.
    #[error("rank {rank} on {host} gave up: {message}")]
    GaveUp { rank: u32, host: String, message: String },
    /// This process gave up itself; whoever still waits is told so.
    #[error("this rank gave up: {0}")]
    Ended(String),
    /// A system call failed.
    #[error("{doing}: {why}")]
    System { doing: &'static str, why: String },
}

/// Something on which a process and rank 0 disagree.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "rank {rank} on {host} and rank 0 on {first} disagree on {what}: {there} and {here}; start all processes alike"
)]
pub struct Disagreement {
    pub rank: u32,
    pub host: String,
    /// Host of rank 0.
    pub first: String,
    pub what: String,
    pub there: String,
    pub here: String,
}

fn listed(names: &[&str]) -> String {
    match names {
        [one] => format!("{one} is"),
        _ => format!("{} are", names.join(", ")),
    }
}

fn ranks(numbers: &[u32]) -> String {
    let all: Vec<String> = numbers.iter().map(u32::to_string).collect();
    format!("{} {}", if all.len() == 1 { "rank" } else { "ranks" }, all.join(", "))
}
