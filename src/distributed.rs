//! A process per rank, as a launcher starts them: what this one is told by the environment, and what all have to agree on.

use crate::failure::Failure;
use paceline_exec::RunSettings;
use paceline_exec::processes::{Patience, Place, Processes, Terms, meet};
use paceline_kernels::Device;
use paceline_sim::program::Program;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::process::CommandExt;
use std::sync::Arc;
use std::time::Duration;

/// Over what ranks of different processes exchange messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// The GPUs' own network, which needs a GPU per process.
    Nccl,
    /// TCP, through the hosts' memory.
    Tcp,
}

/// The place of this process.
pub fn place() -> Result<Place, Failure> {
    Place::read(|name| std::env::var(name).ok()).map_err(Failure::bad_input)
}

/// The driver gives streams eight queues unless it is told otherwise when it starts; more streams would share them, and one that waits
/// for a message would hold up another that sends. Starts this program anew with the variable set, where it is not.
pub fn ensure_connections() -> Result<(), Failure> {
    const NAME: &str = "CUDA_DEVICE_MAX_CONNECTIONS";
    if std::env::var_os(NAME).is_some() {
        return Ok(());
    }
    let program = std::env::current_exe().map_err(Failure::internal)?;
    // Returns only where it fails.
    let error = std::process::Command::new(program).args(std::env::args_os().skip(1)).env(NAME, "32").exec();
    Err(Failure::internal(format!("cannot start anew with {NAME}=32: {error}; set it yourself")))
}

/// Meets the other processes: they have to run the same program with the same settings, data and versions.
pub fn gather(
    place: &Place,
    program: &Program,
    settings: &RunSettings,
    data: &str,
    device: &dyn Device,
    transport: Option<Transport>,
    peer_timeout: u64,
) -> Result<Processes, Failure> {
    let direct = match transport {
        Some(transport) => transport == Transport::Nccl,
        None => device.network().is_some(),
    };
    let mut terms = Terms::from(
        [
            ("the version of paceline", env!("CARGO_PKG_VERSION").to_owned()),
            ("the plan", digest(&serde_json::to_vec(program).map_err(Failure::internal)?)),
            ("the steps", settings.steps.to_string()),
            ("the training settings", digest(format!("{:?} {}", settings.optimizer, settings.seed).as_bytes())),
            ("the evaluation", format!("{:?}", settings.evaluation)),
            ("whether checkpoints are written", settings.checkpoint.is_some().to_string()),
            ("whether to resume", settings.resume.is_some().to_string()),
            ("the data", data.to_owned()),
            ("the transport", if direct { "the GPUs' network" } else { "tcp" }.to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    if let Some(network) = device.network().filter(|_| direct) {
        terms.insert("the version of NCCL".into(), network.version().map_err(Failure::bad_input)?);
    }
    let patience = Patience {
        meeting: Duration::from_secs(peer_timeout.max(1)),
        silence: Duration::from_secs((peer_timeout / 4).max(6)),
        ..Patience::default()
    };
    let mesh = meet(place, &terms, patience).map_err(Failure::bad_input)?;
    Ok(Processes { mesh: Arc::new(mesh), direct })
}

fn digest(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    format!("{:016x}", hasher.finish())
}
