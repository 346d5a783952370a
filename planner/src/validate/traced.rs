//! The rate of matrix products of a GPU from a trace of PyTorch's profiler: every product of the trace by its shape against the
//! model's time for that shape.

use paceline_profiles::import::torch_trace::{KernelClass, TorchTrace};
use paceline_profiles::{Cluster, Generation};
use paceline_sim::cluster::device::Device;
use paceline_sim::cluster::work::Product;
use paceline_sim::cluster::{Layout, PARAMETERS, Parameter, Physics};
use serde::Serialize;
use thiserror::Error;

/// A product of a trace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TracedProduct {
    /// The operator.
    pub operator: String,
    /// Rows, columns, summed dimension, and how many at once.
    pub shape: [f64; 4],
    /// How often it ran.
    pub calls: u64,
    /// Measured seconds of one.
    pub measured_seconds: f64,
    /// Seconds of one, predicted with the fitted rate.
    pub predicted_seconds: f64,
}

/// What a trace says about the rate of products.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TraceFit {
    /// The parameters, the one of this GPU's products replaced.
    pub physics: Physics,
    /// Its name.
    pub parameter: &'static str,
    /// Its value before.
    pub before: f64,
    /// Its value now.
    pub after: f64,
    /// The products, the longest first.
    pub products: Vec<TracedProduct>,
    /// Median absolute error over the products' time, before the fit.
    pub error_before: f64,
    /// The same after it.
    pub error_after: f64,
    /// The same when every fifth product is foretold by the others.
    pub error_held_out: f64,
}

/// A trace that says nothing about products.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TraceFitError {
    /// None with known shapes.
    #[error(
        "the trace holds no large matrix product with known shapes among {operators} operators; profile with record_shapes=True and a batch of the usual size"
    )]
    NoProducts { operators: usize },
}

/// Products below are bound by their launch or their traffic and say nothing about the rate.
const LEAST_FLOPS: f64 = 1e9;
/// Bytes of an element: traces do not say; training runs in 16 bits.
const ELEMENT: f64 = 2.0;

/// Fits the rate of products.
///
/// # Errors
/// When the trace has no product with known shapes.
pub fn fit_trace(trace: &TorchTrace, cluster: &Cluster, start: &Physics) -> Result<TraceFit, TraceFitError> {
    let products: Vec<TracedProduct> = trace
        .operators
        .iter()
        .filter(|o| o.class == KernelClass::Product && o.kernels > 0)
        .filter_map(|o| {
            let shape = product_of(&o.operator, &o.shapes)?;
            let measured_seconds = o.seconds / o.kernels as f64;
            let usable = measured_seconds > 0.0 && 2.0 * shape.iter().product::<f64>() >= LEAST_FLOPS;
            usable.then(|| TracedProduct {
                operator: o.operator.clone(),
                shape,
                calls: o.kernels,
                measured_seconds,
                predicted_seconds: 0.0,
            })
        })
        .collect();
    if products.is_empty() {
        return Err(TraceFitError::NoProducts { operators: trace.operators.len() });
    }
    let all: Vec<&TracedProduct> = products.iter().collect();
    let parameter = rate_of(cluster.gpu.generation);
    let physics = search(&all, cluster, start, parameter);
    let folds = 5.min(products.len());
    let mut held_out = Vec::new();
    for fold in 0..folds {
        let (left, used): (Vec<_>, Vec<_>) = all.iter().enumerate().partition(|(n, _)| n % folds == fold);
        let used: Vec<&TracedProduct> = used.into_iter().map(|(_, p)| *p).collect();
        let without = if used.is_empty() { *start } else { search(&used, cluster, start, parameter) };
        held_out.extend(left.into_iter().map(|(_, p)| weighted(p, cluster, &without)));
    }
    let error = |physics: &Physics| median(all.iter().map(|p| weighted(p, cluster, physics)).collect());
    let fitted = TraceFit {
        parameter: parameter.name,
        before: (parameter.get)(start),
        after: (parameter.get)(&physics),
        error_before: error(start),
        error_after: error(&physics),
        error_held_out: median(held_out),
        products: products
            .iter()
            .map(|p| TracedProduct { predicted_seconds: seconds(p, cluster, &physics), ..p.clone() })
            .collect(),
        physics,
    };
    Ok(fitted)
}

fn rate_of(generation: Generation) -> &'static Parameter {
    let name = match generation {
        Generation::Volta | Generation::Ampere | Generation::Ada => "matmul_ampere",
        Generation::Hopper => "matmul_hopper",
        Generation::Blackwell => "blackwell",
    };
    // The list holds all three; a test goes over the generations.
    PARAMETERS.iter().find(|p| p.name == name).unwrap_or(&PARAMETERS[0])
}

fn seconds(p: &TracedProduct, cluster: &Cluster, physics: &Physics) -> f64 {
    let device = Device::of(&cluster.gpu, &Layout::single(1, 1), physics);
    let [m, n, k, count] = p.shape;
    device.product(&Product { m, n, k, count }, ELEMENT)
}

/// Absolute relative error of a product, with its share of the trace's time as weight.
fn weighted(p: &TracedProduct, cluster: &Cluster, physics: &Physics) -> (f64, f64) {
    ((seconds(p, cluster, physics) / p.measured_seconds - 1.0).abs(), p.measured_seconds * p.calls as f64)
}

