//! The command line as scripts see it: documents, exit codes, files, and one clear error for each bad input.

mod clusters;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory of this test's own, gone when it ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("paceline-{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&path));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.0.join(name), text).unwrap();
        name.to_string()
    }

    fn run(&self, line: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
        command.args(line.split_whitespace()).current_dir(&self.0);
        // Neither the user's profile nor the terminal's colours belong in a test.
        command.env_remove("PACELINE_PROFILE").env("XDG_DATA_HOME", self.0.join("data")).env("NO_COLOR", "1");
        command.output().unwrap()
    }

    fn json(&self, line: &str) -> Value {
        let output = self.run(line);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}: {errors}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{line}: {error}: {errors}"))
    }

    /// The standard error of a command that must fail with this code and nothing on standard output.
    fn fails(&self, code: i32, line: &str) -> String {
        let output = self.run(line);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{line}: {errors}");
        assert!(output.stdout.is_empty(), "{line} wrote {}", String::from_utf8_lossy(&output.stdout));
        assert!(!errors.contains("panicked"), "{line}: {errors}");
        errors
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

const SMALL: &str = "--model demo-1m --seq 32 --global-batch 4";

fn says(errors: &str, all: &[&str]) {
    for part in all {
        assert!(errors.contains(part), "{part:?} is missing in: {errors}");
    }
}

#[test]
fn a_prediction_sums_up_and_follows_the_contract() {
    let folder = Folder::new("predict");
    let document = folder.json(&format!("predict {SMALL} --pp 2 --schedule zb-h1 --memory-limit 1GiB --json"));
    assert_eq!(document["format"], "paceline.prediction/1");
    let seconds = document["iteration_seconds"].as_f64().unwrap();
    let time = document["time"].as_object().unwrap();
    for part in [
        "compute",
        "exposed_tp",
        "exposed_dp",
        "exposed_pp",
        "exposed_cp",
        "exposed_ep",
        "bubble",
        "recompute",
        "optimizer",
    ] {
        assert!(time[part].as_f64().unwrap() >= 0.0);
    }
    let sum: f64 = time.values().map(|part| part.as_f64().unwrap()).sum();
    assert!((sum / seconds - 1.0).abs() < 1e-6, "{sum} of {seconds}");
    let memory = &document["memory"];
    assert_eq!(memory["fits"], true);
    assert_eq!(memory["limit_bytes"], 1u64 << 30);
    for (peak, classes) in memory["peak_bytes"].as_array().unwrap().iter().zip(memory["by_class"].as_array().unwrap()) {
        let sum: u64 = classes.as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum();
        assert_eq!(peak.as_u64(), Some(sum));
    }
    let shares: f64 = document["provenance"].as_object().unwrap().values().map(|share| share.as_f64().unwrap()).sum();
    assert!((shares - 1.0).abs() < 1e-9);
    // A job file with flags laid over it is the same job.
    let job = folder.write("job.toml", "model = 'demo-1m'\nseq = 32\nglobal_batch = 4\npp = 1\nschedule = 'zb-h1'\n");
    assert_eq!(folder.json(&format!("predict {job} --pp 2 --memory-limit 1GiB --json")), document);
}

#[test]
fn a_plan_runs_resumes_compares_and_corrects_the_profile() {
    let folder = Folder::new("loop");
    let plans = folder.json(&format!("plan {SMALL} --top 3 -o plan.json --json"));
    assert_eq!(plans["format"], "paceline.plans/1");
    let list = plans["plans"].as_array().unwrap();
    assert_eq!(list.len(), 3);
    let seconds: Vec<f64> = list.iter().map(|p| p["prediction"]["iteration_seconds"].as_f64().unwrap()).collect();
    assert!(seconds.is_sorted());
    let pruned: u64 = plans["pruned"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(plans["candidates"].as_u64().unwrap(), pruned + plans["simulated"].as_u64().unwrap());

    let run = folder.json("run plan.json --steps 6 --checkpoint-every 3 --trace run.json --perfetto p.json --json");
    assert_eq!(run["format"], "paceline.run/1");
    assert_eq!(run["peak_bytes_equal"], true);
    assert_eq!(run["predicted_peak_bytes"], run["measured_peak_bytes"]);
    let resumed = folder.json("run plan.json --steps 6 --resume plan.checkpoints/step-00000003 --no-checkpoint --json");
    let losses = |run: &Value| -> Vec<(u64, f64)> {
        let steps = run["steps"].as_array().unwrap().iter();
        steps.map(|s| (s["step"].as_u64().unwrap(), s["loss"].as_f64().unwrap())).collect()
    };
    assert_eq!(losses(&run)[3..], losses(&resumed), "resumed losses are bit-identical");
    assert!(losses(&run)[5].1 < losses(&run)[0].1);

    let comparison = folder.json("compare plan.json run.json --json");
    assert_eq!(comparison["format"], "paceline.comparison/1");
    assert_eq!(comparison["peak_bytes_equal"], true);
    assert_eq!(comparison["ranks"].as_array().unwrap().len(), run["measured_peak_bytes"].as_array().unwrap().len());
    // The causes of the error sum to it.
    let causes = comparison["causes"]["parts"].as_array().unwrap().iter();
    let sum: f64 = causes.map(|part| part["seconds"].as_f64().unwrap()).sum();
    let seconds = |of: &str| comparison[of].as_f64().unwrap();
    assert!((sum - (seconds("measured_seconds") - seconds("predicted_seconds"))).abs() < 1e-9, "{sum}");
    let chrome: Value = serde_json::from_slice(&std::fs::read(folder.0.join("p.json")).unwrap()).unwrap();
    assert!(chrome["traceEvents"].as_array().is_some_and(|events| events.len() > 10));

    // A run on a busy machine keeps no kernel times, and says so.
    if folder.0.join("run.kernels.csv").exists() {
        let corrected = folder.json("calibrate --from-trace run.json -o corrected.csv --json");
        assert_eq!(corrected["format"], "paceline.calibration/1");
        assert!(corrected["trace_rows"].as_u64().unwrap() > 0);
        assert!(!corrected["corrections"].as_array().unwrap().is_empty());
        folder.json(&format!("predict {SMALL} --profile corrected.csv --json"));
        // A plan is held against what it was made with; another profile is told.
        let warnings = |line| String::from_utf8(folder.run(line).stderr).unwrap();
        assert!(!warnings("compare plan.json run.json --json").contains("--profile"));
        says(&warnings("compare plan.json run.json --profile corrected.csv --json"), &["plan.json", "--profile"]);
    }
    says(&folder.fails(2, "calibrate --from-trace p.json"), &["p.json", "paceline.trace/1"]);

    let rehearsal = folder.json("run plan.json --device paced --steps 2 --json");
    assert_eq!(rehearsal["format"], "paceline.rehearsal/1");
    assert!(rehearsal["fastest_seconds"].as_f64().unwrap() >= rehearsal["predicted_seconds"].as_f64().unwrap());
}

#[test]
fn the_demonstration_closes_the_loop() {
    let folder = Folder::new("demo");
    let demo = folder.json("demo --calibrate 1 --train 1 --steps 3 --rounds 1 --json --output kept");
    assert_eq!(demo["format"], "paceline.demo/1");
    let runs = demo["runs"].as_array().unwrap();
    assert!(runs.len() >= 8);
    assert_eq!(demo["peak_bytes_equal"], true);
    // One round says nothing about how much the machine varies.
    assert!(demo["variation"].is_null() && runs.iter().all(|run| run["measured_runs"] == 1));
    for run in runs {
        assert_eq!(run["predicted_peak_bytes"], run["measured_peak_bytes"]);
        for key in
            ["predicted_seconds_before", "predicted_seconds_after", "measured_seconds", "loss_first", "loss_last"]
        {
            assert!(run[key].as_f64().is_some_and(|value| value > 0.0), "{key}");
        }
        let ranks = run["configuration"]["dp"].as_u64().unwrap() * run["configuration"]["pp"].as_u64().unwrap();
        assert_eq!(run["measured_peak_bytes"].as_array().unwrap().len() as u64, ranks);
    }
    for file in ["profile.csv", "plan.json", "predicted.json", "measured.json", "demo.json"] {
        assert!(folder.0.join("kept").join(file).exists(), "{file}");
    }
    let first = demo["trained"]["held_out_loss_first"].as_f64().unwrap();
    assert!(demo["trained"]["held_out_loss_last"].as_f64().unwrap() < first);
}

#[test]
fn bad_jobs_are_refused_with_key_value_and_a_way_out() {
    let folder = Folder::new("bad-jobs");
    let job = |text: &str| folder.write("job.toml", text);
    let base = "model = 'demo-1m'\nseq = 32\nglobal_batch = 4\n";
    let cases: [(&str, &[&str]); 6] = [
        ("pipline = 2", &["job.toml", "unknown key pipline", "pp"]),
        ("micro_bach = 2", &["micro_bach", "did you mean micro_batch?"]),
        ("pp = 'two'", &["pp", "two", "whole number"]),
        ("dp = 3", &["dp = 3", "global_batch = 4", "1, 2, 4"]),
        ("pp = 16", &["pp = 16", "8 blocks"]),
        ("[train]\nlr = -1", &["train.lr", "-1", "above 0"]),
    ];
    for (line, parts) in cases {
        let path = job(&format!("{base}{line}\n"));
        says(&folder.fails(2, &format!("predict {path}")), parts);
        says(&folder.fails(2, &format!("plan {path} --json")), parts);
    }
    says(&folder.fails(2, "predict missing.toml"), &["missing.toml"]);
    says(&folder.fails(2, "predict"), &["model is missing", "--model"]);
    job("not toml at all");
    says(&folder.fails(2, "predict job.toml"), &["job.toml", "TOML"]);
    let limit = folder.fails(3, &format!("plan {SMALL} --memory-limit 1MiB"));
    says(&limit, &["1.00 MiB", "smallest plan", "needs", "bytes"]);
    // What it says the smallest needs is enough.
    let needed = limit.split('(').find_map(|part| {
        part.strip_suffix(
            " bytes); raise memory_limit to that, or allow recompute, more pipeline ranks or smaller microbatches\n",
        )
    });
    let needed: u64 = needed.unwrap().parse().unwrap();
    folder.json(&format!("plan {SMALL} --memory-limit {needed} --json"));
    folder.fails(3, &format!("plan {SMALL} --memory-limit {}", needed - 1));
}

#[test]
fn bad_models_are_refused() {
    let folder = Folder::new("bad-models");
    let flags = "--seq 32 --global-batch 4";
    says(&folder.fails(2, &format!("predict --model nosuch {flags}")), &["nosuch", "demo-3m", "config.json"]);
    says(&folder.fails(2, &format!("predict --model no/config.json {flags}")), &["no/config.json"]);
    folder.write("config.json", "{\"model_type\": \"bert\"}");
    says(&folder.fails(2, &format!("predict --model config.json {flags}")), &["model_type", "bert", "llama"]);
    let llama = |heads: u32| {
        format!(
            "{{\"model_type\":\"llama\",\"hidden_size\":64,\"num_hidden_layers\":2,\"num_attention_heads\":{heads},\
             \"intermediate_size\":128,\"vocab_size\":256,\"max_position_embeddings\":64,\"rms_norm_eps\":1e-5}}"
        )
    };
    folder.write("config.json", &llama(5));
    says(&folder.fails(2, &format!("predict --model config.json {flags}")), &["64", "5"]);
    folder.write("config.json", &llama(4));
    folder.json(&format!("predict --model config.json {flags} --json"));
    folder.write("config.json", &llama(4)[..60]);
    says(&folder.fails(2, &format!("predict --model config.json {flags}")), &["config.json"]);
}

#[test]
fn bad_files_are_refused_and_left_alone() {
    let folder = Folder::new("bad-files");
    folder.json(&format!("plan {SMALL} -o plan.json --json"));
    let plan = std::fs::read_to_string(folder.0.join("plan.json")).unwrap();
    folder.write("short.txt", "too short");
    says(&folder.fails(2, "run plan.json --data short.txt"), &["short.txt", "9 tokens", "at least"]);
    folder.write("empty.txt", "");
    says(&folder.fails(2, "run plan.json --data empty.txt"), &["empty.txt", "empty"]);
    says(&folder.fails(2, "run plan.json --data none.txt"), &["none.txt"]);
    folder.write("truncated.json", &plan[..plan.len() / 2]);
    says(&folder.fails(2, "run truncated.json"), &["truncated.json", "truncated"]);
    folder.write("other.json", &plan.replace("\"model_digest\": \"", "\"model_digest\": \"0"));
    says(&folder.fails(2, "run other.json"), &["other.json", "demo-1m", "digest"]);
    folder.write("job.toml", "model = 'demo-1m'");
    says(&folder.fails(2, "run job.toml"), &["job.toml", "paceline plan"]);
    says(&folder.fails(2, "run plan.json --resume nowhere"), &["nowhere", "checkpoint"]);

    folder.json("run plan.json --steps 2 --trace run.json --json");
    let tensors = |folder: &Path| {
        let files = std::fs::read_dir(folder.join("plan.checkpoints/step-00000002")).unwrap();
        files
            .map(|file| file.unwrap().path())
            .find(|path| path.extension().is_some_and(|e| e == "safetensors"))
            .unwrap()
    };
    let path = tensors(&folder.0);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 3]).unwrap();
    says(&folder.fails(2, "run plan.json --steps 4 --resume plan.checkpoints"), &["truncated", "safetensors"]);
    assert!(!folder.0.join("plan.checkpoints/step-00000004").exists());

    says(&folder.fails(2, "compare plan.json plan.json"), &["paceline.trace/1", "--trace"]);
    let trace = std::fs::read_to_string(folder.0.join("run.json")).unwrap();
    folder.write("cut.json", &trace[..trace.len() / 2]);
    says(&folder.fails(2, "compare plan.json cut.json"), &["cut.json", "truncated"]);
    let other = "predict --model demo-1m --seq 32 --global-batch 4 --pp 4 --trace other-trace.json --quiet --json";
    folder.json(other);
    says(&folder.fails(2, "compare other-trace.json run.json"), &["different programs", "same plan"]);
    let nowhere = "predict --model demo-1m --seq 32 --global-batch 4 --trace no/such/folder.json";
    says(&folder.fails(2, nowhere), &["no/such/folder.json"]);
}

