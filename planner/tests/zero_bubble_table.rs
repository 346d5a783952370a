//! Table 5 of the zero-bubble paper (arXiv 2401.10241): the authors' bubble rates, computed from the profiled times of
//! their Table 9. A replay of our orders with these times has to give the same four digits.

use paceline_planner::replay::{StageTimes, replay};
use paceline_planner::schedules::{Request, build};

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
