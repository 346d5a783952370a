//! The optimiser against the exact optimum of small instances: the mixed integer program of the zero-bubble paper (arXiv 2401.10241,
//! appendix G) with the makespan as its aim, for any placement of one copy, solved to the end by branch and bound.
//!
//! Variables: the end of every pass, and for each two passes of a device that neither data nor the sequence of microbatches puts in order, which is
//! first. Microbatches are alike, so each stage can run the passes of a kind in their sequence.

use good_lp::{Expression, Solution, SolverModel, Variable, constraint, microlp, variable, variables};
use paceline_planner::bounds::strongest;
use paceline_planner::optimise::{Effort, Problem, optimise};
use paceline_planner::order::Placement;
use paceline_planner::replay::{StageMemory, StageTimes};
use paceline_planner::schedules::{looped, v_shape};

const KINDS: usize = 3;

struct Instance {
    placement: Placement,
    microbatches: usize,
    times: StageTimes,
    /// Activations (until W) of any stage that a device may hold.
    most: usize,
}

/// A pass: stage, kind (F, B, W) and microbatch.
type Key = (usize, usize, usize);

impl Instance {
    fn duration(&self, (stage, kind, _): Key) -> f64 {
        [&self.times.f, &self.times.b, &self.times.w][kind][stage]
    }

    /// Whether a pass has to come before another one of the same device because data flows that way, perhaps through other microbatches of a stage.
    fn precedes(&self, a: Key, b: Key) -> bool {
        // A microbatch runs F up the stages and B down; W of a stage follows its B, before nothing else.
        let last = self.placement.stages() - 1;
        let place = |(stage, kind, _): Key| if kind == 0 { stage } else { 2 * last + 1 - stage };
        let reaches = match (a.1, b.1) {
            (2, 2) => a.0 == b.0,
            (2, _) => false,
            (_, 2) => place(a) <= place(b),
            _ => place(a) <= place(b),
        };
        reaches && a.2 <= b.2 && a != b
    }

    fn optimum(&self) -> f64 {
        let (stages, m) = (self.placement.stages(), self.microbatches);
        let device_of = &self.placement.device_of_stage;
        let keys: Vec<Key> =
            (0..stages).flat_map(|s| (0..KINDS).flat_map(move |k| (0..m).map(move |j| (s, k, j)))).collect();
        let index = |(s, k, j): Key| (s * KINDS + k) * m + j;
        // One pass after the other is a schedule.
        let horizon: f64 =
            keys.iter().map(|key| self.duration(*key)).sum::<f64>() + self.times.comm * (2 * stages * m) as f64;
        let mut vars = variables!();
        let ends: Vec<Variable> =
            keys.iter().map(|key| vars.add(variable().min(self.duration(*key)).max(horizon))).collect();
        let makespan = vars.add(variable().min(0.0).max(horizon));
        let mut orders: Vec<(Key, Key, Variable)> = Vec::new();
        for (n, &a) in keys.iter().enumerate() {
            for &b in &keys[n + 1..] {
                if device_of[a.0] == device_of[b.0] && !self.precedes(a, b) && !self.precedes(b, a) {
                    orders.push((a, b, vars.add(variable().binary())));
                }
            }
        }
        // 1 when a is before b.
        let before = |a: Key, b: Key| -> Expression {
            if self.precedes(a, b) {
                return 1.0.into();
            }
            if self.precedes(b, a) {
                return 0.0.into();
            }
            let known = orders.iter().find_map(|(x, y, v)| match (*x == a && *y == b, *x == b && *y == a) {
                (true, _) => Some(Expression::from(*v)),
                (_, true) => Some(1.0 - *v),
                _ => None,
            });
            known.expect("two passes of one device")
        };
        let mut model = vars.minimise(makespan).using(microlp);
        let follow = |a: Key, b: Key, transfer: f64| {
            let gap = self.duration(b) + transfer;
            let (a, b) = (ends[index(a)], ends[index(b)]);
            (a, b, gap)
        };
        let mut constraints = Vec::new();
        for &(s, k, j) in &keys {
            constraints.push(constraint!(makespan >= ends[index((s, k, j))]));
            let inputs: Vec<Key> = match k {
                0 => (s > 0).then(|| (s - 1, 0, j)).into_iter().collect(),
                1 => std::iter::once((s, 0, j)).chain((s + 1 < stages).then(|| (s + 1, 1, j))).collect(),
                _ => vec![(s, 1, j)],
            };
            for input in inputs.into_iter().chain((j > 0).then(|| (s, k, j - 1))) {
                let transfer = if device_of[input.0] == device_of[s] { 0.0 } else { self.times.comm };
                let (a, b, gap) = follow(input, (s, k, j), transfer);
                constraints.push(constraint!(b >= a + gap));
            }
            if k == 0 {
                // What is held once this F has started: it, all F before it, less all W before it.
                let device = device_of[s];
                let mut held = Expression::from(1.0);
                for &other in keys.iter().filter(|o| device_of[o.0] == device && **o != (s, k, j)) {
                    match other.1 {
                        0 => held += before(other, (s, k, j)),
                        2 => held -= before(other, (s, k, j)),
                        _ => {}
                    }
                }
                constraints.push(constraint!(held <= self.most as f64));
            }
        }
        for &(a, b, first) in &orders {
            let (x, y) = (ends[index(a)], ends[index(b)]);
            constraints.push(constraint!(y - x + horizon * (1.0 - first) >= self.duration(b)));
            constraints.push(constraint!(x - y + horizon * first >= self.duration(a)));
        }
        for constraint in constraints {
            model = model.with(constraint);
        }
        model.solve().expect("one pass after the other is a solution").value(makespan)
    }
}

