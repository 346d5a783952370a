//! What the tests of views share: made-up figures, a terminal in memory, and keys by name.

use paceline_planner::configuration::Machine;
use paceline_planner::predict::{ClusterSchedule, MemoryClasses, MemoryParts, TimeParts, TokenBudget};
use paceline_planner::replay::{StageMemory, StageTimes, memory_curve, replay};
use paceline_planner::schedules::{Request, build};
use paceline_profiles::{Predictor, Profile, Shares};
use paceline_tui::app::App;
use paceline_tui::draw::draw;
use paceline_tui::event::{Effect, Event, News};
use paceline_tui::figures::Figures;
use paceline_tui::lanes::Lanes;
use paceline_tui::question::{Answer, LocalMachine};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use std::sync::Arc;

/// The sizes that views are made for.
pub const SIZES: [(u16, u16); 3] = [(80, 24), (120, 40), (200, 60)];

/// A machine of two devices with the shipped profile.
pub fn machine() -> LocalMachine {
    let profile = Profile::read(&include_bytes!("../../../profiles/data/cpu.csv")[..]).unwrap();
    LocalMachine {
        predictor: Arc::new(Predictor::new(&profile).unwrap()),
        profile: Arc::new(profile),
        machine: Machine { devices: 2, flops_per_second: Some(1e11) },
        origin: "shipped profile".into(),
    }
}

const GIB: f64 = (1u64 << 30) as f64;

/// Figures of some pipeline ranks that hold less from first to last, `scale` times the usual.
pub fn figures(ranks: usize, scale: f64) -> Figures {
    let classes = |rank: usize| {
        let rest = 1.0 - rank as f64 / (2 * ranks) as f64;
        [8.0, 8.0, 12.0, 30.0 * rest, 1.5, 6.0, 1.0].map(|gib| gib * GIB * scale)
    };
    let by_class: Vec<_> = (0..ranks).map(classes).collect();
    let peak_bytes: Vec<f64> = by_class.iter().map(|of| of.iter().sum()).collect();
    let time = TimeParts {
        compute: 6.0 * scale,
        exposed_tp: 1.0 * scale,
        exposed_dp: 0.25 * scale,
        exposed_pp: 0.5 * scale,
        exposed_cp: 0.0,
        exposed_ep: 0.0,
        bubble: 1.75 * scale,
        recompute: 0.3 * scale,
        optimizer: 0.2 * scale,
    };
    Figures {
        iteration_seconds: time.total(),
        tokens_per_second_per_gpu: 3200.0 / scale,
        mfu: Some(0.41 / scale),
        hfu: Some(0.43 / scale),
        time,
        fits: peak_bytes.iter().all(|peak| *peak <= 79.0 * GIB),
        peak_bytes,
        by_class,
        limit_bytes: Some(79.0 * GIB),
        provenance: Shares { fitted: 0.95, datasheet: 0.05, ..Shares::default() },
    }
}

/// An answer with them.
pub fn answer(ranks: usize, scale: f64) -> Answer {
    let figures = figures(ranks, scale);
    Answer {
        title: "llama-3-8b on 4 x 8 of dgx-h100-ib".into(),
        devices: 32,
        microbatches: 16,
        ratios: None,
        budget: TokenBudget::of(figures.tokens_per_second_per_gpu, 32, 1.0, 0.0),
        figures,
        source: "made up".into(),
    }
}

/// Hands the state the answer to its question.
pub fn tell(app: &mut App, outcome: Result<Answer, String>) {
    let question = app.question();
    app.on(Event::News(News::Answer { question, outcome: Box::new(outcome) }));
}

/// The state as text on a terminal of a size; styles are left out.
pub fn picture(app: &mut App, (width, height): (u16, u16)) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    let mut targets = Vec::new();
    terminal.draw(|frame| targets = draw(frame, app)).unwrap();
    app.drawn(targets);
    let buffer = terminal.backend().buffer();
    let rows = buffer.content.chunks(usize::from(width));
    let line = |row: &[ratatui::buffer::Cell]| {
        let text: String = row.iter().map(|cell| cell.symbol()).collect();
        text.trim_end().to_owned() + "\n"
    };
    rows.map(line).collect()
}

/// Presses keys: letters by themselves, others by name in angle brackets, such as `<down>` or `<c-c>`.
pub fn press(app: &mut App, keys: &str) -> Vec<Effect> {
    let mut effects = Vec::new();
    let mut rest = keys;
    while let Some(letter) = rest.chars().next() {
        let name = rest.strip_prefix('<').and_then(|inner| inner.split_once('>'));
        let key = match name {
            Some((name, after)) => {
                rest = after;
                match name {
                    "up" => KeyCode::Up.into(),
                    "down" => KeyCode::Down.into(),
                    "left" => KeyCode::Left.into(),
                    "right" => KeyCode::Right.into(),
                    "enter" => KeyCode::Enter.into(),
                    "esc" => KeyCode::Esc.into(),
                    "tab" => KeyCode::Tab.into(),
                    "backspace" => KeyCode::Backspace.into(),
                    "pgdn" => KeyCode::PageDown.into(),
                    "c-c" => KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL),
                    "c-u" => KeyEvent::new(KeyCode::Char('u'), KeyModifiers::CONTROL),
                    other => {
                        let number = other.strip_prefix('f').and_then(|n| n.parse().ok());
                        KeyCode::F(number.expect("a known key")).into()
                    }
                }
            }
            None => {
                rest = &rest[letter.len_utf8()..];
                KeyCode::Char(letter).into()
            }
        };
        effects.extend(app.on(Event::Key(key)));
    }
    effects
}

/// The timeline of a schedule in which every pass takes a second (both backwards together two), with some memory.
pub fn lanes(schedule: &str, ranks: u32, microbatches: u32) -> Lanes {
    let order = build(schedule, &Request::new(ranks, microbatches)).unwrap();
    let stages = order.placement.stages();
    let times = StageTimes::uniform(stages, 1.0, 1.0, 1.0, 0.0);
    let memory = StageMemory { until_b: vec![GIB; stages], until_w: vec![GIB; stages], checkpoint: vec![0.0; stages] };
    let timing = replay(&order, &times).unwrap();
    let activations = memory_curve(&order, &memory);
    let classes = |held: &Vec<f64>| MemoryClasses {
        parameters: 2.0 * GIB,
        activations: held.iter().copied().fold(0.0, f64::max),
        ..MemoryClasses::default()
    };
    let memory = MemoryParts { by_class: activations.iter().map(classes).collect(), ..MemoryParts::default() };
    let end = timing.makespan() + 2.0;
    let after = vec![(1.0, 0.5); ranks as usize];
    Lanes::of_schedule(&ClusterSchedule { order, timing, passes: Vec::new(), activations, after }, end, &memory)
}
