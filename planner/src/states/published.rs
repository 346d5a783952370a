//! What PaRO measured (NeurIPS 2024, section 4.3), beside the prediction and the guideline.
//!
//! Settings: 32 A100-80G in four nodes, sequences of 512 tokens, microbatches of 4, 10 accumulated; DeepSpeed 0.10. The paper's
//! absolute figures are in images; its text gives how much faster one partition is than another.

use super::table::{StatesError, any_states, rank_layout};
use crate::predict::{ClusterPrediction, ClusterRequest, RequestError, predict_cluster};
use paceline_profiles::Cluster;
use paceline_sim::cluster::network::{Network, Span};
use paceline_sim::cluster::{Architecture, AttentionKernel, Layout, Physics};
use serde::Serialize;

/// One published gain.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Gain {
    model: &'static str,
    pub trainable: &'static str,
    pub faster: &'static str,
    slower: &'static str,
    /// Throughput of the faster over that of the slower, minus 1.
    pub gain: f64,
}

const fn gain(
    model: &'static str,
    trainable: &'static str,
    faster: &'static str,
    slower: &'static str,
    gain: f64,
) -> Gain {
    Gain { model, trainable, faster, slower, gain }
}

/// Section 4.3, figures 3 and 4. Of the gains with a part of the parameters trained at 65B, the text leaves open whether it states
/// the ratio or the increase ("improved by 266 %", "up to 266 % that of ZeRO-3"); taken as the ratio. What it calls 0.3 % are, in the
/// released script, adapters of rank 16 beside every matrix.
pub(super) const PUBLISHED: [Gain; 8] = [
    gain("llama-7b", "full", "IIG", "GGG", 1.28),
    gain("llama-7b", "full", "NII", "NGG", 0.67),
    gain("llama-65b", "full", "IIG", "GGG", 0.86),
    gain("llama-7b", "1/16", "NII", "NGG", 0.21),
    gain("llama-7b", "1/16", "NIG", "NGG", 0.15),
    gain("llama-65b", "1/16", "IIG", "GGG", 1.66),
    gain("llama-65b", "1/16", "III", "GGG", 1.64),
    gain("llama-65b", "lora:16", "ING", "GGG", 0.44),
];

/// A gain three ways.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GainComparison {
    /// Model.
    pub model: &'static str,
    /// What is trained.
    pub trainable: &'static str,
    /// The faster triple.
    pub faster: &'static str,
    /// The slower triple.
    pub slower: &'static str,
    /// As published.
    pub published: f64,
    /// As predicted, with communication beside computation where the runtime does so.
    pub overlapped: f64,
    /// As predicted, with communication and computation one after the other.
    pub one_after_the_other: f64,
    /// As the guideline has it.
    pub guideline: f64,
}

/// The published job, as the released code runs it (github.com/HanxiaoZhang/PaRO, DeepSpeed 0.10): LLaMA of Hugging Face's library,
/// whose operators are not fused; buckets of DeepSpeed's defaults, 5e7 elements for gathers and 5e8 for reductions.
pub fn published_job(model: &str, trainable: &str) -> ClusterRequest {
    ClusterRequest {
        model: model.into(),
        cluster: "paro-a100-roce".into(),
        nodes: Some(4),
        seq: 512,
        global_batch: 1280,
        micro_batch: Some(4),
        trainable: Some(trainable.into()),
        recompute: Some(if model.contains("65b") { "full" } else { "none" }.into()),
        runtime: Some("deepspeed".into()),
        kernels: Some("separate".into()),
        attention: Some("naive".into()),
        gather_bucket: Some(100_000_000),
        reduce_bucket: Some(1_000_000_000),
        ..ClusterRequest::default()
    }
}

/// All published gains beside predicted ones.
///
/// # Errors
/// When a job cannot be predicted.
pub fn compare_published(physics: &Physics) -> Result<Vec<GainComparison>, StatesError> {
    compare(|_| true, physics)
}

/// The paper gives shares of two digits at most.
const SAME_SHARE: f64 = 0.05;

