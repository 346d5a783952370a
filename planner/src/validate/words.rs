//! What the words of a cell mean: the ways in which people write the same thing.

use crate::schedules;
use paceline_sim::cluster::{Compute, Recompute};
use paceline_sim::partition::StatePartition;

/// Whether a text holds any of some words.
pub fn any(text: &str, words: &[&str]) -> bool {
    words.iter().any(|w| text.contains(w))
}

/// A text's letters and digits, in lower case.
pub fn letters(text: &str) -> String {
    text.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

/// Yes or no, if the cell says either.
pub fn yes_or_no(text: &str) -> Option<bool> {
    match letters(text).as_str() {
        "true" | "yes" | "y" | "t" | "on" | "1" | "10" | "enabled" => Some(true),
        "false" | "no" | "n" | "f" | "off" | "0" | "00" | "disabled" | "none" => Some(false),
        _ => None,
    }
}

/// Whether attention is fused, if the cell says so: yes or no, or a kernel by name.
pub fn fused_attention(text: &str) -> Option<bool> {
    let plain = letters(text);
    yes_or_no(text).or_else(|| {
        // Transformer Engine by its two letters only where these are a word: attention has them too.
        let engine = text.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word.eq_ignore_ascii_case("te"));
        let fused = ["flash", "fa1", "fa2", "fa3", "cudnn", "sdpa", "memoryefficient", "xformers", "transformerengine"];
        if engine || any(&plain, &fused) {
            Some(true)
        } else if any(&plain, &["naive", "math", "eager", "unfused", "softmax", "torch"]) {
            Some(false)
        } else {
            None
        }
    })
}

/// What is recomputed; nothing where the cell is empty. Of `sel...`, the selection by operator where that is the framework's.
pub fn recompute(text: &str, by_operator: bool) -> Recompute {
    let text = text.to_ascii_lowercase();
    match text.as_str() {
        t if yes_or_no(t) == Some(true) || t == "all" => Recompute::Full,
        t if t.starts_with("full") => Recompute::Full,
        t if any(t, &["uniform", "block", "layer"]) && !t.contains("norm") => Recompute::Full,
        // torchtitan's selection is by operator, Megatron's the attention core.
        t if any(t, &["operator", "op-", "sac"]) || (t.starts_with("sel") && by_operator) => Recompute::Operators,
        t if t.starts_with("sel") || any(t, &["attn", "core", "partial"]) => Recompute::Selective,
        _ => Recompute::None,
    }
}

/// What replicas share out; `usual` where the cell says nothing that is known.
pub fn sharding(text: &str, usual: StatePartition) -> StatePartition {
    let text = text.to_ascii_lowercase();
    match text.as_str() {
        "" => usual,
        "none" | "false" | "ddp" | "dp" => StatePartition::NONE,
        t if is_stage(t, 0) || any(t, &["no_shard", "no-shard"]) => StatePartition::NONE,
        t if any(t, &["hsdp", "hybrid", "mics"]) => StatePartition::MICS,
        t if is_stage(t, 2) || any(t, &["grad-op", "grad_op"]) => StatePartition::ZERO2,
        t if is_stage(t, 1) => StatePartition::ZERO1,
        t if is_stage(t, 3) || any(t, &["fsdp", "full"]) => StatePartition::ZERO3,
        t if t.contains("opt") => StatePartition::ZERO1,
        t if t.contains("ddp") => StatePartition::NONE,
        // A triple, or words that say nothing known.
        t => t.parse().unwrap_or(usual),
    }
}

/// Whether a text is the number of a stage of ZeRO, or names it.
fn is_stage(text: &str, stage: u8) -> bool {
    let named = |word: &str| ["", "-", "_", " "].iter().any(|gap| text.contains(&format!("{word}{gap}{stage}")));
    text.strip_suffix(".0").unwrap_or(text) == stage.to_string() || named("zero") || named("stage")
}

/// Format of the matrix products.
pub fn compute(text: &str) -> Compute {
    let text = text.to_ascii_lowercase();
    if any(&text, &["fp4"]) {
        Compute::Fp4
    } else if any(&text, &["fp8", "float8", "e4m3", "8-bit", "int8"]) {
        Compute::Fp8
    } else if any(&text, &["bf16", "bfloat16", "fp16", "float16", "half", "amp", "mixed"]) {
        Compute::Bf16
    } else if any(&text, &["fp32", "tf32", "float32", "single"]) {
        Compute::Fp32
    } else {
        Compute::Bf16
    }
}

