//! Replays one microbatch under a runtime that fetches parameters module by module, as DeepSpeed's stage 3 does: what it gathers ahead, what
//! it keeps, and when computation, collectives and the host wait for each other.
//!
//! The rules are those of DeepSpeed 0.10 (`partitioned_param_coordinator.py`: `fetch_sub_module`, `release_sub_module`; `stage3.py`:
//! `__reduce_and_partition_ipg_grads`, `independent_gradient_partition_epilogue`):
//!
//! - A module's parameters are gathered when it runs, unless they are there or under way; then those of the following uses, as many as pass
//!   the gather bucket, while less than `live` parameters are gathered.
//! - After its pass, a module's parameters are released unless they are used again within the next `reuse` parameters, or the look
//!   ahead has already passed that use and found them there.
//! - Gradients go into a bucket that is reduced before it would overflow.
//! - The host waits for the third last gather before it waits for another, for the third last reduction before it issues another, and for
//!   all reductions at the end of the microbatch. Collectives of one group run in the order in which they were issued.

use super::stages::{PassTimes, Timer};
use paceline_sim::cluster::memory::RankParameters;
use paceline_sim::cluster::{Coordinator, Recompute};
use paceline_sim::partition::exchange::Exchange;
use std::collections::VecDeque;

/// Uses of parameters beyond which the host waits for the oldest.
const OUTSTANDING: usize = 2;

/// The two kinds of collectives, as places in what is kept of both.
const GATHERS: usize = 0;
const REDUCTIONS: usize = 1;

/// A matrix, or a module without parameters of its own (a block, a norm that is kept whole, an activation), in the order of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Module {
    /// Its parameters.
    pub elements: f64,
    /// Seconds of its forward and backward pass on the GPU.
    pub seconds: [f64; 2],
    /// Seconds of the host to launch them.
    pub host: [f64; 2],
}

/// What to replay.
struct Microbatch<'a> {
    /// Groups of modules that are computed again together before their backward pass: blocks, and the ends of the model.
    pub blocks: &'a [Vec<Module>],
    /// Which of them are computed again.
    pub again: &'a [bool],
    /// The first of them that the backward pass goes through.
    pub reached: usize,
    /// Limits.
    pub limits: Coordinator,
    /// Elements after which gathers ahead stop for a module.
    pub gather_bucket: f64,
    /// Elements of a bucket of gradients.
    pub reduce_bucket: f64,
    /// Share of the elements that have gradients.
    pub trained: f64,
    /// Seconds of gathering, and of reducing, a number of elements.
    pub gather: &'a dyn Fn(f64) -> f64,
    pub reduce: &'a dyn Fn(f64) -> f64,
    /// Gathers and reductions go over one communicator.
    pub one_group: bool,
    /// Communication runs beside computation.
    pub beside: bool,
}

/// Communication of a microbatch between the ranks that share states.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Coordinated {
    /// What nothing hides, forward and backward.
    pub exposed: [f64; 2],
    /// Seconds of gathers, and of reductions, alone.
    pub alone: [f64; 2],
}

