//! Kernel times from a trace of PyTorch's profiler (Chrome trace format, `prof.export_chrome_trace`).
//!
//! GPU kernels (category `kernel`, and copies) carry the `External id` of the operator that launched them; operators (category
//! `cpu_op`) carry it too, with their input shapes where the profiler recorded them (`record_shapes=True`). Times are microseconds.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use thiserror::Error;

/// What a kernel does, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelClass {
    /// Matrix products.
    Product,
    /// Fused attention.
    Attention,
    /// Collectives and messages.
    Communication,
    /// Copies and fills.
    Copy,
    /// Everything else: norms, activations, residuals, optimizer.
    Elementwise,
}

/// Times of one operator with one set of shapes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperatorTime {
    /// The operator, for example `aten::mm`; the kernel's name where no operator is known.
    pub operator: String,
    /// Its input shapes as the profiler prints them; empty where they were not recorded.
    pub shapes: String,
    /// What its kernels do.
    pub class: KernelClass,
    /// Kernels launched.
    pub kernels: u64,
    /// Their time in seconds.
    pub seconds: f64,
}

/// A trace as read.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TorchTrace {
    /// By operator, shapes and class; the longest first.
    pub operators: Vec<OperatorTime>,
    /// Time in which at least one kernel that is no communication ran, in seconds, summed over the devices.
    pub compute_seconds: f64,
    /// Time in which only communication ran.
    pub exposed_communication_seconds: f64,
    /// Time between the first and the last kernel in which nothing ran.
    pub idle_seconds: f64,
    /// Kernel events without a usable time; left out.
    pub malformed: usize,
}

/// A trace that cannot be used.
#[derive(Debug, Error)]
pub enum TraceError {
    /// Not JSON.
    #[error("PyTorch trace: not a JSON document ({0}); unpack it first if its name ends in .gz")]
    Json(#[from] serde_json::Error),
    /// No list of events.
    #[error("PyTorch trace: no list `traceEvents`; give the file that `export_chrome_trace` wrote")]
    NoEvents,
    /// No kernels.
    #[error("PyTorch trace: {events} events, but no GPU kernel among them; profile with ProfilerActivity.CUDA")]
    NoKernels { events: usize },
}

fn class(name: &str, category: &str) -> KernelClass {
    let name = name.to_ascii_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
    if has(&["nccl", "rccl", "deep_ep", "nvshmem"]) {
        KernelClass::Communication
    } else if category != "kernel" || has(&["memcpy", "memset"]) {
        KernelClass::Copy
    } else if has(&["flash", "fmha", "attention", "sdpa"]) {
        KernelClass::Attention
    } else if has(&["gemm", "cutlass", "xmma", "cublas", "wgmma", "nvjet", "_mm_", "matmul"]) {
        KernelClass::Product
    } else {
        KernelClass::Elementwise
    }
}

/// Microseconds beyond which a time stamp is damaged: 30,000 years.
const LATEST: f64 = 1e18;

/// A kernel on a device's time line, in microseconds.
struct Span {
    from: f64,
    to: f64,
    communication: bool,
}

/// Reads a trace.
///
/// # Errors
/// When it is no trace, or holds no GPU kernel.
pub fn read(text: &str) -> Result<TorchTrace, TraceError> {
    let document: Value = serde_json::from_str(text)?;
    // The list alone is a valid trace, too.
    let events = document.get("traceEvents").unwrap_or(&document).as_array().ok_or(TraceError::NoEvents)?;
    let field = |event: &Value, key: &str| event.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let external = |event: &Value| event.get("args")?.get("External id")?.as_u64();

    let mut launchers: HashMap<u64, (String, String)> = HashMap::new();
    for event in events.iter().filter(|event| field(event, "cat") == "cpu_op") {
        if let Some(id) = external(event) {
            let shapes = event.get("args").and_then(|a| a.get("Input Dims")).map(Value::to_string).unwrap_or_default();
            launchers.insert(id, (field(event, "name"), shapes));
        }
    }

    let mut trace = TorchTrace::default();
    let mut times: BTreeMap<(String, String, KernelClass), (u64, f64)> = BTreeMap::new();
    let mut devices: BTreeMap<String, Vec<Span>> = BTreeMap::new();
    for event in events {
        let category = field(event, "cat");
        if !["kernel", "gpu_memcpy", "gpu_memset"].contains(&category.as_str()) {
            continue;
        }
        let number = |key: &str| event.get(key).and_then(Value::as_f64).filter(|n| n.abs() < LATEST);
        let (Some(from), Some(length)) = (number("ts"), number("dur").filter(|d| *d >= 0.0)) else {
            trace.malformed += 1;
            continue;
        };
        let name = field(event, "name");
        let class = class(&name, &category);
        let (operator, shapes) =
            external(event).and_then(|id| launchers.get(&id).cloned()).unwrap_or((name, String::new()));
        let entry = times.entry((operator, shapes, class)).or_default();
        entry.0 += 1;
        entry.1 += length * 1e-6;
        let device = event.get("args").and_then(|a| a.get("device")).or(event.get("pid"));
        let span = Span { from, to: from + length, communication: class == KernelClass::Communication };
        devices.entry(device.map(Value::to_string).unwrap_or_default()).or_default().push(span);
    }
    if times.is_empty() {
        return Err(TraceError::NoKernels { events: events.len() });
    }
    for spans in devices.values_mut() {
        occupation(spans, &mut trace);
    }
    trace.operators = times
        .into_iter()
        .map(|((operator, shapes, class), (kernels, seconds))| OperatorTime {
            operator,
            shapes,
            class,
            kernels,
            seconds,
        })
        .collect();
    trace.operators.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(trace)
}

/// Adds how long one device computes, only communicates, and idles.
fn occupation(spans: &mut [Span], trace: &mut TorchTrace) {
    // Ends and beginnings in the order of time, with how each changes the number of running kernels.
    let mut edges: Vec<(f64, i64, i64)> = Vec::with_capacity(2 * spans.len());
    for span in spans.iter() {
        let (compute, communication) = if span.communication { (0, 1) } else { (1, 0) };
        edges.push((span.from, compute, communication));
        edges.push((span.to, -compute, -communication));
    }
    edges.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut compute, mut communication) = (0i64, 0i64);
    for pair in edges.windows(2) {
        compute += pair[0].1;
        communication += pair[0].2;
        let seconds = (pair[1].0 - pair[0].0) * 1e-6;
        *match (compute > 0, communication > 0) {
            (true, _) => &mut trace.compute_seconds,
            (false, true) => &mut trace.exposed_communication_seconds,
            (false, false) => &mut trace.idle_seconds,
        } += seconds;
    }
}

