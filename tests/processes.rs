//! A process per rank, over TCP and over a device's own network: losses, gradients, checkpoints and held-out losses have the bits of a
//! run in one process, and what goes wrong in one process is told in all.

use paceline_exec::processes::{Mesh, Patience, Place, Processes, Terms, meet};
use paceline_exec::{CheckpointSettings, Dataset, Evaluation, ExecError, RunReport, RunSettings, Silent, run};
use paceline_kernels::{CpuDevice, ThreadNetwork};
use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::Job;
use paceline_sim::program::Program;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn program(lines: &str) -> Program {
    let job = Job::from_table(lines.parse().unwrap(), "job.toml").unwrap();
    let configuration = Configuration::of_job(&job).unwrap();
    configuration.program(&job, Machine { devices: 4, flops_per_second: None }).unwrap()
}

fn settings(steps: u64) -> RunSettings {
    RunSettings {
        capture_gradients: true,
        evaluation: Some(Evaluation { every: 100, sequences: 2 }),
        ..RunSettings::new(steps, 1e-2)
    }
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// Processes that have met; here each is a thread.
fn meshes(size: u32) -> Vec<Arc<Mesh>> {
    let port = free_port();
    let soon = Duration::from_secs(30);
    let patience = Patience { meeting: soon, silence: soon, message: soon };
    std::thread::scope(|scope| {
        let place = |rank| Place { rank, size, local_rank: rank, address: "127.0.0.1".into(), port };
        let come = |rank| scope.spawn(move || Arc::new(meet(&place(rank), &Terms::new(), patience).unwrap()));
        let threads: Vec<_> = (0..size).map(come).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The reports of all processes.
fn run_apart(
    program: &Program,
    direct: bool,
    of: impl Fn(usize) -> RunSettings + Sync,
) -> Vec<Result<RunReport, ExecError>> {
    let (data, network) = (Dataset::bundled(), Arc::new(ThreadNetwork::default()));
    std::thread::scope(|scope| {
        let threads: Vec<_> = meshes(program.ranks.len() as u32)
            .into_iter()
            .enumerate()
            .map(|(rank, mesh)| {
                let (data, network, of) = (&data, network.clone(), &of);
                scope.spawn(move || {
                    let mut settings = of(rank);
                    settings.processes = Some(Processes { mesh, direct });
                    run(program, &CpuDevice::connected(network), &settings, data, &mut Silent)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn together(program: &Program, settings: &RunSettings) -> RunReport {
    run(program, &CpuDevice::new(), settings, &Dataset::bundled(), &mut Silent).unwrap()
}

const SIZE: &str = "model = 'demo-1m'\nseq = 16\nglobal_batch = 12\nmicro_batch = 1\n";

/// A pipeline, one that goes back to its first rank, sharded replicas, and everything partitioned.
const LAYOUTS: [&str; 5] = [
    "pp = 3\nschedule = '1f1b'",
    "pp = 2\nschedule = 'zb-v'",
    "dp = 2\npp = 1\nschedule = 'gpipe'\nstates = 'zero1'",
    "dp = 2\npp = 2\nschedule = '1f1b'\nstates = 'zero1'",
    "dp = 3\npp = 1\nschedule = 'gpipe'\nstates = 'zero3'",
];

#[test]
fn processes_over_tcp_compute_the_bits_of_one_process() {
    for layout in LAYOUTS {
        let program = program(&format!("{SIZE}{layout}\n"));
        let expected = together(&program, &settings(3));
        let reports: Vec<RunReport> =
            run_apart(&program, false, |_| settings(3)).into_iter().map(Result::unwrap).collect();
        for (rank, report) in reports.iter().enumerate() {
            for (got, expected) in report.steps.iter().zip(&expected.steps) {
                assert_eq!((got.loss, got.gradient_norm), (expected.loss, expected.gradient_norm), "{layout} r{rank}");
            }
            assert_eq!(report.held_out, expected.held_out, "{layout} r{rank}");
            assert_eq!(report.memory, expected.memory, "{layout} r{rank}");
            assert_eq!(report.trace.ranks.len(), program.ranks.len());
            for (own, of_rank) in report.trace.ranks.iter().zip(&program.ranks) {
                assert_eq!(own.events.len(), of_rank.ops.len());
                assert!(own.events.iter().all(|event| event.start <= event.end));
                assert!(own.events.iter().any(|event| event.end.0 > 0), "{layout}: measured in its own process");
            }
        }
        assert_eq!(reports[0].gradients, expected.gradients, "{layout}");
        assert_eq!(reports[0].parameters, expected.parameters, "{layout}");
    }
}

#[test]
fn processes_over_a_network_of_their_devices_train_alike() {
    for layout in LAYOUTS {
        let program = program(&format!("{SIZE}{layout}\n"));
        let expected = together(&program, &settings(2));
        for report in run_apart(&program, true, |_| settings(2)) {
            let report = report.unwrap();
            for (got, expected) in report.steps.iter().zip(&expected.steps) {
                let error = (got.loss - expected.loss).abs() / expected.loss;
                // The network sums in double precision.
                assert!(error <= 1e-5, "{layout}: {} and {}", got.loss, expected.loss);
            }
        }
    }
}

#[test]
fn a_checkpoint_of_several_processes_is_that_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let program = program(&format!("{SIZE}dp = 2\npp = 2\nschedule = '1f1b'\nstates = 'zero1'\n"));
    let keep = |name: &str| {
        let directory = folder.path().join(name);
        RunSettings { checkpoint: Some(CheckpointSettings { directory, every: None }), ..settings(2) }
    };
    together(&program, &keep("one"));
    let reports = run_apart(&program, false, |_| keep("four"));
    let paths: Vec<Option<PathBuf>> = reports.into_iter().map(|report| report.unwrap().checkpoint).collect();
    assert!(paths[0].is_some() && paths[1..].iter().all(Option::is_none), "the first process writes: {paths:?}");
    let file = |name: &str| std::fs::read(folder.path().join(name).join("step-00000002/tensors-0000.safetensors"));
    assert_eq!(file("one").unwrap(), file("four").unwrap());
    // All go on from it.
    let resume = |name: &str| RunSettings { resume: Some(folder.path().join(name)), ..settings(4) };
    let expected = together(&program, &resume("one"));
    for report in run_apart(&program, false, |_| resume("four")) {
        assert_eq!(report.unwrap().steps.last().unwrap().loss, expected.steps.last().unwrap().loss);
    }
}

#[test]
fn an_error_in_one_process_ends_all_with_its_reason() {
    let program = program(&format!("{SIZE}pp = 3\nschedule = '1f1b'\n"));
    let odd = |rank: usize| {
        let mut settings = settings(4);
        if rank == 1 {
            settings.resume = Some("/nowhere".into());
        }
        settings
    };
    for (rank, report) in run_apart(&program, false, odd).into_iter().enumerate() {
        let message = report.err().unwrap().to_string();
        assert!(message.contains("/nowhere"), "{message}");
        assert_eq!(message.contains("rank 1 on ") && message.contains("gave up"), rank != 1, "{message}");
    }
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let two = program(&format!("{SIZE}pp = 2\nschedule = '1f1b'\n"));
    let refused = |program: &Program, size: u32| {
        let mut all = meshes(size);
        let settings = RunSettings { processes: Some(Processes { mesh: all.remove(0), direct: false }), ..settings(1) };
        let report = run(program, &CpuDevice::new(), &settings, &Dataset::bundled(), &mut Silent);
        report.err().unwrap().to_string()
    };
    let message = refused(&two, 1);
    assert!(message.contains("WORLD_SIZE = 1") && message.contains("start 2 processes"), "{message}");
    let steps = program(&format!("{SIZE}pp = 2\nschedule = '1f1b'\nbarrier_every = 3\n"));
    assert!(steps.steps() > 1);
    let message = refused(&steps, 2);
    assert!(message.contains("barrier_every = 1"), "{message}");
}

fn paceline(folder: &Path, words: &[&str], variables: &[(&str, String)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
    command.current_dir(folder).args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("XDG_CONFIG_HOME", folder).env("HOME", folder);
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command
}

fn plan(folder: &Path) {
    let job = format!("{SIZE}pp = 2\ndp = 1\nschedule = '1f1b'\n[train]\nvalidation = 1e-6\n");
    std::fs::write(folder.join("job.toml"), job).unwrap();
    let made = paceline(folder, &["plan", "job.toml", "-o", "plan.json"], &[]).output().unwrap();
    assert!(made.status.success(), "{}", text(&made));
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn variables(rank: u32, port: u16) -> Vec<(&'static str, String)> {
    vec![
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", "2".into()),
        ("LOCAL_RANK", rank.to_string()),
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", port.to_string()),
    ]
}

#[test]
fn two_real_processes_train_as_a_launcher_starts_them() {
    let folder = tempfile::tempdir().unwrap();
    plan(folder.path());
    let run = ["run", "plan.json", "--steps", "3", "--json", "--no-checkpoint"];
    let alone = paceline(folder.path(), &run, &[]).output().unwrap();
    assert!(alone.status.success(), "{}", text(&alone));
    let port = free_port();
    let apart = [&run[..], &["--distributed"]].concat();
    let start = |rank| paceline(folder.path(), &apart, &variables(rank, port)).spawn().unwrap();
    let outputs: Vec<Output> =
        [start(0), start(1)].into_iter().map(|process| process.wait_with_output().unwrap()).collect();
    for output in &outputs {
        assert!(output.status.success(), "{}", text(output));
    }
    let losses = |output: &Output| -> Vec<f64> {
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        document["steps"].as_array().unwrap().iter().map(|step| step["loss"].as_f64().unwrap()).collect()
    };
    assert_eq!(losses(&alone), losses(&outputs[0]));
    assert!(outputs[1].stdout.is_empty(), "only the first process speaks");
}

#[test]
fn a_process_that_dies_is_named_by_the_others() {
    let folder = tempfile::tempdir().unwrap();
    plan(folder.path());
    let port = free_port();
    let run = ["run", "plan.json", "--steps", "100000", "--checkpoint-every", "1", "--distributed"];
    let start = |rank| paceline(folder.path(), &run, &variables(rank, port)).spawn().unwrap();
    let (first, mut second) = (start(0), start(1));
    // A checkpoint tells that all have met and trained.
    let (begin, checkpoints) = (Instant::now(), folder.path().join("plan.checkpoints"));
    while std::fs::read_dir(&checkpoints).map_or(0, Iterator::count) == 0 {
        assert!(begin.elapsed() < Duration::from_secs(60), "no step within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
    second.kill().unwrap();
    second.wait().unwrap();
    let output = first.wait_with_output().unwrap();
    assert!(!output.status.success());
    let message = text(&output);
    assert!(message.contains("rank 1 on ") && message.contains("is lost"), "{message}");
    assert_eq!(message.matches("error:").count(), 1, "one error: {message}");
}

#[test]
fn a_missing_variable_is_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    plan(folder.path());
    let mut command = paceline(folder.path(), &["run", "plan.json", "--distributed"], &[]);
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"] {
        command.env_remove(name);
    }
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let message = text(&output);
    assert!(message.contains("RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"), "{message}");
}

#[test]
fn processes_with_different_plans_do_not_begin() {
    let folder = tempfile::tempdir().unwrap();
    plan(folder.path());
    let port = free_port();
    let run = |steps| ["run", "plan.json", "--steps", steps, "--no-checkpoint", "--distributed"];
    let start = |rank, steps| paceline(folder.path(), &run(steps), &variables(rank, port)).spawn().unwrap();
    for process in [start(0, "3"), start(1, "4")] {
        let output = process.wait_with_output().unwrap();
        assert!(!output.status.success());
        let message = text(&output);
        assert!(message.contains("disagree on the steps: 4 and 3"), "{message}");
    }
}
