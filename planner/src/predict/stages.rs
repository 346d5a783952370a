//! Which blocks a pipeline stage holds, and what its passes take.

use paceline_sim::cluster::device::{Device, Passing};
use paceline_sim::cluster::memory::RankParameters;
use paceline_sim::cluster::network::{Network, Span};
use paceline_sim::cluster::work::{self, AdapterWork, Product, Work};
use paceline_sim::cluster::{
    Architecture, AttentionKernel, ContextExchange, Layout, Overlap, Partition, Physics, Recompute, VocabularyPasses,
};
use paceline_sim::partition::Level;
use paceline_sim::partition::exchange::{Exchange, Kind, Scope};
use std::ops::Range;

/// The blocks and ends of one stage.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// Blocks.
    pub blocks: Range<u64>,
    /// Share of the embedding that it holds: all or nothing, or an equal part where the vocabulary is spread.
    pub embedding: f64,
    /// Share of final norm, output projection and loss that it holds.
    pub head: f64,
}

/// Cuts a model into `stages` stages, of which the first `ranks` are on different pipeline ranks.
pub fn cut(model: &Architecture, partition: Partition, stages: u64, ranks: u64) -> Vec<Stage> {
    let sizes = match partition {
        Partition::Even | Partition::VocabularySpread => even(model.layers, stages),
        Partition::ByCost => by_cost(model, stages, 0),
        Partition::Balanced => by_cost(model, stages, 1),
    };
    let mut first = 0;
    let stage = |(n, size): (usize, u64)| {
        let blocks = first..first + size;
        first += size;
        let here = |yes: bool| if yes { 1.0 } else { 0.0 };
        if partition == Partition::VocabularySpread {
            let share = here((n as u64) < ranks) / ranks as f64;
            Stage { blocks, embedding: share, head: share }
        } else {
            Stage { blocks, embedding: here(n == 0), head: here(n as u64 + 1 == stages) }
        }
    };
    sizes.into_iter().enumerate().map(stage).collect()
}

/// Equal sizes; what is missing to a multiple is left out at the last stage, the first, and then from the end inwards.
fn even(layers: u64, stages: u64) -> Vec<u64> {
    let most = layers.div_ceil(stages);
    let mut sizes = vec![most; stages as usize];
    let mut missing = most * stages - layers;
    let ends = [stages - 1, 0];
    for stage in ends.into_iter().chain((1..stages.saturating_sub(1)).rev()).cycle() {
        if missing == 0 {
            break;
        }
        if sizes[stage as usize] > 0 {
            sizes[stage as usize] -= 1;
            missing -= 1;
        }
    }
    sizes
}

/// Ends a stage where the sum of the costs passes its share, `halves` halves of the next block included.
fn by_cost(model: &Architecture, stages: u64, halves: u64) -> Vec<u64> {
    let cost = |layer| {
        let matrices: u64 = model.attention.matrices(model.hidden).iter().map(|m| m.0 * m.1).sum();
        let ffn = match model.experts {
            Some(e) if model.routed(layer) => e.top_k * e.ffn + e.shared_ffn,
            _ => model.ffn,
        };
        matrices + model.mlp_matrices(ffn).iter().map(|m| m.0 * m.1).sum::<u64>()
    };
    let total = (0..model.layers).map(cost).sum::<u64>() + model.vocab * model.hidden;
    let mut sizes = vec![0; stages as usize];
    let (mut sum, mut stage) = (0u64, 0usize);
    for layer in 0..model.layers {
        let reached = u128::from(2 * sum + halves * cost(layer)) * u128::from(stages);
        if stage + 1 < sizes.len() && reached >= 2 * u128::from(total) * (stage as u128 + 1) {
            stage += 1;
        }
        sum += cost(layer);
        sizes[stage] += 1;
    }
    sizes
}

