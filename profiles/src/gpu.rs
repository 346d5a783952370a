//! GPUs by name: rates, bandwidths and sizes as their vendors state them, read from `data/gpus.toml` or a file of the
//! user's.

use serde::{Deserialize, Serialize};
use std::sync::LazyLock;
use thiserror::Error;

/// A GPU. Rates are dense, bandwidths per direction, in 10^9 bytes per second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Other names that it goes by.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Its architecture.
    pub generation: Generation,
    /// Total memory as CUDA reports it, in GiB.
    pub memory_gib: f64,
    /// Memory bandwidth.
    pub memory_bandwidth_gbps: f64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Tensor-core rate with 16-bit inputs.
    pub bf16_tflops: f64,
    /// Tensor-core rate with TF32 inputs.
    pub tf32_tflops: f64,
    /// Tensor-core rate with 8-bit inputs, where it has one.
    pub fp8_tflops: Option<f64>,
    /// Tensor-core rate with 4-bit inputs, where it has one.
    pub fp4_tflops: Option<f64>,
    /// NVLink bandwidth, where it has one.
    pub nvlink_gbps: Option<f64>,
    /// Bus bandwidth (nccl-tests' definition) of large all-gathers and reduce-scatters over eight GPUs, where it was
    /// measured; otherwise three quarters of the link.
    pub gather_gbps: Option<f64>,
    /// The same of all-reduces, in which NVSwitches may add.
    pub all_reduce_gbps: Option<f64>,
    /// Where these two come from.
    pub collectives_source: Option<String>,
    /// Names of those of them that were measured on this GPU.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub measured: Vec<String>,
    /// PCIe bandwidth.
    pub pcie_gbps: f64,
    /// GPUs that NVLink joins at most; 1 without.
    pub nvlink_domain: u32,
    /// Power limit, where it differs from that of the architecture's reference (A100 SXM 400 W, H100 SXM 700 W).
    pub power_watts: Option<f64>,
    /// Where the figures come from.
    pub source: String,
    /// Which of them do not.
    pub assumed: Option<String>,
}

/// Architectures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Generation {
    /// V100.
    Volta,
    /// A100.
    Ampere,
    /// L40S, RTX 40.
    Ada,
    /// H100, H200.
    Hopper,
    /// B200, B300, GB200, GB300.
    Blackwell,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    gpu: Vec<Gpu>,
}

/// A GPU that cannot be had.
#[derive(Debug, Error)]
pub enum GpuError {
    /// No GPU of this name.
    #[error(
        "unknown GPU {name:?}; known: {known}. Describe another one in a cluster file, in a [gpu] table with the keys of profiles/data/gpus.toml"
    )]
    Unknown { name: String, known: String },
    /// A file that cannot be read.
    #[error("GPU file: {0}")]
    Parse(#[from] toml::de::Error),
    /// A file from a newer version.
    #[error("GPU file: format {format} is newer than 1, which this version reads; update paceline")]
    Format { format: u32 },
    /// A figure that cannot be.
    #[error("GPU {gpu}: {key} = {value}, but it has to be a finite number above zero")]
    Value { gpu: String, key: &'static str, value: f64 },
}

static SHIPPED: LazyLock<Vec<Gpu>> = LazyLock::new(|| match parse(include_str!("../data/gpus.toml")) {
    Ok(gpus) => gpus,
    Err(error) => unreachable!("the shipped file is checked by a test: {error}"),
});

/// Reads a file of GPUs.
///
/// # Errors
/// When it is no TOML, has unknown or missing keys, or figures that cannot be.
pub fn parse(text: &str) -> Result<Vec<Gpu>, GpuError> {
    let file: File = toml::from_str(text)?;
    if file.format > 1 {
        return Err(GpuError::Format { format: file.format });
    }
    for gpu in &file.gpu {
        gpu.check()?;
    }
    Ok(file.gpu)
}

/// All shipped GPUs.
pub fn gpus() -> &'static [Gpu] {
    &SHIPPED
}

/// A shipped GPU by name or alias; case, spaces and underscores do not matter, nor does a leading `NVIDIA`, `Tesla`, `DGX` or
/// `HGX`.
///
/// # Errors
/// When there is none; the message lists the known ones.
pub fn find_gpu(name: &str) -> Result<&'static Gpu, GpuError> {
    let wanted = plain(name);
    let names =
        gpus().iter().flat_map(|gpu| std::iter::once(&gpu.name).chain(&gpu.aliases).map(move |n| (gpu, plain(n))));
    // The longest name that the wanted one begins with; what follows (`HBM3`) may say more, but no other number.
    let fits =
        |name: &str| wanted.strip_prefix(name).is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()));
    let best = names.filter(|(_, name)| fits(name)).max_by_key(|(_, name)| name.len());
    best.map(|(gpu, _)| gpu).ok_or_else(|| GpuError::Unknown {
        name: name.to_owned(),
        known: gpus().iter().map(|gpu| gpu.name.as_str()).collect::<Vec<_>>().join(", "),
    })
}

