//! From a key to the finished frame: the state machine, the desk on its thread and drawing, for a large job (Llama 3 70B on 512
//! GPUs, 16 pipeline ranks, 64 microbatches). `cargo bench -p paceline-tui --bench latency`.

use paceline_planner::configuration::Machine;
use paceline_profiles::{Predictor, Profile};
use paceline_tui::app::App;
use paceline_tui::desk::Desk;
use paceline_tui::draw::draw;
use paceline_tui::event::{Event, News};
use paceline_tui::question::LocalMachine;
use paceline_tui::settings::{Settings, place_of};
use paceline_tui::theme::Palette;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::KeyCode;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

const JOB: &str =
    "model = 'llama-3-70b'\ncluster = 'dgx-h100-ib'\nnodes = 64\nseq = 8192\nglobal_batch = 256\ntp = 8\npp = 16\n";

/// Knobs that are turned. Each key makes settings that were not asked for before, as long as there are any, so that schedules are
/// built and not remembered.
const TURNED: [&str; 6] = ["schedule", "seq", "schedule", "recompute", "precision", "states"];

fn main() {
    let profile = Profile::read(&include_bytes!("../../profiles/data/cpu.csv")[..]).expect("the shipped profile");
    let local = LocalMachine {
        predictor: Arc::new(Predictor::new(&profile).expect("the shipped profile fits")),
        profile: Arc::new(profile),
        machine: Machine { devices: 2, flops_per_second: None },
        origin: "shipped".into(),
    };
    let (sender, events) = channel();
    let mut desk = Desk::open(local, sender);
    let job = JOB.parse().expect("a job");
    let (mut app, first) = App::new(Settings::from_table(&job), Palette::Dark, None);
    let mut terminal = Terminal::new(TestBackend::new(120, 40)).expect("a terminal in memory");
    let mut settle = |app: &mut App, effects: Vec<_>, desk: &mut Desk| {
        for effect in effects {
            desk.carry_out(effect);
        }
        loop {
            let event = events.recv().expect("the desk answers");
            let answered = matches!(&event, Event::News(News::Answer { question, .. }) if *question == app.question());
            app.on(event);
            if answered {
                break;
            }
        }
        terminal.draw(|frame| drop(draw(frame, app))).expect("a frame");
    };
    settle(&mut app, first, &mut desk);
    let (mut times, mut impossible) = (Vec::new(), 0);
    let mut slowest = (Duration::ZERO, String::new());
    let mut asked = HashSet::new();
    let mut repeated = 0;
    for round in 0..400 {
        // One knob after the other, so that their combinations are walked through.
        app.knob = place_of(TURNED[round % TURNED.len()]).expect("a knob");
        // Sequences go up and down between 8 Ki and 64 Ki; words go round.
        let back = TURNED[round % TURNED.len()] == "seq" && round / TURNED.len() % 6 >= 3;
        let key = if back { KeyCode::Left } else { KeyCode::Right };
        let begin = Instant::now();
        let effects = app.on(Event::Key(key.into()));
        if effects.is_empty() {
            continue;
        }
        settle(&mut app, effects, &mut desk);
        let took = begin.elapsed();
        times.push(took);
        if took > slowest.0 {
            let of = |key: &str| app.settings.get(key).unwrap_or("-").to_owned();
            slowest = (took, ["schedule", "seq", "recompute", "precision", "states"].map(of).join(" "));
        }
        repeated += u32::from(!asked.insert(app.settings.table().to_string()));
        impossible += u32::from(!app.answer.as_ref().is_some_and(Result::is_ok));
    }
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!(
        "key to finished frame, {} keys ({repeated} asked for before, {impossible} impossible): median {:.2?}, 90 % {:.2?}, 99 % {:.2?}, worst {:.2?}",
        times.len(),
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0)
    );
    println!("the slowest: {}", slowest.1);
}
