//! Training the toy under many layouts: results equal the arithmetic done here in f64, whatever the layout.

use crate::heap::Heap;
use crate::toy::{Failure, Layout, SEQ, SEQUENCES, Toy, VOCAB, WIDTH, program, target_vector};
use paceline_exec::{
    CheckpointSettings, Dataset, Evaluation, LearningRate, Observer, OptimizerSettings, RunReport, RunSettings, Silent,
    StepReport, run_passes,
};
use paceline_profiles::{CollectiveRound, Overhead, Subject};
use paceline_sim::program::{Collective, Element, MemoryClass, OpKind, Pass, Program};
use paceline_sim::trace::{Trace, WaitReason};
use paceline_sim::units::{MicrobatchId, StageId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub fn data() -> Dataset {
    let tokens: Vec<u16> = (0..2000u32).map(|k| ((k * k + k / 7) % VOCAB as u32) as u16).collect();
    Dataset::from_tokens("toy", &tokens)
}

pub fn settings(steps: u64) -> RunSettings {
    RunSettings {
        optimizer: OptimizerSettings {
            learning_rate: LearningRate { peak: 0.02, floor: 0.002, warmup_steps: 3, total_steps: 12 },
            clip: Some(0.05),
            ..OptimizerSettings::default()
        },
        seed: 11,
        capture_gradients: true,
        poison: true,
        ..RunSettings::new(steps, 0.02)
    }
}

fn train(layout: &Layout, settings: &RunSettings) -> RunReport {
    run_passes(&program(layout), &Toy::new(layout), &Heap, settings, &data(), &mut Silent).unwrap()
}

/// Layouts of the same global batch of eight microbatches over four stages.
fn layouts() -> Vec<Layout> {
    let base = Layout::SINGLE;
    let mut all = vec![base];
    for (data, pipeline, devices) in
        [(1, 2, 2), (1, 4, 2), (1, 4, 1), (2, 1, 2), (2, 2, 2), (4, 1, 3), (8, 4, 2), (2, 4, 8)]
    {
        for (gpipe, zero1) in [(true, false), (false, true), (false, false)] {
            all.push(Layout { data, pipeline, devices, gpipe, zero1, microbatches: 8 / data, ..base });
        }
    }
    all
}

/// Loss and gradients of one global batch, by the definition of the toy, in f64.
fn reference(parameters: &BTreeMap<String, Vec<f32>>, seed: u64, step: u64) -> (f64, BTreeMap<String, Vec<f64>>) {
    let data = data();
    let sampler = data.sampler(SEQ as u32, VOCAB as u32, seed).unwrap();
    let weights: Vec<Vec<f64>> =
        (0..4).map(|s| parameters[&format!("linear.{s}.weight")].iter().map(|&x| f64::from(x)).collect()).collect();
    let table = &parameters["table"];
    let mut gradients: BTreeMap<String, Vec<f64>> =
        parameters.iter().map(|(k, v)| (k.clone(), vec![0.0; v.len()])).collect();
    let sequences = 8 * SEQUENCES;
    let scale = 1.0 / (sequences * SEQ) as f64;
    let mut loss = 0.0;
    let (mut tokens, mut targets) = ([0; SEQ], [0; SEQ]);
    for index in 0..sequences {
        sampler.train(step, index as u64, &mut tokens, &mut targets).unwrap();
        for (&token, &target) in tokens.iter().zip(&targets) {
            let mut xs =
                vec![table[token as usize * WIDTH..][..WIDTH].iter().map(|&x| f64::from(x)).collect::<Vec<_>>()];
            for w in &weights {
                let x = xs.last().unwrap();
                let y = (0..WIDTH).map(|c| x[c] + (0..WIDTH).map(|k| x[k] * w[k * WIDTH + c]).sum::<f64>()).collect();
                xs.push(y);
            }
            let difference: Vec<f64> = xs[4].iter().zip(target_vector(target)).map(|(y, u)| y - f64::from(u)).collect();
            loss += difference.iter().map(|d| d * d / 2.0).sum::<f64>() * scale;
            let mut dy: Vec<f64> = difference.iter().map(|d| d * scale).collect();
            for s in (0..4).rev() {
                let dw = gradients.get_mut(&format!("linear.{s}.weight")).unwrap();
                let mut dx = dy.clone();
                for k in 0..WIDTH {
                    for c in 0..WIDTH {
                        dw[k * WIDTH + c] += xs[s][k] * dy[c];
                        dx[k] += dy[c] * weights[s][k * WIDTH + c];
                    }
                }
                dy = dx;
            }
            let row = &mut gradients.get_mut("table").unwrap()[token as usize * WIDTH..][..WIDTH];
            row.iter_mut().zip(&dy).for_each(|(r, d)| *r += d);
        }
    }
    (loss, gradients)
}

fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    let size = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * size, "{what}[{i}]: {f} instead of {e}");
    }
}

