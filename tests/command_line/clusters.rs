//! Clusters: what is predicted, searched, scored and written for other launchers.

use crate::{Folder, SMALL, says};
use serde_json::Value;
use std::process::Command;

const CLUSTER: &str = "--model llama-3-8b --cluster dgx-h100-ib --nodes 2 --seq 8192 --global-batch 64";

#[test]
fn layouts_on_clusters_are_predicted_and_searched() {
    let folder = Folder::new("cluster");
    let one = folder.json(&format!("predict {CLUSTER} --tp 4 --pp 2 --tokens 1e12 --dollars-per-gpu-hour 2 --json"));
    assert_eq!(one["format"], "paceline.prediction/1");
    let sum: f64 = one["time"].as_object().unwrap().values().map(|part| part.as_f64().unwrap()).sum();
    assert!((sum / one["iteration_seconds"].as_f64().unwrap() - 1.0).abs() < 1e-9);
    assert_eq!(one["memory"]["peak_bytes"].as_array().unwrap().len(), 2);
    let budget = &one["budget"];
    let number = |value: &Value| value.as_f64().unwrap();
    let gpu_seconds = 1e12 / number(&one["tokens_per_second_per_gpu"]);
    assert!((number(&budget["cost"]) / (gpu_seconds / 3600.0 * 2.0) - 1.0).abs() < 1e-9);
    assert!((number(&budget["days"]) * 16.0 * 86400.0 / gpu_seconds - 1.0).abs() < 1e-9);

    let plans = folder.json(&format!("plan {CLUSTER} --top 4 --json"));
    assert_eq!(plans["format"], "paceline.plans/1");
    let best = &plans["plans"][0];
    assert!(best["prediction"]["iteration_seconds"].as_f64() <= one["iteration_seconds"].as_f64());
    // A job file with the best plan's axes predicts what the plan says.
    let axes = best["configuration"].as_object().unwrap().iter().filter(|(_, value)| !value.is_null());
    let job: String = axes.map(|(key, value)| format!("{key} = {value}\n")).collect();
    folder.write("job.toml", &job);
    let again = folder.json("predict job.toml --json");
    assert_eq!(again["iteration_seconds"], best["prediction"]["iteration_seconds"]);
    assert_eq!(again["memory"], best["prediction"]["memory"]);
    // A limit is kept.
    let limited = folder.json(&format!("plan {CLUSTER} --memory-limit 24GiB --json"));
    for plan in limited["plans"].as_array().unwrap() {
        let peaks = plan["prediction"]["memory"]["peak_bytes"].as_array().unwrap();
        assert!(peaks.iter().all(|peak| number(peak) <= 24.0 * f64::from(1 << 30)));
    }
}

/// Flags of clusters alone change what they name, and formats without a run are shown as assumed.
#[test]
fn knobs_of_clusters_are_flags() {
    let folder = Folder::new("knobs");
    let number = |value: &Value| value.as_f64().unwrap();
    let mixture = "predict --model mixtral-8x7b --cluster dgx-b200-ib --nodes 2 --seq 4096 --global-batch 64 --ep 8 --cp 2 --json";
    let plain = folder.json(mixture);
    let of = |flags: &str, key: &str| number(&folder.json(&format!("{mixture} {flags}"))["time"][key]);
    let before = |key: &str| number(&plain["time"][key]);
    assert!(of("--expert-skew 1.5", "exposed_ep") > 1.3 * before("exposed_ep"));
    assert_eq!(of("--expert-skew 1.5 --expert-capacity 1.0", "exposed_ep"), before("exposed_ep"));
    assert!(of("--overlap all,experts", "exposed_ep") < 0.5 * before("exposed_ep"));
    assert!(of("--cp-exchange all-gather", "exposed_cp") > before("exposed_cp"));
    assert!(of("--overlap none", "exposed_dp") > before("exposed_dp"));
    let (some, all) = (of("--recompute full:8", "recompute"), of("--recompute full", "recompute"));
    assert!((some / all - 0.25).abs() < 1e-9, "{some} {all}");
    let assumed = number(&folder.json(&format!("{mixture} --precision nvfp4"))["provenance"]["assumed"]);
    assert!(assumed > 0.1 && number(&plain["provenance"]["assumed"]) == 0.0, "{assumed}");
}

