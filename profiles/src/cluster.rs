//! Clusters: a GPU, nodes, and the network between them. Shipped ones in `data/clusters.toml`, others in a TOML file of the
//! user's with one `[cluster]` table, for a GPU that is not shipped one `[gpu]` table, and a `[physics]` table of what was
//! fitted to runs on it.

mod measured;

pub use measured::{Change, MeasuredError};

use crate::gpu::{Gpu, GpuError, find_gpu};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;
use thiserror::Error;

/// A cluster of equal nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// What computes.
    pub gpu: Gpu,
    /// GPUs of a node: those that the fast links join.
    pub gpus_per_node: u32,
    /// Bandwidth between GPUs of a node, per GPU and direction, in 10^9 bytes per second.
    pub intra_gbps: f64,
    /// Bus bandwidth of gathers and reduce-scatters inside a node, in 10^9 bytes per second.
    pub gather_gbps: f64,
    /// The same of all-reduces.
    pub all_reduce_gbps: f64,
    /// What joins the nodes.
    pub fabric: Fabric,
    /// Share of the network adapters of one GPU, per direction, in 10^9 bytes per second.
    pub inter_gbps: f64,
    /// Time of a step between nodes in a collective algorithm, in microseconds.
    pub inter_latency_us: f64,
    /// Time that the hosts add to every step of a collective, inside a node as well, in microseconds; 0 on a sound cluster.
    pub host_pace_us: f64,
    /// Whether every step of a ring over several nodes takes as long as one between nodes; elsewhere hops inside a node are taken
    /// as fast as they are.
    pub paced: bool,
    /// How much longer a ring over several nodes that takes several GPUs of each has its links busy than its bytes alone would, as a
    /// share, in the limit of many nodes: over N nodes 1 - 1/N of that. 0 where such rings were not measured.
    #[serde(default)]
    pub ring_crowding: f64,
    /// Where the figures come from.
    pub source: String,
    /// Bandwidths that were measured, on this cluster or on one like it, by the names of their keys; the others are datasheets' or
    /// assumed.
    #[serde(default)]
    pub measured: BTreeSet<String>,
    /// Parameters of predictions that were fitted to runs on this cluster, by name; the others are the shipped ones.
    #[serde(default)]
    pub physics: BTreeMap<String, f64>,
}

/// Networks between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fabric {
    /// InfiniBand.
    Infiniband,
    /// RDMA over converged Ethernet.
    Roce,
    /// AWS Elastic Fabric Adapter.
    Efa,
    /// TCP.
    Ethernet,
}

