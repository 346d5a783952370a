//! Table 5 of the zero-bubble paper (arXiv 2401.10241): the authors' bubble rates, computed from the profiled times of
//! their Table 9. A replay of our orders with these times has to give the same four digits.

use paceline_planner::lower::{AbstractStage, Blueprint, Form, States, Substance, lower};
use paceline_planner::replay::{StageMemory, StageTimes, replay};
use paceline_planner::schedules::{Request, build};
use paceline_sim::cost::FixedTimes;
use paceline_sim::engine::simulate;
use paceline_sim::program::{Device, Stage, Stream, Unit};
use paceline_sim::units::Nanos;

struct Row<'a> {
    model: &'a str,
    devices: u32,
    microbatches: u32,
    schedule: &'a str,
    times: [f64; 4],
    rate: f64,
}

fn rows() -> Vec<Row<'static>> {
    include_str!("data/zerobubble_table5.csv")
        .lines()
        .skip(1)
        .map(|line| {
            let cells: Vec<&str> = line.split(',').collect();
            let number = |i: usize| cells[i].parse::<f64>().unwrap();
            Row {
                model: cells[0],
                devices: cells[1].parse().unwrap(),
                microbatches: cells[2].parse().unwrap(),
                schedule: cells[3],
                times: [number(4), number(5), number(6), number(7)],
                rate: number(8),
            }
        })
        .collect()
}

/// The printed rates have four digits, and so do the printed times behind them.
const LAST_DIGIT: f64 = 0.00011;

#[test]
fn hand_made_orders_have_the_published_bubble() {
    let mut checked = 0;
    for row in rows() {
        let name = match row.schedule {
            "1F1B" => "1f1b",
            "ZB-H1" => "zb-h1",
            "ZB-H2" => "zb-h2",
            _ => continue,
        };
        let order = build(name, &Request::new(row.devices, row.microbatches)).unwrap();
        let [f, b, w, comm] = row.times;
        let timing = replay(&order, &StageTimes::uniform(row.devices as usize, f, b, w, comm)).unwrap();
        let rate = timing.bubble_span();
        assert!(
            (rate - row.rate).abs() < LAST_DIGIT,
            "{} p={} m={} {name}: {rate:.5}, published {}",
            row.model,
            row.devices,
            row.microbatches,
            row.rate
        );
        checked += 1;
    }
    assert_eq!(checked, 36);
}

#[test]
fn the_engine_has_the_published_bubble_of_1f1b() {
    let mut checked = 0;
    for row in rows().into_iter().filter(|row| row.schedule == "1F1B") {
        let order = build("1f1b", &Request::new(row.devices, row.microbatches)).unwrap();
        let stages = row.devices as usize;
        let program = lower(&Blueprint {
            order: &order,
            substance: Substance::Abstract(vec![
                AbstractStage { message: 1, until_b: 1, ..AbstractStage::default() };
                stages
            ]),
            stages: vec![Stage { units: vec![Unit { layers: vec![] }] }; stages],
            data: 1,
            states: States::default(),
            devices: (0..row.devices).map(|n| Device { name: format!("gpu:{n}"), node: n / 8 }).collect(),
            form: Form::Full,
        })
        .unwrap();
        // Milliseconds.
        let [f, b, w, comm] = row.times.map(|time| Nanos::from_seconds(time / 1e3));
        let trace = simulate(&program, &FixedTimes::uniform(f, b, w, comm)).unwrap();
        let (mut work, mut longest) = (0, 0);
        for rank in &trace.ranks {
            let ops = rank.events.iter().filter(|event| event.stream == Stream::COMPUTE && event.end > event.start);
            work += ops.clone().map(|event| event.end.0 - event.start.0).sum::<u64>();
            let begin = ops.clone().map(|event| event.start.0).min().unwrap();
            longest = longest.max(ops.map(|event| event.end.0).max().unwrap() - begin);
        }
        let rate = 1.0 - work as f64 / f64::from(row.devices) / longest as f64;
        let label = format!("{} p={} m={}", row.model, row.devices, row.microbatches);
        assert!((rate - row.rate).abs() < LAST_DIGIT, "{label}: {rate:.5}, published {}", row.rate);
        checked += 1;
    }
    assert_eq!(checked, 12);
}

#[test]
fn interleaving_has_the_published_bubble() {
    // The paper's rate is a formula: work, a v-th of the 1F1B bubble, and 2(pv-1) - p transfers. A replay that pays every
    // crossing between devices takes p transfers more, and nothing else.
    let mut checked = 0;
    for row in rows().into_iter().filter(|row| row.schedule == "1F1B-I") {
        // Chunks per device: the layers of the model and two more for embedding and output, one layer per chunk.
        let chunks = match row.model {
            "1.5B" | "14.6B" => 3,
            "6.2B" => 4,
            "28.3B" => 2,
            other => panic!("unknown model {other}"),
        };
        let order = build("interleaved", &Request::new(row.devices, row.microbatches).chunks(chunks)).unwrap();
        let (p, v) = (f64::from(row.devices), f64::from(chunks));
        let [f, b, w, comm] = row.times;
        let stages = (row.devices * chunks) as usize;
        let timing = replay(&order, &StageTimes::uniform(stages, f / v, b / v, w / v, comm)).unwrap();
        let work = f64::from(row.microbatches) * (f + b + w);
        let published = work + (p - 1.0) * (f + b + w) / v + (2.0 * (p * v - 1.0) - p) * comm;
        let label = format!("{} p={p} m={}", row.model, row.microbatches);
        assert!((1.0 - work / published - row.rate).abs() < LAST_DIGIT, "{label}: {}", 1.0 - work / published);
        let replayed = timing.totals.longest_span;
        assert!((replayed - published - p * comm).abs() < 1e-6, "{label}: {replayed} against {published}");
        checked += 1;
    }
    assert_eq!(checked, 12);
}

#[test]
fn the_heuristic_has_the_published_bubble() {
    // Sizes of the paper's section 3: per layer M_B = s b (34 h + 5 a s) and M_W = 32 s b h; only their ratio matters here.
    let mut checked = 0;
    for row in rows() {
        let name = match row.schedule {
            "ZB-1p" => "zb-1p",
            "ZB-2p" => "zb-2p",
            _ => continue,
        };
        let (heads, hidden) = match row.model {
            "1.5B" => (24.0, 2304.0),
            "6.2B" => (32.0, 4096.0),
            "14.6B" => (40.0, 5120.0),
            "28.3B" => (48.0, 6144.0),
            other => panic!("unknown model {other}"),
        };
        let stages = row.devices as usize;
        let memory = StageMemory {
            until_b: vec![34.0 * hidden + 5.0 * heads * 1024.0; stages],
            until_w: vec![32.0 * hidden; stages],
            checkpoint: vec![0.0; stages],
        };
        let [f, b, w, comm] = row.times;
        let times = StageTimes::uniform(stages, f, b, w, comm);
        let request =
            Request { times: Some(times.clone()), memory: Some(memory), ..Request::new(row.devices, row.microbatches) };
        let order = build(name, &request).unwrap();
        let rate = replay(&order, &times).unwrap().bubble_span();
        let label = format!("{} p={} m={} {name}", row.model, row.devices, row.microbatches);
        assert!((rate - row.rate).abs() < LAST_DIGIT, "{label}: {rate:.5}, published {}", row.rate);
        checked += 1;
    }
    assert_eq!(checked, 24);
}
