//! What each launcher is told, held against what was asked; and what each refuses.

use super::*;
use crate::predict::ClusterRequest;

fn request() -> ClusterRequest {
    ClusterRequest {
        model: "llama-3-70b".into(),
        cluster: "dgx-h100-ib".into(),
        nodes: Some(8),
        seq: 8192,
        global_batch: 128,
        tp: Some(4),
        pp: Some(4),
        ..ClusterRequest::default()
    }
}

fn exported_with(target: Target, change: impl FnOnce(&mut ClusterRequest)) -> Result<Exported, ExportError> {
    let mut request = request();
    change(&mut request);
    export(&Launch::of_request(&request).unwrap(), target)
}

fn text(exported: &Exported, name: &str) -> String {
    exported.files.iter().find(|file| file.name == name).unwrap().text.clone()
}

/// The value after an argument of a script; empty for a flag.
fn argument(script: &str, name: &str) -> Option<String> {
    script.lines().find_map(|line| {
        let rest = line.trim().trim_end_matches('\\').trim().strip_prefix(name)?;
        (rest.is_empty() || rest.starts_with(' ')).then(|| rest.trim().trim_matches('\'').to_owned())
    })
}

#[test]
fn megatron_is_told_every_size() {
    let exported = exported_with(Target::Megatron, |r| {
        (r.chunks, r.schedule, r.micro_batch) = (Some(2), Some("interleaved".into()), Some(2));
    })
    .unwrap();
    let script = text(&exported, "launch.sh");
    assert!(exported.files[0].executable && script.starts_with("#!/usr/bin/env bash\n"));
    for (name, value) in [
        ("--num-layers", "80"),
        ("--hidden-size", "8192"),
        ("--ffn-hidden-size", "28672"),
        ("--num-attention-heads", "64"),
        ("--num-query-groups", "8"),
        ("--rotary-base", "500000"),
        ("--tensor-model-parallel-size", "4"),
        ("--sequence-parallel", ""),
        ("--pipeline-model-parallel-size", "4"),
        ("--num-virtual-stages-per-pipeline-rank", "2"),
        ("--micro-batch-size", "2"),
        ("--global-batch-size", "128"),
        ("--use-distributed-optimizer", ""),
        ("--bf16", ""),
        ("--grad-reduce-in-bf16", ""),
        ("--untie-embeddings-and-output-weights", ""),
        ("--swiglu", ""),
    ] {
        assert_eq!(argument(&script, name).as_deref(), Some(value), "{name}");
    }
    assert!(script.contains("--nnodes 8 --nproc-per-node 8") && script.contains("CUDA_DEVICE_MAX_CONNECTIONS=1"));
    for absent in ["--add-qkv-bias", "--num-experts", "--use-megatron-fsdp", "--recompute-granularity"] {
        assert_eq!(argument(&script, absent), None);
    }
}

#[test]
fn megatron_gets_every_partition_that_it_has() {
    let script = |states: &str, group| {
        let set = |r: &mut ClusterRequest| {
            (r.tp, r.pp, r.states, r.group_size) = (None, None, Some(states.into()), group);
        };
        exported_with(Target::Megatron, set).map(|exported| text(&exported, "launch.sh"))
    };
    let iig = script("IIG", Some(8)).unwrap();
    assert_eq!(argument(&iig, "--data-parallel-sharding-strategy").unwrap(), "optim_grads_params");
    assert_eq!(argument(&iig, "--outer-dp-sharding-strategy").unwrap(), "optim");
    assert_eq!(argument(&iig, "--num-distributed-optimizer-instances").unwrap(), "8");
    assert!(!iig.contains("CUDA_DEVICE_MAX_CONNECTIONS"));
    let mics = script("mics", Some(16)).unwrap();
    assert_eq!(argument(&mics, "--outer-dp-sharding-strategy").unwrap(), "no_shard");
    assert_eq!(argument(&mics, "--num-distributed-optimizer-instances").unwrap(), "4");
    let nni = script("NNI", Some(8)).unwrap();
    assert_eq!(argument(&nni, "--num-distributed-optimizer-instances").unwrap(), "8");
    assert_eq!(argument(&nni, "--use-megatron-fsdp"), None);
    assert_eq!(argument(&script("zero2", None).unwrap(), "--data-parallel-sharding-strategy").unwrap(), "optim_grads");
    let refused = script("IGG", Some(8)).unwrap_err().to_string();
    assert!(refused.contains("states = IGG") && refused.contains("IIG"), "{refused}");
}