#[test]
fn plans_for_clusters_are_files_that_other_launchers_start() {
    let folder = Folder::new("export");
    let plans = folder.json(&format!("plan {CLUSTER} --for megatron --top 2 -o plan.json --json"));
    let best = &plans["plans"][0]["configuration"];
    let again = folder.json("predict plan.json --json");
    assert_eq!(again["iteration_seconds"], plans["plans"][0]["prediction"]["iteration_seconds"]);
    let exported = folder.json("export plan.json --to megatron -o run --json");
    assert_eq!((exported["format"].as_str(), exported["to"].as_str()), (Some("paceline.export/1"), Some("megatron")));
    let script = std::fs::read_to_string(folder.0.join("run/launch.sh")).unwrap();
    assert_eq!(exported["files"][0]["text"], script.as_str());
    says(&script, &[&format!("--tensor-model-parallel-size {}", best["tp"]), "torchrun --nnodes 2 --nproc-per-node 8"]);
    let shell = Command::new("bash").args(["-n", "run/launch.sh"]).current_dir(&folder.0).status().unwrap();
    assert!(shell.success(), "the script is none:\n{script}");
    // A plan of this machine exports too, and a schedule travels as PyTorch's CSV.
    folder.json(&format!("plan {SMALL} --pp 2 --schedule zb-h1 --micro-batch 1 -o local.json --json"));
    let exported = folder.json("export local.json --to pytorch-schedule --json");
    folder.write("zb-h1.csv", exported["files"][0]["text"].as_str().unwrap());
    let read = folder.json("schedule --import pytorch zb-h1.csv --json");
    assert_eq!((read["p"].as_u64(), read["m"].as_u64()), (Some(2), Some(4)));

    says(&folder.fails(2, "run plan.json"), &["plan.json is for a cluster", "paceline export"]);
    says(&folder.fails(2, "export plan.json --to slurm"), &["slurm", "megatron, torchtitan"]);
    says(&folder.fails(2, "export plan.json --to megatron --tp 2"), &["flags"]);
    says(&folder.fails(2, "export local.json --to megatron"), &["schedule = zb-h1", "interleaved"]);
    says(&folder.fails(2, "export missing.json --to megatron"), &["missing.json"]);
    says(&folder.fails(2, &format!("plan {SMALL} --for megatron")), &["--for", "--cluster"]);
    says(&folder.fails(2, &format!("plan {CLUSTER} --for slurm")), &["slurm", "torchtitan"]);
    let none =
        folder.fails(3, "plan --model gpt2-xl --cluster dgx-h100-ib --seq 1024 --global-batch 64 --for torchtitan");
    says(&none, &["torchtitan", "model = gpt2-xl"]);
}

#[test]
fn impossible_clusters_are_refused() {
    let folder = Folder::new("bad-clusters");
    let model = "--model llama-3-8b --seq 8192 --global-batch 64";
    let cases: [(&str, &[&str]); 11] = [
        ("--cluster moon", &["moon", "dgx-h100-ib", "[cluster] table"]),
        ("--cluster dgx-h100-ib --dp 3", &["there are 8 GPUs"]),
        ("--cluster dgx-h100-ib --micro-batch 3", &["global_batch = 64", "take 48"]),
        ("--cluster dgx-h100-ib --states zero9", &["zero9", "zero1"]),
        ("--cluster dgx-h100-ib --precision int1", &["int1", "bf16"]),
        ("--cluster dgx-h100-ib --cp-exchange spiral", &["spiral", "zig-zag"]),
        ("--cluster dgx-h100-ib --overlap sleep", &["sleep", "experts"]),
        ("--cluster dgx-h100-ib --expert-skew 0.5", &["expert_skew = 0.5", "at least 1"]),
        ("--cluster dgx-h100-ib --recompute full:none", &["full:none", "full:2"]),
        ("--cluster dgx-h100-ib --memory-limit lots", &["lots", "80GiB"]),
        ("--cluster dgx-h100-ib --trace t.json", &["--trace", "local"]),
    ];
    for (flags, parts) in cases {
        says(&folder.fails(2, &format!("predict {model} {flags}")), parts);
    }
    let large = "plan --model llama-3.1-405b --cluster dgx-h100-ib --seq 8192 --global-batch 64";
    says(&folder.fails(3, large), &["no plan fits", "needs", "more nodes"]);
    says(&folder.fails(2, "predict --cluster dgx-h100-ib --model llama-3-8b --seq 8"), &["global_batch is missing"]);
    folder.write("job.toml", "model = 'llama-3-8b'\ncluster = 'p5'\nseq = 8192\nglobal_batch = 64\npiplines = 2\n");
    says(&folder.fails(2, "predict job.toml"), &["job.toml", "piplines", "pp"]);
}