#[test]
fn gradients_of_the_first_step_are_those_of_the_definition() {
    let layout = Layout::SINGLE;
    let mut untouched = settings(1);
    untouched.optimizer.learning_rate = LearningRate::constant(0.0);
    let report = train(&layout, &untouched);
    // At rate zero the parameters after the step are those before it.
    let (loss, gradients) = reference(&report.parameters, untouched.seed, 0);
    assert!((report.steps[0].loss - loss).abs() < 1e-6 * loss, "{} {loss}", report.steps[0].loss);
    let mut squares = 0.0;
    for (name, expected) in gradients {
        squares += expected.iter().map(|g| g * g).sum::<f64>();
        let expected: Vec<f32> = expected.iter().map(|&g| g as f32).collect();
        assert_close(&name, &report.gradients[&name], &expected, 1e-5);
    }
    let norm = report.steps[0].gradient_norm;
    assert!((norm - squares.sqrt()).abs() < 1e-5 * norm, "{norm} {}", squares.sqrt());
    assert!(norm > 0.05, "the clipping has something to do");
}

#[test]
fn every_layout_trains_like_a_single_rank() {
    let alone = train(&Layout::SINGLE, &settings(4));
    let falls = alone.steps[3].loss < alone.steps[0].loss;
    assert!(falls, "{:?}", alone.steps.iter().map(|s| s.loss).collect::<Vec<_>>());
    for layout in layouts() {
        let report = train(&layout, &settings(4));
        for (found, expected) in report.steps.iter().zip(&alone.steps) {
            let what = format!("{layout:?} step {}", found.step);
            assert!((found.loss - expected.loss).abs() < 1e-5 * expected.loss, "{what}: loss");
            assert!(
                (found.gradient_norm - expected.gradient_norm).abs() < 1e-5 * expected.gradient_norm,
                "{what}: norm"
            );
        }
        assert_eq!(report.gradients.len(), 5);
        for (name, expected) in &alone.gradients {
            assert_close(&format!("{layout:?} {name}"), &report.gradients[name], expected, 2e-5);
        }
        for (name, expected) in &alone.parameters {
            assert_close(&format!("{layout:?} {name}"), &report.parameters[name], expected, 2e-5);
        }
    }
}

/// The peak by the rule of the contract: allocations at issue, frees at the end, in issue order.
fn peak(program: &Program, rank: usize) -> u64 {
    let rank = &program.ranks[rank];
    let size = |ids: &[paceline_sim::units::BufferId]| ids.iter().map(|b| rank.buffers[b.index()].bytes).sum::<u64>();
    let mut live = size(&rank.persistent);
    let mut peak = live;
    for op in &rank.ops {
        live += size(&op.alloc);
        peak = peak.max(live);
        live -= size(&op.free);
    }
    peak
}

