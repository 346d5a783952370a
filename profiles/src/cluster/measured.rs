//! A cluster's figures replaced by what nccl-tests measured on it.

use super::Cluster;
use crate::import::nccl_tests::{CollectiveRow, NcclLog};
use thiserror::Error;

/// Why a run of a log says nothing about a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MeasuredError {
    /// Neither the rank lines nor the rows tell the ranks.
    #[error(
        "run {run}: the number of ranks is neither printed nor follows from the rows; keep the `# Rank` lines of the log"
    )]
    Ranks { run: usize },
    /// A test whose bandwidth says nothing here.
    #[error(
        "run {run}: the test {test:?} is not used; give all_reduce_perf, all_gather_perf, reduce_scatter_perf or sendrecv_perf"
    )]
    Test { run: usize, test: String },
    /// Too small a buffer.
    #[error("run {run}: the largest buffer has {bytes} bytes; bandwidth needs {LEAST_BYTES} at least (-e 1G)")]
    Small { run: usize, bytes: u64 },
    /// Trees over two nodes.
    #[error(
        "run {run}: all-reduces over two nodes exceed the network adapters (NVIDIA/nccl-tests, issue 169); give three nodes or more, or all_gather_perf"
    )]
    TwoNodes { run: usize },
    /// Nothing was measured.
    #[error("run {run}: it has no rows, or none with a time")]
    Empty { run: usize },
}

/// Buffers from this size on show bandwidth.
const LEAST_BYTES: u64 = 64 << 20;

/// What a run changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// The run in the log.
    pub run: usize,
    /// The key of the cluster.
    pub key: &'static str,
    /// Its value before.
    pub before: f64,
    /// Its value now.
    pub after: f64,
}

impl Cluster {
    /// Takes the bandwidth of the largest buffers of every run of a log: on one node the bus bandwidth of all-reduces or gathers,
    /// on several that of the network, per GPU. Two nodes are left out for all-reduces, whose trees exceed the adapters
    /// there (NVIDIA/nccl-tests, issue 169). Returns what changed, and why the other runs changed nothing.
    pub fn apply_log(&mut self, log: &NcclLog) -> (Vec<Change>, Vec<MeasuredError>) {
        let (mut changes, mut unused) = (Vec::new(), Vec::new());
        for run in 0..log.runs.len() {
            match self.apply_run(log, run) {
                Ok(change) => changes.push(change),
                Err(error) => unused.push(error),
            }
        }
        if !changes.is_empty() {
            self.source = format!("{}; measured with nccl-tests: {}", self.source, keys(&changes));
        }
        (changes, unused)
    }

    fn apply_run(&mut self, log: &NcclLog, run: usize) -> Result<Change, MeasuredError> {
        let head = &log.runs[run];
        let rows: Vec<&CollectiveRow> = log.rows.iter().filter(|row| row.run == run).collect();
        let largest = rows.iter().max_by_key(|row| row.bytes).ok_or(MeasuredError::Empty { run })?;
        if largest.bytes < LEAST_BYTES {
            return Err(MeasuredError::Small { run, bytes: largest.bytes });
        }
        let bus = largest.bus_bandwidth().ok_or(MeasuredError::Empty { run })? / 1e9;
        let ranks = head.ranks.or(head.counted_ranks).ok_or(MeasuredError::Ranks { run })?;
        let nodes = ranks.div_ceil(u64::from(self.gpus_per_node)).max(head.hosts.len() as u64);
        let test = test_of(&head.test, largest, head.counted_ranks.is_some());
        let (key, value): (&'static str, &mut f64) = match (test, nodes) {
            (Test::AllReduce, 1) => ("all_reduce_gbps", &mut self.all_reduce_gbps),
            (Test::Gather, 1) => ("gather_gbps", &mut self.gather_gbps),
            (Test::Message, 1) => ("intra_gbps", &mut self.intra_gbps),
            (Test::AllReduce, 2) => return Err(MeasuredError::TwoNodes { run }),
            (Test::AllReduce | Test::Gather | Test::Message, _) => ("inter_gbps", &mut self.inter_gbps),
            (Test::Other, _) => return Err(MeasuredError::Test { run, test: head.test.clone() }),
        };
        // A ring over whole nodes uses the adapters of all their GPUs.
        let share = if key == "inter_gbps" && test != Test::Message { (ranks / nodes).max(1) as f64 } else { 1.0 };
        let change = Change { run, key, before: *value, after: bus / share };
        *value = change.after;
        self.measured.insert(key.to_owned());
        Ok(change)
    }
}

