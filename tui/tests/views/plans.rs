//! The plan view.

use crate::stage::{SIZES, answer, figures, machine, picture, press, tell};
use paceline_planner::export::Target;
use paceline_tui::app::{App, View};
use paceline_tui::desk::Desk;
use paceline_tui::event::{Effect, Event, News};
use paceline_tui::plans::{Cell, job_to_search};
use paceline_tui::search::{Found, Row, SearchProgress};
use paceline_tui::settings::{Settings, place_of};
use paceline_tui::theme::Palette;
use std::sync::mpsc::channel;
use std::time::Duration;

fn row(name: &str, scale: f64, ranks: usize) -> Row {
    let job = format!(
        "model = 'llama-3-8b'\ncluster = 'dgx-h100-ib'\nseq = 8192\nglobal_batch = 128\nnodes = 4\npp = {ranks}"
    );
    let mut figures = figures(ranks, scale);
    // Faster plans hold more.
    figures.peak_bytes.iter_mut().for_each(|peak| *peak /= scale * scale);
    Row { configuration: name.into(), job: job.parse().unwrap(), figures, scored: None }
}

fn app() -> App {
    let (mut app, _) = App::new(Settings::usual(), Palette::Mono, None);
    tell(&mut app, Ok(answer(2, 1.0)));
    assert!(press(&mut app, "<f4>").is_empty());
    app
}

fn found(app: &mut App) {
    let effects = press(app, "s");
    assert!(matches!(&effects[..], [Effect::Search { search, .. }] if *search == app.plans.search));
    let rows =
        vec![row("dp 16 pp 2 zb-h1", 0.8, 2), row("dp 4 pp 8 1f1b", 0.9, 8), row("dp 32 full recomputation", 1.2, 1)];
    let outcome = Found {
        rows,
        candidates: 120,
        pruned: [40, 0, 21],
        simulated: 99,
        search_seconds: 0.4,
        gap: Some(0.9),
        nothing: None,
    };
    let search = app.plans.search;
    app.on(Event::News(News::Found { search, outcome: Box::new(Ok(outcome)) }));
}

#[test]
fn as_it_looks() {
    for size in SIZES {
        let mut app = app();
        found(&mut app);
        press(&mut app, "j");
        insta::assert_snapshot!(format!("plan-{}x{}", size.0, size.1), picture(&mut app, size));
    }
    let mut app = app();
    assert!(picture(&mut app, (80, 24)).contains("no search yet"));
    found(&mut app);
    press(&mut app, "v");
    insta::assert_snapshot!("plan-pareto", picture(&mut app, (80, 24)));
    for (width, height) in [(60, 16), (300, 100)] {
        picture(&mut app, (width, height));
    }
}

#[test]
fn progress_is_shown_and_a_search_is_stopped() {
    let mut app = app();
    press(&mut app, "s");
    let search = app.plans.search;
    let progress =
        SearchProgress { candidates: 900, decided: 450, memory: 100, invalid: 7, best: Some(4.2), bound: Some(2.1) };
    app.on(Event::News(News::Searching { search, progress }));
    let shown = picture(&mut app, (80, 24));
    assert!(shown.contains("450 of 900") && shown.contains("100 too large") && shown.contains("2.00 times"), "{shown}");
    assert_eq!(press(&mut app, "<esc>"), [Effect::StopSearch]);
    // News of a search before count no more.
    press(&mut app, "s");
    app.on(Event::News(News::Found { search, outcome: Box::new(Err("old".into())) }));
    assert!(app.plans.running && app.plans.found.is_none());
    let search = app.plans.search;
    let nothing = Found { nothing: Some("no plan fits; raise the limit".into()), ..Found::default() };
    app.on(Event::News(News::Found { search, outcome: Box::new(Ok(nothing)) }));
    assert!(picture(&mut app, (80, 24)).contains("no plan fits"));
}