#[test]
fn measured_runs_are_scored() {
    let folder = Folder::new("validate");
    // Two rows of Megatron-LM's table 1 (arXiv 2104.04473): 1.7B and 18.4B parameters on A100s.
    let header = "id,source,layers,hidden,heads,seq,vocab,gpu,gpus,tp,pp,dp,micro_batch,global_batch,iteration_seconds";
    let rows = "a-1,tables,24,2304,24,2048,51200,A100-80G-SXM,32,1,1,32,16,512,4.9\n\
                a-2,tables,40,6144,48,2048,51200,A100-80G-SXM,256,8,1,32,4,1024,9.9\n";
    folder.write("runs.csv", &format!("{header}\n{rows}"));
    let document = folder.json("validate runs.csv --rows --json --csv out.csv --svg out.svg");
    assert_eq!(document["format"], "paceline.validation/1");
    let source = &document["sources"][0];
    assert_eq!((source["source"].as_str(), source["rows"].as_u64()), (Some("tables"), Some(2)));
    let rows = document["rows"].as_array().unwrap();
    assert!(rows.iter().all(|row| row["predicted_iteration_seconds"].as_f64().is_some_and(|s| s > 0.1)));
    assert_eq!(std::fs::read_to_string(folder.0.join("out.csv")).unwrap().lines().count(), 3);
    assert!(std::fs::read_to_string(folder.0.join("out.svg")).unwrap().starts_with("<svg"));
    assert!(folder.json("validate runs.csv --json").get("rows").is_none());

    folder.write("bad.csv", "id,source,layers\n1,x,24\n");
    says(&folder.fails(2, "validate bad.csv"), &["bad.csv", "hidden", "missing"]);
    folder.write("bad.csv", &format!("{header}\na-1,tables,24,2304,24,2048,51200,A100-80G-SXM,32,1,1,32,16,512,NaN\n"));
    says(&folder.fails(2, "validate bad.csv"), &["bad.csv", "NaN"]);
    folder.write("bad.csv", &format!("{header}\na-1,tables,24,2304,24,2048,51200,A100-80G-SXM,32,1,1,32,16,512,-4\n"));
    says(&folder.fails(2, "validate bad.csv"), &["bad.csv", "-4"]);
    says(&folder.fails(2, "validate none.csv"), &["none.csv"]);
}

