mod fuzz;
mod lifetimes;

use super::parameters::{decay_groups, tied_matrix, unit_layout, unit_parameters};
use super::*;
use crate::program::{
    Element, MemoryClass, OpKind, Pass, Precision, Recompute, Stage, Tensor, TransformerWorkload, Unit,
};
use crate::units::{MicrobatchId, StageId};
use paceline_profiles::KernelOp;
use std::path::Path;

fn workload(model: &str, recompute: Recompute) -> TransformerWorkload {
    let model = ModelConfig::preset(model).unwrap();
    TransformerWorkload {
        model,
        micro_batch: 2,
        seq: 64,
        recompute,
        tied_on_one_rank: false,
        trainable: Trainable::Full,
        precision: Precision::Fp32,
    }
}

/// Stages of one unit per layer, with so many blocks each; the ends go to the first and the last.
fn stages(model: &ModelConfig, blocks: &[u32]) -> Vec<Stage> {
    let mut next = 0;
    let mut all: Vec<Vec<Layer>> = blocks
        .iter()
        .map(|&count| {
            next += count;
            (next - count..next).map(Layer::Block).collect()
        })
        .collect();
    assert_eq!(next, model.layers);
    all[0].insert(0, Layer::Embedding);
    all.last_mut().unwrap().push(Layer::Head);
    all.into_iter()
        .map(|layers| Stage { units: layers.into_iter().map(|layer| Unit { layers: vec![layer] }).collect() })
        .collect()
}

fn pass(workload: &TransformerWorkload, stages: &[Stage], pass: Pass, stage: u16) -> ModelPass {
    let end = stages[usize::from(stage)].units.len() as u16;
    let kind = OpKind::Compute { pass, stage: StageId(stage), microbatch: MicrobatchId(0), first: 0, end };
    ModelPass::new(workload, stages, 1, &kind)
}

