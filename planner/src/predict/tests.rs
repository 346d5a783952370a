use super::*;
use paceline_profiles::find_cluster;
use paceline_sim::cluster::network::Span;
use paceline_sim::cluster::{Attention, MessageBuffers, Numerics, Overlap, PositionTable, Runtime, VocabularyPasses};
use paceline_sim::partition::StatePartition;

fn gpt() -> Architecture {
    Architecture {
        name: "GPT-3 175B".into(),
        layers: 96,
        hidden: 12288,
        attention: Attention::Grouped { heads: 96, kv_heads: 96, head_dim: 128 },
        ffn: 4 * 12288,
        gated: false,
        experts: None,
        vocab: 51200,
        tied: true,
        biases: true,
        positions: PositionTable::Learned(2048),
        dropout: true,
    }
}

fn layout() -> Layout {
    Layout {
        tp: 8,
        sp: true,
        pp: 8,
        dp: 2,
        microbatches: 64,
        sharding: StatePartition::ZERO1,
        recompute: Recompute::Selective,
        ..Layout::single(2048, 1)
    }
}

fn predict(layout: &Layout) -> ClusterPrediction {
    predict_cluster(&gpt(), layout, find_cluster("dgx-a100-ib").unwrap(), &Physics::default()).unwrap()
}

#[test]
fn parts_sum_to_the_whole() {
    for layout in [
        layout(),
        Layout { schedule: "interleaved".into(), chunks: 3, ..layout() },
        Layout { schedule: "zb-h1".into(), ..layout() },
        Layout { pp: 1, sharding: StatePartition::ZERO3, dp: 8, numerics: Numerics::GATHERED_16_BIT, ..layout() },
        Layout { cp: 2, ..layout() },
    ] {
        let p = predict(&layout);
        assert!((p.time.total() / p.iteration_seconds - 1.0).abs() < 1e-12);
        let c = p.compute;
        assert!(((c.products + c.attention + c.memory_bound + c.launches) / p.time.compute - 1.0).abs() < 1e-12);
        assert!(c.products > 0.3 * p.time.compute && c.launches > -1e-9 * p.time.compute, "{c:?}");
        for (classes, peak) in p.memory.by_class.iter().zip(&p.memory.peak_bytes) {
            assert!((classes.total() / peak - 1.0).abs() < 1e-12);
        }
        assert_eq!(p.memory.peak_bytes.len() as u64, layout.pp);
        assert!((p.provenance.measured + p.provenance.fitted + p.provenance.datasheet - 1.0).abs() < 1e-12);
        assert_eq!(p.provenance.assumed, 0.0);
        assert!(p.mfu > 0.1 && p.mfu < 0.8, "{}", p.mfu);
        assert!(p.hfu >= p.mfu);
    }
}

