//! Searches with costs by FLOPs: bounds hold, pruning loses nothing, and a no says what would do.

use super::*;
use crate::configuration::ConfigurationError;
use paceline_profiles::Shares;
use paceline_sim::cost::{CostError, CostModel, Exchange, Round};
use paceline_sim::model::{Flops, Layer, ModelConfig, ModelPass};
use paceline_sim::program::{Group, Op, OpKind, Program, Workload};
use paceline_sim::units::Nanos;
use smallvec::{SmallVec, smallvec};

/// A device of 1 GFLOP/s with 1 us per op, and links of 1 GB/s.
struct ByFlops;

impl CostModel for ByFlops {
    fn compute(&self, program: &Program, _: paceline_sim::units::RankId, op: &Op) -> Nanos {
        let Workload::Transformer(workload) = &program.workload else { return Nanos::ZERO };
        let flops = match op.kind {
            OpKind::Compute { .. } => ModelPass::new(workload, &program.stages, program.microbatches, &op.kind).flops(),
            _ => 0.0,
        };
        Nanos(1000) + Nanos::from_seconds(flops * 1e-9)
    }

    fn transfer(
        &self,
        _: &Program,
        _: paceline_sim::units::RankId,
        _: paceline_sim::units::RankId,
        bytes: u64,
    ) -> Round {
        Round { wire: Nanos(bytes), ..Round::default() }
    }

    fn collective(&self, _: &Program, exchange: Exchange, _: &Group) -> SmallVec<[Round; 2]> {
        smallvec![Round { wire: Nanos(exchange.bytes), ..Round::default() }]
    }
}

impl Costs for ByFlops {
    fn of(&self, _: &Program) -> Result<(Box<dyn CostModel>, Shares), CostError> {
        Ok((Box::new(ByFlops), Shares { measured: 1.0, ..Shares::default() }))
    }
}

const MACHINE: Machine = Machine { devices: 4, flops_per_second: Some(1e9) };

fn job(more: &str) -> Job {
    Job::from_table(format!("model = 'demo-1m'\nseq = 16\nglobal_batch = 16\n{more}").parse().unwrap(), "job").unwrap()
}

fn run(job: &Job, top: usize) -> Result<Plans, SearchError> {
    search(job, MACHINE, &ByFlops, top, &|_| true)
}

#[test]
fn bounds_hold_and_pruning_loses_nothing() {
    let job = job("micro_batch = [1, 4]\nschedule = ['1f1b', 'interleaved', 'zb-h1', 'v-half', 'dualpipe']");
    let candidates = candidates::of_job(&job, MACHINE);
    assert!(candidates.len() > 100, "{}", candidates.len());
    let bound = LayerBound::new(&job, MACHINE, &ByFlops);
    let score = Simulation { job: &job, machine: MACHINE, costs: &ByFlops, cuts: &bound };
    let mut all: Vec<Scored> = Vec::new();
    for candidate in &candidates {
        let Ok(scored) = score.predict(candidate) else { continue };
        let least = bound.at_least(candidate).unwrap();
        let peak = *scored.prediction.memory.peak_bytes.iter().max().unwrap();
        assert!(least.seconds <= scored.prediction.iteration_seconds * (1.0 + 1e-9), "{candidate}");
        assert!(least.bytes <= peak, "{candidate}: {} > {peak}", least.bytes);
        assert_eq!(score.bytes(candidate).unwrap(), peak);
        all.push(scored);
    }
    all.sort_by(|a, b| a.prediction.iteration_seconds.total_cmp(&b.prediction.iteration_seconds));
    let plans = run(&job, 5).unwrap();
    let seconds = |list: &[Scored]| list.iter().map(|s| s.prediction.iteration_seconds).collect::<Vec<_>>();
    assert_eq!(seconds(&plans.plans), seconds(&all[..5]));
    assert_eq!(plans.candidates, candidates.len());
    assert_eq!(plans.candidates, plans.plans.len() + plans.losers.len());
    assert_eq!(plans.candidates, plans.simulated + plans.pruned.memory + plans.pruned.bound + plans.pruned.invalid);
    assert!(plans.pruned.bound > 0 && plans.gap >= 0.0 && plans.gap < 1.0, "{:?} {}", plans.pruned, plans.gap);
    // Four devices, no bubble to speak of: the best uses all of them.
    assert_eq!(plans.plans[0].configuration.ranks(), 4);
}