#[test]
fn rows_are_sorted_filtered_opened_and_written() {
    let mut app = app();
    found(&mut app);
    let names = |app: &App| app.plans.rows().iter().map(|(place, _)| *place).collect::<Vec<_>>();
    assert_eq!(names(&app), [0, 1, 2]);
    press(&mut app, "o");
    assert_eq!(names(&app), [2, 1, 0]);
    press(&mut app, "ooo/pp<enter>");
    assert_eq!(names(&app), [0, 1]);
    press(&mut app, "/ 8<enter>j");
    assert_eq!(names(&app), [1]);
    assert!(matches!(&press(&mut app, "w")[..], [Effect::Write(row)] if row.configuration == "dp 4 pp 8 1f1b"));
    press(&mut app, "e");
    assert!(picture(&mut app, (120, 24)).contains("export for: (m)egatron (t)orchtitan"));
    assert!(press(&mut app, "<esc>").is_empty() && !app.plans.choosing);
    let effects = press(&mut app, "ed");
    assert!(matches!(&effects[..], [Effect::Export { to: Target::Deepspeed, .. }]), "{effects:?}");
    app.on(Event::News(News::Written(Ok("plan.json".into()))));
    assert!(picture(&mut app, (80, 24)).contains("written to plan.json"));
    let effects = press(&mut app, "<enter>");
    assert_eq!((app.view, app.settings.get("pp")), (View::Predict, Some("8")));
    assert!(matches!(&effects[..], [Effect::Ask { .. }]));
    press(&mut app, "<f4>/zigzag");
    assert!(picture(&mut app, (80, 24)).contains("no plan contains"));
    press(&mut app, "<esc>");
    assert_eq!(names(&app).len(), 3);
}

/// Knobs say what is trained on what; of the axes only those that the job fixed stay fixed.
#[test]
fn a_search_frees_what_the_job_leaves_open() {
    let opened: toml::Table =
        "model = 'gpt2'\nseq = 1024\nglobal_batch = 8\ntp = 2\n[train]\nsteps = 3".parse().unwrap();
    let mut settings = Settings::from_table(&opened);
    settings.set(place_of("tp").unwrap(), "8").unwrap();
    settings.set(place_of("nodes").unwrap(), "16").unwrap();
    settings.set(place_of("pp").unwrap(), "4").unwrap();
    let job = job_to_search(&settings, &opened);
    let number = |key: &str| job.get(key).and_then(toml::Value::as_integer);
    assert_eq!((number("tp"), number("pp"), number("nodes")), (Some(2), None, Some(16)));
    assert!(job.contains_key("train"));
}

#[test]
fn the_map_fills_cell_by_cell() {
    let mut app = app();
    let effects = press(&mut app, "m");
    assert!(matches!(&effects[..], [Effect::Map { .. }]));
    let search = app.plans.search;
    for (model, nodes, scale) in [("llama-3-8b", 1, 0.8), ("llama-3-8b", 4, 1.2), ("llama-3-70b", 1, 2.0)] {
        let best = if scale < 2.0 { Ok(row("dp 8", scale, 1)) } else { Err("no plan fits".into()) };
        let cell = Cell { model: model.into(), nodes, best };
        let before = app.plans.cells.len();
        assert!(picture(&mut app, (80, 24)).contains(&format!("searching: {before} of 42 cells")));
        app.on(Event::News(News::Cell { search, cell: Box::new(cell), last: scale == 2.0 }));
    }
    assert!(!app.plans.running);
    press(&mut app, "l");
    insta::assert_snapshot!("plan-map", picture(&mut app, (80, 24)));
    press(&mut app, "hj");
    assert!(picture(&mut app, (80, 24)).contains("llama-3-70b on 1 node: no plan fits"));
}

#[test]
fn the_desk_searches_and_stops() {
    let (sender, events) = channel();
    let mut desk = Desk::open(machine(), sender);
    let (mut app, _) = App::new(Settings::usual(), Palette::Dark, None);
    for effect in press(&mut app, "<f4>s") {
        desk.carry_out(effect);
    }
    while app.plans.running {
        app.on(events.recv_timeout(Duration::from_secs(60)).unwrap());
    }
    let Some(Ok(found)) = &app.plans.found else { panic!("{:?}", app.plans.found) };
    assert!(found.rows.len() > 10 && found.simulated > found.rows.len() / 2);
    // A search that is stopped at once ends with less.
    let all = found.simulated;
    for effect in press(&mut app, "s<esc>") {
        desk.carry_out(effect);
    }
    while app.plans.running {
        app.on(events.recv_timeout(Duration::from_secs(60)).unwrap());
    }
    let Some(Ok(found)) = &app.plans.found else { panic!("{:?}", app.plans.found) };
    assert!(found.simulated < all, "{} {all}", found.simulated);
}
