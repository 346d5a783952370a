//! A panic under the views: the terminal is given back, and the message is there to be read.

use crate::Terminal;
use paceline_planner::configuration::Machine;
use paceline_profiles::{Predictor, Profile};
use paceline_tui::app::App;
use paceline_tui::desk::Desk;
use paceline_tui::question::LocalMachine;
use paceline_tui::settings::Settings;
use paceline_tui::terminal::show;
use paceline_tui::theme::Palette;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::time::Duration;

/// Set for the process that panics.
const TOLD: &str = "PACELINE_TEST_PANIC";

#[test]
fn a_panic_gives_the_terminal_back() {
    let this = std::env::current_exe().unwrap();
    let command =
        format!("RUST_BACKTRACE=0 {TOLD}=1 {} --exact panics::panics_when_told_to --nocapture", this.display());
    let Some(terminal) = Terminal::play("panic", &command, (100, 40)) else { return };
    terminal.shows(&["F2 Predict", "llama-3-8b"]);
    let end = terminal.shows(&["panicked at", "on purpose", "a thread panicked, which is a bug", " echo", " icanon"]);
    assert!(!end.contains("F2 Predict"), "{end}");
}

/// Does nothing unless it is the process that the test above starts.
#[test]
fn panics_when_told_to() {
    if std::env::var_os(TOLD).is_none() {
        return;
    }
    let profile = Profile::read(&include_bytes!("../../profiles/data/cpu.csv")[..]).unwrap();
    let local = LocalMachine {
        predictor: Arc::new(Predictor::new(&profile).unwrap()),
        profile: Arc::new(profile),
        machine: Machine { devices: 2, flops_per_second: None },
        origin: "shipped".into(),
    };
    let (mut app, effects) = App::new(Settings::usual(), Palette::Dark, None);
    let (sender, events) = channel();
    let mut desk = Desk::open(local, sender.clone());
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(1));
        panic!("on purpose");
    });
    let shown = show(&mut app, effects, &mut desk, (sender, events), &AtomicBool::new(false));
    println!("{}", shown.unwrap_err());
}
