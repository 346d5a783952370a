//! `paceline schedule` as scripts see it: comparisons at a memory limit, files of PyTorch, and one clear error for each bad input.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn run(line: &str, folder: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
    command.args(line.split_whitespace()).current_dir(folder).env("NO_COLOR", "1");
    command.output().unwrap()
}

fn json(line: &str) -> Value {
    let output = run(line, &std::env::temp_dir());
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The error of a command that must fail as bad input, with all of these in it.
fn fails(line: &str, folder: &Path, all: &[&str]) {
    let output = run(line, folder);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{line}: {errors}");
    assert!(output.stdout.is_empty() && !errors.contains("panicked"), "{line}: {errors}");
    for part in all {
        assert!(errors.contains(part), "{line}: {part:?} is missing in: {errors}");
    }
}

#[test]
fn bad_input_is_explained() {
    let here = std::env::temp_dir();
    let cases: &[(&str, &[&str])] = &[
        ("1f1b -p 0 -m 8", &["devices", "at least 1"]),
        ("1f1b -p 4 -m 0", &["microbatches", "at least 1"]),
        ("dualpipe -p 5 -m 10", &["5 devices", "even", "take 6"]),
        ("interleaved -p 4 -m 6", &["6 microbatches", "multiple of 4", "take 4 or 8"]),
        ("v-half -p 4 -m 8 --chunks 3", &["3 chunks", "exactly 2"]),
        ("frob -p 4 -m 8", &["frob", "1f1b", "optimised"]),
        ("optimised -p 4 -m 8 --memory-limit 0.5", &["0.5", "least", "is 1"]),
        ("v-min -p 4 -m 8 --memory-limit 0.75", &["0.75", "least", "is 1"]),
        ("zb-1p -p 4 -m 8 --memory-limit 0", &["--memory-limit 0", "above 0"]),
        ("1f1b -p 4 -m 8 --f 1,2", &["--f", "2 values", "4 stages"]),
        ("1f1b -p 4 -m 8 --f -1", &["-1"]),
        ("1f1b -p 4 -m 8 --memory-fractions 0.5,0.6", &["0.5,0.6", "sum 1"]),
        ("--import pytorch nowhere.csv", &["nowhere.csv", "cannot be read"]),
        ("1f1b -p 2 -m 2 --export megatron out.csv", &["megatron", "pytorch"]),
    ];
    for (line, all) in cases {
        fails(&format!("schedule {line}"), &here, all);
    }
}

#[test]
fn files_with_missing_or_doubled_actions_are_refused() {
    let folder = std::env::temp_dir().join(format!("paceline-schedules-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    assert!(run("schedule zb-h1 -p 2 -m 3 --export pytorch right.csv", &folder).status.success());
    let right = std::fs::read_to_string(folder.join("right.csv")).unwrap();
    assert!(run("schedule --import pytorch right.csv", &folder).status.success());
    std::fs::write(folder.join("missing.csv"), right.replacen("1W2", "", 1)).unwrap();
    fails("schedule --import pytorch missing.csv", &folder, &["missing.csv", "1W2"]);
    std::fs::write(folder.join("doubled.csv"), right.replacen("0F1", "0F1,0F1", 1)).unwrap();
    fails("schedule --import pytorch doubled.csv", &folder, &["doubled.csv", "0F1"]);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn the_optimised_schedule_is_the_best_of_a_comparison() {
    let rows = [
        (8, 24, "--f 18.522 --b 18.086 --w 9.337 --comm 0.601"),
        (8, 24, "--f 29.718 --b 29.444 --w 19.927 --comm 0.527"),
        (16, 48, "--f 11.347 --b 11.248 --w 8.132 --comm 0.377"),
    ];
    for (p, m, times) in rows {
        for limit in [(p + 2) / 2, p] {
            let document = json(&format!(
                "schedule -p {p} -m {m} {times} --memory-limit {limit} --memory-fractions 0,1 --json --compare \
                 1f1b,interleaved,zb-h1,zb-1p,zb-v,zb-v-timed,1f1b-v,v-min,v-half,v-zb,adaptive-v,optimised"
            ));
            let schedules = document["schedules"].as_array().unwrap();
            let makespan = |s: &Value| s["makespan"].as_f64().unwrap();
            let optimised = schedules.iter().find(|s| s["name"] == "optimised").unwrap();
            assert_eq!(optimised["fits"], true);
            assert!(optimised["gap"].as_f64().unwrap() <= 0.01, "{times} {limit}: {}", optimised["gap"]);
            for schedule in schedules.iter().filter(|s| s["fits"] == true) {
                assert!(
                    makespan(optimised) <= makespan(schedule) * (1.0 + 1e-9),
                    "{times} {limit}: {} is better",
                    schedule["name"]
                );
            }
        }
    }
}