impl Timer<'_> {
    /// What the runtime's coordinator makes of a microbatch of a rank that holds the whole depth of a dense model; none where there is no
    /// coordinator, or nothing for it to gather.
    pub fn coordinated(&self, times: &PassTimes, parameters: &RankParameters) -> Option<Coordinated> {
        let (layout, model) = (self.layout, self.model);
        let limits = layout.runtime.coordinator?;
        let gather = layout.sharding.parameter_gather()?;
        if layout.keep_gathered || layout.pp > 1 || layout.chunks > 1 || parameters.routed > 0.0 {
            return None;
        }
        let numerics = &layout.numerics;
        let wire = numerics.parameter.min(numerics.activation);
        let reduction = layout.sharding.gradient_reduction();
        let group = self.groups.state_group[0];
        let seconds = |exchange: Exchange, bytes: f64| {
            let span = self.groups.data.scope(exchange.scope, group);
            self.network.collective(exchange.kind, span, exchange.buffer(bytes, group as f64))
        };
        let blocks = self.modules(times);
        let again: Vec<bool> = {
            let computed = layout.recomputed(model.layers) as usize;
            let whole = layout.recompute == Recompute::Full;
            (0..blocks.len()).map(|n| whole && (1..=computed).contains(&n)).collect()
        };
        let frozen = layout.frozen_blocks(model.layers);
        // Behind the embedding.
        let reached = if frozen > 0 { frozen as usize + 1 } else { 0 };
        // What is trained lies in the blocks that are reached.
        let trained = layout.trainable * model.layers as f64 / (model.layers - frozen).max(1) as f64;
        let microbatch = Microbatch {
            blocks: &blocks,
            again: &again,
            reached,
            limits,
            gather_bucket: layout.gather_bytes.map_or(f64::INFINITY, |bytes| bytes / wire),
            reduce_bucket: layout.bucket_bytes.map_or(f64::INFINITY, |bytes| bytes / numerics.reduced),
            trained: if reduction.is_some() { trained.min(1.0) } else { 0.0 },
            gather: &|elements| seconds(gather, elements * wire),
            reduce: &|elements| reduction.map_or(0.0, |e| seconds(e, elements * numerics.reduced)),
            one_group: reduction.is_some_and(|e| e.scope == gather.scope),
            beside: layout.overlap.parameters && layout.overlap.gradients,
        };
        let replayed = microbatch.replay();
        let computed = |pass: usize, from: usize| {
            blocks.iter().skip(from).flatten().map(|module| module.seconds[pass]).sum::<f64>()
        };
        let recomputed = blocks.iter().zip(&again).skip(reached).filter(|(_, again)| **again);
        let twice: f64 = recomputed.flat_map(|(block, _)| block).map(|module| module.seconds[0]).sum();
        let [forward, end] = replayed.ends;
        let exposed = [forward - computed(0, 0), end - forward - computed(1, reached) - twice];
        // What runs beside computation slows it down.
        let beside = (replayed.communication[0] + replayed.communication[1] - exposed[0] - exposed[1]).max(0.0);
        let slower = self.physics.contention * beside;
        Some(Coordinated { exposed: [exposed[0], exposed[1] + slower], alone: replayed.communication })
    }

    /// The modules of the embedding, of each block, and of the head. Their time goes by their parameters, since nearly all of it is products.
    fn modules(&self, times: &PassTimes) -> Vec<Vec<Module>> {
        let (layout, model) = (self.layout, self.model);
        let cut = layout.tp as f64;
        let matrices: Vec<f64> = model.dense_matrices(0).into_iter().map(|elements| elements as f64 / cut).collect();
        let vocabulary = (model.vocab * model.hidden) as f64 / cut;
        let head = if model.tied { 0.0 } else { vocabulary };
        let block: f64 = matrices.iter().sum();
        let computing = |blocks: u64| block * blocks as f64 + vocabulary;
        let back = computing(model.layers - layout.frozen_blocks(model.layers));
        let passes = [times.forward / computing(model.layers), (times.backward + times.weights) / back];
        let (forward, backward) = self.launched(0);
        let launches = [forward.host, backward.host].map(|host| host / matrices.len() as f64);
        let hook = layout.runtime.hook;
        let plain = Module { elements: 0.0, seconds: [0.0; 2], host: [hook; 2] };
        let matrix = |elements: f64| Module {
            elements,
            seconds: passes.map(|per| per * elements),
            host: launches.map(|host| host + hook),
        };
        // Block, norm, attention before its first matrix; positions before its last; norm and MLP before the first of the MLP,
        // the activation after it.
        let mlp = if model.gated { 3 } else { 2 };
        let first_of_mlp = matrices.len().saturating_sub(mlp);
        let mut modules = Vec::new();
        for (n, &elements) in matrices.iter().enumerate() {
            let before = match n {
                0 => 3,
                n if n + 1 == first_of_mlp || n == first_of_mlp + 1 => 1,
                n if n == first_of_mlp => 2,
                _ => 0,
            };
            modules.extend(std::iter::repeat_n(plain, before));
            modules.push(matrix(elements));
        }
        let embedding = Module { elements: vocabulary, ..plain };
        // A tied head reads the matrix that the embedding has gathered; its time is there all the same.
        let head = Module { elements: head, ..matrix(vocabulary) };
        let mut blocks = vec![vec![embedding]];
        blocks.extend(std::iter::repeat_n(modules, model.layers as usize));
        blocks.push(vec![plain, head]);
        blocks
    }
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Replayed {
    /// End of the forward pass, and of the backward pass with everything that it waits for.
    pub ends: [f64; 2],
    /// Seconds of gathers and reductions.
    pub communication: [f64; 2],
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    Backward,
}