#[test]
fn the_optimiser_has_a_try_at_the_shapes_of_the_best() {
    // Four stages of one layer and few microbatches: bubbles decide, and the fixed patterns were not made for these times.
    let free = job("pp = 4\ndp = 1\nmicro_batch = 4\nrecompute = 'none'");
    let plans = run(&free, 40).unwrap();
    let all =
        plans.plans.iter().map(|plan| &plan.configuration).chain(plans.losers.iter().map(|loser| &loser.configuration));
    let tried = all.clone().filter(|configuration| configuration.schedule == "optimised").count();
    assert!(tried >= 1, "{}", plans.plans.len());
    assert_eq!(plans.candidates, plans.simulated + plans.pruned.memory + plans.pruned.bound + plans.pruned.invalid);
    assert_eq!(plans.candidates, all.count());
    assert!(plans.plans.is_sorted_by_key(|plan| plan.prediction.iteration_seconds));
    assert!(plans.bound_iteration_seconds <= plans.plans[0].prediction.iteration_seconds);
    // With little memory the fixed patterns, and those made for these times, are beaten somewhere; and a plan says enough to make the
    // same order again.
    let fullest = |plan: &Scored| plan.prediction.memory.peak_bytes.iter().copied().max().unwrap();
    let mut won = 0;
    for shape in
        ["pp = 4\ndp = 1\nmicro_batch = 2", "pp = 3\ndp = 1\nmicro_batch = 2", "pp = 2\ndp = 1\nmicro_batch = 2"]
    {
        let mut tight = job(&format!("{shape}\nrecompute = 'none'"));
        let least = run(&tight, 40).unwrap().plans.iter().map(fullest).min().unwrap();
        for percent in [101, 108, 120] {
            tight.memory_limit = Some(least * percent / 100);
            let plans = run(&tight, 40).unwrap().plans;
            assert!(plans.iter().all(|plan| Some(fullest(plan)) <= tight.memory_limit));
            let best =
                |optimised: bool| plans.iter().find(|plan| (plan.configuration.schedule == "optimised") == optimised);
            let (Some(computed), Some(named)) = (best(true), best(false)) else { continue };
            assert!(computed.configuration.measured.is_some());
            computed.configuration.program(&tight, MACHINE).unwrap();
            let [computed, named] = [computed, named].map(|plan| plan.prediction.iteration_seconds);
            println!("{shape:?} {percent} %: optimised {computed}, named {named}");
            won += usize::from(computed < named);
            // Of two that are as fast the named one is the simpler.
            assert!(computed != named || plans[0].configuration.schedule != "optimised", "{shape}");
        }
    }
    assert!(won > 0);
    // Where the job names its schedules, nothing else is tried.
    let named = run(&job("pp = 4\ndp = 1\nmicro_batch = 4\nschedule = ['1f1b', 'zb-h1']"), 40).unwrap();
    assert!(named.plans.iter().all(|plan| plan.configuration.schedule != "optimised"));
}

#[test]
fn a_prediction_is_the_sum_of_its_parts() {
    for text in ["dp = 2\npp = 2\nrecompute = 'full'\nstates = 'zero1'", "pp = 4\nschedule = 'zb-h1'", "dp = 4", ""] {
        let job = job(text);
        let configuration = Configuration::of_job(&job).unwrap();
        let program = configuration.program(&job, MACHINE).unwrap();
        let (found, trace) = crate::prediction::predict(&program, &ByFlops, MACHINE, Some(1 << 20)).unwrap();
        assert!((found.time.total() / found.iteration_seconds - 1.0).abs() < 1e-12, "{text}: {:?}", found.time);
        assert_eq!(found.iteration_seconds, trace.makespan.seconds());
        for (peak, classes) in found.memory.peak_bytes.iter().zip(&found.memory.by_class) {
            assert_eq!(*peak, classes.total());
        }
        assert_eq!(found.memory.peak_bytes.len(), configuration.pp as usize);
        assert!(!found.memory.fits);
        assert_eq!(found.time.recompute > 0.0, text.contains("full"));
        assert_eq!(found.time.exposed_dp > 0.0, configuration.dp > 1 || text.contains("zb"), "{text}");
        // All FLOPs of the model over the FLOPs of four devices.
        let tokens = found.tokens_per_second_per_gpu * 4.0 * found.iteration_seconds;
        assert!((tokens / 256.0 - 1.0).abs() < 1e-9, "{tokens}");
        let (mfu, hfu) = (found.mfu.unwrap(), found.hfu.unwrap());
        assert!(mfu > 0.1 && mfu <= hfu && hfu <= 1.0, "{text}: {mfu} {hfu}");
    }
}