/// The value below which half of the weight lies.
fn median(mut values: Vec<(f64, f64)>) -> f64 {
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let half = values.iter().map(|v| v.1).sum::<f64>() / 2.0;
    let mut sum = 0.0;
    for (value, weight) in &values {
        sum += weight;
        if sum >= half {
            return *value;
        }
    }
    values.last().map_or(0.0, |v| v.0)
}

/// Scales the rate until half of the time is predicted too long and half too short. Products that their traffic binds do not
/// follow the rate, which is why one step is not enough.
fn search(products: &[&TracedProduct], cluster: &Cluster, start: &Physics, parameter: &Parameter) -> Physics {
    let mut physics = *start;
    for _ in 0..8 {
        let ratios = products
            .iter()
            .map(|p| (seconds(p, cluster, &physics) / p.measured_seconds, p.measured_seconds * p.calls as f64));
        let value = (parameter.get)(&physics) * median(ratios.collect());
        (parameter.set)(&mut physics, value.clamp(parameter.range.0, parameter.range.1));
    }
    physics
}

/// The product that an operator computes from its input shapes.
fn product_of(operator: &str, shapes: &str) -> Option<[f64; 4]> {
    let shapes: Vec<Vec<f64>> = serde_json::from_str::<Vec<serde_json::Value>>(shapes)
        .ok()?
        .into_iter()
        .map(|shape| serde_json::from_value(shape).unwrap_or_default())
        .collect();
    let matrices: Vec<&[f64]> = shapes.iter().map(Vec::as_slice).filter(|s| s.len() >= 2).collect();
    let name = operator.strip_prefix("aten::")?;
    let [a, b, ..] = matrices.as_slice() else { return None };
    let shape = match name {
        "mm" | "addmm" | "_scaled_mm" => match (*a, *b) {
            ([m, k], [k2, n]) if k == k2 => [*m, *n, *k, 1.0],
            _ => return None,
        },
        "bmm" | "baddbmm" => match (*a, *b) {
            ([batch, m, k], [batch2, k2, n]) if k == k2 && batch == batch2 => [*m, *n, *k, *batch],
            _ => return None,
        },
        "linear" => match (a.split_last()?, *b) {
            ((k, rows), [n, k2]) if k == k2 => [rows.iter().product(), *n, *k, 1.0],
            _ => return None,
        },
        _ => return None,
    };
    shape.iter().all(|n| n.is_finite() && *n >= 1.0).then_some(shape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_profiles::find_cluster;
    use paceline_profiles::import::torch_trace::OperatorTime;

    fn operator(name: &str, shapes: &str, kernels: u64, seconds: f64) -> OperatorTime {
        OperatorTime { operator: name.into(), shapes: shapes.into(), class: KernelClass::Product, kernels, seconds }
    }

    #[test]
    fn shapes_of_operators() {
        assert_eq!(product_of("aten::mm", "[[8,4],[4,2]]"), Some([8.0, 2.0, 4.0, 1.0]));
        assert_eq!(product_of("aten::addmm", "[[2],[8,4],[4,2],[],[]]"), Some([8.0, 2.0, 4.0, 1.0]));
        assert_eq!(product_of("aten::bmm", "[[3,8,4],[3,4,2]]"), Some([8.0, 2.0, 4.0, 3.0]));
        assert_eq!(product_of("aten::linear", "[[3,8,4],[2,4],[2]]"), Some([24.0, 2.0, 4.0, 1.0]));
        for (name, shapes) in [
            ("aten::mm", "[[8,4],[5,2]]"),
            ("aten::mm", ""),
            ("aten::mm", "[[8,4]]"),
            ("mm", "[[8,4],[4,2]]"),
            ("aten::add", "[[8,4],[4,2]]"),
        ] {
            assert_eq!(product_of(name, shapes), None, "{name} {shapes}");
        }
    }

    /// Times that come from a known rate give it back, whatever it was before.
    #[test]
    fn the_rate_is_found() {
        for (cluster, set) in [
            ("dgx-a100-ib", (|p: &mut Physics| p.matmul_ampere = 0.62) as fn(&mut Physics)),
            ("dgx-h100-ib", |p: &mut Physics| p.matmul_hopper = 0.62),
            ("dgx-b200-ib", |p: &mut Physics| p.blackwell = 0.62),
        ] {
            let cluster = find_cluster(cluster).unwrap();
            let mut truth = Physics::default();
            set(&mut truth);
            let mut trace = TorchTrace::default();
            for (n, k) in [(4096.0, 4096.0), (11008.0, 4096.0), (4096.0, 11008.0), (128.0, 128.0)] {
                let p = TracedProduct {
                    operator: String::new(),
                    shape: [8192.0, n, k, 1.0],
                    calls: 1,
                    measured_seconds: 0.0,
                    predicted_seconds: 0.0,
                };
                let seconds = 3.0 * seconds(&p, cluster, &truth);
                trace.operators.push(operator("aten::mm", &format!("[[8192,{k}],[{k},{n}]]"), 3, seconds));
            }
            let fit = fit_trace(&trace, cluster, &Physics::default()).unwrap();
            assert_eq!(fit.products.len(), 3, "the smallest says nothing");
            assert!((fit.after - 0.62).abs() < 1e-3, "{fit:?}");
            assert!(fit.error_after < 1e-3 && fit.error_held_out < 1e-2 && fit.error_before > 0.05, "{fit:?}");
        }
        let nothing = TorchTrace { operators: vec![operator("aten::add", "", 1, 1.0)], ..TorchTrace::default() };
        let error = fit_trace(&nothing, find_cluster("p5").unwrap(), &Physics::default()).unwrap_err();
        assert!(error.to_string().contains("record_shapes"));
    }
}