fn keys(changes: &[Change]) -> String {
    let mut keys: Vec<&str> = changes.iter().map(|c| c.key).collect();
    keys.dedup();
    keys.join(", ")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Test {
    AllReduce,
    Gather,
    Message,
    Other,
}

/// The test by its name, or where none is printed by its rows: a reduction whose size is its elements is an all-reduce; a size
/// of as many elements as ranks is a gather or a scatter of a reduction.
fn test_of(name: &str, row: &CollectiveRow, counted: bool) -> Test {
    match name.trim_end_matches("_mpi") {
        "all_reduce_perf" => Test::AllReduce,
        "all_gather_perf" | "reduce_scatter_perf" => Test::Gather,
        "sendrecv_perf" => Test::Message,
        "" if counted => Test::Gather,
        "" if !row.redop.is_empty() => Test::AllReduce,
        _ => Test::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find_cluster;
    use crate::import::nccl_tests::{Strictness, read};

    fn log(test: &str, ranks: u64, hosts: u64, row: &str) -> NcclLog {
        let mut text = format!("# Collective test starting: {test}\n");
        for rank in 0..ranks {
            text +=
                &format!("#  Rank {rank} Group 0 Pid 1 on host{} device 0 [0x10] NVIDIA H100\n", rank * hosts / ranks);
        }
        text += "#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong\n";
        read(&format!("{text}{row}\n"), Strictness::Refuse).unwrap()
    }

    /// An H100 node and twelve of them, as in published logs: 479 GB/s inside; 387 GB/s of a ring over the adapters of eight GPUs.
    #[test]
    fn one_node_and_many() {
        let mut cluster = find_cluster("dgx-h100-ib").unwrap().clone();
        cluster.all_reduce_gbps = 1.0;
        let inside =
            log("all_reduce_perf", 8, 1, "8589934592 2147483648 float sum -1 31360 273.9 479.3 0 31400 273.6 478.7 0");
        let (changes, unused) = cluster.apply_log(&inside);
        assert_eq!((changes.len(), unused.len()), (1, 0));
        assert!((cluster.all_reduce_gbps / 479.3 - 1.0).abs() < 1e-3, "{}", cluster.all_reduce_gbps);
        let wide = log(
            "all_reduce_perf",
            96,
            12,
            "8589934592 2147483648 float sum -1 43980 195.3 386.5 0 44000 195.2 386.4 0",
        );
        cluster.apply_log(&wide);
        assert!((cluster.inter_gbps / (386.5 / 8.0) - 1.0).abs() < 1e-3, "{}", cluster.inter_gbps);
        assert!(cluster.source.contains("nccl-tests"));
    }

    #[test]
    fn two_nodes_say_nothing_about_all_reduces_and_small_buffers_nothing_at_all() {
        let mut cluster = find_cluster("dgx-h100-ib").unwrap().clone();
        let before = cluster.clone();
        let two =
            log("all_reduce_perf", 16, 2, "8589934592 2147483648 float sum -1 33065 259.8 487.1 0 33065 259.8 487.1 0");
        assert_eq!(cluster.apply_log(&two), (vec![], vec![MeasuredError::TwoNodes { run: 0 }]));
        assert_eq!(cluster, before);
        let small = log("all_reduce_perf", 8, 1, "1024 256 float sum -1 30.0 0.03 0.06 0 30.0 0.03 0.06 0");
        assert_eq!(cluster.apply_log(&small).1, [MeasuredError::Small { run: 0, bytes: 1024 }]);
        let odd =
            log("hypercube_perf", 8, 1, "8589934592 2147483648 float none -1 31360 273.9 479.3 0 31400 273.6 478.7 0");
        assert!(matches!(cluster.apply_log(&odd).1[..], [MeasuredError::Test { .. }]));
        assert_eq!(cluster, before);
    }
}
