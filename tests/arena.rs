//! The arenas of real programs: every schedule, several models and layouts, packed close to the peak of live bytes.

use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::Job;
use paceline_planner::schedules::SCHEDULES;
use paceline_sim::arena;
use paceline_sim::memory::walk;
use paceline_sim::program::Program;
use paceline_sim::units::RankId;

fn program(lines: &str) -> Option<Program> {
    let job = Job::from_table(lines.parse().unwrap(), "job.toml").unwrap();
    let configuration = Configuration::of_job(&job).unwrap();
    configuration.program(&job, Machine { devices: 8, flops_per_second: None }).ok()
}

#[test]
fn nearly_all_arenas_are_within_one_per_cent_of_the_peak() {
    let mut overheads = Vec::new();
    let mut worst = (0.0f64, String::new());
    for schedule in SCHEDULES.iter().map(|schedule| schedule.name) {
        for model in ["model = 'demo-1m'\nseq = 64", "model = 'gpt2'\nseq = 1024", "model = 'llama-2-7b'\nseq = 4096"] {
            for layout in ["micro_batch = 2", "dp = 2\nstates = 'zero1'\nrecompute = 'full'"] {
                let lines = format!("{model}\nglobal_batch = 16\npp = 4\nschedule = '{schedule}'\n{layout}\n");
                let Some(program) = program(&lines) else { continue };
                for rank in 0..program.ranks.len() {
                    let arena = arena::plan(&program.ranks[rank], 256);
                    assert_eq!(arena.peak, walk(&program, RankId(rank as u32)).peak_bytes, "{lines} rank {rank}");
                    overheads.push(arena.overhead());
                    if arena.overhead() > worst.0 {
                        worst = (arena.overhead(), format!("{lines} rank {rank}: {} of {}", arena.bytes, arena.peak));
                    }
                }
            }
        }
    }
    overheads.sort_by(f64::total_cmp);
    let (count, at) = (overheads.len(), |share: f64| 100.0 * overheads[(overheads.len() as f64 * share) as usize]);
    println!(
        "{count} arenas: median {:.3} %, 95 of 100 within {:.3} %, the worst {:.3} %",
        at(0.5),
        at(0.95),
        100.0 * worst.0
    );
    assert!(count > 300, "only {count} programs");
    assert!(at(0.5) <= 0.1 && at(0.95) <= 1.0, "95 of 100 are within {:.3} % of their peaks", at(0.95));
    assert!(worst.0 <= 0.04, "{:.3} % over the peak: {}", 100.0 * worst.0, worst.1);
}
