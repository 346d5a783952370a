//! Lower bounds from single layers: each layer's passes are costed once per microbatch size and kind of recomputation, and a
//! candidate's bound is arithmetic on those.
//!
//! Time: a device is busy with all passes of its ranks; a pipeline rank starts when the first microbatch has come through the
//! stages before it. Memory: what persists, and one microbatch's activations of one stage.

use super::{AtLeast, Bound};
use crate::configuration::{Configuration, Machine};
use crate::job::Job;
use crate::layer_partition::{LayerCosts, Vocabulary, in_flight, partition};
use crate::lower::{Blueprint, Form, LowerError, States, Substance, lower_unchecked};
use crate::order::{ComputeOrder, Placement};
use crate::prediction::Costs;
use crate::schedules::{action, find, looped};
use paceline_sim::model::Layer;
use paceline_sim::partition::Level;
use paceline_sim::program::{
    Device, Ids, MemoryClass, Op, OpKind, Pass, Recompute, Stage, Stream, Tensor, TransformerWorkload, Unit,
};
use paceline_sim::units::RankId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Forward passes of a step, over all ranks, up to which programs are simulated.
const MOST_PASSES: u64 = 1 << 20;

/// What one layer takes for one microbatch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct LayerTimes {
    forward: f64,
    again: f64,
    fused: f64,
    split: f64,
    optimizer: f64,
    /// Parameters and gradients of what is trained.
    weights: u64,
    /// Parameters of what is not.
    frozen: u64,
    moments: u64,
    /// From F to the backward.
    kept: u64,
}

/// The shares of a layer's state that a rank holds.
struct Held {
    weights: f64,
    frozen: f64,
    moments: f64,
}

impl Held {
    fn of(candidate: &Configuration, placement: &Placement) -> Held {
        let holders = u64::from(candidate.dp) * u64::from(placement.copies);
        let group = candidate.sharing.group_size.map_or(holders, u64::from);
        let kept = |level: Level| 1.0 / level.parts(holders, group) as f64;
        // Parameters and gradients weigh the same.
        let frozen = kept(candidate.states.parameters);
        let weights = (frozen + kept(candidate.states.gradients)) / 2.0;
        Held { weights, frozen, moments: kept(candidate.states.optimizer) }
    }

    fn bytes(&self, layer: &LayerTimes) -> f64 {
        let trained = layer.weights as f64 * self.weights + layer.moments as f64 * self.moments;
        trained + layer.frozen as f64 * self.frozen
    }
}

/// By layer in forward order.
type Layers = Arc<Vec<LayerTimes>>;

/// Bounds for one job on one machine.
pub struct LayerBound<'a> {
    job: &'a Job,
    machine: Machine,
    costs: &'a dyn Costs,
    known: Mutex<HashMap<(u32, Recompute), Result<Layers, String>>>,
}

