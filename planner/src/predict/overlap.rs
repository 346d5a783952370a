//! Whether communication can hide behind computation at all: the ratios of the Ultra-Scale Playbook's appendix (Tazi et al.
//! 2025, "Math for Compute/Communication Overlap"), each `time of communication / time of computation` at peak rates.

use paceline_profiles::Cluster;
use paceline_sim::cluster::{Architecture, Layout};
use serde::{Deserialize, Serialize};

/// Ratios of communication to the computation that it can hide behind. At most 1: it can hide in full. As the playbook
/// counts, one byte per element on the wire; with 16 bits every ratio doubles.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OverlapRatios {
    /// Gradient reduction behind the backward pass of one microbatch: `1 / (2 s b) (DP-1)/DP F/B`. (The playbook prints another
    /// factor of the number of parameters, which its two times, of all gradients, do not leave.)
    pub dp: f64,
    /// Gathering a layer's parameters behind the forward pass of another: `1 / (2 s b) (DP-1)/DP F/B`.
    pub zero3: f64,
    /// Gathering the input of a product behind the product before: `(TP-1) / (2 h) F/B`.
    pub tp: f64,
    /// Sending activations behind the next stage: `F / (32 h L_stage B)`.
    pub pp: f64,
}

impl OverlapRatios {
    /// Of a layout on a cluster. `F` is the stated 16-bit rate, `B` the link that the group's messages take: the one between
    /// nodes where the group leaves its node.
    pub fn of(model: &Architecture, layout: &Layout, cluster: &Cluster) -> OverlapRatios {
        let groups = super::Groups::of(layout, u64::from(cluster.gpus_per_node));
        let bandwidth = |across: bool| 1e9 * if across { cluster.inter_gbps } else { cluster.intra_gbps };
        let flops = cluster.gpu.bf16_tflops * 1e12;
        let replicas = (layout.dp * layout.cp) as f64;
        let per_byte = |across| flops / bandwidth(across);
        let data = (replicas - 1.0) / replicas * per_byte(groups.data.nodes() > 1);
        let tokens = layout.tokens();
        let hidden = model.hidden as f64;
        let next = model.layers as f64 / (layout.pp * layout.chunks) as f64;
        let pipeline = if layout.pp > 1 { per_byte(groups.pipeline_across) / (32.0 * hidden * next) } else { 0.0 };
        OverlapRatios {
            dp: data / (2.0 * tokens),
            zero3: data / (2.0 * tokens),
            tp: (layout.tp as f64 - 1.0) / (2.0 * hidden) * per_byte(groups.tensor.nodes() > 1),
            pp: pipeline,
        }
    }
}

/// What a number of tokens takes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TokenBudget {
    /// Tokens of all GPUs in a day.
    pub tokens_per_day: f64,
    /// Days.
    pub days: f64,
    /// GPU-hours.
    pub gpu_hours: f64,
    /// Cost in the currency of the price.
    pub cost: f64,
}

impl TokenBudget {
    /// Of training on `tokens` tokens at a speed, with a price per GPU-hour.
    pub fn of(tokens_per_second_per_gpu: f64, gpus: u64, tokens: f64, price_per_gpu_hour: f64) -> TokenBudget {
        let gpu_hours = tokens / tokens_per_second_per_gpu / 3600.0;
        TokenBudget {
            tokens_per_day: tokens_per_second_per_gpu * gpus as f64 * 86_400.0,
            days: gpu_hours / gpus as f64 / 24.0,
            gpu_hours,
            cost: gpu_hours * price_per_gpu_hour,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_profiles::find_cluster;

    #[test]
    fn ratios_of_the_playbook() {
        let model = Architecture::load("llama-3-8b").unwrap();
        let layout = Layout { tp: 8, dp: 4, pp: 2, ..Layout::single(4096, 1) };
        let ratios = OverlapRatios::of(&model, &layout, find_cluster("dgx-h100-ib").unwrap());
        let (flops, inside, between) = (989.4e12, 450e9, 50e9);
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-12;
        assert!(close(ratios.tp, 7.0 / (2.0 * 4096.0) * flops / inside), "{ratios:?}");
        assert!(close(ratios.zero3, 0.75 / (2.0 * 4096.0) * flops / between));
        assert!(close(ratios.pp, flops / (32.0 * 4096.0 * 16.0 * between)));
        assert_eq!(ratios.dp, ratios.zero3);
        let alone = OverlapRatios::of(&model, &Layout::single(4096, 1), find_cluster("dgx-h100-ib").unwrap());
        assert_eq!([alone.dp, alone.zero3, alone.tp, alone.pp], [0.0; 4]);
    }

    /// Llama 3 405B: 3.8e25 FLOPs, which at 400 TFLOP/s and GPU on 16,384 GPUs take 67 days.
    #[test]
    fn budgets() {
        let speed = 400e12 / (3.8e25 / 15.6e12);
        let budget = TokenBudget::of(speed, 16_384, 15.6e12, 2.0);
        assert!((budget.days - 67.1).abs() < 0.1, "{budget:?}");
        assert!((budget.tokens_per_day * budget.days / 15.6e12 - 1.0).abs() < 1e-12);
        assert_eq!(budget.cost, 2.0 * budget.gpu_hours);
    }
}