#[test]
fn uneven_stages_are_spelled_out() {
    let exported = exported_with(Target::Megatron, |r| {
        (r.model, r.nodes, r.tp, r.pp, r.global_batch) = ("llama-3.1-405b".into(), Some(64), Some(8), Some(16), 512);
    })
    .unwrap();
    let layout = argument(&text(&exported, "launch.sh"), "--pipeline-model-parallel-layout").unwrap();
    let stages: Vec<&str> = layout.split('|').collect();
    assert_eq!(stages.len(), 16);
    assert!(stages[0].starts_with('E') && stages[15].ends_with('L'), "{layout}");
    let blocks = |stage: &str| match stage.trim_start_matches('E').trim_end_matches('L').split_once("t*") {
        Some((_, number)) => number.parse::<u64>().unwrap(),
        None => stage.matches('t').count() as u64,
    };
    assert_eq!(stages.iter().map(|stage| blocks(stage)).sum::<u64>(), 126);
}

#[test]
fn latent_attention_and_experts_reach_megatron() {
    let exported = exported_with(Target::Megatron, |r| {
        (r.model, r.nodes, r.tp, r.ep, r.global_batch, r.seq) =
            ("deepseek-v3".into(), Some(32), Some(2), Some(32), 1024, 4096);
    })
    .unwrap();
    let script = text(&exported, "launch.sh");
    for (name, value) in [
        ("--multi-latent-attention", ""),
        ("--q-lora-rank", "1536"),
        ("--kv-lora-rank", "512"),
        ("--qk-head-dim", "128"),
        ("--qk-pos-emb-head-dim", "64"),
        ("--num-experts", "256"),
        ("--moe-router-topk", "8"),
        ("--moe-ffn-hidden-size", "2048"),
        ("--moe-layer-freq", "([0]*3+[1]*58)"),
        ("--expert-model-parallel-size", "32"),
    ] {
        assert_eq!(argument(&script, name).as_deref(), Some(value), "{name}");
    }
}

#[test]
fn torchtitan_runs_a_schedule_that_it_does_not_know_from_the_csv() {
    let exported = exported_with(Target::Torchtitan, |r| {
        (r.schedule, r.states) = (Some("v-half".into()), Some("zero2".into()));
    })
    .unwrap();
    let module = text(&exported, "paceline_run.py");
    for line in [
        "config.parallelism.pipeline_parallel_schedule = \"ZBVZeroBubble\"",
        "config.parallelism.data_parallel_shard_degree = 4",
        "config.parallelism.fsdp_reshard_after_forward = \"never\"",
        "config.parallelism.num_pp_microbatches = 32",
        "config.training.num_tokens_per_train_step = 1048576",
    ] {
        assert!(module.contains(line), "{line}\n{module}");
    }
    assert_eq!(module.matches("\"layers.").count(), 80);
    assert!(!module.contains("SelectiveAC") && module.contains("from pathlib import Path"));
    let order = pytorch::read(&text(&exported, "schedule.csv"), "v-half").unwrap();
    assert_eq!((order.microbatches, order.placement.name.as_str(), order.actions.len()), (32, "v", 4));
    let plain = exported_with(Target::Torchtitan, |r| r.states = Some("zero2".into())).unwrap();
    assert!(plain.files.iter().all(|file| file.name != "schedule.csv"));
}