/// A cluster that cannot be had.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// No cluster of this name.
    #[error("unknown cluster {name:?}; known: {known}. Or give a TOML file with a [cluster] table")]
    Unknown { name: String, known: String },
    /// A file that cannot be read.
    #[error("cluster file: {0}")]
    Parse(#[from] toml::de::Error),
    /// Its GPU.
    #[error("cluster {cluster}: {source}")]
    Gpu { cluster: String, source: GpuError },
    /// A file from a newer version.
    #[error("cluster file: format {format} is newer than 1, which this version reads; update paceline")]
    Format { format: u32 },
    /// A figure that cannot be.
    #[error("cluster {cluster}: {key} = {value}, but it has to be a finite number above zero")]
    Value { cluster: String, key: &'static str, value: f64 },
    /// A fitted parameter that is no number.
    #[error("cluster {cluster}: [physics] {name} = {value}, but it has to be a finite number")]
    Physics { cluster: String, name: String, value: f64 },
    /// Neither a name nor a table of a GPU.
    #[error("cluster {cluster}: no GPU; name a shipped one (gpu = \"H100-SXM\") or describe one in a [gpu] table")]
    NoGpu { cluster: String },
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    measured: BTreeSet<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    aliases: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<String>,
    gpus_per_node: u32,
    intra_gbps: Option<f64>,
    gather_gbps: Option<f64>,
    all_reduce_gbps: Option<f64>,
    fabric: Fabric,
    inter_gbps: f64,
    inter_latency_us: f64,
    #[serde(default)]
    host_pace_us: f64,
    paced: Option<bool>,
    #[serde(default)]
    ring_crowding: f64,
    source: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shipped {
    format: u32,
    cluster: Vec<Entry>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Own {
    #[serde(default = "one")]
    format: u32,
    cluster: Entry,
    gpu: Option<Gpu>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    physics: BTreeMap<String, f64>,
}

fn one() -> u32 {
    1
}

/// Share of NVLink that a ring of collectives reaches where nothing was measured.
const NVLINK_SHARE: f64 = 0.75;
/// The same of PCIe: NCCL plans with three quarters of the stated rate, and the ring crosses the bridge between two sockets in
/// both directions. Assumed.
const PCIE_SHARE: f64 = 0.375;

/// Bus bandwidths of gathers and all-reduces over links of `intra_gbps`: as measured with the GPU's own links, in proportion
/// with others.
fn bus_bandwidths(gpu: &Gpu, intra_gbps: f64) -> (f64, f64) {
    let scale = gpu.nvlink_gbps.map_or(1.0, |own| intra_gbps / own);
    let measured = |value: Option<f64>| match (value, gpu.nvlink_gbps) {
        (Some(value), Some(_)) => value * scale,
        (None, Some(_)) => NVLINK_SHARE * intra_gbps,
        (_, None) => PCIE_SHARE * intra_gbps,
    };
    (measured(gpu.gather_gbps), measured(gpu.all_reduce_gbps))
}

impl Entry {
    fn build(self, own: Option<Gpu>) -> Result<Cluster, ClusterError> {
        let cluster = self.name.clone();
        let wrap = |source| ClusterError::Gpu { cluster: cluster.clone(), source };
        let gpu = match (own, &self.gpu) {
            (Some(gpu), _) => {
                gpu.check().map_err(wrap)?;
                gpu
            }
            (None, Some(name)) => find_gpu(name).map_err(wrap)?.clone(),
            (None, None) => return Err(ClusterError::NoGpu { cluster }),
        };
        let mut measured = self.measured;
        // Those of the GPU hold with the GPU's own links.
        if self.intra_gbps.is_none() && self.gather_gbps.is_none() && self.all_reduce_gbps.is_none() {
            measured.extend(gpu.measured.iter().cloned());
        }
        let intra_gbps = self.intra_gbps.unwrap_or_else(|| gpu.nvlink_gbps.unwrap_or(gpu.pcie_gbps));
        let (gather_gbps, all_reduce_gbps) = bus_bandwidths(&gpu, intra_gbps);
        let built = Cluster {
            intra_gbps,
            gather_gbps: self.gather_gbps.unwrap_or(gather_gbps),
            all_reduce_gbps: self.all_reduce_gbps.unwrap_or(all_reduce_gbps),
            name: self.name,
            gpu,
            gpus_per_node: self.gpus_per_node,
            fabric: self.fabric,
            inter_gbps: self.inter_gbps,
            inter_latency_us: self.inter_latency_us,
            host_pace_us: self.host_pace_us,
            // Bandwidths measured over EFA say so (p5 in the shipped clusters).
            paced: self.paced.unwrap_or(self.fabric == Fabric::Efa),
            ring_crowding: self.ring_crowding,
            source: self.source,
            measured,
            physics: BTreeMap::new(),
        };
        built.check()?;
        Ok(built)
    }
}

static SHIPPED: LazyLock<Vec<(Vec<String>, Cluster)>> =
    LazyLock::new(|| match shipped(include_str!("../data/clusters.toml")) {
        Ok(clusters) => clusters,
        Err(error) => unreachable!("the shipped file is checked by a test: {error}"),
    });

fn shipped(text: &str) -> Result<Vec<(Vec<String>, Cluster)>, ClusterError> {
    let file: Shipped = toml::from_str(text)?;
    if file.format > 1 {
        return Err(ClusterError::Format { format: file.format });
    }
    let named = |entry: Entry| {
        let names = std::iter::once(entry.name.clone()).chain(entry.aliases.clone()).collect();
        Ok((names, entry.build(None)?))
    };
    file.cluster.into_iter().map(named).collect()
}

/// Names of the shipped clusters.
pub fn cluster_names() -> impl Iterator<Item = &'static str> {
    SHIPPED.iter().map(|(_, cluster)| cluster.name.as_str())
}

/// A shipped cluster by name or alias.
///
/// # Errors
/// When there is none; the message lists the known ones.
pub fn find_cluster(name: &str) -> Result<&'static Cluster, ClusterError> {
    let found = SHIPPED.iter().find(|(names, _)| names.iter().any(|n| n.eq_ignore_ascii_case(name)));
    found.map(|(_, cluster)| cluster).ok_or_else(|| ClusterError::Unknown {
        name: name.to_owned(),
        known: cluster_names().collect::<Vec<_>>().join(", "),
    })
}

impl Cluster {
    /// Reads a user's file.
    ///
    /// # Errors
    /// When it is no TOML, has unknown or missing keys, an unknown GPU or figures that cannot be.
    pub fn from_toml(text: &str) -> Result<Cluster, ClusterError> {
        let own: Own = toml::from_str(text)?;
        if own.format > 1 {
            return Err(ClusterError::Format { format: own.format });
        }
        let cluster = Cluster { physics: own.physics, ..own.cluster.build(own.gpu)? };
        cluster.check()?;
        Ok(cluster)
    }

    /// The file that [`Cluster::from_toml`] reads this cluster from again.
    ///
    /// # Errors
    /// When a figure is one that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        let entry = Entry {
            name: self.name.clone(),
            aliases: Vec::new(),
            measured: self.measured.clone(),
            gpu: None,
            gpus_per_node: self.gpus_per_node,
            intra_gbps: Some(self.intra_gbps),
            gather_gbps: Some(self.gather_gbps),
            all_reduce_gbps: Some(self.all_reduce_gbps),
            fabric: self.fabric,
            inter_gbps: self.inter_gbps,
            inter_latency_us: self.inter_latency_us,
            host_pace_us: self.host_pace_us,
            paced: Some(self.paced),
            ring_crowding: self.ring_crowding,
            source: self.source.clone(),
        };
        toml::to_string(&Own { format: 1, cluster: entry, gpu: Some(self.gpu.clone()), physics: self.physics.clone() })
    }

    /// Checks the figures.
    ///
    /// # Errors
    /// The first that cannot be.
    pub fn check(&self) -> Result<(), ClusterError> {
        for (key, value) in [
            ("gpus_per_node", f64::from(self.gpus_per_node)),
            ("intra_gbps", self.intra_gbps),
            ("gather_gbps", self.gather_gbps),
            ("all_reduce_gbps", self.all_reduce_gbps),
            ("inter_gbps", self.inter_gbps),
            ("inter_latency_us", self.inter_latency_us),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ClusterError::Value { cluster: self.name.clone(), key, value });
            }
        }
        for (key, value) in [("host_pace_us", self.host_pace_us), ("ring_crowding", self.ring_crowding)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ClusterError::Value { cluster: self.name.clone(), key, value });
            }
        }
        if let Some((name, &value)) = self.physics.iter().find(|(_, value)| !value.is_finite()) {
            return Err(ClusterError::Physics { cluster: self.name.clone(), name: name.clone(), value });
        }
        Ok(())
    }

    /// The same cluster with its GPUs joined by PCIe only.
    #[must_use]
    pub fn over_pcie(mut self) -> Cluster {
        self.gpu.nvlink_gbps = None;
        self.intra_gbps = self.gpu.pcie_gbps;
        (self.gather_gbps, self.all_reduce_gbps) = bus_bandwidths(&self.gpu, self.intra_gbps);
        self.measured.clear();
        self
    }

    /// A cluster of a GPU that is not described otherwise: eight GPUs per node (or its NVLink domain) and the network that
    /// vendors usually sell with its generation.
    pub fn usual(gpu: &Gpu) -> Cluster {
        use crate::gpu::Generation;
        let inter_gbps = match gpu.generation {
            Generation::Volta | Generation::Ada => 12.5,
            Generation::Ampere => 25.0,
            Generation::Hopper | Generation::Blackwell => 50.0,
        };
        let intra_gbps = gpu.nvlink_gbps.unwrap_or(gpu.pcie_gbps);
        let (gather_gbps, all_reduce_gbps) = bus_bandwidths(gpu, intra_gbps);
        Cluster {
            gather_gbps,
            all_reduce_gbps,
            name: format!("usual nodes of {}", gpu.name),
            gpu: gpu.clone(),
            gpus_per_node: if gpu.nvlink_domain > 2 { gpu.nvlink_domain } else { 8 },
            intra_gbps,
            fabric: Fabric::Infiniband,
            inter_gbps,
            inter_latency_us: 14.0,
            host_pace_us: 0.0,
            paced: false,
            ring_crowding: 0.0,
            source: "assumed: the usual network of this generation".into(),
            measured: gpu.measured.iter().cloned().collect(),
            physics: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_clusters_are_sound_and_names_are_unique() {
        let all = shipped(include_str!("../data/clusters.toml")).unwrap();
        let mut names: Vec<&String> = all.iter().flat_map(|(names, _)| names).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        assert_eq!(find_cluster("selene").unwrap().gpu.name, "A100-80G-SXM");
        assert_eq!(find_cluster("P5").unwrap().intra_gbps, 450.0);
    }

    const OWN: &str = r#"
        [cluster]
        name = "lab"
        gpu = "H100-PCIe"
        gpus_per_node = 4
        fabric = "roce"
        inter_gbps = 12.5
        inter_latency_us = 20.0
        source = "measured with nccl-tests"
    "#;

    #[test]
    fn what_is_written_is_read_again() {
        let mut lab = Cluster::from_toml(OWN).unwrap();
        lab.physics.insert("launch".into(), 2e-5);
        assert_eq!(Cluster::from_toml(&lab.to_toml().unwrap()).unwrap(), lab);
        let shipped = find_cluster("gb200-nvl72").unwrap();
        assert_eq!(&Cluster::from_toml(&shipped.to_toml().unwrap()).unwrap(), shipped);
    }

    #[test]
    fn own_clusters() {
        let lab = Cluster::from_toml(OWN).unwrap();
        assert_eq!((lab.gpus_per_node, lab.intra_gbps, lab.fabric), (4, 64.0, Fabric::Roce));
        for (from, to, phrase) in [
            ("H100-PCIe", "H1000", "unknown GPU \"H1000\""),
            ("gpus_per_node = 4", "gpus_per_node = 0", "gpus_per_node = 0"),
            ("roce", "carrier pigeon", "carrier pigeon"),
            ("inter_gbps = 12.5", "", "inter_gbps"),
            ("gpu = \"H100-PCIe\"", "", "[gpu] table"),
            ("[cluster]", "format = 9\n[cluster]", "newer"),
        ] {
            let error = Cluster::from_toml(&OWN.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(phrase), "{error}");
        }
        assert!(find_cluster("x").unwrap_err().to_string().contains("dgx-h100-ib"));
    }
}
