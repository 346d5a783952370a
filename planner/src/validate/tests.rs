use super::*;
use crate::predict::predict_cluster;

const RUNS: &str = "id,source,model,layers,hidden,ffn_hidden,heads,kv_heads,vocab,seq,gpu,gpus,gpus_per_node,tp,sp,pp,dp,zero_stage_or_fsdp,mbs,gbs,recompute,flash_attn,framework,precision,iter_time_s,peak_mem_gib,outcome,notes
k-1,korthikanti,gpt-22b,48,6144,24576,64,64,51200,2048,A100-80G-SXM,8,8,8,True,1,1,zero0,4,4,selective,False,Megatron-LM 2022,fp16,1.10,,ok,
k-2,korthikanti,gpt-22b,48,6144,24576,64,64,51200,2048,A100-80G-SXM,8,8,8,False,1,1,zero0,4,4,full,False,Megatron-LM 2022,fp16,1.42,,ok,
t-1,big,gpt-175b,96,12288,49152,96,96,51200,2048,A100-80G-SXM,8,8,8,False,1,1,zero0,1,8,none,False,Megatron-LM 2022,fp16,,,oom,
u-1,big,odd,2,128,,4,,,128,Z9,1,,,,,,,1,1,,,,,1.0,,ok,
";

#[test]
fn runs_are_predicted_and_scored() {
    let validation = validate(load(RUNS).unwrap(), &Physics::default());
    let [big, korthikanti] = validation.sources.as_slice() else { panic!("{:?}", validation.sources) };
    assert_eq!((korthikanti.rows, korthikanti.scored_time), (2, 2));
    assert!(korthikanti.time_median_error.unwrap() < 0.25, "{korthikanti:?}");
    assert_eq!(big.oom.true_positive, 1);
    assert_eq!(big.skipped.len(), 1);
    assert!(big.skipped.keys().next().unwrap().contains("Z9"));
    assert_eq!(validation.to_csv().lines().count(), 4);
    assert!(validation.to_markdown().contains("| korthikanti | 2 | 2 |"));
    let svg = scatter(&validation.rows);
    assert_eq!(svg.matches("fill-opacity").count(), 2);
}

/// A fit to times that come from known parameters brings the loss down.
#[test]
fn a_fit_finds_its_way_back() {
    let mut cases = load(RUNS).unwrap().cases;
    cases.retain(|c| !c.oom);
    let truth = Physics { matmul_ampere: 0.6, ..Physics::default() };
    for case in &mut cases {
        let p = predict_cluster(&case.model, &case.layout, &case.cluster, &truth).unwrap();
        case.seconds = Some(p.iteration_seconds);
    }
    let found = fit(cases.iter(), &Physics::default(), 300).unwrap();
    assert!(found.before > 0.15 && found.after < 0.03, "{found:?}");
    assert!(fit([].iter(), &truth, 10).is_err());
}

#[test]
fn folds_leave_every_run_out_once() {
    let cases = load(RUNS).unwrap().cases;
    let folds = cross_validate_folds(&cases, &Physics::default(), 30, 3).unwrap();
    assert_eq!(folds.iter().map(|f| f.source.as_str()).collect::<Vec<_>>(), ["fold 1", "fold 2", "fold 3"]);
    assert_eq!(folds.iter().filter(|f| f.time_median_error.is_some()).count(), 2);
}

#[test]
fn documents_have_their_names() {
    let validation = validate(load(RUNS).unwrap(), &Physics::default());
    let document = validation.to_json(false).unwrap();
    assert_eq!(document["format"], "paceline.validation/1");
    assert!(document.get("rows").is_none());
    let source = &document["sources"][1];
    for key in [
        "source",
        "rows",
        "scored_time",
        "scored_memory",
        "skipped",
        "time_median_error",
        "time_p90_error",
        "time_bias",
        "memory_median_error",
        "memory_p90_error",
        "oom",
    ] {
        assert!(source.get(key).is_some(), "{key}");
    }
    assert_eq!(validation.to_json(true).unwrap()["rows"].as_array().map(Vec::len), Some(3));
}

/// Published runs, predicted with the shipped parameters. The limits are a little above what is reached today.
#[test]
fn published_runs_stay_predicted() {
    let text = include_str!("../../tests/data/published_runs.csv");
    let validation = validate(load(text).unwrap(), &Physics::default());
    for (source, time, memory) in [
        ("korthikanti", 0.05, None),
        ("megatron-sc21", 0.05, None),
        ("mosaic-mpt", 0.03, None),
        ("zero-bubble", 0.08, Some(0.04)),
        ("simumax-b200", 0.08, Some(0.03)),
    ] {
        let score = validation.sources.iter().find(|s| s.source == source).unwrap();
        assert_eq!(score.rows, score.scored_time, "{score:?}");
        assert!(score.time_median_error.unwrap() < time, "{score:?}");
        assert!(memory.is_none_or(|limit| score.memory_median_error.unwrap() < limit), "{score:?}");
        assert!(score.oom.right().unwrap() > 0.99);
    }
}