/// The published gains of a job, if it is one of those published; none otherwise.
///
/// # Errors
/// When a job cannot be predicted.
pub fn published_of(request: &ClusterRequest) -> Result<Vec<GainComparison>, StatesError> {
    let request = any_states(request)?;
    let (_, layout, cluster) = request.resolve()?;
    let job = layout.data_ranks() == 32 && layout.gpus() == 32 && cluster.gpus_per_node == 8;
    let batch = (layout.seq, layout.micro_batch, layout.microbatches) == (512, 4, 10);
    let network = cluster.gpu.name.starts_with("A100-80G") && (cluster.inter_gbps - 10.0).abs() < 1e-9;
    let same = |p: &Gain| {
        let asked = ClusterRequest { trainable: Some(p.trainable.into()), ..request.clone() };
        let share = asked.resolve().map(|(_, asked, _)| asked.trainable).unwrap_or(f64::NAN);
        p.model == request.model && (share / layout.trainable - 1.0).abs() < SAME_SHARE
    };
    if job && batch && network { compare(same, &Physics::default()) } else { Ok(Vec::new()) }
}

/// A published job with one thing changed, or none.
#[derive(Clone)]
pub(super) struct Variant<'a> {
    pub model: Architecture,
    pub layout: Layout,
    pub cluster: Cluster,
    physics: &'a Physics,
}

impl<'a> Variant<'a> {
    pub fn of(gain: &Gain, physics: &'a Physics) -> Result<Variant<'a>, StatesError> {
        let (model, layout, cluster) = published_job(gain.model, gain.trainable).resolve()?;
        Ok(Variant { model, layout, cluster, physics })
    }

    /// The job under a triple.
    fn under(&self, triple: &str) -> Result<(Layout, ClusterPrediction), StatesError> {
        let layout = Layout { sharding: triple.parse().map_err(RequestError::from)?, ..self.layout.clone() };
        let prediction = predict_cluster(&self.model, &layout, &self.cluster, self.physics)?;
        Ok((layout, prediction))
    }

    pub fn gain(&self, gain: &Gain) -> Result<f64, StatesError> {
        let seconds = |triple| Ok::<_, StatesError>(self.under(triple)?.1.iteration_seconds);
        Ok(seconds(gain.slower)? / seconds(gain.faster)? - 1.0)
    }

    /// The same by the guideline.
    fn gain_by_guideline(&self, gain: &Gain) -> Result<f64, StatesError> {
        let seconds = |triple| {
            let (layout, prediction) = self.under(triple)?;
            Ok::<_, StatesError>(rank_layout(&self.model, &layout, &self.cluster, &prediction).seconds)
        };
        Ok(seconds(gain.slower)? / seconds(gain.faster)? - 1.0)
    }
}

fn compare(wanted: impl Fn(&Gain) -> bool, physics: &Physics) -> Result<Vec<GainComparison>, StatesError> {
    PUBLISHED
        .into_iter()
        .filter(wanted)
        .map(|p| {
            let mut job = Variant::of(&p, physics)?;
            let overlapped = job.gain(&p)?;
            let guideline = job.gain_by_guideline(&p)?;
            (job.layout.overlap.gradients, job.layout.overlap.parameters) = (false, false);
            Ok(GainComparison {
                model: p.model,
                trainable: p.trainable,
                faster: p.faster,
                slower: p.slower,
                published: p.gain,
                overlapped,
                one_after_the_other: job.gain(&p)?,
                guideline,
            })
        })
        .collect()
}

/// What is changed about the published jobs, to see how much of a gain it explains.
struct Cause {
    name: &'static str,
    /// Whether the prediction has it, so that the change takes it back; otherwise it is one that would have to be assumed.
    held: bool,
    change: fn(&mut Variant<'_>),
}

const CAUSES: [Cause; 14] = [
    Cause {
        name: "one reduce-scatter per bucket, no rooted reductions",
        held: true,
        change: |job| job.layout.runtime.rooted_reductions = false,
    },
    Cause {
        name: "stages 1 and 2 reduce beside the backward pass",
        held: true,
        change: |job| job.layout.runtime.waits_for_reductions = false,
    },
    Cause {
        name: "updated parameters gathered beside the next forward pass",
        held: true,
        change: |job| job.layout.runtime.waits_for_updates = false,
    },
    Cause {
        name: "NII sums in 16 bits between nodes",
        held: true,
        change: |job| job.layout.runtime.sums_in_32_bits = false,
    },
    Cause {
        name: "stage 3 gathers whole blocks",
        held: true,
        change: |job| (job.layout.runtime.coordinator, job.layout.gather_bytes) = (None, None),
    },
    Cause {
        name: "stage 3 looks ahead without limit",
        held: true,
        change: |job| {
            if let Some(coordinator) = &mut job.layout.runtime.coordinator {
                coordinator.live = f64::INFINITY;
            }
        },
    },
    Cause {
        name: "fused operators and FlashAttention",
        held: true,
        change: |job| {
            (job.layout.fused_kernels, job.layout.fused_norms) = (true, true);
            job.layout.attention = AttentionKernel::Flash2;
        },
    },
    Cause {
        name: "14 us for a step between nodes (NCCL's table)",
        held: true,
        change: |job| (job.cluster.inter_latency_us, job.cluster.paced) = (14.0, false),
    },
    Cause { name: "35 us for a step between nodes", held: true, change: |job| job.cluster.inter_latency_us = 35.0 },
    Cause { name: "two GPUs share an adapter", held: false, change: |job| job.cluster.inter_gbps /= 2.0 },
    Cause {
        name: "rings over all GPUs of four nodes take half as long again",
        held: false,
        change: |job| job.cluster.ring_crowding = 2.0 / 3.0,
    },
    Cause {
        name: "a sixteenth are the last blocks",
        held: false,
        change: |job| {
            if job.layout.trainable == 1.0 / 16.0 {
                job.layout.backward_blocks = Some(job.model.layers / 16);
            }
        },
    },
    Cause {
        name: "stage 3 hides nothing",
        held: false,
        change: |job| (job.layout.overlap.gradients, job.layout.overlap.parameters) = (false, false),
    },
    Cause { name: "0.3 ms of the host around each module", held: false, change: |job| job.layout.runtime.hook = 3e-4 },
];

/// The published gains with one cause changed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// What is changed; nothing in the first.
    pub change: &'static str,
    /// Whether the prediction holds the cause, which is taken back here; if not, it would have to be assumed.
    pub held: bool,
    /// Predicted gains, in the order of [`compare_published`].
    pub gains: Vec<f64>,
}

/// What explains the published gains: each cause changed by itself.
///
/// # Errors
/// When a job cannot be predicted.
pub fn explain_published(physics: &Physics) -> Result<Vec<Explanation>, StatesError> {
    let gains = |change: &dyn Fn(&mut Variant<'_>)| -> Result<Vec<f64>, StatesError> {
        PUBLISHED
            .iter()
            .map(|gain| {
                let mut job = Variant::of(gain, physics)?;
                change(&mut job);
                job.gain(gain)
            })
            .collect()
    };
    let mut rows = vec![Explanation { change: "", held: true, gains: gains(&|_| ())? }];
    for cause in &CAUSES {
        rows.push(Explanation { change: cause.name, held: cause.held, gains: gains(&cause.change)? });
    }
    Ok(rows)
}

/// An all-gather over a cluster's nodes, flat and in two levels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GatherComparison {
    /// GPUs.
    pub ranks: u64,
    /// Seconds of the flat ring.
    pub flat_seconds: f64,
    /// Seconds in two levels.
    pub two_level_seconds: f64,
    /// Share of the time that the two levels save.
    pub gain: f64,
}

