//! Against every cut there is, and hand-computed cases.

use super::*;
use crate::schedules::{Request, bidirectional, build, looped, v_shape, wave};
use proptest::prelude::*;

fn costs(layers: usize, seed: &[u32]) -> LayerCosts {
    let pick = |from: usize| (0..layers).map(|n| f64::from(seed[(from + n) % seed.len()])).collect();
    LayerCosts { seconds: pick(0), fixed: pick(17), activation: pick(31) }
}

/// All ways to cut `layers` layers into `stages` stages.
fn cuts(layers: u32, stages: usize) -> Vec<Vec<u32>> {
    if stages == 1 {
        return vec![vec![layers]];
    }
    let rest = |first: u32| cuts(layers - first, stages - 1).into_iter().map(move |cut| [vec![first], cut].concat());
    (1..=layers + 1 - stages as u32).flat_map(rest).collect()
}

/// Load of the busiest device, and whether all fit.
fn judge(costs: &LayerCosts, placement: &Placement, held: &[InFlight], limit: &[f64], sizes: &[u32]) -> (f64, bool) {
    let n = placement.stages_per_copy();
    let mut first = 0;
    let ranges: Vec<_> = sizes
        .iter()
        .map(|size| {
            first += *size as usize;
            first - *size as usize..first
        })
        .collect();
    let sum = |list: &[f64], stage: usize| list[ranges[stage].clone()].iter().sum::<f64>();
    let (mut busiest, mut fits) = (0.0f64, true);
    for device in 0..placement.devices() {
        let local: Vec<usize> = placement.stages_of(device as u32).map(|s| s.index() % n).collect();
        // Two copies of a pipeline share the microbatches.
        let work = local.iter().map(|s| sum(&costs.seconds, *s)).sum::<f64>();
        busiest = busiest.max(work);
        let fixed: f64 = local.iter().map(|s| sum(&costs.fixed, *s)).sum();
        for held in &held[device] {
            let live: f64 = local.iter().zip(held).map(|(s, n)| f64::from(*n) * sum(&costs.activation, *s)).sum();
            fits &= fixed + live <= limit[device] * (1.0 + 1e-12);
        }
    }
    (busiest, fits)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn no_other_cut_is_better(
        which in 0usize..5,
        more in 0usize..6,
        seed in prop::collection::vec(1u32..30, 60),
        room in 0.6f64..2.0,
    ) {
        let (name, p) = [("1f1b", 4), ("gpipe", 3), ("v-half", 3), ("zb-v", 2), ("dualpipe", 4)][which];
        let order = build(name, &Request::new(p, 7)).unwrap();
        let layers = order.placement.stages_per_copy() + more;
        let costs = costs(layers, &seed);
        let held = in_flight(&order);
        // Around what an even share takes.
        let total: f64 = costs.fixed.iter().sum::<f64>() + 3.0 * costs.activation.iter().sum::<f64>();
        let limit: Vec<f64> = (0..p).map(|d| room * total / f64::from(p) * (1.0 + 0.1 * f64::from(d))).collect();
        let found = partition(&costs, &order.placement, &held, Some(&limit), Vocabulary::Ends);
        let all = cuts(layers as u32, order.placement.stages_per_copy());
        let best = all
            .iter()
            .map(|cut| judge(&costs, &order.placement, &held, &limit, cut))
            .filter(|(_, fits)| *fits)
            .map(|(busiest, _)| busiest)
            .fold(f64::INFINITY, f64::min);
        match found {
            Ok(sizes) => {
                let (busiest, fits) = judge(&costs, &order.placement, &held, &limit, &sizes);
                prop_assert!(fits && (busiest - best).abs() < 1e-9, "{} {:?}: {} but {} is possible", name, sizes, busiest, best);
            }
            Err(PartitionError::NothingFits { device, needed, limit: has }) => {
                prop_assert!(best.is_infinite() && needed > has && has == limit[device], "{name}: {needed} {has}");
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}

#[test]
fn ends_count_and_can_be_spread() {
    // Eight blocks of 2, an embedding of 1 and a head of 5.
    let mut seconds = vec![2.0; 10];
    (seconds[0], seconds[9]) = (1.0, 5.0);
    let costs = LayerCosts { seconds, fixed: vec![1.0; 10], activation: vec![0.0; 10] };
    let line = looped(4, 1);
    let one = vec![vec![vec![1]]; 4].concat();
    let one: Vec<InFlight> = one.into_iter().map(|held| vec![held]).collect();
    // 22 in all: 5, 6, 6, 5 would be equal, and the head alone takes 5.
    assert_eq!(partition(&costs, &line, &one, None, Vocabulary::Ends), Ok(vec![3, 3, 3, 1]));
    assert_eq!(partition(&costs, &line, &one, None, Vocabulary::Spread), Ok(vec![2, 2, 2, 2]));
    // In V placement both ends are on device 0: with an embedding of 3 two blocks there and six on the other device are 12 each.
    let mut costs = costs;
    costs.seconds[0] = 3.0;
    let vee = v_shape(2);
    let held: Vec<InFlight> = vec![vec![vec![1, 1]]; 2];
    let sizes = partition(&costs, &vee, &held, None, Vocabulary::Ends).unwrap();
    let (first, last) = (sizes[0] + sizes[3], sizes[1] + sizes[2]);
    assert_eq!((sizes.iter().sum::<u32>(), first, last), (10, 4, 6), "{sizes:?}");
    // A limit on device 0 moves layers, and one below the least says so.
    let sizes = partition(&costs, &vee, &held, Some(&[3.0, 7.0]), Vocabulary::Ends).unwrap();
    assert_eq!(sizes[0] + sizes[3], 3);
    let error = partition(&costs, &vee, &held, Some(&[3.0, 6.0]), Vocabulary::Ends).unwrap_err();
    assert_eq!(error, PartitionError::NothingFits { device: 0, needed: 4.0, limit: 3.0 });
    let error = partition(&costs, &looped(3, 3), &vec![vec![vec![1; 3]]; 3], None, Vocabulary::Spread).unwrap_err();
    assert_eq!(error, PartitionError::TooFewLayers { layers: 8, stages: 9 });
    let error = partition(&costs, &line, &held, None, Vocabulary::Ends).unwrap_err();
    assert_eq!(error.to_string(), "2 values for the microbatches in flight, 4 needed");
    // Other placements are cut by stage.
    let sizes = partition(&costs, &wave(2, 4), &vec![vec![vec![1; 4]]; 2], None, Vocabulary::Ends).unwrap();
    assert_eq!((sizes.len(), sizes.iter().sum::<u32>()), (8, 10));
    assert_eq!(bidirectional(2).stages_per_copy(), 2);
}

#[test]
fn what_is_in_flight() {
    let held = |name: &str, p, m| in_flight(&build(name, &Request::new(p, m)).unwrap());
    assert_eq!(held("1f1b", 3, 8), [[[3]], [[2]], [[1]]]);
    assert_eq!(held("zb-h1", 3, 8), [[[3]], [[3]], [[3]]]);
    // Each combination of V-ZB fills the device, and none covers another one.
    for combinations in held("v-zb", 4, 16) {
        assert!(combinations.iter().all(|counts| counts.iter().sum::<u32>() <= 8));
        assert!(combinations.iter().any(|counts| counts.iter().sum::<u32>() == 8));
    }
}

#[test]
fn a_hundred_layers_on_sixteen_devices_are_quick_to_cut() {
    let costs = LayerCosts {
        seconds: (0..102).map(|n| if n == 101 { 9.0 } else { 1.0 + f64::from(n % 3) / 10.0 }).collect(),
        fixed: vec![1.0; 102],
        activation: vec![1.0; 102],
    };
    let order = build("v-half", &Request::new(16, 32)).unwrap();
    let held = in_flight(&order);
    let sizes = partition(&costs, &order.placement, &held, None, Vocabulary::Ends).unwrap();
    let (busiest, _) = judge(&costs, &order.placement, &held, &[f64::INFINITY; 16], &sizes);
    // The head of 9 shares device 0 with one layer at least.
    let share = costs.seconds.iter().sum::<f64>() / 16.0;
    assert!(busiest >= share && busiest <= 10.01, "{busiest}, share {share}");
}