#[test]
fn nanotron_reads_numbers_as_numbers() {
    let exported = exported_with(Target::Nanotron, |r| r.precision = Some("bf16-fp32-accumulation".into())).unwrap();
    let yaml = text(&exported, "nanotron.yaml");
    assert!(yaml.contains("adam_eps: 1.0e-8\n"), "YAML 1.1 takes 1e-8 for a text");
    let value: serde_yaml_ng::Value = serde_yaml_ng::from_str(&yaml).unwrap();
    let number = |path: [&str; 2]| value[path[0]][path[1]].as_u64().unwrap();
    assert_eq!(number(["parallelism", "dp"]) * number(["parallelism", "tp"]) * number(["parallelism", "pp"]), 64);
    assert_eq!(number(["tokens", "batch_accumulation_per_replica"]), 32);
    assert_eq!(value["optimizer"]["zero_stage"].as_u64(), Some(1));
    assert_eq!(value["optimizer"]["accumulate_grad_in_fp32"].as_bool(), Some(true));
    assert_eq!(value["model"]["model_config"]["rope_theta"].as_f64(), Some(500_000.0));
}

#[test]
fn deepspeed_batches_multiply_out() {
    let exported = exported_with(Target::Deepspeed, |r| {
        (r.tp, r.pp, r.states, r.micro_batch) = (None, None, Some("zero3".into()), Some(2));
    })
    .unwrap();
    let value: serde_json::Value = serde_json::from_str(&text(&exported, "ds_config.json")).unwrap();
    assert_eq!(value["train_micro_batch_size_per_gpu"], 2);
    assert_eq!(value["gradient_accumulation_steps"], 1);
    assert_eq!(value["train_batch_size"], 128);
    assert_eq!(value["zero_optimization"]["stage"], 3);
    assert!(exported.notes[0].contains("not to fit"), "70B without recomputation: {:?}", exported.notes);
}

#[test]
fn what_a_launcher_lacks_is_refused_with_what_it_has() {
    let refused = |target, change: &dyn Fn(&mut ClusterRequest)| exported_with(target, change).unwrap_err().to_string();
    for (message, phrases) in [
        (refused(Target::Megatron, &|r| r.schedule = Some("zb-h1".into())), ["schedule = zb-h1", "interleaved"]),
        (refused(Target::Megatron, &|r| r.recompute = Some("operators".into())), ["recompute", "selective"]),
        (refused(Target::Megatron, &|r| r.recompute = Some("selective:2".into())), ["some blocks (2)", "full"]),
        (refused(Target::Deepspeed, &|r| r.recompute = Some("full:1".into())), ["some blocks (1)", "Megatron-LM"]),
        (refused(Target::Torchtitan, &|r| r.model = "gpt2-xl".into()), ["model = gpt2-xl", "llama-3-8b"]),
        (refused(Target::Torchtitan, &|_| ()), ["states = NNG", "GGG"]),
        (refused(Target::Nanotron, &|r| r.precision = Some("fp8".into())), ["precision = fp8", "bf16"]),
        (refused(Target::Nanotron, &|r| r.schedule = Some("v-half".into())), ["schedule = v-half", "gpipe"]),
        (refused(Target::Deepspeed, &|r| r.states = Some("mics".into())), ["states = III", "megatron"]),
        (refused(Target::Deepspeed, &|r| r.states = Some("zero3".into())), ["beside a pipeline", "NNG"]),
        (refused(Target::Deepspeed, &|r| r.pp = Some(1)), ["sp = true", "sp = false"]),
        (refused(Target::PytorchSchedule, &|r| r.schedule = Some("dualpipe".into())), ["two copies", "dualpipe-v"]),
        (refused(Target::Megatron, &|r| r.trainable = Some("lora:8".into())), ["trainable", "plan again"]),
    ] {
        assert!(phrases.iter().all(|phrase| message.contains(phrase)), "{message}");
    }
    let unknown = "slurm".parse::<Target>().unwrap_err().to_string();
    assert!(unknown.contains("slurm") && unknown.contains("pytorch-schedule"), "{unknown}");
}