#[test]
fn hardware_flops_are_those_of_the_kernels() {
    let model = ModelConfig::preset("demo-1m").unwrap();
    let layers = f64::from(model.layers);
    let forward = Flops::per_token(&model, 16);
    let logits = Flops::of_layer(&model, Layer::Head, 16).total();
    // The output of a block is the next checkpoint: R stops before the last projection.
    let down = 2.0 * f64::from(model.intermediate) * f64::from(model.hidden);
    let repeated = (Flops::of_layer(&model, Layer::Block(0), 16).total() - down) * layers;
    // A backward of attention makes the scores again: one product of the two of a forward.
    let always = logits + forward.attention / 2.0;
    for (text, again) in [
        ("", always),
        ("recompute = 'selective'", always),
        ("recompute = 'full'\ndp = 2", always + repeated),
        ("pp = 4\nschedule = 'zb-h1'", always + logits),
        ("pp = 2\nschedule = 'v-half'\nrecompute = 'full'", always + logits + repeated),
    ] {
        let job = job(text);
        let program = Configuration::of_job(&job).unwrap().program(&job, MACHINE).unwrap();
        let (found, _) = crate::prediction::predict(&program, &ByFlops, MACHINE, None).unwrap();
        let ratio = found.hfu.unwrap() / found.mfu.unwrap();
        let expected = 1.0 + again / (3.0 * forward.total());
        assert!((ratio / expected - 1.0).abs() < 1e-12, "{text}: {ratio} instead of {expected}");
    }
}

#[test]
fn what_does_not_fit_is_told_what_the_smallest_plan_needs() {
    let tight = |limit: u64| job(&format!("micro_batch = [1, 16]\nmemory_limit = {limit}"));
    let SearchError::NothingFits { needed, configuration, limit } = run(&tight(1000), 3).unwrap_err() else { panic!() };
    assert_eq!(limit, 1000);
    // Nothing holds less, and what it says is enough.
    assert!(matches!(run(&tight(needed - 1), 3), Err(SearchError::NothingFits { needed: n, .. }) if n == needed));
    let plans = run(&tight(needed), 3).unwrap();
    assert!(plans.plans.iter().any(|plan| {
        Configuration { stage_layers: vec![], ..plan.configuration.clone() }
            == Configuration { stage_layers: vec![], ..(*configuration).clone() }
    }));
    assert!(plans.pruned.memory > 0);
    let memory = plans.losers.iter().filter(|loser| matches!(loser.reason, Reason::Memory { .. })).count();
    assert_eq!(memory, plans.pruned.memory);
    assert!(plans.plans.iter().all(|plan| plan.prediction.memory.fits));
}

#[test]
fn states_are_cut_where_only_that_fits() {
    let fixed = "dp = 4\npp = 1\nmicro_batch = 1\nrecompute = 'none'\nschedule = '1f1b'\n";
    let names = |text: &str| -> Vec<String> {
        let all = run(&job(&format!("{fixed}{text}")), 20).unwrap();
        let mut names: Vec<String> = all.plans.iter().map(|plan| plan.configuration.states.letters()).collect();
        names.sort();
        names
    };
    assert_eq!(names(""), ["GGG", "NGG", "NNG", "NNN"]);
    assert_eq!(names("group_size = 2").len(), 10);
    // Gathered parameters can stay only where some are gathered.
    assert_eq!(names("keep_gathered = true"), ["GGG"]);
    assert_eq!(names("keep_gathered = true\nstates = ['zero1', 'zero3']"), ["GGG"]);
    let alone = run(&job("dp = 1\nkeep_gathered = true"), 3).unwrap_err().to_string();
    assert!(alone.contains("keep_gathered = true needs replicas"), "{alone}");
    let default = Configuration::of_job(&job("dp = 2\nkeep_gathered = true")).unwrap();
    let refused = default.program(&job("dp = 2\nkeep_gathered = true"), MACHINE).unwrap_err().to_string();
    assert!(refused.contains("keep_gathered = true with states = none") && refused.contains("I or G"), "{refused}");
    let all = run(&job(fixed), 20).unwrap();
    let peak = |letters: &str| {
        let plan = all.plans.iter().find(|plan| plan.configuration.states.letters() == letters).unwrap();
        plan.prediction.memory.peak_bytes[0]
    };
    assert!(peak("GGG") < peak("NGG") && peak("NGG") < peak("NNG") && peak("NNG") < peak("NNN"));
    assert_eq!(names(&format!("memory_limit = {}", peak("GGG"))), ["GGG"]);
}