#[test]
fn what_other_tools_measured_becomes_a_cluster() {
    let folder = Folder::new("import");
    // Runs of one small cluster, a tenth slower than the shipped parameters foretell.
    let header = "id,source,layers,hidden,heads,seq,vocab,gpu,gpus,tp,pp,dp,micro_batch,global_batch,iteration_seconds";
    let mut rows = String::new();
    for (n, (tp, pp, mbs)) in [(1, 1, 4), (1, 2, 4), (2, 1, 4), (2, 2, 8), (4, 1, 8), (8, 1, 8)].iter().enumerate() {
        let dp = 32 / (tp * pp);
        rows += &format!("r-{n},lab,24,2304,24,2048,51200,A100-80G-SXM,32,{tp},{pp},{dp},{mbs},512,1\n");
    }
    folder.write("runs.csv", &format!("{header}\n{rows}"));
    let predicted = folder.json("validate runs.csv --rows --json");
    let slower: String = predicted["rows"].as_array().unwrap().iter().zip(rows.lines()).fold(
        format!("{header}\n"),
        |text, (row, line)| {
            let seconds = 1.1 * row["predicted_iteration_seconds"].as_f64().unwrap();
            format!("{text}{},{seconds}\n", line.rsplit_once(',').unwrap().0)
        },
    );
    folder.write("slower.csv", &slower);
    let fitted = folder.json("calibrate --from runs slower.csv -o fitted.toml --json");
    assert!(fitted["loss_after"].as_f64().unwrap() < 0.5 * fitted["loss_before"].as_f64().unwrap(), "{fitted}");
    assert!(fitted["held_out"]["time_median_error"].as_f64().unwrap() < 0.08, "{fitted}");
    // What the runs say nothing about stays.
    let shipped = paceline_sim::cluster::Physics::default();
    assert_eq!(fitted["parameters"]["matmul_hopper"], shipped.matmul_hopper);
    let error = |line: &str| folder.json(line)["sources"][0]["time_median_error"].as_f64().unwrap();
    let (before, after) =
        (error("validate slower.csv --json"), error("validate slower.csv --cluster fitted.toml --json"));
    assert!((before - 0.0909).abs() < 1e-3 && after < 0.04, "{before} {after}");
    let flags = "--model llama-3-8b --nodes 4 --seq 4096 --global-batch 32 --tp 4 --json";
    let seconds = |cluster: &str| {
        folder.json(&format!("predict {flags} --cluster {cluster}"))["iteration_seconds"].as_f64().unwrap()
    };
    assert!(seconds("fitted.toml") > 1.03 * seconds("a100-roce"));

    let log = "# nThread 1 nGpus 8 minBytes 8589934592 maxBytes 8589934592\n\
        #  Rank  0 Group  0 Pid 1 on host0 device  0 [0x10] NVIDIA H100\n\
        #       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong\n\
        8589934592 2147483648 float sum -1 31360 273.9 400.0 0 31400 273.6 400.0 0\n\
        8589934592 2147483648 float sum -1 31360 27x.9\n";
    folder.write("log.txt", log);
    let lenient = folder.run("calibrate --from nccl-tests log.txt --cluster dgx-h100-ib -o lab.toml");
    let errors = String::from_utf8_lossy(&lenient.stderr).into_owned();
    assert!(lenient.status.success(), "{errors}");
    says(&errors, &["left out line 5"]);
    says(
        &folder.fails(2, "calibrate --from nccl-tests log.txt --cluster dgx-h100-ib --strict"),
        &["log.txt", "line 5"],
    );
    says(&folder.fails(2, "calibrate --from nccl-tests log.txt"), &["--cluster", "missing"]);
    says(&folder.fails(2, "calibrate --from nvprof log.txt --cluster p5"), &["nvprof", "torch-trace"]);
    says(&folder.fails(2, "calibrate --from torch-trace log.txt --cluster p5"), &["log.txt"]);
}

