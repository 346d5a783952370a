//! The view of one configuration.

use crate::stage::{SIZES, answer, machine, picture, press, tell};
use paceline_tui::app::{App, Notice};
use paceline_tui::event::{Effect, Event, News, OptionNews};
use paceline_tui::question::{ask, cluster_requests};
use paceline_tui::settings::{KNOBS, Settings, place_of};
use paceline_tui::theme::Palette;
use ratatui::crossterm::event::{KeyModifiers, MouseButton, MouseEvent, MouseEventKind};

fn app() -> App {
    App::new(Settings::usual(), Palette::Dark, None).0
}

fn options(app: &mut App) {
    let (question, knob) = (app.question(), app.knob);
    let option = |value: &str, outcome: Result<(f64, bool), &str>| OptionNews {
        value: value.into(),
        outcome: outcome.map_err(str::to_owned),
    };
    let options = vec![
        option("1", Ok((9.1, false))),
        option("2", Ok((10.0, true))),
        option("4", Ok((11.5, true))),
        option("64", Err("tp = 64 does not divide the 32 attention heads; take a divisor of them")),
    ];
    app.on(Event::News(News::Options { question, knob, options }));
}

#[test]
fn as_it_looks() {
    for size in SIZES {
        let mut app = app();
        tell(&mut app, Ok(answer(2, 1.0)));
        press(&mut app, "jjjjjjj<right>");
        tell(&mut app, Ok(answer(2, 0.9)));
        options(&mut app);
        insta::assert_snapshot!(format!("predict-{}x{}", size.0, size.1), picture(&mut app, size));
    }
}

#[test]
fn one_rank_many_ranks_and_too_much_memory() {
    for (name, ranks, scale) in [("one-rank", 1, 1.0), ("64-ranks", 64, 1.0), ("too-much", 4, 1.6)] {
        let mut app = app();
        tell(&mut app, Ok(answer(ranks, scale)));
        insta::assert_snapshot!(format!("predict-{name}"), picture(&mut app, (80, 24)));
    }
    let mut app = app();
    tell(&mut app, Ok(answer(64, 1.0)));
    press(&mut app, "<pgdn><pgdn>");
    assert!(picture(&mut app, (80, 24)).contains("r16"));
}

#[test]
fn impossible_settings_say_why_and_keep_the_latest_that_were_possible() {
    let mut app = app();
    tell(&mut app, Ok(answer(2, 1.0)));
    press(&mut app, "jjjjjjj<right>");
    tell(&mut app, Err("tp x cp x pp x dp = 33, but there are 32 GPUs; change dp or nodes".into()));
    let shown = picture(&mut app, (80, 24));
    assert!(shown.contains("Impossible: tp x cp") && shown.contains("the latest that was possible"), "{shown}");
    assert!(shown.contains("llama-3-8b on 4 x 8"), "{shown}");
}

#[test]
fn huge_names_and_no_colours() {
    let mut app = app();
    let name = "a-model-with-a-name-that-no-terminal-is-wide-enough-for-".repeat(4);
    app.settings = app.settings.with(0, &name);
    let mut huge = answer(2, 1.0);
    huge.title = format!("{name} on 4 x 8 of dgx-h100-ib");
    tell(&mut app, Ok(huge));
    app.palette = Palette::Mono;
    insta::assert_snapshot!("predict-huge-mono", picture(&mut app, (80, 24)));
}

#[test]
fn too_small_terminals_say_so() {
    let mut app = app();
    tell(&mut app, Ok(answer(2, 1.0)));
    assert_eq!(picture(&mut app, (20, 5)), "20 x 5 is too small.\nPaceline needs 60 x…\nq quits.\n\n\n");
    for width in 1..90 {
        for height in 1..26 {
            picture(&mut app, (width, height));
        }
    }
    picture(&mut app, (400, 120));
}

#[test]
fn a_broken_job_opens_with_the_error_and_the_default() {
    let text = "job broken.toml: not a TOML document; showing the default".to_string();
    let (mut app, effects) = App::new(Settings::usual(), Palette::Dark, Some(Notice { text, bad: true }));
    assert!(matches!(&effects[..], [Effect::Ask { settings, .. }] if **settings == Settings::usual()));
    tell(&mut app, Ok(answer(2, 1.0)));
    let shown = picture(&mut app, (80, 24));
    assert!(shown.contains("error: job broken.toml: not a TOML document") && shown.contains("llama-3-8b"), "{shown}");
    press(&mut app, "j");
    assert!(!picture(&mut app, (80, 24)).contains("broken"));
}