/// A pass over a module.
struct Step {
    module: usize,
    pass: Pass,
}

/// Whether a module's parameters are gathered; under way until the instant.
#[derive(Clone, Copy, PartialEq)]
enum Held {
    Not,
    UnderWay(f64),
    There,
}

struct Replay<'a> {
    job: &'a Microbatch<'a>,
    modules: Vec<Module>,
    steps: Vec<Step>,
    held: Vec<Held>,
    /// The last use that the look ahead has passed, by module.
    passed: Vec<Option<usize>>,
    /// The next use that it looks at.
    ahead: usize,
    gathered: f64,
    host: f64,
    compute: f64,
    /// When the last gather and the last reduction end.
    last: [f64; 2],
    fetches: VecDeque<f64>,
    reduced: VecDeque<f64>,
    /// Elements in the bucket, and when the passes have computed the last of them.
    bucket: (f64, f64),
    communication: [f64; 2],
}

impl Microbatch<'_> {
    /// Replays it.
    fn replay(&self) -> Replayed {
        let mut starts = Vec::new();
        let mut modules = Vec::new();
        for block in self.blocks {
            starts.push(modules.len());
            modules.extend(block.iter().copied());
        }
        let forward = |module| Step { module, pass: Pass::Forward };
        let mut steps: Vec<Step> = (0..modules.len()).map(forward).collect();
        let end_of_forward = steps.len();
        for (block, (&start, &again)) in self.blocks.iter().zip(starts.iter().zip(self.again)).skip(self.reached).rev()
        {
            let range = start..start + block.len();
            if again {
                steps.extend(range.clone().map(forward));
            }
            steps.extend(range.rev().map(|module| Step { module, pass: Pass::Backward }));
        }
        let count = modules.len();
        let mut replay = Replay {
            job: self,
            modules,
            steps,
            held: vec![Held::Not; count],
            passed: vec![None; count],
            ahead: 0,
            gathered: 0.0,
            host: 0.0,
            compute: 0.0,
            last: [0.0; 2],
            fetches: VecDeque::new(),
            reduced: VecDeque::new(),
            bucket: (0.0, 0.0),
            communication: [0.0; 2],
        };
        (0..end_of_forward).for_each(|step| replay.step(step));
        let forward = replay.compute;
        (end_of_forward..replay.steps.len()).for_each(|step| replay.step(step));
        replay.flush();
        let end = replay.compute.max(replay.last[REDUCTIONS]);
        Replayed { ends: [forward, end], communication: replay.communication }
    }
}