/// The schedule of the registry that a name means, with several stages per rank or not; unknown names by what they share with known
/// ones.
pub fn schedule(text: &str, chunks: u64) -> String {
    let stated = text.to_ascii_lowercase().replace([' ', '_'], "-");
    let known = |name: &str| schedules::find(name).is_ok();
    let name = match stated.as_str() {
        "zb-1p" if !known("zb-1p") => "zb-h1",
        "zb-2p" if !known("zb-2p") => "zb-h2",
        "afab" => "gpipe",
        other if !other.is_empty() && other != "1f1b" && known(other) => other,
        other if any(other, &["dualpipev", "dualpipe-v"]) => "dualpipe-v",
        other if any(other, &["dualpipe", "dual-pipe"]) => "dualpipe",
        other if chunks > 1 && !other.contains("zb") => "interleaved",
        other if any(other, &["zbv", "zb-v", "zero-bubble-v"]) => "zb-v",
        other if any(other, &["zb", "zero-bubble"]) => "zb-h1",
        _ => "1f1b",
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yes_and_no() {
        for text in ["True", "TRUE", "yes", "1", "1.0", "on"] {
            assert_eq!(yes_or_no(text), Some(true), "{text}");
        }
        for text in ["False", "no", "0", "off"] {
            assert_eq!(yes_or_no(text), Some(false), "{text}");
        }
        assert_eq!(yes_or_no(""), None);
    }

    #[test]
    fn kernels_of_attention() {
        for (text, fused) in [
            ("FlashAttention-2", Some(true)),
            ("cuDNN", Some(true)),
            ("fused softmax", Some(false)),
            ("naive", Some(false)),
            ("unfused attention", Some(false)),
            ("TE", Some(true)),
            ("Transformer Engine", Some(true)),
            ("", None),
        ] {
            assert_eq!(fused_attention(text), fused, "{text}");
        }
    }

    #[test]
    fn partitions_of_states() {
        for (text, partition) in [
            ("FSDP2", StatePartition::ZERO3),
            ("full_shard", StatePartition::ZERO3),
            ("ZeRO-3", StatePartition::ZERO3),
            ("zero stage 3", StatePartition::ZERO3),
            ("3", StatePartition::ZERO3),
            ("2.0", StatePartition::ZERO2),
            ("stage_2", StatePartition::ZERO2),
            ("zero_0", StatePartition::NONE),
            ("SHARD_GRAD_OP", StatePartition::ZERO2),
            ("fsdp-grad-op", StatePartition::ZERO2),
            ("ZeRO-2", StatePartition::ZERO2),
            ("distributed optimizer", StatePartition::ZERO1),
            ("zero1", StatePartition::ZERO1),
            ("HYBRID_SHARD", StatePartition::MICS),
            ("HSDP", StatePartition::MICS),
            ("NO_SHARD", StatePartition::NONE),
            ("DDP", StatePartition::NONE),
            ("IIG", "IIG".parse().unwrap()),
            ("somehow", StatePartition::ZERO1),
        ] {
            assert_eq!(sharding(text, StatePartition::ZERO1), partition, "{text}");
        }
    }

    #[test]
    fn recomputation() {
        for (text, kind) in [
            ("full", Recompute::Full),
            ("True", Recompute::Full),
            ("uniform 1", Recompute::Full),
            ("selective", Recompute::Selective),
            ("core_attn", Recompute::Selective),
            ("none", Recompute::None),
            ("False", Recompute::None),
        ] {
            assert_eq!(recompute(text, false), kind, "{text}");
        }
        assert_eq!(recompute("selective", true), Recompute::Operators);
    }

    #[test]
    fn formats() {
        for (text, format) in [
            ("BF16", Compute::Bf16),
            ("", Compute::Bf16),
            ("bf16 + fp8", Compute::Fp8),
            ("MXFP8", Compute::Fp8),
            ("NVFP4", Compute::Fp4),
            ("fp32 (tf32)", Compute::Fp32),
            ("mixed fp16/fp32", Compute::Bf16),
        ] {
            assert_eq!(compute(text), format, "{text}");
        }
    }

    #[test]
    fn names_of_schedules() {
        for (text, chunks, name) in [
            ("", 1, "1f1b"),
            ("1F1B", 4, "interleaved"),
            ("Interleaved 1F1B", 2, "interleaved"),
            ("DualPipe", 1, "dualpipe"),
            ("DualPipeV", 1, "dualpipe-v"),
            ("ZBV", 2, "zb-v"),
            ("zero bubble", 1, "zb-h1"),
            ("AFAB", 1, "gpipe"),
        ] {
            assert_eq!(schedule(text, chunks), name, "{text}");
        }
    }
}