#[test]
fn presets_have_the_published_number_of_parameters() {
    for (name, parameters) in [
        ("gpt2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("llama-2-7b", 6_738_415_616),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-30b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("mistral-7b", 7_241_732_096),
        ("qwen2-0.5b", 494_032_768),
        ("qwen2-7b", 7_615_616_512),
    ] {
        assert_eq!(ModelConfig::preset(name).unwrap().parameters(), parameters, "{name}");
    }
    let error = ModelConfig::preset("llama-4").unwrap_err().to_string();
    assert!(error.contains("llama-4") && error.contains("llama-3-8b"), "{error}");
}

#[test]
fn units_hold_every_parameter_once() {
    for name in ["demo-3m", "demo-gpt-1m", "gpt2"] {
        let workload = workload(name, Recompute::None);
        let layers = workload.model.layers;
        for cut in [vec![layers], vec![1, layers - 1]] {
            let stages = stages(&workload.model, &cut);
            let mut total = 0;
            for (number, stage) in (0..).zip(&stages) {
                for unit in 0..stage.units.len() as u16 {
                    let specs = unit_layout(&workload, &stages, StageId(number), unit);
                    let mut end = 0;
                    for spec in &specs {
                        assert_eq!(spec.range.start, end, "{name} {}: no gaps", spec.name);
                        assert_eq!(spec.range.len(), spec.shape.iter().product::<usize>());
                        end = spec.range.end;
                    }
                    assert_eq!(end, unit_parameters(&workload, &stages, StageId(number), unit));
                    total += specs.iter().filter(|spec| !spec.tied_copy).map(|spec| spec.range.len()).sum::<usize>();
                }
            }
            assert_eq!(total as u64, workload.model.parameters(), "{name} {cut:?}");
        }
    }
}

#[test]
fn tied_embeddings_have_a_copy_where_two_ranks_need_them() {
    let workload = workload("gpt2", Recompute::None);
    let two = stages(&workload.model, &[6, 6]);
    let (table, counted) = tied_matrix(&workload, &two, StageId(0), 0).unwrap();
    assert!(counted && table == (0..50257 * 768));
    let (copy, counted) = tied_matrix(&workload, &two, StageId(1), 6).unwrap();
    assert!(!counted && copy.len() == table.len());
    assert_eq!(tied_matrix(&workload, &two, StageId(1), 0), None, "a block");
    let one = stages(&workload.model, &[12]);
    assert_eq!(tied_matrix(&workload, &one, StageId(0), 0), None, "one stage holds it once");
}

#[test]
fn passes_compute_what_the_convention_counts() {
    for name in ["demo-3m", "demo-gpt-1m"] {
        let workload = workload(name, Recompute::None);
        let stages = stages(&workload.model, &[workload.model.layers]);
        let flops = |kind| pass(&workload, &stages, kind, 0).flops();
        let tokens = 2.0 * 64.0;
        let forward = Flops::per_token(&workload.model, 64).total() * tokens;
        assert!((flops(Pass::F) / forward - 1.0).abs() < 1e-9, "{name} F");
        // Attention and head make their scores and logits again in the backward.
        let attention = Flops::per_token(&workload.model, 64).attention * tokens;
        let head = Flops::of_layer(&workload.model, Layer::Head, 64).total() * tokens;
        let backward = 2.0 * forward + attention / 2.0 + head;
        assert!((flops(Pass::BW) / backward - 1.0).abs() < 1e-9, "{name} BW");
        // Split, each half needs the logits.
        let split = flops(Pass::B) + flops(Pass::W);
        assert!((split / (backward + head) - 1.0).abs() < 1e-9, "{name} B and W");
    }
}

#[test]
fn recomputation_keeps_less() {
    let kept = |recompute| {
        let workload = workload("demo-3m", recompute);
        let stages = stages(&workload.model, &[workload.model.layers]);
        let operands = pass(&workload, &stages, Pass::F, 0).operands;
        let bytes = |keeps: fn(&Tensor) -> bool| -> u64 {
            operands.iter().filter(|operand| keeps(&operand.tensor)).map(|operand| operand.bytes).sum()
        };
        (
            bytes(|tensor| matches!(tensor, Tensor::SavedForB { .. } | Tensor::Checkpoint { .. })),
            bytes(|tensor| matches!(tensor, Tensor::SavedForW { .. })),
        )
    };
    let (none, selective, full) = (kept(Recompute::None), kept(Recompute::Selective), kept(Recompute::Full));
    let sum = |(a, b): (u64, u64)| a + b;
    assert!(sum(full) * 3 < sum(selective) && sum(selective) < sum(none), "{none:?} {selective:?} {full:?}");
    // Full: the input of every layer but the first is a checkpoint; beside them only the head keeps something.
    let rows = 2 * 64;
    assert!(full.0 >= 8 * rows * 192 * 4 && sum(full) < 10 * rows * 192 * 4 + rows * 192 * 4, "{full:?}");
}

#[test]
fn operands_are_whole_tensors_in_their_classes() {
    let workload = workload("demo-3m", Recompute::None);
    let stages = stages(&workload.model, &[4, 4]);
    let hidden = 2 * 64 * 192 * 4;
    let operands = pass(&workload, &stages, Pass::BW, 1).operands;
    let of = |tensor: Tensor| operands.iter().find(|operand| operand.tensor == tensor).copied();
    let (stage, microbatch) = (StageId(1), MicrobatchId(0));
    let input = of(Tensor::InputGradient { stage, microbatch }).unwrap();
    assert_eq!((input.bytes, input.class), (hidden, MemoryClass::Activation));
    for unit in 0..5 {
        let len = 4 * unit_parameters(&workload, &stages, stage, unit) as u64;
        assert_eq!(of(Tensor::Gradients { stage, unit }).unwrap().bytes, len);
        assert_eq!(of(Tensor::Parameters { stage, unit }).unwrap().class, MemoryClass::Parameter);
    }
    assert!(of(Tensor::OutputGradient { stage, microbatch }).is_none(), "the head makes its own gradient");
    let tensors: Vec<Tensor> = operands.iter().map(|operand| operand.tensor).collect();
    assert!(tensors.is_sorted() && tensors.windows(2).all(|pair| pair[0] != pair[1]));
    // Every slice of every kernel lies within its tensor.
    for step in pass(&workload, &stages, Pass::BW, 1).steps {
        for slice in step.operands {
            assert!(slice.end() <= of(slice.tensor).unwrap().bytes, "{} {slice:?}", step.key);
        }
    }
}

#[test]
fn a_config_json_is_the_preset() {
    let read = |text: &str| ModelConfig::from_json("test", text, Path::new("config.json"));
    let llama = r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;
    let preset = |name: &str| ModelConfig { name: "test".into(), ..ModelConfig::preset(name).unwrap() };
    assert_eq!(read(llama).unwrap(), preset("llama-3-8b"));
    let gpt2 = r#"{"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024,
        "layer_norm_epsilon": 1e-05, "activation_function": "gelu_new"}"#;
    assert_eq!(read(gpt2).unwrap(), preset("gpt2"));

    let refused = |text: &str| read(text).unwrap_err().to_string();
    let family = refused(&llama.replace("\"llama\"", "\"mamba\""));
    assert!(family.contains("mamba") && family.contains("llama, mistral, qwen2, gpt2"), "{family}");
    let heads = refused(&llama.replace("\"num_key_value_heads\": 8", "\"num_key_value_heads\": 7"));
    assert!(heads.contains("num_key_value_heads = 7") && heads.contains("num_attention_heads = 32"), "{heads}");
    let wrong = refused(&llama.replace("4096", "\"wide\""));
    assert!(wrong.contains("hidden_size") && wrong.contains("whole number"), "{wrong}");
    let missing = refused(&llama.replace("\"num_hidden_layers\": 32,", ""));
    assert!(missing.contains("num_hidden_layers is missing"), "{missing}");
    assert!(refused("[]").contains("must be a JSON object"));
}