fn plain(name: &str) -> String {
    let kept: String = name.to_ascii_lowercase().chars().filter(char::is_ascii_alphanumeric).collect();
    let kept = "0123456789".chars().fold(kept, |name, digit| name.replace(&format!("{digit}gb"), &format!("{digit}g")));
    let mut name = kept.as_str();
    for brand in ["nvidia", "tesla", "dgx", "hgx"] {
        name = name.strip_prefix(brand).unwrap_or(name);
    }
    name.to_owned()
}

impl Gpu {
    /// Checks the figures.
    ///
    /// # Errors
    /// The first that cannot be.
    pub fn check(&self) -> Result<(), GpuError> {
        let optional = [
            ("fp8_tflops", self.fp8_tflops),
            ("fp4_tflops", self.fp4_tflops),
            ("nvlink_gbps", self.nvlink_gbps),
            ("gather_gbps", self.gather_gbps),
            ("all_reduce_gbps", self.all_reduce_gbps),
            ("power_watts", self.power_watts),
        ];
        let given = [
            ("memory_gib", self.memory_gib),
            ("memory_bandwidth_gbps", self.memory_bandwidth_gbps),
            ("multiprocessors", f64::from(self.multiprocessors)),
            ("bf16_tflops", self.bf16_tflops),
            ("tf32_tflops", self.tf32_tflops),
            ("pcie_gbps", self.pcie_gbps),
            ("nvlink_domain", f64::from(self.nvlink_domain)),
        ];
        let given = given.into_iter().chain(optional.into_iter().filter_map(|(k, v)| v.map(|v| (k, v))));
        for (key, value) in given {
            if !(value.is_finite() && value > 0.0) {
                return Err(GpuError::Value { gpu: self.name.clone(), key, value });
            }
        }
        Ok(())
    }

    /// Total memory in bytes.
    pub fn memory_bytes(&self) -> f64 {
        self.memory_gib * (1u64 << 30) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_gpus_are_sound_and_names_are_unique() {
        let gpus = parse(include_str!("../data/gpus.toml")).unwrap();
        let mut names: Vec<String> =
            gpus.iter().flat_map(|g| std::iter::once(&g.name).chain(&g.aliases)).map(|n| plain(n)).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all, "two GPUs share a name");
        assert!(gpus.iter().all(|g| (g.nvlink_domain > 1) == g.nvlink_gbps.is_some()));
    }

    #[test]
    fn names_are_forgiving() {
        for (name, found) in [
            ("NVIDIA A100 80GB", "A100-80G-SXM"),
            ("h100", "H100-SXM"),
            ("A100-40G", "A100-40G-SXM"),
            ("a100_80g_pcie", "A100-80G-PCIe"),
            ("B200-SXM", "B200"),
            ("NVIDIA H100 80GB HBM3", "H100-SXM"),
            ("A100-SXM4-40GB", "A100-40G-SXM"),
            ("A100-SXM-40GB", "A100-40G-SXM"),
            ("A800-80G-SXM", "A800-80G-SXM"),
            ("A800 PCIe 80GB", "A800-80G-PCIe"),
            ("H100 PCIe 80GB", "H100-PCIe"),
            ("NVIDIA H100 NVL 94GB", "H100-NVL"),
            ("B200 192GB", "B200"),
            ("NVIDIA DGX B200", "B200"),
            ("GB300 288GB", "GB300"),
            ("GH200 120GB", "GH200-96G"),
            ("NVIDIA GH200 480GB", "GH200-96G"),
            ("Tesla V100-SXM2-16GB", "V100-16G"),
            ("NVIDIA A10G", "A10G"),
            ("A10", "A10"),
            ("L40S", "L40S"),
            ("L4", "L4"),
        ] {
            assert_eq!(find_gpu(name).unwrap().name, found);
        }
        assert!(find_gpu("H1000").is_err());
        let error = find_gpu("MI300X").unwrap_err().to_string();
        assert!(error.contains("MI300X") && error.contains("H200") && error.contains("[gpu]"), "{error}");
    }

    #[test]
    fn impossible_figures_are_refused() {
        let text = include_str!("../data/gpus.toml").replace("memory_gib = 79.15", "memory_gib = -1.0");
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains("A100-80G-SXM") && error.contains("memory_gib = -1"), "{error}");
        let text = include_str!("../data/gpus.toml").replace("memory_gib = 79.15", "memory_gob = 79.15");
        assert!(parse(&text).unwrap_err().to_string().contains("memory_gob"));
        assert!(parse("format = 2\ngpu = []").unwrap_err().to_string().contains("newer"));
    }
}