#[test]
fn measured_peaks_and_traces_follow_the_program() {
    for layout in layouts() {
        let program = program(&layout);
        let report = train(&layout, &settings(3));
        for (r, rank) in report.trace.ranks.iter().enumerate() {
            let expected = peak(&program, r);
            assert_eq!(report.memory[r].peak_bytes, expected, "{layout:?} rank {r}");
            assert_eq!((rank.peak_bytes, rank.peak_by_class.values().sum::<u64>()), (expected, expected));
            assert_eq!(rank.memory.iter().map(|m| m.1).max(), Some(expected));
            assert!(rank.memory.is_sorted_by_key(|m| m.0));
            assert!(rank.peak_by_class[&MemoryClass::Parameter] > 0);
            assert_eq!(rank.events.len(), program.ranks[r].ops.len());
            let mut clock = paceline_sim::units::Nanos::ZERO;
            for (event, op) in rank.events.iter().zip(&program.ranks[r].ops) {
                assert_eq!(event.kind, op.kind);
                assert!(event.ready <= event.start && event.start <= event.end && event.end <= report.trace.makespan);
                for wait in &op.waits {
                    assert!(
                        event.start >= rank.events[wait.index()].end,
                        "{layout:?} {:?} before its wait",
                        event.kind
                    );
                }
                if let Some(WaitReason::Op(on)) = event.wait {
                    assert!(op.waits.contains(&on));
                }
                if op.stream.0 == 0 {
                    assert!(event.start >= clock, "compute ops run one by one");
                    clock = event.end;
                }
            }
        }
        // Ranks of one device take turns.
        let mut turns: Vec<Vec<_>> = vec![vec![]; layout.devices as usize];
        for (trace, rank) in report.trace.ranks.iter().zip(&program.ranks) {
            let takes_device =
                |kind: &OpKind| matches!(kind, OpKind::Compute { .. } | OpKind::Optimizer { .. } | OpKind::Recv { .. });
            turns[rank.device.index()]
                .extend(trace.events.iter().filter(|e| takes_device(&e.kind)).map(|e| (e.start, e.end)));
        }
        for mut turns in turns {
            turns.sort();
            assert!(turns.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{layout:?}");
        }
    }
}

#[test]
fn resuming_gives_the_same_bits_and_works_under_another_layout() {
    let layout =
        Layout { data: 2, pipeline: 2, devices: 2, microbatches: 4, gpipe: false, zero1: true, ..Layout::SINGLE };
    let straight = train(&layout, &settings(6));
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Some(CheckpointSettings { directory: folder.path().into(), every: Some(2) });
    let first = train(&layout, &RunSettings { checkpoint: checkpoint.clone(), ..settings(3) });
    assert_eq!(first.checkpoint, Some(folder.path().join("step-00000003")));
    assert!(folder.path().join("step-00000002").is_dir());
    let resume = Some(folder.path().to_path_buf());
    // The seed of the checkpoint counts, not this one.
    let second = train(&layout, &RunSettings { resume: resume.clone(), seed: 99, ..settings(6) });
    let losses = |report: &RunReport| report.steps.iter().map(|s| (s.step, s.loss.to_bits())).collect::<Vec<_>>();
    assert_eq!([losses(&first), losses(&second)].concat(), losses(&straight));
    assert_eq!(second.parameters, straight.parameters);
    assert_eq!(second.gradients, straight.gradients);

    for other in layouts() {
        let report = train(&other, &RunSettings { resume: resume.clone(), ..settings(6) });
        assert_eq!(report.steps.len(), 3);
        for (name, expected) in &straight.parameters {
            assert_close(&format!("{other:?} {name}"), &report.parameters[name], expected, 2e-5);
        }
    }

    let error = |layout: &Layout, settings: RunSettings| {
        run_passes(&program(layout), &Toy::new(layout), &Heap, &settings, &data(), &mut Silent).unwrap_err().to_string()
    };
    let deeper = Layout { stages: 5, ..Layout::SINGLE };
    assert!(error(&deeper, RunSettings { resume: resume.clone(), ..settings(6) }).contains("another model"));
    assert!(error(&layout, RunSettings { resume, ..settings(3) }).contains("3 steps are done already"));
}

/// Raises the stop flag after a step.
struct StopAfter(u64, Arc<AtomicBool>, Vec<String>);

impl Observer for StopAfter {
    fn step(&mut self, report: &StepReport) {
        self.2.push(format!("step {}", report.step));
        self.1.store(report.step >= self.0, Ordering::Relaxed);
    }

    fn evaluated(&mut self, step: u64, _: f64) {
        self.2.push(format!("evaluated {step}"));
    }

    fn saved(&mut self, path: &std::path::Path) {
        self.2.push(format!("saved {}", path.file_name().unwrap().to_string_lossy()));
    }

    fn timeline(&mut self, step: u64, trace: &dyn Fn() -> Trace) {
        let trace = trace();
        let alive = trace.ranks.iter().all(|rank| rank.peak_bytes > 0 && rank.events.iter().any(|e| e.end > e.start));
        self.2.push(format!("timeline {step} of {} ranks, alive: {alive}", trace.ranks.len()));
    }
}

#[test]
fn the_stop_flag_ends_the_run_with_a_checkpoint_and_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout { pipeline: 2, devices: 2, ..Layout::SINGLE };
    for stop_after in [1, 2] {
        let stop = Arc::new(AtomicBool::new(false));
        let settings = RunSettings {
            stop: Some(stop.clone()),
            checkpoint: Some(CheckpointSettings { directory: folder.path().into(), every: None }),
            evaluation: Some(Evaluation { every: 100, sequences: 4 }),
            ..settings(1000)
        };
        let mut observer = StopAfter(stop_after, stop, vec![]);
        let report =
            run_passes(&program(&layout), &Toy::new(&layout), &Heap, &settings, &data(), &mut observer).unwrap();
        assert!(report.stopped);
        assert_eq!(report.steps.len() as u64, stop_after);
        assert_eq!(report.trace_step, stop_after);
        assert!(report.trace.makespan.0 > 0);
        let saved = format!("saved step-{stop_after:08}");
        let of = |n| [format!("step {n}"), format!("timeline {n} of 2 ranks, alive: true")];
        let mut expected: Vec<String> = (1..=stop_after).flat_map(of).collect();
        expected.insert(0, "evaluated 0".into());
        expected.extend([format!("evaluated {stop_after}"), saved]);
        assert_eq!(observer.2, expected);
    }
}