/// Sizes of a block by hand: rows 128, hidden 256, 4 heads of 64, gated MLP of 768.
#[test]
fn bfloat16_halves_values_and_leaves_statistics() {
    let bytes = |precision| {
        let workload = TransformerWorkload { precision, ..workload("demo-3m", Recompute::None) };
        let stages = stages(&workload.model, &[1, 1, workload.model.layers - 2]);
        let operands = |kind| pass(&workload, &stages, kind, 1).operands;
        let of = |operands: &[Operand], is: fn(&Tensor) -> bool| {
            operands.iter().filter(|operand| is(&operand.tensor)).map(|operand| operand.bytes).sum::<u64>()
        };
        let (forward, backward) = (operands(Pass::F), operands(Pass::BW));
        let message = of(&forward, |tensor| matches!(tensor, Tensor::StageOutput { .. }));
        let until_b = of(&forward, |tensor| matches!(tensor, Tensor::SavedForB { .. }));
        let until_w = of(&forward, |tensor| matches!(tensor, Tensor::SavedForW { .. }));
        let weights = of(&backward, |tensor| matches!(tensor, Tensor::Parameters { .. }));
        let gradients = of(&backward, |tensor| matches!(tensor, Tensor::Gradients { .. }));
        let kept = persistent(&workload, &stages, StageId(1), Shard::WHOLE);
        let all: u64 = kept.iter().map(|operand| operand.bytes).sum();
        (message, until_b, until_w, weights, gradients, all)
    };
    let model = ModelConfig::preset("demo-3m").unwrap();
    let (rows, parameters) = (2 * 64u64, model.layer_parameters(Layer::Block(1)));
    let (message, until_b, until_w, ..) = bytes(Precision::Fp32);
    let statistics = 4 * rows * u64::from(model.heads) + 2 * 4 * rows;
    assert_eq!(message, 4 * rows * u64::from(model.hidden));
    assert_eq!(until_w % 64, 0);
    for (precision, gradient) in [(Precision::Bf16, 2), (Precision::Bf16Fp32Gradients, 4)] {
        let narrow = bytes(precision);
        assert_eq!(narrow.0, message / 2);
        assert_eq!(narrow.1, (until_b - statistics) / 2 + statistics, "values halve, statistics do not");
        assert_eq!(narrow.2, until_w / 2);
        assert_eq!((narrow.3, narrow.4), (2 * parameters, gradient * parameters));
        assert_eq!(narrow.5, (14 + gradient) * parameters, "2 + gradient + 4 master + 8 moments");
    }
    // Statistics and room for sums are 32-bit wherever they lie.
    let workload = TransformerWorkload { precision: Precision::Bf16, ..workload("demo-3m", Recompute::Selective) };
    let stages = stages(&workload.model, &[1, 1, workload.model.layers - 2]);
    let all: Vec<Step> =
        [Pass::F, Pass::B, Pass::W].into_iter().flat_map(|kind| pass(&workload, &stages, kind, 1).steps).collect();
    let norm = all.iter().find(|step| step.key.op == KernelOp::RmsNorm).unwrap();
    let elements: Vec<Element> = norm.operands.iter().map(|slice| slice.element).collect();
    assert_eq!(elements, [Element::Bf16, Element::Bf16, Element::Bf16, Element::F32]);
    let attention = all.iter().find(|step| step.key.op == KernelOp::AttentionBackward).unwrap();
    assert_eq!((attention.operands[2].element, attention.operands[5].element), (Element::F32, Element::F32));
}

