use super::*;

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