#[test]
fn held_out_loss_is_that_of_the_definition_and_independent_of_layout() {
    let evaluated = |layout: &Layout| {
        let settings = RunSettings { evaluation: Some(Evaluation { every: 2, sequences: 6 }), ..settings(2) };
        train(layout, &settings).held_out
    };
    let alone = evaluated(&Layout::SINGLE);
    assert_eq!(alone.iter().map(|e| e.0).collect::<Vec<_>>(), [0, 2]);
    for layout in layouts() {
        let found = evaluated(&layout);
        assert_eq!(found[0].1.to_bits(), alone[0].1.to_bits(), "{layout:?}: the first parameters have the same bits");
        assert!((found[1].1 - alone[1].1).abs() < 1e-5 * alone[1].1);
    }
    // By hand: at rate zero, the loss over the same sequences.
    let mut still = RunSettings { evaluation: Some(Evaluation { every: 1, sequences: 6 }), ..settings(1) };
    still.optimizer.learning_rate = LearningRate::constant(0.0);
    let report = train(&Layout::SINGLE, &still);
    let data = data();
    let sampler = data.sampler(SEQ as u32, VOCAB as u32, 11).unwrap();
    let (mut tokens, mut targets) = ([0; SEQ], [0; SEQ]);
    let mut expected = 0.0;
    for k in 0..6 {
        sampler.held_out(k * sampler.held_out_sequences() / 6, &mut tokens, &mut targets).unwrap();
        for (&token, &target) in tokens.iter().zip(&targets) {
            let mut x: Vec<f64> =
                report.parameters["table"][token as usize * WIDTH..][..WIDTH].iter().map(|&v| v.into()).collect();
            for s in 0..4 {
                let w = &report.parameters[&format!("linear.{s}.weight")];
                x = (0..WIDTH)
                    .map(|c| x[c] + (0..WIDTH).map(|k| x[k] * f64::from(w[k * WIDTH + c])).sum::<f64>())
                    .collect();
            }
            let squares = x.iter().zip(target_vector(target)).map(|(y, u)| (y - f64::from(u)).powi(2) / 2.0);
            expected += squares.sum::<f64>() / (6 * SEQ) as f64;
        }
    }
    assert!((report.held_out[0].1 - expected).abs() < 1e-6 * expected);
    assert_eq!(report.held_out[0].1, report.held_out[1].1);
}