#[test]
fn keys_turn_knobs_and_ask() {
    let mut app = app();
    let tp = place_of("tp").unwrap();
    for _ in 0..tp {
        press(&mut app, "j");
    }
    let effects = press(&mut app, "l");
    assert_eq!(app.settings.get("tp"), Some("4"));
    let [Effect::Ask { question, settings, knob }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((*question, settings.get("tp"), *knob), (app.question(), Some("4"), tp));
    press(&mut app, "hh");
    assert_eq!(app.settings.get("tp"), Some("1"));
    press(&mut app, "16<enter>");
    assert_eq!((app.settings.get("tp"), app.typed.as_deref()), (Some("16"), None));
    // Refused input stays to be mended, and the value stays as it was.
    press(&mut app, "0<enter>");
    assert_eq!((app.settings.get("tp"), app.typed.as_deref()), (Some("16"), Some("0")));
    assert!(app.notice.as_ref().is_some_and(|notice| notice.bad && notice.text.contains("from 1 on")));
    press(&mut app, "<backspace>8<enter>");
    assert_eq!(app.settings.get("tp"), Some("8"));
    press(&mut app, "4<esc>x");
    assert_eq!(app.settings.get("tp"), None);
    assert!(press(&mut app, "x").is_empty(), "nothing changed, nothing is asked");
    press(&mut app, "<enter>");
    // While a value is typed, letters are letters.
    press(&mut app, "q");
    assert_eq!(app.typed.as_deref(), Some("q"));
    assert_eq!(press(&mut app, "<c-c>"), [Effect::Quit]);
    press(&mut app, "<esc>");
    assert_eq!(press(&mut app, "q"), [Effect::Quit]);
}

#[test]
fn outdated_answers_are_dropped() {
    let mut app = app();
    let old = app.question();
    press(&mut app, "jj<right>");
    app.on(Event::News(News::Answer { question: old, outcome: Box::new(Ok(answer(1, 2.0))) }));
    assert!(app.waiting && app.answer.is_none());
    tell(&mut app, Ok(answer(2, 1.0)));
    assert!(!app.waiting);
    assert_eq!(app.answer.as_ref().unwrap().as_ref().unwrap().figures.peak_bytes.len(), 2);
}

#[test]
fn figures_are_held_against_the_setting_before_or_a_pinned_one() {
    let mut app = app();
    tell(&mut app, Ok(answer(2, 1.0)));
    assert!(app.before.is_none());
    press(&mut app, "jj<right>");
    tell(&mut app, Ok(answer(2, 0.5)));
    assert!(picture(&mut app, (120, 40)).contains("-50.0 %"));
    press(&mut app, "p<right>");
    tell(&mut app, Ok(answer(2, 1.0)));
    press(&mut app, "<right>");
    tell(&mut app, Ok(answer(2, 2.0)));
    assert!(picture(&mut app, (120, 40)).contains("+300.0 %"));
}

#[test]
fn the_mouse_finds_what_is_drawn() {
    let mut app = app();
    tell(&mut app, Ok(answer(2, 1.0)));
    picture(&mut app, (80, 24));
    let mouse = |kind, row| Event::Mouse(MouseEvent { kind, column: 3, row, modifiers: KeyModifiers::NONE });
    app.on(mouse(MouseEventKind::Down(MouseButton::Left), 1 + 7));
    assert_eq!(KNOBS[app.knob].key, "tp");
    let effects = app.on(mouse(MouseEventKind::ScrollUp, 1 + 7));
    assert_eq!((app.settings.get("tp"), effects.len()), (Some("4"), 1));
}

#[test]
fn help_lies_over_the_view_until_a_key() {
    let mut app = app();
    tell(&mut app, Ok(answer(2, 1.0)));
    press(&mut app, "?");
    insta::assert_snapshot!("predict-help", picture(&mut app, (80, 24)));
    assert!(press(&mut app, "j").is_empty());
    assert!(!app.help && app.knob == 0);
}

/// What the view shows is what `paceline predict --json` prints.
#[test]
fn figures_are_those_of_the_command_line() {
    use paceline_planner::predict::predict_cluster;
    use paceline_sim::cluster::Physics;
    let settings = Settings::usual();
    let answer = ask(&settings, &machine()).unwrap();
    let (model, layout, cluster) = cluster_requests(settings.table()).unwrap()[0].resolve().unwrap();
    let prediction = predict_cluster(&model, &layout, &cluster, &Physics::of(&cluster).unwrap()).unwrap();
    let json = prediction.to_json().unwrap();
    let figures = &answer.figures;
    assert_eq!(json["iteration_seconds"], figures.iteration_seconds);
    assert_eq!(json["tokens_per_second_per_gpu"], figures.tokens_per_second_per_gpu);
    assert_eq!(json["mfu"].as_f64(), figures.mfu);
    assert_eq!(json["memory"]["peak_bytes"][1], figures.peak_bytes[1]);
    assert_eq!(json["memory"]["by_class"][0]["activations"], figures.by_class[0][3]);
    assert!((figures.parts().iter().sum::<f64>() / figures.iteration_seconds - 1.0).abs() < 1e-12);
    assert_eq!((answer.devices, figures.peak_bytes.len()), (32, 2));
}

#[test]
fn this_machine_and_impossible_jobs_answer_too() {
    let machine = machine();
    let table = "model = 'demo-3m'\nseq = 256\nglobal_batch = 8\npp = 2".parse().unwrap();
    let mut settings = Settings::from_table(&table);
    let answer = ask(&settings, &machine).unwrap();
    assert_eq!((answer.figures.peak_bytes.len(), answer.devices), (2, 2));
    assert!(answer.figures.iteration_seconds > 0.0 && answer.figures.limit_bytes.is_none());
    settings.set(place_of("tp").unwrap(), "2").unwrap();
    let why = ask(&settings, &machine).unwrap_err();
    assert!(why.contains("tp = 2"), "{why}");
    let mut far = Settings::usual().with(place_of("global_batch").unwrap(), "7");
    assert!(ask(&far, &machine).unwrap_err().contains("global_batch"));
    far = Settings::from_table(&"cluster = 'dgx-h100-ib'\nmodle = 'x'".parse().unwrap());
    assert!(ask(&far, &machine).unwrap_err().contains("model is missing"));
}
