//! The timeline.

use crate::stage::{SIZES, answer, lanes, machine, picture, press, tell};
use paceline_planner::prediction::predict;
use paceline_tui::app::{App, View};
use paceline_tui::desk::Desk;
use paceline_tui::event::{Effect, Event, News};
use paceline_tui::lanes::Lanes;
use paceline_tui::question::local_job;
use paceline_tui::settings::Settings;
use paceline_tui::theme::Palette;
use ratatui::crossterm::event::{KeyModifiers, MouseButton, MouseEvent, MouseEventKind};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

fn app(lanes: Lanes) -> App {
    let (mut app, _) = App::new(Settings::usual(), Palette::Mono, None);
    tell(&mut app, Ok(answer(2, 1.0)));
    let effects = press(&mut app, "<f3>");
    assert!(matches!(&effects[..], [Effect::Simulate { question, .. }] if *question == app.question()));
    let question = app.question();
    app.on(Event::News(News::Lanes { question, outcome: Box::new(Ok(Arc::new(lanes))) }));
    app
}

#[test]
fn as_it_looks() {
    for size in SIZES {
        let mut app = app(lanes("1f1b", 4, 8));
        press(&mut app, "jjn");
        insta::assert_snapshot!(format!("timeline-{}x{}", size.0, size.1), picture(&mut app, size));
    }
    let mut app = app(lanes("zb-h1", 64, 80));
    picture(&mut app, (80, 24));
    press(&mut app, &"j".repeat(40));
    insta::assert_snapshot!("timeline-64-ranks", picture(&mut app, (80, 24)));
}

#[test]
fn one_rank_and_any_size() {
    let mut app = app(lanes("1f1b", 1, 1));
    insta::assert_snapshot!("timeline-one-rank", picture(&mut app, (80, 24)));
    press(&mut app, "++++<right><right>LLHcnG");
    for (width, height) in [(60, 16), (61, 17), (300, 100), (80, 17)] {
        picture(&mut app, (width, height));
    }
}

#[test]
fn zooming_keeps_the_cursor_in_sight_and_shows_microbatches() {
    let mut app = app(lanes("1f1b", 4, 8));
    picture(&mut app, (80, 24));
    assert_eq!(app.timeline.window(), (0.0, app.timeline.end()));
    press(&mut app, "ccc+++");
    let (from, to) = app.timeline.window();
    assert!((to - from - app.timeline.end() / 8.0).abs() < 1e-9);
    assert!((from..to).contains(&app.timeline.cursor));
    assert!(picture(&mut app, (80, 24)).contains("F2"));
    press(&mut app, "G");
    let (from, to) = app.timeline.window();
    assert!((from..=to).contains(&app.timeline.cursor) && app.timeline.cursor == app.timeline.end());
    press(&mut app, "----");
    assert_eq!(app.timeline.window(), (0.0, app.timeline.end()));
}

#[test]
fn the_critical_path_and_gaps_are_walked_with_reasons() {
    let mut app = app(lanes("1f1b", 4, 8));
    let mut ranks = Vec::new();
    for _ in 0..4 {
        press(&mut app, "c");
        assert!(app.timeline.span().is_some_and(|span| span.critical));
        ranks.push(app.timeline.rank);
    }
    // The first pass begins where the cursor is, so the walk goes on from it through the pipeline.
    assert_eq!(ranks, [1, 2, 3, 3]);
    press(&mut app, "gn");
    assert_eq!(app.timeline.gap().unwrap().why, "waits for forward of microbatch 0 on stage 2 (r2)");
    assert!(picture(&mut app, (120, 40)).contains("idle for 3.00 s: waits for forward of microbatch 0"));
}

#[test]
fn predicted_is_shown_above_measured() {
    let mut app = app(lanes("1f1b", 2, 4));
    let mut measured = lanes("gpipe", 2, 4);
    measured.measured = true;
    let outcome = Box::new(Ok(Arc::new(measured)));
    app.on(Event::News(News::Recorded { path: "run.json".into(), outcome }));
    insta::assert_snapshot!("timeline-both", picture(&mut app, (80, 24)));
    // What is under the cursor is held against what it took.
    press(&mut app, "c");
    assert!(picture(&mut app, (120, 24)).contains("predicted 1.00 s, measured 1.00 s (+0.0 %)"));
    press(&mut app, "m");
    assert!(picture(&mut app, (80, 24)).contains("predicted, 2 ranks"));
    press(&mut app, "m");
    assert!(picture(&mut app, (80, 24)).contains("measured, 2 ranks"));
}