#[test]
fn one_failure_ends_the_run_of_all_with_one_clear_error() {
    let failures = [
        (Failure::Error, "the toy was told to fail"),
        (Failure::Panic, "r2 panicked: the toy was told to panic"),
        (Failure::Undeclared, "touches Gradients { stage: StageId(2), unit: 0 }, which its `uses` do not declare"),
    ];
    for (failure, expected) in failures {
        for devices in [1, 4] {
            let layout = Layout { pipeline: 4, devices, gpipe: false, ..Layout::SINGLE };
            let toy = Toy { fail: Some((Pass::F, StageId(2), MicrobatchId(3), failure)), ..Toy::new(&layout) };
            let error = run_passes(&program(&layout), &toy, &Heap, &settings(5), &data(), &mut Silent).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}

#[test]
fn settings_are_checked() {
    let error = |settings: RunSettings| {
        run_passes(&program(&Layout::SINGLE), &Toy::new(&Layout::SINGLE), &Heap, &settings, &data(), &mut Silent)
            .unwrap_err()
            .to_string()
    };
    let with = |change: fn(&mut RunSettings)| {
        let mut settings = settings(2);
        change(&mut settings);
        error(settings)
    };
    assert!(with(|s| s.optimizer.beta2 = 1.0).contains("beta2 = 1"));
    assert!(with(|s| s.optimizer.clip = Some(0.0)).contains("clip = 0"));
    assert!(with(|s| s.optimizer.epsilon = f32::NAN).contains("epsilon = NaN"));
    assert!(with(|s| s.optimizer.weight_decay = -1.0).contains("weight_decay = -1"));
    assert!(with(|s| s.steps = 0).contains("steps = 0"));
    assert!(with(|s| s.resume = Some("/nonexistent".into())).contains("no checkpoint in /nonexistent"));
}

#[test]
fn a_loss_that_is_not_a_number_ends_the_run() {
    let mut wild = settings(50);
    wild.optimizer.learning_rate = LearningRate::constant(1e30);
    let error = run_passes(&program(&Layout::SINGLE), &Toy::new(&Layout::SINGLE), &Heap, &wild, &data(), &mut Silent);
    assert!(error.unwrap_err().to_string().contains("lower the learning rate"));
}

#[test]
fn communication_is_timed_piece_by_piece() {
    let base = Layout { microbatches: 4, ..Layout::SINGLE };
    for layout in [Layout { data: 2, devices: 2, ..base }, Layout { pipeline: 2, devices: 2, ..base }] {
        let (program, report) = (program(&layout), train(&layout, &settings(4)));
        // The first of the four steps is not counted.
        let steps = 3;
        let mut parts: BTreeMap<u64, u64> = BTreeMap::new();
        let mut received = 0;
        for (rank, op) in program.ranks.iter().flat_map(|rank| rank.ops.iter().map(move |op| (rank, op))) {
            match op.kind {
                OpKind::Recv { .. } => received += steps,
                OpKind::Collective { collective: Collective::AllReduce, buffer, bytes, .. }
                    if rank.buffers[buffer.index()].element == Element::F32 =>
                {
                    *parts.entry(bytes).or_default() += steps;
                }
                _ => {}
            }
        }
        let count = |subject: Subject| report.exchanges.iter().find(|t| t.subject == subject).map_or(0, |t| t.count);
        for (&bytes, &expected) in &parts {
            for round in CollectiveRound::ALL {
                assert_eq!(count(Subject::Collective { round, members: 2, bytes }), expected, "{layout:?} {bytes}");
            }
        }
        assert!(layout.data == 1 || !parts.is_empty());
        let handed = count(Subject::Overhead(Overhead::Message));
        assert!(handed <= received, "{layout:?}: {handed} of {received}");
        assert!(report.exchanges.iter().all(|times| times.total_seconds > 0.0), "{:?}", report.exchanges);
        assert_eq!(report.busy_seconds.len() as u64, steps);
        assert!(report.busy_seconds.iter().all(|&seconds| seconds > 0.0));
    }
}