/// A steady state that is continued equals one that is replayed in full.
#[test]
fn continued_iterations_equal_replayed_ones() {
    for (schedule, chunks) in [("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("v-half", 2)] {
        let model = gpt();
        let layout = Layout { schedule: schedule.into(), chunks, pp: 4, microbatches: 64, ..layout() };
        let cluster = find_cluster("dgx-a100-ib").unwrap();
        let predicted = predict_cluster(&model, &layout, cluster, &Physics::default()).unwrap();
        let physics = Physics::default();
        let timer = Timer {
            model: &model,
            layout: &layout,
            device: Device::of(&cluster.gpu, &layout, &physics),
            network: Network::of(cluster, &physics),
            groups: Groups::of(&layout, 8),
            physics: &physics,
            pace: 0.0,
        };
        let stages = cut(&model, layout.partition, layout.pp * layout.chunks, layout.pp);
        let placement = schedules::find(schedule).unwrap().placement(4, (chunks > 1).then_some(2)).unwrap();
        let passes: Vec<PassTimes> = stages
            .iter()
            .map(|s| {
                let p = RankParameters::of(&model, &layout, s.blocks.clone(), s.embedding, s.head);
                timer.stage(s, &p)
            })
            .collect();
        let message = 2.0 * layout.tokens() * model.hidden as f64 / layout.tp as f64;
        let hop = timer.network.message(true, message);
        let device_of = &placement.device_of_stage;
        let sends = |n: usize, o: usize| if device_of[o] == device_of[n] { 0.0 } else { hop };
        let last = stages.len() - 1;
        let times = StageTimes {
            f: (0..=last).map(|n| passes[n].f() + if n < last { sends(n, n + 1) } else { 0.0 }).collect(),
            b: (0..=last).map(|n| passes[n].b() + if n > 0 { sends(n, n - 1) } else { 0.0 }).collect(),
            w: passes.iter().map(|p| p.weights).collect(),
            comm: 0.0,
        };
        let whole = Replayer::default().run(&order(&layout, 64).unwrap(), &times).unwrap().makespan;
        let continued = Pipeline::replay(&layout, &passes, hop, device_of).unwrap().makespan;
        assert!((continued / whole - 1.0).abs() < 2e-3, "{schedule}: {continued} {whole}");
        assert!(predicted.iteration_seconds > whole);
    }
}

#[test]
fn what_is_not_there_costs_nothing() {
    let alone = predict_cluster(
        &Architecture { layers: 2, ..gpt() },
        &Layout::single(2048, 1),
        find_cluster("dgx-a100-ib").unwrap(),
        &Physics::default(),
    )
    .unwrap();
    let t = alone.time;
    assert_eq!([t.exposed_tp, t.exposed_dp, t.exposed_pp, t.exposed_cp, t.exposed_ep, t.bubble, t.recompute], [0.0; 7]);
    assert_eq!(alone.memory.by_class[0].communication, 0.0);
}

#[test]
fn more_work_takes_longer_and_more_room() {
    let base = predict(&layout());
    let full = predict(&Layout { recompute: Recompute::Full, ..layout() });
    assert!(full.time.recompute > base.time.recompute);
    assert!(full.memory.peak_bytes[0] < base.memory.peak_bytes[0]);
    let hidden = predict(&Layout {
        overlap: Overlap { gradients: true, tensor: true, input_gradients: true, parameters: true, experts: true },
        ..layout()
    });
    assert!(hidden.iteration_seconds < base.iteration_seconds);
    let longer = predict(&Layout { microbatches: 128, ..layout() });
    assert!(longer.iteration_seconds > 1.8 * base.iteration_seconds);
    assert_eq!(longer.memory.peak_bytes, base.memory.peak_bytes);
}

#[test]
fn impossible_layouts_say_why() {
    let cluster = find_cluster("dgx-a100-ib").unwrap();
    let error =
        |layout: Layout| predict_cluster(&gpt(), &layout, cluster, &Physics::default()).unwrap_err().to_string();
    assert!(error(Layout { dp: 0, ..layout() }).contains("dp is 0"));
    assert!(error(Layout { pp: 128, ..layout() }).contains("96 blocks"));
    assert!(error(Layout { schedule: "magic".into(), ..layout() }).contains("magic"));
}

/// A host that is ahead of the GPU holds four whole rows for each block among the launches that wait, if collectives give their
/// buffers back late; a host that is not, or memory that is short, holds none.
#[test]
fn buffers_that_are_given_back_late_are_as_many_as_launches_wait() {
    use paceline_sim::cluster::work;
    let slow_gpu = Layout { pp: 1, dp: 64, micro_batch: 2, ..layout() };
    let launches = work::block(&gpt(), &slow_gpu, 0).kernels;
    let row = 2.0 * 2.0 * 2048.0 * 12288.0;
    let small = Architecture { layers: 24, ..gpt() };
    let cluster = find_cluster("dgx-a100-ib").unwrap();
    let peak = |messages, memory_limit| {
        let layout = Layout { messages, memory_limit, ..slow_gpu.clone() };
        predict_cluster(&small, &layout, cluster, &Physics::default()).unwrap().memory
    };
    let shared = peak(MessageBuffers::Shared, None).peak_bytes[0];
    let late = peak(MessageBuffers::FreedLate, None);
    assert!(((late.peak_bytes[0] - shared) / (1024.0 / launches * 4.0 * row) - 1.0).abs() < 1e-9, "{late:?} {shared}");
    let short = peak(MessageBuffers::FreedLate, Some(shared + row));
    assert!(short.fits && (short.peak_bytes[0] / (shared + row) - 1.0).abs() < 1e-12);
    assert_eq!(peak(MessageBuffers::FreedLate, Some(shared)).peak_bytes[0], shared);
}

/// Yeung et al. (arXiv 2411.05288, sections 5 and 6.2): one wait keeps a microbatch more in flight, two keep two, an interlaced pipeline half
/// as many again as it has ranks; and the pipeline fills later by as many intervals.
#[test]
fn a_spread_vocabulary_keeps_more_microbatches_in_flight() {
    let of = |vocabulary| {
        let spread = Layout { vocabulary, partition: Partition::VocabularySpread, dp: 1, ..layout() };
        predict(&spread)
    };
    let one = of(VocabularyPasses::OneBarrier);
    let two = of(VocabularyPasses::TwoBarriers);
    let interlaced = of(VocabularyPasses::Interlaced);
    let each = two.memory.by_class[7].activations - one.memory.by_class[7].activations;
    // The last rank has one microbatch of its own and those that wait.
    assert!((one.memory.by_class[7].activations / each - 2.0).abs() < 1e-9);
    assert!((interlaced.memory.by_class[7].activations / each - 5.0).abs() < 1e-9);
    assert!(one.iteration_seconds < two.iteration_seconds && two.iteration_seconds < interlaced.iteration_seconds);
}

/// Messages to experts and back run beside the passes of another microbatch if asked; the busiest rank's share makes them longer, and a
/// capacity bounds it.
#[test]
fn experts_exchange_beside_computation_and_as_skewed_as_they_are() {
    let model = Architecture::load("mixtral-8x7b").unwrap();
    let cluster = find_cluster("dgx-h100-ib").unwrap();
    let base = Layout { ep: 8, dp: 8, microbatches: 4, ..Layout::single(4096, 1) };
    let of = |layout: &Layout| predict_cluster(&model, layout, cluster, &Physics::default()).unwrap();
    let plain = of(&base);
    let beside = of(&Layout { overlap: Overlap { experts: true, ..base.overlap }, ..base.clone() });
    let contention = Physics::default().contention;
    assert!((beside.time.exposed_ep / plain.time.exposed_ep - contention).abs() < 1e-9, "{:?}", beside.time);
    let skewed = |skew, capacity| {
        let routing = paceline_sim::cluster::Routing { skew, capacity };
        of(&Layout { routing, ..base.clone() }).time.exposed_ep / plain.time.exposed_ep
    };
    // Beside the latency, which stays, the time goes with the busiest rank's tokens.
    let (two, three) = (skewed(2.0, None), skewed(3.0, None));
    assert!(two > 1.85 && (three - two - (two - 1.0)).abs() < 1e-9, "{two} {three}");
    assert_eq!(skewed(2.0, Some(1.25)), skewed(1.25, None));
}

/// Formats that no run is known of are assumed, and the prediction says for how much of the time.
#[test]
fn unknown_formats_are_said_to_be_assumed() {
    let of = |cluster: &str, compute| {
        let numerics = Numerics { compute, ..Numerics::MIXED };
        let layout = Layout { numerics, ..layout() };
        predict_cluster(&gpt(), &layout, find_cluster(cluster).unwrap(), &Physics::default()).unwrap()
    };
    for (cluster, compute, assumed) in [
        ("dgx-h100-ib", Compute::Bf16, false),
        ("dgx-h100-ib", Compute::Fp8, false),
        ("dgx-b200-ib", Compute::Fp8, true),
        ("dgx-b200-ib", Compute::Fp4, true),
    ] {
        let p = of(cluster, compute);
        let share = if assumed { p.compute.products / p.time.total() } else { 0.0 };
        assert!((p.provenance.assumed - share).abs() < 1e-12, "{cluster} {compute:?}: {:?}", p.provenance);
    }
}

/// Of six blocks of a stage, two computed again keep their inputs only, and take two sixths of the time.
#[test]
fn some_blocks_are_recomputed() {
    let of = |recompute, recomputed_blocks| {
        predict(&Layout { recompute, recomputed_blocks, pp: 16, chunks: 1, dp: 1, ..layout() })
    };
    let (none, two, all) = (of(Recompute::None, None), of(Recompute::Full, Some(2)), of(Recompute::Full, None));
    assert!((two.time.recompute / all.time.recompute - 2.0 / 6.0).abs() < 1e-9);
    let kept = |p: &ClusterPrediction| p.memory.by_class[3].activations;
    let mixed = (4.0 * kept(&none) + 2.0 * kept(&all)) / 6.0;
    assert!((kept(&two) / mixed - 1.0).abs() < 1e-9, "{} {mixed}", kept(&two));
    assert!(none.hfu < two.hfu / two.mfu * none.mfu && two.hfu / two.mfu < all.hfu / all.mfu);
    assert_eq!(of(Recompute::Full, Some(99)), all);
}

/// Parameters that stay gathered over the microbatches of a step: one gather instead of two for each microbatch, and all of them held.
#[test]
fn parameters_that_stay_gathered_cost_memory_and_save_time() {
    let layout = Layout {
        sharding: StatePartition::ZERO3,
        overlap: Overlap { parameters: true, gradients: true, ..layout().overlap },
        pp: 4,
        dp: 4,
        ..layout()
    };
    let (each, once) = (predict(&layout), predict(&Layout { keep_gathered: true, ..layout.clone() }));
    let times = each.exchanges.parameter_gather / once.exchanges.parameter_gather;
    assert!((times - 2.0 * layout.microbatches as f64).abs() < 1e-6, "{times}");
    assert_eq!(each.exchanges.gradient_reduction, once.exchanges.gradient_reduction);
    assert!(once.iteration_seconds < each.iteration_seconds);
    assert!((once.time.total() / once.iteration_seconds - 1.0).abs() < 1e-12);
    let (a, b) = (&each.memory.by_class[1], &once.memory.by_class[1]);
    assert_eq!(
        (a.parameters, a.gradients, a.optimizer, a.activations),
        (b.parameters, b.gradients, b.optimizer, b.activations)
    );
    // An inner stage has 24 blocks: all of them instead of two.
    let block = gpt().block_parameters(1) as f64 / 8.0 * layout.numerics.parameter.min(layout.numerics.activation);
    assert!(((b.communication - a.communication) / (22.0 * block) - 1.0).abs() < 0.01);
    // Where nothing is gathered, nothing changes.
    let zero1 = Layout { sharding: StatePartition::ZERO1, ..layout };
    assert_eq!(predict(&zero1), predict(&Layout { keep_gathered: true, ..zero1 }));
}

/// Stage 2 of DeepSpeed: each of the 31 borders between owners and each bucket makes a launch of a reduction, and none of them hides.
#[test]
fn rooted_reductions_by_hand() {
    let cluster = find_cluster("paro-a100-roce").unwrap();
    let model = Architecture::load("llama-7b").unwrap();
    let physics = Physics::default();
    let layout = Layout {
        dp: 32,
        microbatches: 10,
        sharding: StatePartition::ZERO2,
        numerics: Numerics::MIXED,
        bucket_bytes: Some(1e9),
        runtime: Runtime::DEEPSPEED,
        overlap: Overlap { parameters: true, gradients: true, ..layout().overlap },
        ..Layout::single(512, 4)
    };
    let network = Network::of(cluster, &physics);
    let bytes = 2.0 * model.parameters() as f64;
    let launches = (bytes / 1e9).ceil() + 31.0;
    let each = launches * network.reduce(Span::strided(32, 1, 8), bytes / launches);
    let p = predict_cluster(&model, &layout, cluster, &physics).unwrap();
    assert!((p.exchanges.gradient_reduction / (10.0 * each) - 1.0).abs() < 1e-9);
    // All of it shows, and the gather of what was updated too.
    let all = p.exchanges.gradient_reduction + p.exchanges.parameter_sync;
    assert!((p.time.exposed_dp / all - 1.0).abs() < 1e-9, "{} {all}", p.time.exposed_dp);
    let fused = predict_cluster(&model, &Layout { runtime: Runtime::FUSED, ..layout }, cluster, &physics).unwrap();
    assert!(fused.time.exposed_dp < 0.6 * p.time.exposed_dp);
}
