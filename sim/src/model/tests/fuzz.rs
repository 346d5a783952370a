//! Any `config.json` gives a model whose arithmetic holds, or an error that says what to change.

use super::*;
use crate::model::parameters::unit_parameters;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use serde_json::{Value, json};

const KEYS: [&str; 28] = [
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "sliding_window",
    "use_sliding_window",
    "n_embd",
    "n_head",
    "n_layer",
    "n_inner",
    "n_positions",
    "n_ctx",
    "layer_norm_epsilon",
    "activation_function",
    "add_cross_attention",
    "scale_attn_by_inverse_layer_idx",
    "model_type",
];

/// Values that a careless or hostile file may hold.
fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        6 => (1u32..70).prop_map(|n| json!(n)),
        2 => any::<u32>().prop_map(|n| json!(n)),
        1 => any::<i64>().prop_map(|n| json!(n)),
        1 => any::<f64>().prop_map(|n| json!(n)),
        1 => any::<bool>().prop_map(|flag| json!(flag)),
        1 => "\\PC{0,6}".prop_map(|text| json!(text)),
        1 => prop_oneof![Just(json!("silu")), Just(json!("gelu_new")), Just(json!(4_294_967_295u32)), Just(Value::Null)],
        1 => any::<f64>().prop_map(|theta| json!({ "rope_theta": theta })),
        1 => Just(json!([])),
    ]
}