#[test]
fn fixed_axes_stay_fixed_and_impossible_jobs_say_why() {
    let plans = run(&job("dp = 2\npp = 2\nschedule = '1f1b'\nmicro_batch = 2\nrecompute = 'none'\nstates = 'none'"), 9)
        .unwrap();
    assert_eq!((plans.candidates, plans.plans.len()), (1, 1));
    assert_eq!(plans.plans[0].configuration.to_string(), "dp 2 pp 2 1f1b, micro-batch 2");
    // Interleaving needs a multiple of pp microbatches.
    let error = run(&job("dp = 2\npp = 3\nschedule = 'interleaved'\nmicro_batch = 2"), 3).unwrap_err().to_string();
    assert!(error.contains("multiple of 3"), "{error}");

    let refuse = |text: &str| Configuration::of_job(&job(text)).unwrap_err();
    assert!(matches!(refuse("pp = [1, 2]"), ConfigurationError::Choice { key: "pp", .. }));
    let text = refuse("dp = 8\nmicro_batch = 4").to_string();
    assert!(text.contains("global_batch = 16") && text.contains("multiple of 32"), "{text}");
    assert!(refuse("schedule = 'zb-v'\nchunks = 3").to_string().contains("exactly 2"));
    assert!(matches!(refuse("cluster = 'h100'"), ConfigurationError::Cluster { .. }));
    let error = run(&job("cluster = 'h100'"), 3).unwrap_err().to_string();
    assert!(error.contains("\"h100\"") && error.contains("\"local\""), "{error}");
    // A batch of millions with one sequence at a time is refused before it is lowered.
    let text = "model = 'demo-1m'\nseq = 16\nglobal_batch = 8388608\nmicro_batch = 1";
    let vast = Job::from_table(text.parse().unwrap(), "job").unwrap();
    let error = run(&vast, 3).unwrap_err().to_string();
    assert!(error.contains("larger micro_batch"), "{error}");
}

#[test]
fn a_search_can_be_stopped_and_tells_how_far_it_is() {
    let seen = std::sync::Mutex::new(Vec::new());
    let stop_at_once = |progress: Progress| {
        seen.lock().unwrap().push(progress);
        false
    };
    let plans = search(&job(""), MACHINE, &ByFlops, 10, &stop_at_once).unwrap();
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen.len(), 1);
    assert_eq!(
        (seen[0].candidates, seen[0].best),
        (plans.candidates, Some(plans.plans[0].prediction.iteration_seconds))
    );
    assert!(seen[0].decided < plans.candidates);
}

#[test]
fn no_single_layer_moved_makes_the_best_plan_shorter() {
    let job = job("pp = 2\ndp = 1\nmicro_batch = 8\nschedule = ['1f1b', 'zb-h1', 'v-half']");
    let plans = run(&job, 2).unwrap();
    let bound = LayerBound::new(&job, MACHINE, &ByFlops);
    let score = Simulation { job: &job, machine: MACHINE, costs: &ByFlops, cuts: &bound };
    for plan in &plans.plans {
        let sizes = &plan.configuration.stage_layers;
        for (from, to) in (1..sizes.len()).flat_map(|right| [(right - 1, right), (right, right - 1)]) {
            let mut moved = plan.configuration.clone();
            if sizes[from] > 1 {
                moved.stage_layers[from] -= 1;
                moved.stage_layers[to] += 1;
                let seconds = score.predict(&moved).unwrap().prediction.iteration_seconds;
                assert!(seconds >= plan.prediction.iteration_seconds, "{moved}: {seconds}");
            }
        }
    }
    assert!(plans.gap >= 0.0);
}

#[test]
fn computed_schedules_know_what_passes_take() {
    let job = job("pp = 2\ndp = 1\nmicro_batch = 1\nschedule = ['zb-1p', 'zb-v-timed', 'adaptive-v', 'optimised']");
    let plans = run(&job, 8).unwrap();
    assert!(plans.plans.len() >= 4, "{:?}", plans.losers);
    for plan in &plans.plans {
        let configuration = &plan.configuration;
        let measured = configuration.measured.as_ref().unwrap();
        // The cut is uneven, and ByFlops counts each op's microsecond.
        assert!(measured.forward_nanos.iter().chain(&measured.input_nanos).all(|nanos| *nanos > 1000));
        assert!(measured.until_b_bytes.iter().zip(&measured.until_w_bytes).all(|(b, w)| b >= w && *b > 0));
        assert!(measured.message_nanos > 0);
        // A plan file brings the same order about.
        let text = serde_json::to_string(configuration).unwrap();
        let again: Configuration = serde_json::from_str(&text).unwrap();
        assert_eq!(again.order(&job), configuration.order(&job));
        let unaware = Configuration { measured: None, ..again };
        assert_eq!(unaware.order(&job).unwrap().placement, configuration.order(&job).unwrap().placement);
    }
}
