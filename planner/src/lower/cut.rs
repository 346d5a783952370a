//! Layers to stages: contiguous runs whose heaviest is as light as can be, embedding and head counted.

use super::LowerError;
use paceline_sim::model::{Flops, Layer, ModelConfig};
use paceline_sim::program::{Stage, Unit};

/// Forward FLOPs per token of a layer: the weight to cut by when no times are known.
pub fn forward_flops(model: &ModelConfig, seq: u32) -> impl Fn(Layer) -> f64 {
    move |layer| Flops::of_layer(model, layer, seq).total()
}

/// Cuts a model into `stages` stages, each layer a unit. The heaviest stage is as light as possible (exact, by dynamic
/// programming over cuts: `stages * layers^2` steps), and among such cuts stages are close to equal.
///
/// # Errors
/// When there are more stages than blocks, or none.
pub fn cut(model: &ModelConfig, stages: usize, weight: impl Fn(Layer) -> f64) -> Result<Vec<Stage>, LowerError> {
    if stages == 0 {
        return Err(LowerError::Zero { what: "the number of stages" });
    }
    if stages > model.layers as usize {
        return Err(LowerError::TooManyStages { model: model.name.clone(), stages, blocks: model.layers });
    }
    let layers: Vec<Layer> = model.all_layers().collect();
    let mut before = vec![0.0; layers.len() + 1];
    for (n, &layer) in layers.iter().enumerate() {
        before[n + 1] = before[n] + weight(layer).max(0.0);
    }
    let total = before[layers.len()].max(f64::MIN_POSITIVE);
    // best[end]: heaviest stage and sum of squares for the stages so far over layers 0..end; from[stage][end]: its start.
    let mut best: Vec<(f64, f64)> = vec![(f64::INFINITY, f64::INFINITY); layers.len() + 1];
    best[0] = (0.0, 0.0);
    let mut from = Vec::with_capacity(stages);
    for stage in 0..stages {
        let mut next = vec![(f64::INFINITY, f64::INFINITY); layers.len() + 1];
        let mut starts = vec![0; layers.len() + 1];
        for end in stage + 1..=layers.len() {
            for start in stage..end {
                let load = (before[end] - before[start]) / total;
                let found = (best[start].0.max(load), best[start].1 + load * load);
                // Loads that differ by rounding only are equal.
                let lighter = found.0 < next[end].0 * (1.0 - 1e-12);
                let as_light = found.0 <= next[end].0 * (1.0 + 1e-12);
                if lighter || (as_light && found.1 < next[end].1) {
                    next[end] = found;
                    starts[end] = start;
                }
            }
        }
        best = next;
        from.push(starts);
    }
    let mut cuts = vec![layers.len()];
    for starts in from.iter().rev() {
        let end = cuts[cuts.len() - 1];
        cuts.push(starts[end]);
    }
    cuts.reverse();
    Ok(cuts
        .windows(2)
        .map(|pair| Stage {
            units: layers[pair[0]..pair[1]].iter().map(|&layer| Unit { layers: vec![layer] }).collect(),
        })
        .collect())
}