impl Replay<'_> {
    fn step(&mut self, step: usize) {
        let Step { module, pass, .. } = self.steps[step];
        let Module { elements, seconds, host } = self.modules[module];
        if elements > 0.0 {
            if self.held[module] == Held::Not {
                let end = self.issue_gather(elements);
                self.held[module] = Held::UnderWay(end);
            }
            if let Held::UnderWay(end) = self.held[module] {
                wait_for_old(&mut self.fetches, &mut self.host);
                self.fetches.push_back(end);
                self.compute = self.compute.max(end);
                self.held[module] = Held::There;
            }
        }
        if self.passed[module].is_none_or(|passed| passed < step) {
            self.ahead = self.ahead.max(step + 1);
            self.passed[module] = Some(step);
        }
        self.look_ahead();
        let kind = usize::from(pass == Pass::Backward);
        self.host += host[kind];
        self.compute = self.compute.max(self.host) + seconds[kind];
        if pass == Pass::Backward && elements * self.job.trained > 0.0 {
            let gradients = elements * self.job.trained;
            if self.bucket.0 > 0.0 && self.bucket.0 + gradients > self.job.reduce_bucket {
                self.flush();
            }
            self.bucket = (self.bucket.0 + gradients, self.compute);
        }
        if elements > 0.0 && !self.stays(module, step) {
            self.held[module] = Held::Not;
            self.gathered -= elements;
        }
    }

    /// Gathers ahead what the following uses need.
    fn look_ahead(&mut self) {
        let most = (self.job.limits.live - self.gathered).min(self.job.gather_bucket);
        let (mut fetched, mut elements) = (Vec::new(), 0.0);
        while self.ahead < self.steps.len() && elements < most {
            let module = self.steps[self.ahead].module;
            self.passed[module] = Some(self.ahead);
            self.ahead += 1;
            let needed = self.held[module] == Held::Not && self.modules[module].elements > 0.0;
            if needed && !fetched.contains(&module) {
                elements += self.modules[module].elements;
                fetched.push(module);
            }
        }
        if !fetched.is_empty() {
            let end = self.issue_gather(elements);
            for module in fetched {
                self.held[module] = Held::UnderWay(end);
            }
        }
    }

    /// Whether a module keeps its parameters after a step.
    fn stays(&self, module: usize, step: usize) -> bool {
        if self.passed[module].is_some_and(|passed| passed > step) {
            return true;
        }
        let mut between = 0.0;
        for later in &self.steps[step + 1..] {
            if between >= self.job.limits.reuse {
                return false;
            }
            if later.module == module {
                return true;
            }
            between += self.modules[later.module].elements;
        }
        false
    }

    /// Issues a gather, which waits for nothing but its turn; returns when it ends.
    fn issue_gather(&mut self, elements: f64) -> f64 {
        self.gathered += elements;
        self.issue(GATHERS, self.host, (self.job.gather)(elements))
    }

    /// Reduces what is in the bucket, after the passes that have been launched.
    fn flush(&mut self) {
        let (elements, computed) = std::mem::take(&mut self.bucket);
        if elements <= 0.0 {
            return;
        }
        wait_for_old(&mut self.reduced, &mut self.host);
        let end = self.issue(REDUCTIONS, self.host.max(computed), (self.job.reduce)(elements));
        self.reduced.push_back(end);
    }

    /// Runs a collective that is ready at an instant, after those before it; returns when it ends.
    fn issue(&mut self, kind: usize, ready: f64, seconds: f64) -> f64 {
        self.communication[kind] += seconds;
        let before = if self.job.one_group { self.last[GATHERS].max(self.last[REDUCTIONS]) } else { self.last[kind] };
        let start = ready.max(before);
        if self.job.beside {
            self.last[kind] = start + seconds;
        } else {
            self.compute = start.max(self.compute) + seconds;
            self.last[kind] = self.compute;
        }
        self.last[kind]
    }
}