impl TorchTrace {
    /// Seconds and kernels by class.
    pub fn by_class(&self) -> BTreeMap<KernelClass, (u64, f64)> {
        let mut classes: BTreeMap<KernelClass, (u64, f64)> = BTreeMap::new();
        for operator in &self.operators {
            let entry = classes.entry(operator.class).or_default();
            entry.0 += operator.kernels;
            entry.1 += operator.seconds;
        }
        classes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TRACE: &str = r#"{"traceEvents": [
      {"ph": "M", "name": "process_name", "pid": 1},
      {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 5, "args": {"External id": 7, "Input Dims": [[8, 4], [4, 2]]}},
      {"ph": "X", "cat": "kernel", "name": "sm80_xmma_gemm_bf16", "ts": 10, "dur": 20, "args": {"External id": 7, "device": 0}},
      {"ph": "X", "cat": "kernel", "name": "sm80_xmma_gemm_bf16", "ts": 40, "dur": 10, "args": {"External id": 7, "device": 0}},
      {"ph": "X", "cat": "kernel", "name": "ncclDevKernel_AllGather_RING_LL", "ts": 25, "dur": 10, "args": {"device": 0}},
      {"ph": "X", "cat": "kernel", "name": "flash_fwd_kernel", "ts": 50, "dur": 1, "args": {"device": 0}},
      {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "ts": 51, "dur": 1, "args": {"device": 0}},
      {"ph": "X", "cat": "kernel", "name": "broken", "ts": 50, "dur": "soon"}
    ]}"#;

    #[test]
    fn kernels_belong_to_operators_and_time_is_split() {
        let trace = read(TRACE).unwrap();
        let first = &trace.operators[0];
        assert_eq!((first.operator.as_str(), first.shapes.as_str(), first.kernels), ("aten::mm", "[[8,4],[4,2]]", 2));
        assert!((first.seconds - 30e-6).abs() < 1e-12);
        assert_eq!(trace.malformed, 1);
        let classes = trace.by_class();
        assert_eq!(classes.len(), 4);
        assert_eq!(classes[&KernelClass::Communication].0, 1);
        // 10 to 30 computes, 30 to 35 only communicates, 35 to 40 idles, 40 to 52 computes.
        assert!((trace.compute_seconds - 32e-6).abs() < 1e-12);
        assert!((trace.exposed_communication_seconds - 5e-6).abs() < 1e-12);
        assert!((trace.idle_seconds - 5e-6).abs() < 1e-12);
    }

    #[test]
    fn what_is_no_trace_says_why() {
        assert!(read("{").unwrap_err().to_string().contains(".gz"));
        assert!(read("{}").unwrap_err().to_string().contains("traceEvents"));
        assert!(read(r#"[{"cat": "cpu_op"}]"#).unwrap_err().to_string().contains("1 events"));
    }

    proptest! {
        #[test]
        fn damaged_traces_are_survived(cut in 0usize..1400, junk in "[ -~]{0,20}") {
            let mut text = TRACE.to_owned();
            text.insert_str(cut.min(text.len()), &junk);
            let _ = read(&text);
            let _ = read(&text[..cut.min(text.len())]);
        }
    }
}
