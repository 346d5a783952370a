//! nanotron's YAML (keys as in its `config/config.py` of April 2026).

use super::{ExportError, Exported, File, Launch, Target};
use paceline_sim::cluster::{Attention, AttentionKernel, ContextExchange, Recompute};
use paceline_sim::model::Positions;
use serde_json::{Value, json};

const TARGET: Target = Target::Nanotron;

pub(super) fn files(launch: &Launch) -> Result<Exported, ExportError> {
    launch.refuse_rare(TARGET)?;
    let mut notes = vec![
        "learning rate, warm-up and the number of steps are examples; set yours".to_owned(),
        "data_stages has no dataset, so that it trains on random tokens; set yours and the tokenizer".to_owned(),
    ];
    if launch.pp > 1 {
        notes.push("nanotron cuts the blocks over its pipeline ranks by itself".into());
    }
    if launch.ep > 1 || launch.model.experts.is_some() {
        notes.push("mixtures of experts need nanotron's Qwen2 model".into());
    }
    let (dtype, in_fp32) = match launch.precision.as_str() {
        "fp32" => ("float32", false),
        "bf16" => ("bfloat16", false),
        "bf16-fp32-accumulation" => ("bfloat16", true),
        other => return Launch::lacks(TARGET, "precision", other, "it has fp32, bf16 and bf16-fp32-accumulation"),
    };
    let zero_stage = match launch.states.letters().as_str() {
        "NNN" => 0,
        "NNG" => 1,
        other => return Launch::lacks(TARGET, "states", other, "it has NNN (none) and NNG (zero1)"),
    };
    let engine = match (launch.schedule.as_str(), launch.pp, launch.chunks) {
        (_, 1, 1) | ("1f1b", _, 1) => "1f1b",
        ("gpipe", _, 1) => "afab",
        (other, ..) => {
            return Launch::lacks(TARGET, "schedule", other, "it has 1f1b and gpipe, with one stage per rank");
        }
    };
    let recompute = match launch.recompute {
        Recompute::None => false,
        Recompute::Full => true,
        Recompute::Selective | Recompute::Operators => {
            return Launch::lacks(TARGET, "recompute", "selective", "it has none and full");
        }
    };
    if !matches!(launch.attention, AttentionKernel::Flash1 | AttentionKernel::Flash2 | AttentionKernel::Flash3) {
        return Launch::lacks(TARGET, "attention", "naive or fused", "its models run flash attention");
    }
    let train = &launch.train;
    let document = json!({
        "general": { "project": "paceline", "run": format!("{}_%date_%jobid", launch.model.name), "seed": train.seed,
            "ignore_sanity_checks": true },
        "model": { "ddp_bucket_cap_mb": 25, "dtype": dtype, "init_method": { "std": 0.02 },
            "make_vocab_size_divisible_by": 1, "model_config": model(launch)? },
        "parallelism": {
            "dp": launch.dp, "tp": launch.tp, "pp": launch.pp, "pp_engine": engine,
            "context_parallel_size": launch.cp, "expert_parallel_size": launch.ep,
            "tp_mode": if launch.sp { "REDUCE_SCATTER" } else { "ALL_REDUCE" },
            "tp_linear_async_communication": launch.sp, "tp_recompute_allgather": true, "recompute_layer": recompute,
        },
        "tokens": {
            "sequence_length": launch.seq, "train_steps": train.steps, "micro_batch_size": launch.micro_batch,
            "batch_accumulation_per_replica": launch.microbatches(), "val_check_interval": -1,
        },
        "optimizer": {
            "zero_stage": zero_stage, "accumulate_grad_in_fp32": in_fp32, "weight_decay": train.weight_decay,
            "clip_grad": train.clip,
            "optimizer_factory": { "name": "adamW", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8,
                "torch_adam_is_fused": true },
            "learning_rate_scheduler": { "learning_rate": train.lr, "lr_warmup_steps": train.warmup,
                "lr_warmup_style": "linear", "lr_decay_style": "cosine", "min_decay_lr": train.min_lr },
        },
        "data_stages": [{ "name": "training", "start_training_step": 1,
            "data": { "dataset": null, "num_loading_workers": 1, "seed": train.seed } }],
        "tokenizer": null,
        "checkpoints": { "checkpoint_interval": train.steps, "checkpoints_path": "checkpoints" },
        "logging": { "iteration_step_info_interval": 1, "log_level": "info", "log_level_replica": "info" },
    });
    let body = serde_yaml_ng::to_string(&document).map_err(|error| ExportError::Text(error.to_string()))?;
    let body = with_points(&body);
    let header: String = launch.header().iter().map(|line| format!("# {line}\n")).collect();
    let start = format!(
        "# Start it on every node from a checkout of nanotron:\n#   CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nnodes {} --nproc-per-node {} \
         run_train.py --config-file nanotron.yaml\n",
        launch.nodes, launch.gpus_per_node
    );
    let file = File { name: "nanotron.yaml".into(), text: header + &start + &body, executable: false };
    Ok(Exported { files: vec![file], notes })
}