#[test]
fn the_27_state_partitions_of_a_job() {
    let folder = Folder::new("states");
    let job = "states --json --model llama-65b --recompute full --cluster paro-a100-roce --nodes 4 --seq 512 --global-batch 1280 \
               --micro-batch 4";
    let document = folder.json(job);
    assert_eq!(document["format"], "paceline.states/1");
    let states = document["states"].as_array().unwrap();
    assert_eq!((states.len(), states.iter().filter(|s| s["effective"] == true).count()), (27, 14));
    let fitting: Vec<_> = states.iter().filter(|s| s["fits"] == true).map(|s| s["triple"].as_str().unwrap()).collect();
    assert_eq!(fitting, ["IIG", "IGG", "GIG", "GGG"]);
    let ggg = &states[26];
    assert!(ggg["names"].as_array().unwrap().iter().any(|name| name == "zero3"));
    let samples = ggg["samples_per_second"].as_f64().unwrap() * ggg["iteration_seconds"].as_f64().unwrap();
    assert!((samples - 1280.0).abs() < 1e-6);
    assert_eq!(document["published"].as_array().unwrap().len(), 1);
    // The same job under one of them, predicted, takes the same time.
    let predicted = folder.json(&job.replace("states --json", "predict --json --states GGG"));
    assert_eq!(predicted["iteration_seconds"], ggg["iteration_seconds"]);

    for (flags, phrase) in [
        ("--group-size 5", "group_size = 5 does not divide the 32"),
        ("--trainable 1.5", "trainable = \"1.5\""),
        ("--trainable lora:8:q,zz", "no matrix \"zz\""),
        ("--overlap some", "overlap = \"some\""),
        ("--gather-bucket 0", "gather_bucket = \"0\""),
        ("--states NNX", "\"NNX\" is no state partition"),
        ("--runtime horovod", "runtime = \"horovod\"; allowed: fused, deepspeed"),
        ("--kernels slow", "kernels = \"slow\"; allowed: fused, separate"),
        ("--explain", "--published"),
    ] {
        let error = folder.fails(2, &format!("{job} {flags}"));
        assert!(error.contains(phrase), "{error}");
    }
    let published = folder.json("states --published --json");
    assert_eq!((published["gains"].as_array().unwrap().len(), published["gathers"].as_array().unwrap().len()), (8, 4));
    assert!(published.get("explanations").is_none());
    let explained = folder.json("states --published --explain --json");
    let rows = explained["explanations"].as_array().unwrap();
    assert!(rows.len() > 10 && rows.iter().all(|row| row["gains"].as_array().unwrap().len() == 8));
    // Another runtime takes another time.
    let slower = folder.json(&format!("{job} --runtime deepspeed --kernels separate"));
    assert!(slower["states"][26]["iteration_seconds"].as_f64() > ggg["iteration_seconds"].as_f64());
}

/// PaRO's guideline is part of every plan: on a cluster and on this machine, as text with `--explain` and in JSON.
#[test]
fn plans_carry_the_guideline() {
    let folder = Folder::new("guideline");
    let cluster =
        "plan --model llama-3-8b --cluster dgx-h100-ib --nodes 2 --seq 8192 --global-batch 64 --tp 1 --pp 1 --top 3";
    let here = format!("plan {SMALL} --dp 2 --pp 1 --top 3");
    for job in [cluster, &here] {
        let document = folder.json(&format!("{job} --json"));
        for plan in document["plans"].as_array().unwrap() {
            let guideline = &plan["guideline"];
            let (seconds, indicator) =
                (guideline["seconds"].as_f64().unwrap(), guideline["indicator"].as_f64().unwrap());
            assert!(seconds >= guideline["communication"].as_f64().unwrap() && (seconds.ln() + indicator).abs() < 1e-9);
        }
        let output = folder.run(&format!("{job} --explain"));
        assert!(output.status.success());
        says(&String::from_utf8(output.stdout).unwrap(), &["log(1/T)", "PaRO's closed form"]);
    }
    // Parameters that stay gathered are an axis of clusters too.
    let kept = folder.json(&format!("{cluster} --json --states zero3 --keep-gathered true"));
    assert!(kept["plans"].as_array().unwrap().iter().all(|plan| plan["configuration"]["keep_gathered"] == true));
}

/// Gathered parameters can stay only where some are gathered: here, on a cluster, in a prediction and in a search.
#[test]
fn keeping_what_is_not_gathered_is_refused() {
    let folder = Folder::new("keep");
    let cluster =
        "--model llama-3-8b --cluster dgx-h100-ib --nodes 2 --seq 8192 --global-batch 64 --keep-gathered true";
    for job in [
        format!("predict {cluster}"),
        format!("plan {cluster} --states NII"),
        format!("predict {SMALL} --dp 2 --keep-gathered true"),
        format!("plan {SMALL} --dp 2 --states zero1 --keep-gathered true"),
    ] {
        let output = folder.run(&job);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{job}: {errors}");
        says(&errors, &["keep_gathered = true with states = ", "first letter is I or G", "leave keep_gathered out"]);
    }
    // The table of all partitions is asked for none.
    assert!(folder.run(&format!("states {cluster}")).status.success());
}