impl<'a> LayerBound<'a> {
    /// Nothing is costed before it is asked for.
    pub fn new(job: &'a Job, machine: Machine, costs: &'a dyn Costs) -> LayerBound<'a> {
        LayerBound { job, machine, costs, known: Mutex::new(HashMap::new()) }
    }

    /// Cuts the layers by the times that they take.
    ///
    /// # Errors
    /// When they cannot be cut so, or have no costs.
    pub fn cut(&self, candidate: &Configuration) -> Result<Vec<u32>, String> {
        let placement = self.placement(candidate)?;
        let stages = self.stages(candidate, &placement)?;
        Ok(stages.iter().map(|stage| stage.units.len() as u32).collect())
    }

    fn placement(&self, candidate: &Configuration) -> Result<Placement, String> {
        let schedule = find(&candidate.schedule).map_err(|error| error.to_string())?;
        schedule.placement(candidate.pp, Some(candidate.chunks)).map_err(|error| error.to_string())
    }

    /// The candidate's own cut, or the one whose busiest rank does as little as can be, within memory where the job limits it and
    /// such a cut exists.
    fn stages(&self, candidate: &Configuration, placement: &Placement) -> Result<Vec<Stage>, String> {
        let stages = placement.stages_per_copy();
        let mut cut = candidate.clone();
        if cut.stage_layers.is_empty() {
            let blocks = self.job.model.layers;
            if stages > blocks as usize {
                let model = self.job.model.name.clone();
                return Err(LowerError::TooManyStages { model, stages, blocks }.to_string());
            }
            let (layers, held) = (self.layers(candidate)?, Held::of(candidate, placement));
            let list = |of: &dyn Fn(&LayerTimes) -> f64| layers.iter().map(of).collect();
            let costs = LayerCosts {
                seconds: list(&|layer| layer.forward + layer.again + layer.fused),
                fixed: list(&|layer| held.bytes(layer)),
                activation: list(&|layer| layer.kept as f64),
            };
            // Generators that keep a limit fit their order to the cut, so only fixed schedules bound it.
            let order = find(&candidate.schedule).ok().filter(|schedule| schedule.fixed);
            let order = order.and_then(|_| candidate.order(self.job).ok());
            let within = self.job.memory_limit.zip(order).and_then(|(limit, order)| {
                let limit = vec![limit as f64; placement.devices()];
                partition(&costs, placement, &in_flight(&order), Some(&limit), Vocabulary::Ends).ok()
            });
            let nothing = vec![Vec::new(); placement.devices()];
            cut.stage_layers = match within {
                Some(sizes) => sizes,
                None => partition(&costs, placement, &nothing, None, Vocabulary::Ends).map_err(|e| e.to_string())?,
            };
        }
        cut.cut(self.job, stages).map_err(|error| error.to_string())
    }

    fn layers(&self, candidate: &Configuration) -> Result<Layers, String> {
        let key = (candidate.micro_batch, candidate.recompute);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(key).or_insert_with(|| self.probe(key.0, key.1)).clone()
    }

    /// Costs every layer as a stage of its own on one rank: microbatch 0 with the fused backward, microbatch 1 with the
    /// split one.
    fn probe(&self, micro_batch: u32, recompute: Recompute) -> Result<Layers, String> {
        let layers: Vec<Layer> = self.job.model.all_layers().collect();
        let n = layers.len() as u32;
        let forwards = (0..2).flat_map(|m| (0..n).map(move |s| action(Pass::F, s, m)));
        let fused = (0..n).rev().map(|s| action(Pass::BW, s, 0));
        let split = (0..n).rev().flat_map(|s| [action(Pass::B, s, 1), action(Pass::W, s, 1)]);
        let order = ComputeOrder {
            name: "layer by layer".into(),
            microbatches: 2,
            placement: looped(1, n),
            actions: vec![forwards.chain(fused).chain(split).collect()],
        };
        let workload = TransformerWorkload {
            model: self.job.model.clone(),
            micro_batch,
            seq: self.job.seq,
            recompute,
            tied_on_one_rank: true,
            trainable: self.job.trainable.clone(),
            precision: self.job.precision,
        };
        let program = lower_unchecked(&Blueprint {
            order: &order,
            substance: Substance::Transformer(workload),
            stages: layers.iter().map(|&layer| Stage { units: vec![Unit { layers: vec![layer] }] }).collect(),
            data: 1,
            states: States::default(),
            devices: (0..self.machine.devices).map(|d| Device { name: format!("cpu:{d}"), node: 0 }).collect(),
            form: Form::Full,
        })
        .map_err(|error| error.to_string())?;
        let (costs, _) = self.costs.of(&program).map_err(|error| error.to_string())?;
        // A stage is one op for all its layers: what an op takes by itself does not count for each of them.
        let nothing = Op {
            stream: Stream::COMPUTE,
            kind: OpKind::Join,
            waits: Ids::new(),
            alloc: Ids::new(),
            uses: Ids::new(),
            free: Ids::new(),
        };
        let overhead = costs.compute(&program, RankId(0), &nothing);
        let mut times = vec![LayerTimes::default(); layers.len()];
        for op in &program.ranks[0].ops {
            let seconds = || (costs.compute(&program, RankId(0), op) - overhead).seconds();
            match op.kind {
                OpKind::Compute { pass, stage, microbatch, .. } => {
                    let layer = &mut times[stage.index()];
                    match (pass, microbatch.0) {
                        (Pass::F, 0) => layer.forward = seconds(),
                        (Pass::R, 0) => layer.again = seconds(),
                        (Pass::BW, _) => layer.fused = seconds(),
                        (Pass::B | Pass::W, _) => layer.split += seconds(),
                        _ => {}
                    }
                }
                OpKind::Optimizer { stage, .. } => times[stage.index()].optimizer += seconds(),
                _ => {}
            }
        }
        for buffer in &program.ranks[0].buffers {
            let (stage, bytes) = match buffer.tensor {
                Tensor::Parameters { stage, .. } | Tensor::Gradients { stage, .. } => {
                    times[stage.index()].weights += buffer.bytes;
                    continue;
                }
                Tensor::Frozen { stage, .. } => {
                    times[stage.index()].frozen += buffer.bytes;
                    continue;
                }
                Tensor::Moments { stage, .. } => {
                    times[stage.index()].moments += buffer.bytes;
                    continue;
                }
                Tensor::SavedForB { stage, microbatch, .. } | Tensor::SavedForW { stage, microbatch, .. }
                    if microbatch.0 == 0 && recompute != Recompute::Full =>
                {
                    (stage, buffer.bytes)
                }
                Tensor::Checkpoint { stage, microbatch, .. } if microbatch.0 == 0 => (stage, buffer.bytes),
                _ => continue,
            };
            debug_assert!(buffer.class == MemoryClass::Activation);
            times[stage.index()].kept += bytes;
        }
        Ok(Arc::new(times))
    }
}