/// PaRO-CC's all-gather of `bytes` against the flat ring, on 2, 4, 8 and 16 nodes of a cluster. Published for 1 GB on 16 to 128
/// A100: 25.2 to 39.7 % less time (NeurIPS 2024, section 4.4).
pub fn compare_gathers(cluster: &Cluster, physics: &Physics, bytes: f64) -> Vec<GatherComparison> {
    let network = Network::of(cluster, physics);
    let node = u64::from(cluster.gpus_per_node);
    [2, 4, 8, 16]
        .map(|nodes| {
            let span = Span::strided(nodes * node, 1, node);
            let (flat, levels) = (network.gather(span, bytes), network.gather_in_two_levels(span, bytes));
            GatherComparison {
                ranks: span.ranks,
                flat_seconds: flat,
                two_level_seconds: levels,
                gain: 1.0 - levels / flat,
            }
        })
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::super::table::tabulate;
    use super::*;
    use paceline_profiles::find_cluster;

    /// Ratios of throughput, predicted over published, with one model of the runtime for all. The two jobs at 65B with a part of the
    /// parameters trained gather the same and compute nearly the same, but were published as 2.66 and 1.44 times as fast: they are held to
    /// their mean.
    #[test]
    fn gains_near_the_published_ones() {
        let gains = compare_published(&Physics::default()).unwrap();
        let off = |model: &str, trainable: &str, faster: &str| {
            let g = gains.iter().find(|g| (g.model, g.trainable, g.faster) == (model, trainable, faster)).unwrap();
            (1.0 + g.overlapped) / (1.0 + g.published) - 1.0
        };
        assert!(off("llama-65b", "full", "IIG").abs() < 0.1);
        assert!(off("llama-7b", "1/16", "NII").abs() < 0.05);
        assert!(off("llama-7b", "1/16", "NIG").abs() < 0.1);
        let partly =
            [off("llama-65b", "1/16", "IIG"), off("llama-65b", "1/16", "III"), off("llama-65b", "lora:16", "ING")];
        assert!((((1.0 + partly[0]) * (1.0 + partly[2])).sqrt() - 1.0).abs() < 0.12, "{partly:?}");
        // These two are not explained in full.
        assert!(off("llama-7b", "full", "IIG").abs() < 0.35 && off("llama-7b", "full", "NII").abs() < 0.25);
        for g in &gains {
            assert!(g.overlapped > 0.0 && (g.slower != "GGG" || g.guideline > 3.0 * g.published), "{g:?}");
        }
    }

    /// What the changes of the table are for: rooted reductions make what NII and NIG gain with few gradients, waiting for them half of what
    /// NII gains with many; the limit of the look ahead makes gathers of single matrices at 7B.
    #[test]
    fn causes_explain_what_they_are_said_to() {
        let rows = explain_published(&Physics::default()).unwrap();
        assert_eq!(rows.len(), 1 + CAUSES.len());
        let gain =
            |change: &str, which: usize| rows.iter().find(|row| row.change.contains(change)).unwrap().gains[which];
        let all = compare_published(&Physics::default()).unwrap();
        assert_eq!(rows[0].gains, all.iter().map(|g| g.overlapped).collect::<Vec<_>>());
        let predicted = |which: usize| rows[0].gains[which];
        assert!(predicted(3) > 0.2 && gain("no rooted", 3) < 0.05 && gain("no rooted", 4) < 0.05);
        assert!(gain("beside the backward", 1) < 0.5 * predicted(1));
        assert!(gain("without limit", 0) < 0.5 * predicted(0));
        // Each changes something.
        assert!(rows[1..].iter().all(|row| row.gains != rows[0].gains), "{rows:?}");
    }

    /// Section 4.3: at 65B and 80 GB exactly GGG, IGG and IIG ran, and GIG has IGG's size; IIG is the fastest of them. With a
    /// sixteenth trained, IIG and III are the best of those that cut parameters and gradients.
    #[test]
    fn what_fits_and_what_is_best() {
        let physics = Physics::default();
        let rows = tabulate(&published_job("llama-65b", "full"), &physics).unwrap();
        let fitting: Vec<&str> = rows.iter().filter(|row| row.fits).map(|row| row.triple.as_str()).collect();
        assert_eq!(fitting, ["IIG", "IGG", "GIG", "GGG"]);
        let best =
            rows.iter().filter(|row| row.fits).min_by(|a, b| a.iteration_seconds.total_cmp(&b.iteration_seconds));
        assert_eq!(best.unwrap().triple, "IIG");
        let rows = tabulate(&published_job("llama-65b", "1/16"), &physics).unwrap();
        let seconds = |triple: &str| rows.iter().find(|row| row.triple == triple).unwrap().iteration_seconds;
        assert!((seconds("III") / seconds("IIG") - 1.0).abs() < 0.01);
        assert!(["IGG", "GIG", "GGG"].iter().all(|slower| seconds(slower) > seconds("IIG")));
        // At 7B, of the partitions that the paper ran, those without an exchange over nodes in every microbatch lead.
        let order = |runtime: &str| {
            let job = ClusterRequest { runtime: Some(runtime.into()), ..published_job("llama-7b", "full") };
            let ran = ["NII", "NIG", "NGG", "III", "IIG", "IGG", "ING", "GGG"];
            let mut rows = tabulate(&job, &physics).unwrap();
            rows.retain(|row| ran.contains(&row.triple.as_str()));
            rows.sort_by(|a, b| a.iteration_seconds.total_cmp(&b.iteration_seconds));
            rows.into_iter().map(|row| row.triple).collect::<Vec<_>>()
        };
        for runtime in ["fused", "deepspeed"] {
            let order = order(runtime);
            assert_eq!(order[7], "GGG", "{order:?}");
            assert!(
                ["NII", "NIG", "III", "IIG", "ING"].iter().all(|ahead| order[..5].iter().any(|o| o == ahead)),
                "{order:?}"
            );
        }
        assert!(order("fused")[..2].iter().any(|triple| triple == "NII"));
    }

    #[test]
    fn two_level_gathers_gain_what_was_published() {
        let cluster = find_cluster("paro-a100-roce").unwrap();
        for g in compare_gathers(cluster, &Physics::default(), 1e9) {
            assert!((0.252..=0.397).contains(&g.gain), "{g:?}");
        }
    }
}