/// Bound, optimum and what the optimiser finds.
fn compare(instance: &Instance) -> (f64, f64, f64) {
    let placement = &instance.placement;
    let stages = placement.stages();
    let memory = StageMemory { until_b: vec![1.0; stages], until_w: vec![1.0; stages], checkpoint: vec![0.0; stages] };
    let limit = vec![instance.most as f64; placement.devices()];
    let m = instance.microbatches as u32;
    let problem =
        Problem { placement: placement.clone(), microbatches: m, times: instance.times.clone(), memory, limit };
    let found = optimise(&problem, Effort { gap: 0.0, ..Effort::default() }).unwrap().makespan;
    let bound = strongest(&problem, found).makespan;
    (bound, instance.optimum(), found)
}

#[test]
fn the_optimiser_reaches_the_optimum_of_small_instances() {
    let uneven = |stages: usize| StageTimes {
        f: (0..stages).map(|s| 3.0 + (s % 2) as f64).collect(),
        b: (0..stages).map(|s| 4.0 + (s % 3) as f64).collect(),
        w: vec![2.0; stages],
        comm: 0.5,
    };
    let cases = [
        ("p=2 m=3, 2 held", looped(2, 1), 3, StageTimes::uniform(2, 3.0, 4.0, 2.0, 0.5), 2),
        ("p=2 m=4, 3 held", looped(2, 1), 4, StageTimes::uniform(2, 3.0, 4.0, 2.0, 0.5), 3),
        ("p=3 m=3, 2 held", looped(3, 1), 3, uneven(3), 2),
        ("p=3 m=3, 3 held", looped(3, 1), 3, uneven(3), 3),
        ("V p=2 m=2, 3 held", v_shape(2), 2, StageTimes::uniform(4, 3.0, 4.0, 2.0, 0.0), 3),
        ("p=3 m=4, 2 held", looped(3, 1), 4, uneven(3), 2),
        ("V p=2 m=3, 2 held", v_shape(2), 3, uneven(4), 2),
        ("V p=2 m=3, 3 held", v_shape(2), 3, StageTimes::uniform(4, 3.0, 4.0, 2.0, 0.5), 3),
        ("V p=2 m=2, 4 held", v_shape(2), 2, uneven(4), 4),
    ];
    for (name, placement, microbatches, times, most) in cases {
        let begin = std::time::Instant::now();
        let (bound, optimum, found) = compare(&Instance { placement, microbatches, times, most });
        println!("{name}: bound {bound}, optimum {optimum}, found {found}, {:?}", begin.elapsed());
        assert!(bound <= optimum + 1e-6, "{name}: bound {bound}, optimum {optimum}");
        assert!(found >= optimum - 1e-6, "{name}: found {found}, optimum {optimum}");
        assert!(found <= optimum * 1.02, "{name}: found {found}, optimum {optimum}");
    }
}