impl Bound for LayerBound<'_> {
    fn at_least(&self, candidate: &Configuration) -> Result<AtLeast, String> {
        let microbatches = candidate.microbatches(self.job).map_err(|error| error.to_string())?;
        let placement = self.placement(candidate)?;
        let passes = u64::from(microbatches) * placement.stages() as u64 * u64::from(candidate.dp);
        if passes > MOST_PASSES {
            return Err(format!(
                "{passes} forward passes in a step are more than the {MOST_PASSES} that a search simulates; name a larger micro_batch"
            ));
        }
        let layers = self.layers(candidate)?;
        let per_copy = placement.stages_per_copy();
        let stages = self.stages(candidate, &placement)?;
        let split = find(&candidate.schedule).is_ok_and(|schedule| schedule.split);
        // Sums over the layers of each stage of one copy.
        let mut next = 0;
        let sums: Vec<LayerTimes> = stages
            .iter()
            .map(|stage| {
                let held = &layers[next..next + stage.units.len()];
                next += stage.units.len();
                let sum = |of: fn(&LayerTimes) -> f64| held.iter().map(of).sum::<f64>();
                let bytes = |of: fn(&LayerTimes) -> u64| held.iter().map(of).sum::<u64>();
                LayerTimes {
                    forward: sum(|l| l.forward),
                    again: sum(|l| l.again),
                    fused: sum(|l| l.fused),
                    split: sum(|l| l.split),
                    optimizer: sum(|l| l.optimizer),
                    weights: bytes(|l| l.weights),
                    frozen: bytes(|l| l.frozen),
                    moments: bytes(|l| l.moments),
                    kept: bytes(|l| l.kept),
                }
            })
            .collect();

        let pp = candidate.pp as usize;
        let copies = placement.copies as usize;
        let held = Held::of(candidate, &placement);
        let mut work = vec![0.0; pp];
        let mut arrival = vec![f64::INFINITY; pp];
        let mut bytes = vec![0u64; pp];
        let mut kept = vec![0u64; pp];
        for copy in 0..copies {
            // The copies share the microbatches: the first one takes the odd one.
            let passes = if copies == 1 {
                microbatches
            } else if copy == 0 {
                microbatches.div_ceil(2)
            } else {
                microbatches / 2
            };
            let mut reached = 0.0;
            for (stage, times) in sums.iter().enumerate() {
                let rank = placement.device_of_stage[copy * per_copy + stage] as usize;
                // Schedules that split do so for some microbatches at least; both kinds of backward bound them.
                let backward = if split { times.split.min(times.fused) } else { times.fused };
                work[rank] +=
                    f64::from(passes) * (times.forward + times.again + backward) + times.optimizer * held.moments;
                if passes > 0 {
                    arrival[rank] = f64::min(arrival[rank], reached);
                    kept[rank] = kept[rank].max(times.kept);
                }
                reached += times.forward;
                bytes[rank] += held.bytes(times) as u64;
            }
        }
        let mut load = vec![0.0; self.machine.devices as usize];
        for rank in 0..candidate.ranks() as usize {
            load[rank % self.machine.devices as usize] += work[rank % pp];
        }
        // The way of the first microbatch is paid once per barrier.
        let steps = f64::from(self.job.barrier_every);
        let alone = work.iter().zip(&arrival).filter(|(_, at)| at.is_finite()).map(|(work, at)| work + at / steps);
        let seconds = load.into_iter().chain(alone).fold(0.0, f64::max);
        let bytes = bytes.iter().zip(&kept).map(|(held, kept)| held + kept).max().unwrap_or(0);
        Ok(AtLeast { seconds, bytes })
    }
}
