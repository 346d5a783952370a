//! Times of several programs on a machine that is fast in one minute and slow in the next. They run in rounds: each program for
//! a few steps, in another order every time, so that a slow minute touches all of them alike.

use paceline_exec::{Dataset, RunReport, RunSettings, Silent, run};
use paceline_kernels::CpuDevice;
use paceline_sim::program::Program;

/// Steps of a program in a round; the first is not counted.
const STEPS: u64 = 4;

/// A program and what its runs showed, one in each round.
pub struct Runs {
    pub program: Program,
    pub reports: Vec<RunReport>,
    /// Seconds of the median step over all rounds.
    pub seconds: f64,
    /// Half of the rounds are within this of `seconds`, after all programs of a round are brought to the usual pace.
    pub spread: f64,
}

/// Runs all programs in each of some rounds.
pub fn measure(programs: Vec<Program>, rounds: u32) -> Vec<Runs> {
    let (device, data) = (CpuDevice::new(), Dataset::bundled());
    let mut reports: Vec<Vec<RunReport>> = programs.iter().map(|_| Vec::new()).collect();
    let mut order: Vec<usize> = (0..programs.len()).collect();
    let mut loss_of_all = None;
    for round in 0..rounds {
        shuffle(&mut order, round);
        for &n in &order {
            let settings = RunSettings::new(STEPS, 1e-3);
            let report = run(&programs[n], &device, &settings, &data, &mut Silent).unwrap();
            // They all train the same model.
            let loss = report.steps.last().unwrap().loss;
            let expected = *loss_of_all.get_or_insert(loss);
            assert!((loss / expected - 1.0).abs() < 1e-3, "{loss} and {expected}");
            reports[n].push(report);
        }
    }
    let typical: Vec<f64> = reports.iter().map(|all| median(all.iter().flat_map(steps).collect())).collect();
    let pace: Vec<f64> = (0..rounds as usize)
        .map(|round| {
            median(reports.iter().zip(&typical).map(|(all, usual)| all[round].median_seconds() / usual).collect())
        })
        .collect();
    let runs = programs.into_iter().zip(reports).zip(typical);
    runs.map(|((program, reports), seconds)| {
        let off = reports.iter().zip(&pace).map(|(report, pace)| (report.median_seconds() / pace - seconds).abs());
        let spread = median(off.collect());
        Runs { program, reports, seconds, spread }
    })
    .collect()
}

/// The counted steps of a run.
fn steps(report: &RunReport) -> impl Iterator<Item = f64> {
    report.steps.iter().skip(1).map(|step| step.seconds)
}

/// Another order for each round, the same in every run (SplitMix64 and Fisher-Yates).
fn shuffle(order: &mut [usize], round: u32) {
    let mut state = u64::from(round).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for last in (1..order.len()).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        order.swap(last, ((mixed ^ (mixed >> 31)) % (last as u64 + 1)) as usize);
    }
}

/// The middle value; of an even number, the mean of the two.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}