/// Times of the passes of one stage over one microbatch, in seconds, communication that nothing hides included.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PassTimes {
    /// Forward without communication.
    pub forward: f64,
    /// Backward for the input, without communication and recomputation.
    pub backward: f64,
    /// Backward for the weights.
    pub weights: f64,
    /// Recomputation in the backward pass, its communication included.
    pub recompute: f64,
    /// Exposed tensor-parallel communication, forward and backward.
    pub tensor: [f64; 2],
    /// Exposed context-parallel communication, forward and backward.
    pub context: [f64; 2],
    /// Exposed expert-parallel communication, forward and backward.
    pub experts: [f64; 2],
    /// Exposed gathering of cut parameters, and reducing of cut gradients, per microbatch: forward and backward.
    pub sharded: [f64; 2],
    /// Gathering of cut parameters, and reducing of cut gradients, per microbatch, whether it is hidden or not.
    pub exchanged: [f64; 2],
    /// Of forward, backward and weights: matrix products.
    pub products: f64,
    /// Of them: fused attention.
    pub attention: f64,
    /// Of them: memory-bound operators. What is left is waiting for the host.
    pub memory_bound: f64,
}

impl PassTimes {
    /// Forward pass, communication included.
    pub fn f(&self) -> f64 {
        self.forward + self.tensor[0] + self.context[0] + self.experts[0] + self.sharded[0]
    }

    /// Backward pass for the input, communication and recomputation included.
    pub fn b(&self) -> f64 {
        self.backward + self.recompute + self.tensor[1] + self.context[1] + self.experts[1] + self.sharded[1]
    }
}

/// The groups of ranks of a layout, ranks ordered tp, cp, dp, pp from the inside out.
#[derive(Debug, Clone, Copy)]
pub struct Groups {
    /// Tensor-parallel.
    pub tensor: Span,
    /// Context-parallel.
    pub context: Span,
    /// Data-parallel, context ranks included: those that hold the same parameters.
    pub data: Span,
    /// Expert-parallel.
    pub experts: Span,
    /// Replicas of the same experts.
    pub expert_data: Span,
    /// Data-parallel ranks of a group within which states may be cut, and replicas of experts of one.
    pub state_group: [u64; 2],
    /// GPUs of a node.
    pub node: u64,
    /// Pipeline ranks.
    pub pipeline: Span,
    /// Whether neighbour pipeline ranks are in different nodes.
    pub pipeline_across: bool,
}

impl Groups {
    /// On nodes of `node` GPUs.
    pub fn of(layout: &Layout, node: u64) -> Groups {
        let inner = layout.tp * layout.cp * layout.dp;
        // Expert groups take the tensor ranks too when there are not enough others.
        let expert_stride = if layout.ep > 1 && layout.ep <= layout.dp * layout.cp { layout.tp } else { 1 };
        let expert_replicas = (inner / layout.ep / expert_stride.max(1)).max(1);
        Groups {
            tensor: Span::strided(layout.tp, 1, node),
            context: Span::strided(layout.cp, layout.tp, node),
            data: Span::strided(layout.dp * layout.cp, layout.tp, node),
            experts: Span::strided(layout.ep, expert_stride, node),
            expert_data: Span::strided(expert_replicas, layout.ep * expert_stride, node),
            state_group: {
                let group = layout.group_ranks(node);
                let experts = (expert_replicas * group / layout.data_ranks()).max(1);
                [group, (1..=experts).rev().find(|n| expert_replicas.is_multiple_of(*n)).unwrap_or(1)]
            },
            node,
            pipeline: Span::strided(layout.pp, inner, node),
            pipeline_across: inner >= node,
        }
    }
}

/// What `communication` adds to the computation that it can hide behind: what is left over, and for what runs beside the computation, the
/// share by which both slow each other.
pub fn exposed(communication: f64, hidden_by: f64, physics: &Physics) -> f64 {
    let beside = communication.min(hidden_by);
    communication - beside + physics.contention * beside
}