/// A model that needs recomputation and of which nothing is said gets it; one that says it does not, runs out of memory.
#[test]
fn recomputation_is_assumed_only_where_nothing_is_said() {
    let head = RUNS.lines().next().unwrap();
    let run = |recompute: &str| {
        format!(
            "r-{recompute},s,gpt-22b,48,6144,24576,64,64,51200,2048,A100-80G-SXM,8,8,8,True,1,1,zero0,32,32,{recompute},False,Megatron-LM 2022,fp16,9,,ok,"
        )
    };
    let validation = validate(load(&format!("{head}\n{}\n{}\n", run(""), run("none"))).unwrap(), &Physics::default());
    assert_eq!(validation.rows.iter().map(|r| r.predicted_oom).collect::<Vec<_>>(), [false, true]);
}

mod fuzz {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::select;

    fn one_of(words: &'static [&'static str]) -> impl Strategy<Value = String> {
        select(words).prop_map(str::to_owned)
    }

    prop_compose! {
        fn shape()(
            model in one_of(&["", "GPT-3", "Mixtral-8x7B", "DeepSeek V3", "qwen3-30b-a3b", "Nemotron-4 15B", "llama3-8b"]),
            layers in one_of(&["", "1", "7", "32", "61"]),
            hidden in one_of(&["64", "2880", "16384", ""]),
            heads in one_of(&["1", "8", "100"]),
            experts in one_of(&["", "0", "8", "256"]),
            topk in one_of(&["", "1", "8", "300"]),
            seq in one_of(&["1", "512", "131072"]),
            billions in one_of(&["", "0", "0.001", "7", "2000"]),
        ) -> String {
            format!("{model},{layers},{hidden},,{heads},,,{experts},{topk},{seq},{billions}")
        }
    }

    prop_compose! {
        fn machine()(
            gpu in one_of(&["a100", "H100-SXM", "NVIDIA H100 80GB HBM3", "gb200", "B300", "V100", "L40S", "H800", "MI300X", "A100 PCIe"]),
            gpus in one_of(&["1", "6", "8", "64", "4096"]),
            node in one_of(&["", "1", "4", "8", "72"]),
            links in one_of(&["", "PCIe", "EFA", "NVLink + RoCE 1600Gbps/node", "4x100 Gb/s Omni-Path"]),
            precision in one_of(&["", "BF16", "fp16", "FP8-mx", "nvfp4", "fp32"]),
        ) -> String {
            format!("{gpu},{gpus},{node},{links},{precision}")
        }
    }

    prop_compose! {
        fn cut()(
            tp in one_of(&["", "1", "2", "8"]),
            sp in one_of(&["", "True", "false"]),
            cp in one_of(&["", "2"]),
            pp in one_of(&["", "1", "2", "8"]),
            vpp in one_of(&["", "1", "2", "5"]),
            ep in one_of(&["", "1", "8", "64"]),
            states in one_of(&["", "ZeRO-3", "hsdp", "FSDP2", "distributed optimizer", "IIG", "whatever"]),
            schedule in one_of(&["", "1F1B", "Interleaved 1F1B", "zb-v", "dualpipe", "v-half", "somehow"]),
            batch in one_of(&["1,8", ",64", "3,4096", "2,", "1,4096"]),
            recompute in one_of(&["", "full", "selective", "uniform 1", "core_attn+moe"]),
            flash in one_of(&["", "True", "False"]),
            framework in one_of(&["", "TorchTitan", "Megatron-Bridge 25.09", "DeepSpeed", "nanotron", "NeMo", "Composer FSDP", "InternEvo"]),
        ) -> String {
            format!("{tp},{sp},{cp},{pp},{vpp},,{ep},{states},{schedule},{batch},{recompute},{flash},{framework}")
        }
    }

    const COLUMNS: &str = "id,source,model,layers,hidden,ffn_hidden,heads,kv_heads,vocab,experts,topk,seq,params_b,gpu,gpus,gpus_per_node,interconnect,precision,tp,sp,cp,pp,vpp,dp,ep,zero_stage_or_fsdp,schedule,mbs,gbs,recompute,flash_attn,framework,iter_time_s,notes";

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Whatever the words of a row, it is predicted with finite figures, or there is a reason why not.
        #[test]
        fn every_row_is_predicted_or_has_a_reason(
            shape in shape(), machine in machine(), cut in cut(), notes in "[ -+\\--~]{0,30}",
        ) {
            let text = format!("{COLUMNS}\nx-1,x,{shape},{machine},{cut},1.5,\"{}\"\n", notes.replace('"', ""));
            let validation = validate(load(&text).unwrap(), &Physics::default());
            let reasons: usize = validation.sources.iter().map(|s| s.skipped.values().sum::<usize>()).sum();
            prop_assert!(!validation.rows.is_empty() || reasons > 0, "neither predicted nor explained");
            for row in &validation.rows {
                prop_assert!(row.predicted_iteration_seconds.is_finite() && row.predicted_iteration_seconds > 0.0, "{row:?}");
                prop_assert!(row.predicted_peak_gib.is_finite() && row.predicted_peak_gib > 0.0, "{row:?}");
            }
        }
    }
}