/// YAML 1.1, which PyYAML reads, takes `1e-8` for a text: a number with an exponent needs a point.
fn with_points(text: &str) -> String {
    let number = |word: &str| match word.split_once('e') {
        Some((digits, power))
            if !digits.is_empty()
                && digits.bytes().all(|byte| byte.is_ascii_digit())
                && power.parse::<i32>().is_ok() =>
        {
            Some(format!("{digits}.0e{}{power}", if power.starts_with('-') { "" } else { "+" }))
        }
        _ => None,
    };
    let line = |line: &str| match line.rsplit_once(": ") {
        Some((key, value)) => number(value).map_or_else(|| line.to_owned(), |value| format!("{key}: {value}")),
        None => line.to_owned(),
    };
    text.lines().map(|text| line(text) + "\n").collect()
}

/// The model: Llama's class, or Qwen2's where there are experts or context parallelism.
fn model(launch: &Launch) -> Result<Value, ExportError> {
    let (model, details) = (&launch.model, &launch.details);
    let (Attention::Grouped { heads, kv_heads, head_dim }, Positions::Rotary { theta }, true) =
        (model.attention, details.positions, model.gated)
    else {
        return Launch::lacks(TARGET, "model", &model.name, "it has models of the llama and qwen families");
    };
    if heads * head_dim != model.hidden || details.qk_norm {
        let allowed = "its heads make up the hidden width, and queries and keys are not normalised; export to megatron";
        return Launch::lacks(TARGET, "model", &model.name, allowed);
    }
    let mut config = json!({
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": model.hidden,
        "initializer_range": 0.02, "intermediate_size": model.ffn,
        "max_position_embeddings": details.max_positions.max(launch.seq), "num_attention_heads": heads,
        "num_hidden_layers": model.layers, "num_key_value_heads": kv_heads, "rms_norm_eps": details.norm_epsilon,
        "rope_theta": theta, "rope_interleaved": false, "attention_bias": details.qkv_bias,
        "tie_word_embeddings": model.tied, "vocab_size": model.vocab,
    });
    if model.experts.is_none() && launch.cp == 1 {
        config["is_llama_config"] = true.into();
        return Ok(config);
    }
    config["is_qwen2_config"] = true.into();
    if launch.cp > 1 {
        if launch.context != ContextExchange::AllGather {
            let allowed = "its context ranks gather keys and values; take cp_exchange = \"all-gather\"";
            return Launch::lacks(TARGET, "cp_exchange", format!("{:?}", launch.context).to_lowercase(), allowed);
        }
        config["_attn_implementation"] = "llama3_ring_attention".into();
        config["ring_attn_heads_k_stride"] = 1.into();
    }
    if let Some(experts) = model.experts {
        config["moe_config"] = json!({
            "num_experts": experts.count, "top_k": experts.top_k, "moe_intermediate_size": experts.ffn,
            "shared_expert_intermediate_size": experts.shared_ffn, "enable_shared_expert": experts.shared_ffn > 0,
            "layers": (experts.dense_layers..model.layers).collect::<Vec<_>>(), "token_dispatcher_type": "alltoall",
        });
    }
    Ok(config)
}