/// Collectives of a stage between the ranks that share its states, in every microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct UnitExchanges {
    /// Units, of which each is gathered and reduced by itself: blocks, mostly.
    pub units: f64,
    /// Seconds of gathering the parameters of one, once.
    pub gather: f64,
    /// Seconds of reducing the gradients of one.
    pub reduce: f64,
    /// Units whose gradients are reduced at a time.
    pub together: f64,
}

/// Everything that times of passes depend on.
pub struct Timer<'a> {
    /// The model.
    pub model: &'a Architecture,
    /// The layout.
    pub layout: &'a Layout,
    /// The GPU.
    pub device: Device,
    /// The network.
    pub network: Network,
    /// The groups.
    pub groups: Groups,
    /// The fitted parameters.
    pub physics: &'a Physics,
    /// Seconds that the hosts add to each step of a collective.
    pub pace: f64,
}

/// Bytes per parameter that adding a microbatch's gradients to those before it reads and writes: the gradient and the sum, in one
/// product that accumulates or through a buffer of its own.
fn accumulation_bytes(layout: &Layout) -> f64 {
    let n = &layout.numerics;
    if n.accumulated > 0.0 { 2.0 * n.gradient + 2.0 * n.accumulated } else { 2.0 * n.gradient }
}

/// Of the work of a layer: on the GPU, forward, backward, weights, and its messages.
struct LayerTimes {
    forward: Passing,
    backward: Passing,
    weights: Passing,
    tensor: f64,
    context: f64,
    experts: f64,
}