/// Lets the host wait for the oldest of more than [`OUTSTANDING`] events.
fn wait_for_old(events: &mut VecDeque<f64>, host: &mut f64) {
    while events.front().is_some_and(|end| *end <= *host) {
        events.pop_front();
    }
    if events.len() > OUTSTANDING
        && let Some(end) = events.pop_front()
    {
        *host = host.max(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(elements: f64, forward: f64) -> Module {
        Module { elements, seconds: [forward, 2.0 * forward], host: [0.0; 2] }
    }

    /// Nothing is computed again, no gradients; a gather or reduction of 10 elements takes a second.
    fn microbatch(blocks: &[Vec<Module>], live: f64) -> Microbatch<'_> {
        Microbatch {
            blocks,
            again: &[false; 3],
            reached: 0,
            limits: Coordinator { live, reuse: 0.0 },
            gather_bucket: 10.0,
            reduce_bucket: 10.0,
            trained: 0.0,
            gather: &|elements| 0.1 * elements,
            reduce: &|elements| 0.1 * elements,
            one_group: true,
            beside: true,
        }
    }

    /// Three matrices of 10 that take a second to gather, two to pass forward and four to pass backward. The first gather shows; all others
    /// hide, and the one under way when the forward pass ends is kept for the backward pass.
    #[test]
    fn gathers_hide_behind_passes() {
        let blocks = vec![vec![module(10.0, 2.0)], vec![module(10.0, 2.0)], vec![module(10.0, 2.0)]];
        let r = microbatch(&blocks, f64::INFINITY).replay();
        assert_eq!(r.ends, [7.0, 19.0]);
        // The last one stays between its passes, because the look ahead has seen both.
        assert_eq!(r.communication[GATHERS], 5.0);
        // One after the other: five gathers beside 18 seconds of passes.
        let apart = Microbatch { beside: false, ..microbatch(&blocks, f64::INFINITY) }.replay();
        assert_eq!(apart.ends[1], 23.0);
        // Where no second matrix may be there, none is kept between the passes. They hide all the same: the host, which counts, is
        // three matrices ahead of the GPU.
        let strict = microbatch(&blocks, 10.0).replay();
        assert_eq!((strict.ends, strict.communication[GATHERS]), ([7.0, 19.0], 6.0));
    }

    /// Slow gathers: the passes follow them.
    #[test]
    fn passes_wait_for_gathers() {
        let blocks = vec![vec![module(10.0, 2.0)]; 3];
        let r = Microbatch { gather: &|elements| elements, ..microbatch(&blocks, f64::INFINITY) }.replay();
        // Gathered at 10, 20, 30; again at 40 and 50; the last backward pass takes four seconds more.
        assert_eq!(r.ends, [32.0, 54.0]);
    }

    /// Gathers join until the bucket is full; at the limit, each goes alone.
    #[test]
    fn the_limit_breaks_gathers_up() {
        let blocks = vec![vec![module(4.0, 1.0); 12]];
        let count = |live| {
            let calls = std::cell::Cell::new(0);
            let counted = |elements: f64| {
                calls.set(calls.get() + 1);
                0.01 * elements
            };
            Microbatch { gather: &counted, ..microbatch(&blocks, live) }.replay();
            calls.get()
        };
        assert!(count(f64::INFINITY) < count(12.0), "{} {}", count(f64::INFINITY), count(12.0));
    }

    /// Where the first blocks are frozen, neither their backward passes nor gathers for them are made.
    #[test]
    fn the_backward_pass_ends_where_nothing_before_is_trained() {
        let blocks = vec![vec![module(10.0, 2.0)], vec![module(10.0, 2.0)], vec![module(10.0, 2.0)]];
        let last = Microbatch { reached: 2, ..microbatch(&blocks, f64::INFINITY) }.replay();
        assert_eq!((last.ends, last.communication[0]), ([7.0, 11.0], 3.0));
    }

    /// Gradients of 10 take a second to reduce behind passes of four; of the last bucket nothing hides.
    #[test]
    fn reductions_run_behind_and_the_last_shows() {
        let blocks = vec![vec![module(10.0, 2.0)]; 3];
        let r = Microbatch { trained: 1.0, ..microbatch(&blocks, f64::INFINITY) }.replay();
        assert_eq!(r.communication[REDUCTIONS], 3.0);
        assert_eq!(r.ends[1], 20.0);
        // With slow reductions in the same queue, gathers wait behind them; in queues of their own, only the end does.
        let slow = |one_group| {
            let plain = microbatch(&blocks, f64::INFINITY);
            Microbatch { trained: 1.0, one_group, reduce: &|elements| elements, ..plain }.replay().ends[1]
        };
        assert!(slow(true) >= slow(false) && slow(false) >= 30.0);
    }

    /// Computed again, a block keeps its parameters until its backward pass where these are near, and gathers them a third time where not.
    #[test]
    fn blocks_that_are_computed_again() {
        let blocks = vec![vec![module(10.0, 2.0); 4]; 3];
        let times = |live, reuse| {
            let limits = Coordinator { live, reuse };
            let replayed = Microbatch { again: &[true; 3], limits, ..microbatch(&blocks, live) }.replay();
            // All twelve matrices take a second each.
            replayed.communication[GATHERS] / 12.0
        };
        assert!(times(10.0, 1e9) < times(10.0, 0.0));
        assert!(times(10.0, 0.0) > 2.5 && times(f64::INFINITY, 1e9) <= 2.0);
    }
}