/// A traced step comes back from both kinds of files as it was in memory: passes, gaps with their reasons, memory, the
/// critical path.
#[test]
fn recorded_timelines_are_read_from_files() {
    let job: toml::Table = "model = 'demo-1m'\nseq = 64\nglobal_batch = 4\npp = 2".parse().unwrap();
    let (job, configuration) = local_job(&Settings::from_table(&job)).unwrap();
    let local = machine();
    let program = configuration.program(&job, local.machine.for_job(&job)).unwrap();
    let (_, mut trace) = predict(&program, &*local.predictor, local.machine.for_job(&job), None).unwrap();
    trace.origin = paceline_sim::trace::Origin::Measured;
    let expected = Lanes::of_trace(&trace);
    assert!(expected.lanes[0].gaps.iter().any(|gap| gap.why.contains("on its way")), "{:?}", expected.lanes[0].gaps);
    let folder = std::env::temp_dir().join(format!("paceline-recorded-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let ours = write("run.json", serde_json::to_string(&trace).unwrap());
    let chrome = write("chrome.json", trace.to_chrome().to_string());
    let foreign =
        write("foreign.json", r#"{"traceEvents":[{"ph":"X","name":"aten::mm","pid":1,"ts":1,"dur":2}]}"#.into());
    let broken = write("broken.json", "{\"traceEvents\": [".into());
    let (sender, events) = channel();
    let mut desk = Desk::open(local, sender);
    let mut app = app(lanes("1f1b", 2, 4));
    let mut load = |app: &mut App, path: &str| {
        for effect in press(app, &format!("fx<c-u>{path}<enter>")) {
            desk.carry_out(effect);
        }
        app.on(events.recv_timeout(Duration::from_secs(60)).unwrap());
    };
    for path in [&ours, &chrome] {
        app.timeline.measured = None;
        load(&mut app, path);
        let read = app.timeline.measured.clone().unwrap_or_else(|| panic!("{:?}", app.notice));
        assert!(read.measured && (read.end - expected.end).abs() < 1e-6);
        assert_eq!(read.lanes.len(), 2);
        for (read, expected) in read.lanes.iter().zip(&expected.lanes) {
            let whats =
                |lane: &paceline_tui::lanes::Lane| lane.spans.iter().map(|s| (s.what, s.critical)).collect::<Vec<_>>();
            assert_eq!(whats(read), whats(expected));
            let whys =
                |lane: &paceline_tui::lanes::Lane| lane.gaps.iter().map(|gap| gap.why.clone()).collect::<Vec<_>>();
            assert_eq!(whys(read), whys(expected));
            assert_eq!((read.peak_bytes, read.memory.len()), (expected.peak_bytes, expected.memory.len()));
        }
    }
    for (path, why) in
        [(&foreign, "pass of Paceline"), (&broken, "truncated"), (&"/nowhere.json".to_string(), "No such file")]
    {
        load(&mut app, path);
        let notice = app.notice.clone().unwrap();
        assert!(notice.bad && notice.text.contains(why), "{notice:?}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn the_mouse_sets_the_cursor_and_the_wheel_zooms() {
    let mut app = app(lanes("1f1b", 4, 8));
    picture(&mut app, (80, 24));
    let mouse = |kind, column, row| Event::Mouse(MouseEvent { kind, column, row, modifiers: KeyModifiers::NONE });
    app.on(mouse(MouseEventKind::Down(MouseButton::Left), 40, 2 + 3));
    assert_eq!(app.timeline.rank, 3);
    assert!((app.timeline.cursor / app.timeline.end() - 0.48).abs() < 0.02);
    app.on(mouse(MouseEventKind::ScrollUp, 40, 5));
    assert!(app.timeline.span > 0.0);
}

/// The timeline of other settings is asked for anew, and an outdated one is dropped.
#[test]
fn timelines_follow_the_settings() {
    let mut app = app(lanes("1f1b", 4, 8));
    assert!(press(&mut app, "<f2><f3>").is_empty(), "the settings are the same");
    let old = app.question();
    press(&mut app, "<f2>jj<right>");
    let effects = press(&mut app, "<f3>");
    assert!(matches!(&effects[..], [Effect::Simulate { .. }]));
    assert!(picture(&mut app, (80, 24)).contains("simulating"));
    app.on(Event::News(News::Lanes { question: old, outcome: Box::new(Ok(Arc::new(lanes("gpipe", 2, 2)))) }));
    assert!(app.timeline.predicted.is_none());
    let question = app.question();
    app.on(Event::News(News::Lanes { question, outcome: Box::new(Err("tp = 3 is impossible".into())) }));
    assert!(picture(&mut app, (80, 24)).contains("Impossible: tp = 3"));
}

/// The desk answers both kinds of questions, for clusters and for this machine, and drops what is outdated.
#[test]
fn the_desk_answers() {
    let (sender, events) = channel();
    let mut desk = Desk::open(machine(), sender);
    let local = "model = 'demo-1m'\nseq = 64\nglobal_batch = 4\npp = 2".parse().unwrap();
    for settings in [Settings::usual(), Settings::from_table(&local)] {
        let (mut app, effects) = App::new(settings, Palette::Dark, None);
        for effect in effects.into_iter().chain(app.show(View::Timeline)) {
            desk.carry_out(effect);
        }
        while app.waiting || app.timeline.predicted.is_none() {
            app.on(events.recv_timeout(Duration::from_secs(60)).unwrap());
        }
        assert!(matches!(app.answer, Some(Ok(_))), "{:?}", app.answer);
        let lanes = app.timeline.lanes().unwrap();
        assert_eq!(lanes.lanes.len(), 2);
        let seconds = app.last.as_ref().unwrap().figures.iteration_seconds;
        assert!((lanes.end / seconds - 1.0).abs() < 1e-3, "{} {seconds}", lanes.end);
        // Work, gaps and memory are there on every rank.
        for lane in &lanes.lanes {
            assert!(!lane.spans.is_empty() && !lane.memory.is_empty() && lane.peak_bytes > 0.0);
            assert!(lane.gaps.iter().all(|gap| !gap.why.is_empty()));
        }
    }
}