/// A file that would be read, before some of its keys are overwritten.
fn sound(family: &str) -> Value {
    if family == "gpt2" {
        return json!({ "model_type": family, "n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 50 });
    }
    json!({ "model_type": family, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 64, "vocab_size": 50 })
}

fn read(text: &str) -> Result<ModelConfig, ReadError> {
    ModelConfig::from_json("fuzz", text, Path::new("config.json"))
}

/// Sizes of a model that was accepted: none overflows, parts add up.
fn consistent(model: &ModelConfig) -> Result<(), TestCaseError> {
    prop_assert_eq!(model.validate(), Ok(()));
    let matrix = u64::from(model.hidden) * u64::from(model.vocab);
    prop_assert!(model.parameters() > matrix, "more than the embedding matrix");
    prop_assert!(model_flops_per_token(model, 16) >= 6.0 * matrix as f64);
    if model.layers > 70 {
        return Ok(());
    }
    let workload = TransformerWorkload {
        model: model.clone(),
        micro_batch: 1,
        seq: 1,
        recompute: Recompute::None,
        tied_on_one_rank: true,
        trainable: Trainable::Full,
        precision: Precision::Fp32,
    };
    let stages = stages(model, &[model.layers]);
    if workload.validate(&stages).is_ok() {
        let units = 0..stages[0].units.len() as u16;
        let held: usize = units.map(|unit| unit_parameters(&workload, &stages, StageId(0), unit)).sum();
        prop_assert_eq!(held as u64, model.parameters());
        for precision in Precision::ALL {
            within(&TransformerWorkload { precision, ..workload.clone() }, &stages)?;
        }
    }
    Ok(())
}

/// Every slice of every kernel of every pass lies within its tensor.
fn within(workload: &TransformerWorkload, stages: &[Stage]) -> Result<(), TestCaseError> {
    for stage in 0..stages.len() as u16 {
        for kind in [Pass::F, Pass::R, Pass::B, Pass::W, Pass::BW] {
            let ModelPass { steps, operands } = pass(workload, stages, kind, stage);
            for slice in steps.iter().flat_map(|step| &step.operands) {
                let whole = operands.iter().find(|operand| operand.tensor == slice.tensor).map(|operand| operand.bytes);
                prop_assert!(slice.end() <= whole.unwrap_or(0), "{} {:?}", kind, slice);
                prop_assert!(!slice.range.is_empty(), "{} {:?}", kind, slice);
            }
        }
    }
    Ok(())
}

#[test]
fn sizes_beyond_kernels_and_counters_are_refused() {
    let refused = |changes: &[(&str, u32)]| {
        let mut file = sound("llama");
        changes.iter().for_each(|&(key, value)| file[key] = json!(value));
        read(&file.to_string()).unwrap_err().to_string()
    };
    // 4 + 2 * 4 heads of 2^29: queries, keys and values would be 6 * 2^30 wide, beyond the dimensions of a kernel.
    assert!(refused(&[("head_dim", 1 << 29)]).contains("head_dim = 536870912"));
    assert!(refused(&[("intermediate_size", 1 << 31)]).contains("intermediate = 2147483648"));
    let many = refused(&[("hidden_size", u32::MAX - 3), ("head_dim", 2), ("vocab_size", u32::MAX)]);
    assert!(many.contains("parameters = ") && many.contains("at most 4503599627370496"), "{many}");

    let model = ModelConfig::preset("llama-3.1-405b").unwrap();
    let stages = stages(&model, &[126]);
    let of = |micro_batch, seq| {
        let recompute = Recompute::None;
        TransformerWorkload {
            model: model.clone(),
            micro_batch,
            seq,
            recompute,
            tied_on_one_rank: false,
            trainable: Trainable::Full,
            precision: Precision::Fp32,
        }
        .validate(&stages)
    };
    assert_eq!(of(4, 1 << 20), Ok(()), "a long context is no mistake");
    assert!(of(1 << 11, 1 << 20).unwrap_err().to_string().contains("micro_batch = 2048"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_values_give_a_consistent_model_or_an_error(
        family in prop_oneof![Just("llama"), Just("mistral"), Just("qwen2"), Just("gpt2")],
        overwritten in btree_map(prop::sample::select(&KEYS[..]), value(), 0..4),
    ) {
        let mut file = sound(family);
        for (key, value) in overwritten {
            file[key] = value;
        }
        match read(&file.to_string()) {
            Ok(model) => consistent(&model)?,
            Err(error) => prop_assert!(error.to_string().starts_with("model "), "{}", error),
        }
    }

    #[test]
    fn damaged_text_is_refused_not_a_panic(cut in 0usize..200, noise in vec(any::<char>(), 0..5)) {
        let whole = sound("llama").to_string();
        let cut = cut.min(whole.len() - 1);
        let text: String = whole[..cut].chars().chain(noise).collect();
        if let Err(error) = read(&text) {
            prop_assert!(error.to_string().contains("config.json"), "{}", error);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn every_cut_of_every_model_holds_it_once_and_stays_in_its_buffers(
        (kv_heads, group, half_width) in (1u32..4, 1u32..4, 1u32..5),
        (hidden, intermediate, vocab) in (1u32..40, 1u32..40, 1u32..40),
        (gpt, biased, tied) in any::<(bool, bool, bool)>(),
        blocks in vec(1u32..4, 1..4),
        recompute in prop_oneof![Just(Recompute::None), Just(Recompute::Selective), Just(Recompute::Full)],
        (micro_batch, seq) in (1u32..4, 1u32..9),
    ) {
        let preset = ModelConfig::preset(if gpt { "gpt2" } else { "llama-3-8b" }).unwrap();
        let model = ModelConfig {
            layers: blocks.iter().sum(),
            hidden,
            heads: kv_heads * group,
            kv_heads,
            head_dim: 2 * half_width,
            intermediate,
            vocab,
            qkv_bias: biased,
            tied_embeddings: tied,
            ..preset
        };
        let stages = stages(&model, &blocks);
        let workload = TransformerWorkload { model, micro_batch, seq, recompute, tied_on_one_rank: false, trainable: Trainable::Full, precision: Precision::Fp32 };
        prop_assert_eq!(workload.validate(&stages), Ok(()));
        for precision in Precision::ALL {
            within(&TransformerWorkload { precision, ..workload.clone() }, &stages)?;
        }
        let all = (0..).zip(&stages).flat_map(|(stage, held)| (0..held.units.len() as u16).map(move |unit| (StageId(stage), unit)));
        let specs = all.flat_map(|(stage, unit)| unit_layout(&workload, &stages, stage, unit));
        let counted: usize = specs.filter(|spec| !spec.tied_copy).map(|spec| spec.range.len()).sum();
        prop_assert_eq!(counted as u64, workload.model.parameters());
    }
}