#[test]
fn a_profile_of_another_machine_warns_and_names_both() {
    let folder = Folder::new("profile");
    let shipped = include_str!("../../profiles/data/cpu.csv");
    let mut reader = csv::Reader::from_reader(shipped.as_bytes());
    let host = reader.headers().unwrap().iter().position(|name| name == "host").unwrap();
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(reader.headers().unwrap()).unwrap();
    for record in reader.records() {
        let record = record.unwrap();
        let fields =
            record.iter().enumerate().map(|(column, field)| if column == host { "Abacus 9000" } else { field });
        writer.write_record(fields).unwrap();
    }
    let text = String::from_utf8(writer.into_inner().unwrap()).unwrap();
    folder.write("other.csv", &text);
    let output = folder.run(&format!("predict {SMALL} --profile other.csv --json"));
    assert!(output.status.success());
    let errors = String::from_utf8(output.stderr).unwrap();
    says(&errors, &["warning", "Abacus 9000", "this is cpu", "paceline calibrate"]);
    serde_json::from_slice::<Value>(&output.stdout).unwrap();
    folder.write("broken.csv", &text[..text.len() / 2]);
    says(&folder.fails(2, &format!("predict {SMALL} --profile broken.csv")), &["broken.csv", "line"]);
}

#[test]
fn help_shows_an_example_of_every_command_and_words_are_checked() {
    let folder = Folder::new("help");
    for command in ["demo", "predict", "plan", "run", "calibrate", "compare", "validate", "export"] {
        let output = folder.run(&format!("{command} --help"));
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        says(&text, &["Example", &format!("paceline {command}"), "--json"]);
        assert!(!text.contains('\x1b'), "NO_COLOR is respected");
    }
    folder.fails(2, "frobnicate");
    folder.fails(2, "predict --frobnicate");
    folder.fails(2, "calibrate --seconds 0");
    says(&folder.fails(2, &format!("predict {SMALL} --schedule frob")), &["schedule", "frob", "1f1b"]);
    says(&folder.fails(2, &format!("predict {SMALL} --tp 2")), &["tp = 2", "local"]);
}

#[test]
fn a_gpu_that_is_not_there_is_one_clear_error() {
    let folder = Folder::new("no-gpu");
    folder.json(&format!("plan {SMALL} --json -o plan.json"));
    let output = folder.run("run plan.json --device cuda --steps 1 --no-checkpoint");
    // On a machine with a GPU the run is what is asked for.
    if !output.status.success() {
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{errors}");
        says(&errors, &["cuda"]);
        if !errors.contains("GPU") {
            says(&errors, &["libcuda.so", "/usr/local/cuda/lib64", "PACELINE_CUDA_LIBS", "--device cpu"]);
        }
    }
}