impl Timer<'_> {
    fn layer(&self, work: &Work, beside: &AdapterWork) -> LayerTimes {
        let [forward, backward, weights] = self.passes(work, beside);
        let messages = work.messages.plus(&beside.forward.messages);
        let calls = messages.tensor_calls.max(1.0);
        // Slow hosts do not lengthen the messages; they are what the GPU waits for.
        let network = Network { inter_step: self.network.inter_step - self.pace, ..self.network };
        let tensor = if messages.tensor_all_reduce > 0.0 && messages.tensor_gather == 0.0 {
            calls * network.all_reduce(self.groups.tensor, messages.tensor_all_reduce / calls)
        } else {
            calls * network.gather(self.groups.tensor, messages.tensor_gather / calls)
        };
        let experts = 2.0 * self.network.all_to_all(self.groups.experts, messages.experts / 2.0);
        let context = self.context(messages.context);
        let steps = messages.tensor_calls * self.layout.tp.saturating_sub(1) as f64 * self.pace;
        let waiting = |passing: Passing| Passing { host: passing.host + steps, ..passing };
        LayerTimes { forward: waiting(forward), backward: waiting(backward), weights, tensor, context, experts }
    }

    /// A layer's passes without messages: forward, backward for the input, and for what is trained of it.
    fn passes(&self, work: &Work, beside: &AdapterWork) -> [Passing; 3] {
        let element = self.layout.numerics.activation;
        let (backward, weights) = self.device.backward(work, element);
        // Frozen weights get no gradients.
        let own = [self.device.forward(work, element), backward, weights.times(self.layout.trained_share())];
        let adapters = [&beside.forward, &beside.backward, &beside.weights];
        std::array::from_fn(|n| own[n].plus(self.device.forward(adapters[n], element)))
    }

    /// A block's forward and whole backward pass without messages, with the time that the host takes to launch them.
    pub fn launched(&self, layer: u64) -> (Passing, Passing) {
        let (work, beside) = (work::block(self.model, self.layout, layer), self.adapters(layer));
        let [forward, input, weights] = self.passes(&work, &beside);
        (forward, input.plus(weights))
    }

    fn adapters(&self, layer: u64) -> AdapterWork {
        work::adapters(self.model, self.layout, layer)
    }

    /// Forward exchange of the context-parallel ranks in one layer.
    fn context(&self, bytes: f64) -> f64 {
        let (span, hops) = (self.groups.context, (self.layout.cp - 1) as f64);
        if hops == 0.0 {
            return 0.0;
        }
        match self.layout.context {
            // Keys and values go round; each hop is a message to the neighbour.
            ContextExchange::Ring | ContextExchange::ZigZag => hops * self.network.message(span.nodes() > 1, bytes),
            ContextExchange::AllGather => self.network.gather(span, bytes * self.layout.cp as f64),
            // Queries, keys and values one after the other, and the output.
            ContextExchange::AllToAll => 4.0 * self.network.all_to_all(span, bytes / 4.0),
        }
    }

    /// Times of one stage.
    pub fn stage(&self, stage: &Stage, parameters: &RankParameters) -> PassTimes {
        let mut times = PassTimes::default();
        // Blocks of one kind take the same time.
        let routed = stage.blocks.clone().filter(|l| self.model.routed(*l)).count() as f64;
        let blocks = stage.blocks.end - stage.blocks.start;
        let dense = blocks as f64 - routed;
        // The first blocks are computed again, dense ones mostly.
        let again = self.layout.recomputed(blocks);
        let dense_again = stage.blocks.clone().take(again as usize).filter(|l| !self.model.routed(*l)).count() as f64;
        let dense_at = stage.blocks.clone().find(|l| !self.model.routed(*l));
        let routed_at = stage.blocks.clone().find(|l| self.model.routed(*l));
        let kinds = [(dense_at, dense, dense_again), (routed_at, routed, again as f64 - dense_again)];
        let frozen = self.layout.frozen_blocks(self.model.layers);
        let reached = stage.blocks.end.saturating_sub(stage.blocks.start.max(frozen)) as f64 / blocks.max(1) as f64;
        for (layer, count, again) in kinds {
            if let Some(layer) = layer {
                let work = work::block(self.model, self.layout, layer);
                let layer = self.layer(&work, &self.adapters(layer));
                self.add(&mut times, (&work, layer), [count, count * reached], again * reached);
            }
        }
        if stage.embedding > 0.0 {
            let back = if frozen > 0 || self.layout.trained_share() == 0.0 { 0.0 } else { 1.0 };
            self.add_end(&mut times, &work::embedding(self.model, self.layout), back);
        }
        if stage.head > 0.0 {
            self.add_end(&mut times, &work::head(self.model, self.layout, stage.head), 1.0);
        }
        if self.layout.partition == Partition::VocabularySpread && stage.head > 0.0 {
            self.add_vocabulary_exchanges(&mut times);
        }
        let accumulation =
            self.device.traffic(parameters.total() * self.layout.trainable * accumulation_bytes(self.layout));
        times.weights += accumulation;
        times.memory_bound += accumulation;
        self.add_exchanges(&mut times, parameters);
        times
    }

    /// Messages of a vocabulary that is spread over the pipeline ranks, in which all of them take part for every microbatch: embedded
    /// tokens are summed over the ranks and their gradients sent to all, the last hidden states go to all and their gradients come
    /// back summed. Beside other passes, unless all ranks stop for them.
    fn add_vocabulary_exchanges(&self, times: &mut PassTimes) {
        let row = self.layout.numerics.activation * self.layout.tokens() * self.model.hidden as f64;
        let span = self.groups.pipeline;
        let each = self.network.gather(span, row) + self.network.all_reduce(span, row);
        let shown = |behind: f64| match self.layout.vocabulary {
            VocabularyPasses::Interlaced => each,
            _ => exposed(each, behind, self.physics),
        };
        let (forward, backward) = (shown(times.forward), shown(times.backward));
        times.forward += forward;
        times.backward += backward;
    }

    /// Adds an end of the model, beside whose matrices no adapters stand, and of the backward pass a share of it.
    fn add_end(&self, times: &mut PassTimes, work: &Work, back: f64) {
        self.add(times, (work, self.layer(work, &AdapterWork::default())), [1.0, back], 0.0);
    }

    /// Adds `count` layers of some work, `back` of which the backward pass goes through, and `again` of which are computed once more in it.
    fn add(&self, times: &mut PassTimes, (work, layer): (&Work, LayerTimes), [count, back]: [f64; 2], again: f64) {
        let physics = self.physics;
        let (forward, backward, weights) = (layer.forward, layer.backward, layer.weights);
        let hide_forward = if self.layout.overlap.tensor { forward.products } else { 0.0 };
        // The backward pass has the products of the weights to hide behind, which nothing waits for.
        let hide_backward = weights.products + if self.layout.overlap.tensor { backward.products } else { 0.0 };
        let tensor_forward =
            if self.layout.overlap.tensor { exposed(layer.tensor, hide_forward, physics) } else { layer.tensor };
        // Half of the backward communication has the products of the weights' gradients beside it.
        let overlap = self.layout.overlap;
        let independent = if overlap.tensor { 1.0 } else { 0.5 * f64::from(u8::from(overlap.input_gradients)) };
        let tensor_backward =
            (1.0 - independent) * layer.tensor + exposed(independent * layer.tensor, hide_backward, physics);
        // Only a ring runs beside attention. Gradients of keys and values go round, or are scattered, too.
        let (context_forward, context_backward) = match self.layout.context {
            ContextExchange::Ring | ContextExchange::ZigZag => (
                exposed(layer.context, forward.attention, physics),
                exposed(2.0 * layer.context, backward.attention, physics),
            ),
            ContextExchange::AllGather => (layer.context, 2.0 * layer.context),
            ContextExchange::AllToAll => (layer.context, layer.context),
        };

        // The host launches ahead; where it is slower than the GPU with its communication, the GPU waits.
        let pace = |passing: Passing, communication: f64| passing.gpu.max(passing.host - communication);
        times.forward += count * pace(forward, tensor_forward);
        times.backward += back * pace(backward, tensor_backward);
        times.weights += count * weights.seconds();
        for (part, count) in [(forward, count), (backward, back), (weights, count)] {
            times.products += count * (part.products - part.attention);
            times.attention += count * part.attention;
            times.memory_bound += count * (part.gpu - part.products);
        }
        times.tensor[0] += count * tensor_forward;
        times.tensor[1] += back * tensor_backward;
        times.context[0] += count * context_forward;
        times.context[1] += back * context_backward;
        let experts_beside = |behind: f64| {
            if overlap.experts { exposed(layer.experts, behind, physics) } else { layer.experts }
        };
        times.experts[0] += count * experts_beside(forward.gpu);
        times.experts[1] += back * experts_beside(backward.gpu + weights.gpu);
        if again > 0.0 {
            times.recompute += again * self.recompute(work, forward, tensor_forward + context_forward + layer.experts);
        }
    }

    fn recompute(&self, work: &Work, forward: Passing, communication: f64) -> f64 {
        match self.layout.recompute {
            Recompute::None => 0.0,
            Recompute::Full => forward.seconds() + communication,
            Recompute::Operators => {
                let again = Work { core: None, products: self.dropped(work), ..work.clone() };
                self.device.forward(&again, self.layout.numerics.activation).seconds() + communication
            }
            Recompute::Selective => match self.layout.attention {
                // Scores, softmax and the weighted sum again.
                AttentionKernel::Naive | AttentionKernel::FusedSoftmax => {
                    let core: Vec<_> = work.products.iter().copied().filter(|p| p.count > 1.0).collect();
                    let heads = self.model.attention.heads() as f64 / self.layout.tp as f64;
                    let traffic =
                        4.0 * self.layout.numerics.activation * heads * self.layout.tokens() * self.layout.seq as f64;
                    let core = Work { kernels: 4.0, products: core, traffic, ..Work::default() };
                    self.device.forward(&core, self.layout.numerics.activation).seconds()
                }
                _ => {
                    let core = Work { core: work.core, kernels: 1.0, ..Work::default() };
                    self.device.forward(&core, self.layout.numerics.activation).seconds()
                }
            },
        }
    }

    /// The products whose results are not kept where every second one is: keys and the output projection; of a dense gated MLP half
    /// of gate and up, of a plain one the second matrix; all of routed experts.
    fn dropped(&self, work: &Work) -> Vec<Product> {
        let (query, key, value) = self.model.attention.widths();
        let keys = key as f64 / (query + key + value) as f64;
        let mut products = work.products.clone();
        let count = self.model.attention.matrices(self.model.hidden).len();
        let routed = products.len() > count + 2;
        for (n, product) in products.iter_mut().enumerate() {
            let dense = n >= count && !routed;
            product.n *= match (n, self.model.gated) {
                (0, _) => keys,
                (n, true) if dense && n == count => 0.5,
                (n, false) if dense && n == count => 0.0,
                (n, true) if dense && n == count + 1 => 0.0,
                _ => 1.0,
            };
        }
        products.retain(|p| p.n > 0.0);
        products
    }

    /// A collective over the ranks that share the states of these dense and routed parameters, with `element` bytes each, in
    /// launches of at most `most` bytes.
    pub fn exchange(&self, exchange: Exchange, [dense, routed]: [f64; 2], element: f64, most: Option<f64>) -> f64 {
        let rooted = self.rooted(exchange);
        let of = |span: Span, group: u64, parameters: f64| {
            let bytes = parameters * element;
            if bytes <= 0.0 {
                return 0.0;
            }
            let span = span.scope(exchange.scope, group);
            let buckets = most.map_or(1.0, |most| (bytes / most).ceil().max(1.0));
            // Every border between owners inside a bucket cuts it once more.
            let launches = if rooted { buckets + (span.ranks - 1) as f64 } else { buckets };
            let each = exchange.buffer(bytes / launches, group as f64);
            launches
                * if rooted {
                    self.network.reduce(span, each)
                } else {
                    self.network.collective(exchange.kind, span, each)
                }
        };
        let [group, expert_group] = self.groups.state_group;
        of(self.groups.data, group, dense) + of(self.groups.expert_data, expert_group, routed)
    }

    /// Whether the runtime makes an exchange out of rooted reductions.
    fn rooted(&self, exchange: Exchange) -> bool {
        let whole = self.layout.sharding.parameters == Level::Whole && exchange.scope != Scope::Across;
        self.layout.runtime.rooted_reductions && whole && exchange.kind == Kind::ReduceScatter
    }

    /// What runs beside computation under the runtime.
    pub fn overlap(&self) -> Overlap {
        let Layout { overlap, runtime, sharding, .. } = self.layout;
        let waits = runtime.waits_for_reductions && sharding.parameters == Level::Whole;
        Overlap { gradients: overlap.gradients && !waits, ..*overlap }
    }

    /// The collectives of every microbatch.
    pub fn unit_exchanges(&self, parameters: &RankParameters) -> UnitExchanges {
        let layout = self.layout;
        let units = (parameters.total() / parameters.largest_unit.max(1.0)).max(1.0);
        let wire = layout.numerics.parameter.min(layout.numerics.activation);
        let unit = [parameters.dense / units, parameters.routed / units];
        let gather = layout.sharding.parameter_gather();
        let gather = gather.map_or(0.0, |e| self.exchange(e, unit, wire, layout.gather_bytes));
        let element = layout.numerics.reduced;
        // A bucket that is larger than a unit waits for as many as it holds.
        let bytes = parameters.total() * layout.trainable * element;
        let together = layout.bucket_bytes.map_or(1.0, |most| (most * units / bytes).floor()).clamp(1.0, units);
        let reduce = layout.sharding.gradient_reduction().map_or(0.0, |e| {
            let together = if self.rooted(e) { units } else { together };
            let share = layout.trainable * together / units;
            let trained = [parameters.dense * share, parameters.routed * share];
            self.exchange(e, trained, element, layout.bucket_bytes) / together
        });
        UnitExchanges { units, gather, reduce, together }
    }

    /// Gathering the parameters before each pass and reducing the gradients after it, unit by unit beside the passes.
    fn add_exchanges(&self, times: &mut PassTimes, parameters: &RankParameters) {
        let layout = self.layout;
        if let Some(replayed) = self.coordinated(times, parameters) {
            (times.sharded, times.exchanged) = (replayed.exposed, replayed.alone);
            return;
        }
        let UnitExchanges { units, gather, reduce, together } = self.unit_exchanges(parameters);
        // Parameters that stay are gathered once, see `gather_once`.
        let gather = if layout.keep_gathered { 0.0 } else { gather };
        // The first unit's parameters and the last bucket of gradients have nothing to hide behind.
        let others = (units - 1.0).max(0.0);
        times.exchanged = [2.0 * units * gather, units * reduce];
        let (last, before) = (together * reduce, (units - together).max(0.0) * reduce);
        let overlap = self.overlap();
        times.sharded[0] = self.beside(overlap.parameters, gather, others * gather, times.forward);
        let backward = times.backward + times.weights + times.recompute;
        times.sharded[1] = match (overlap.parameters, overlap.gradients) {
            (true, true) => self.beside(true, last, units * gather + before, backward),
            (parameters, gradients) => {
                self.beside(parameters, gather, others * gather, backward)
                    + self.beside(gradients, last, before, backward)
            }
        };
    }

    /// Communication of which `alone` has nothing beside it.
    fn beside(&self, overlap: bool, alone: f64, other: f64, behind: f64) -> f64 {
        alone + if overlap { exposed(other, behind, self.physics) } else { other }
    }

    /// Gathering parameters that stay until the last pass of the iteration, beside the first microbatch: what it takes alone, and what of it
    /// shows.
    pub fn gather_once(&self, parameters: &RankParameters, forward: f64) -> (f64, f64) {
        if !self.layout.keep_gathered {
            return (0.0, 0.0);
        }
        let UnitExchanges { units, gather, .. } = self.unit_exchanges(parameters);
        let others = (units - 1.0).max(0.0) * gather;
        (units * gather, self.beside(self.layout.overlap.parameters, gather, others, forward))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_cut_evenly_and_short_at_the_ends() {
        assert_eq!(even(32, 4), [8, 8, 8, 8]);
        assert_eq!(even(30, 4), [7, 8, 8, 7]);
        assert_eq!(even(31, 4), [8, 8, 8, 7]);
        assert_eq!(even(5, 4), [1, 2, 1, 1]);
        assert_eq!(even(3, 4), [1, 1, 1, 0]);
        assert_eq!(even(1, 1), [1]);
    }

    /// Ranks of a 3.6B model with a vocabulary of 131,072, whose sizes nanotron's runs in the Ultra-Scale Playbook show: the
    /// first holds 16, 8 and 2 of the 28 blocks on 2, 4 and 16 ranks.
    #[test]
    fn blocks_are_cut_by_cost() {
        use paceline_sim::cluster::{Attention, PositionTable};
        let model = Architecture {
            name: String::new(),
            layers: 28,
            hidden: 3072,
            attention: Attention::Grouped { heads: 32, kv_heads: 32, head_dim: 96 },
            ffn: 8192,
            gated: true,
            experts: None,
            vocab: 131_072,
            tied: true,
            biases: false,
            positions: PositionTable::None,
            dropout: false,
        };
        for (stages, first) in [(2, 16), (4, 8), (16, 2)] {
            let sizes = by_cost(&model, stages, 0);
            assert_eq!(sizes[0], first, "{sizes:?}");
            assert_eq!(sizes.iter().sum::<u64>(), 28);
        }
        // 28 blocks and a head that weighs 3.6 of them, in equal parts of 7.9.
        assert_eq!(by_cost(&model, 4, 1), [8, 8, 8, 4]);
    }

    #[test]
    fn what_hides_is_paid_by_its_contention() {
        let physics = Physics { contention: 0.25, ..Physics::default() };
        assert_eq!(exposed(4.0, 10.0, &physics), 1.0);
        assert_eq!(exposed(4.0, 1.0, &physics), 3.25);
        assert_eq!(exposed(0.0, 1.0, &physics), 0.0);
    }
}