#[test]
fn one_optimizer_call_has_many_parameters() {
    let parameters = [(0..4, true), (4..6, false), (6..8, false), (8..20, true), (20..21, false)];
    let of = |within| {
        let groups = decay_groups(parameters.iter().cloned(), within).into_iter();
        groups.map(|group| (group.range, group.first, group.borders.to_vec())).collect::<Vec<_>>()
    };
    assert_eq!(of(0..21), [(0..21, true, vec![4, 8, 20])]);
    assert_eq!(of(5..9), [(5..9, false, vec![3])], "borders count from the begin");
    assert_eq!(of(9..12), [(9..12, true, vec![])]);
    assert!(of(3..3).is_empty());
    // A hole, more borders than a call has, and more elements than it counts.
    let apart = decay_groups([(0..2, true), (3..4, true)], 0..4);
    assert_eq!(apart.iter().map(|group| group.range.clone()).collect::<Vec<_>>(), [0..2, 3..4]);
    let turns = (0..40).map(|n| (n..n + 1, n % 2 == 1));
    let groups = decay_groups(turns, 0..40);
    assert_eq!(groups.iter().map(|group| group.range.clone()).collect::<Vec<_>>(), [0..16, 16..32, 32..40]);
    assert!(groups.iter().all(|group| !group.first && group.borders.len() == group.range.len() - 1));
    let many = 3 * u32::MAX as usize;
    let sizes: Vec<usize> = decay_groups([(0..many, true)], 1..many).iter().map(|group| group.range.len()).collect();
    assert_eq!(sizes, [u32::MAX as usize, u32::MAX as usize, u32::MAX as usize - 1]);
}

/// Biases, activations and the residual stream go with their product; adapters stand in between.
#[test]
fn products_take_along_what_follows_them() {
    let counts = |model: &str, trainable: &str, which: Pass| {
        let workload =
            TransformerWorkload { trainable: trainable.parse().unwrap(), ..workload(model, Recompute::None) };
        let stages = stages(&workload.model, &[workload.model.layers]);
        let steps = pass(&workload, &stages, which, 0).steps;
        let count = |op: KernelOp| steps.iter().filter(|step| step.key.op == op).count() as u32 / workload.model.layers;
        use KernelOp::{Add, AddBias, Gelu, GeluBackward, MatmulNn, MatmulNt};
        use KernelOp::{ProjectAdd, ProjectBackGelu, ProjectBias, ProjectBiasAdd, ProjectBiasGelu};
        match which {
            Pass::F => [ProjectBias, ProjectBiasGelu, ProjectBiasAdd, ProjectAdd, MatmulNt, AddBias, Gelu, Add]
                .map(count)
                .to_vec(),
            _ => [ProjectBackGelu, MatmulNn, GeluBackward].map(count).to_vec(),
        }
    };
    assert_eq!(counts("gpt2", "full", Pass::F), [1, 1, 2, 0, 0, 0, 0, 0]);
    assert_eq!(counts("llama-3-8b", "full", Pass::F), [0, 0, 0, 2, 2, 0, 0, 0]);
    assert_eq!(counts("gpt2", "full", Pass::B), [1, 3, 0]);
    assert_eq!(counts("llama-3-8b", "full", Pass::B), [0, 4, 0]);
    // Beside the first matrix of the MLP: the product, two of the adapter, bias and GELU.
    assert_eq!(counts("gpt2", "lora:4:up", Pass::F), [1, 0, 2, 0, 3, 1, 1, 0]);
    assert_eq!(counts("gpt2", "lora:4:down", Pass::B), [0, 6, 1]);
}
