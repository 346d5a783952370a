//! The calibrate view.

use crate::stage::{SIZES, answer, machine, picture, press, tell};
use paceline_planner::job::Job;
use paceline_profiles::{Profile, Source};
use paceline_tui::app::App;
use paceline_tui::calibration::{MeasureNews, Measured, ProfileView};
use paceline_tui::desk::Desk;
use paceline_tui::event::{Effect, Event, News};
use paceline_tui::question::LocalMachine;
use paceline_tui::settings::Settings;
use paceline_tui::theme::Palette;
use paceline_tui::training::{End, RunNews};
use paceline_tui::workshop::{TrainOrder, Workshop};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

const JOB: &str = "model = 'demo-1m'\nseq = 64\nglobal_batch = 4\npp = 2\n";

/// A few kernels of the shipped profile, as it was when this test was written.
fn profile() -> Profile {
    Profile::read(&include_bytes!("profile.csv")[..]).unwrap()
}

fn local() -> LocalMachine {
    let profile = profile();
    LocalMachine {
        predictor: Arc::new(paceline_profiles::Predictor::new(&profile).unwrap()),
        profile: Arc::new(profile),
        origin: "a profile".into(),
        ..machine()
    }
}

fn app() -> App {
    let (mut app, _) = App::new(Settings::from_table(&JOB.parse().unwrap()), Palette::Mono, None);
    tell(&mut app, Ok(answer(2, 1.0)));
    assert_eq!(press(&mut app, "<f6>"), [Effect::Profile]);
    app
}

#[test]
fn as_it_looks() {
    let view = Arc::new(ProfileView::of(&local()).unwrap());
    for size in SIZES {
        let mut app = app();
        assert!(picture(&mut app, size).contains("fitting"));
        app.on(Event::News(News::Profile(Box::new(Ok(view.clone())))));
        press(&mut app, "j");
        insta::assert_snapshot!(format!("calibrate-{}x{}", size.0, size.1), picture(&mut app, size));
    }
    let mut app = app();
    app.on(Event::News(News::Profile(Box::new(Err("no kernel times".into())))));
    assert!(picture(&mut app, (80, 24)).contains("cannot be used: no kernel times"));
    app.on(Event::News(News::Profile(Box::new(Ok(view)))));
    for (width, height) in [(60, 16), (61, 17), (300, 100)] {
        picture(&mut app, (width, height));
    }
}

/// Sources are counted, classes carry their points, and operators without a row are named.
#[test]
fn a_profile_is_taken_apart() {
    let local = local();
    let view = ProfileView::of(&local).unwrap();
    let count = |source: Source| local.profile.rows.iter().filter(|row| row.source == source).count();
    assert_eq!(view.rows, [count(Source::Measured), count(Source::Trace), count(Source::Datasheet)]);
    assert_eq!(view.classes.iter().map(|class| class.rows[0]).sum::<usize>(), view.rows[0]);
    for class in &view.classes {
        let worst = class.points.iter().map(|point| point.error().abs()).reduce(f64::max);
        assert_eq!(worst, class.residual.as_ref().and_then(|residual| residual.worst_error), "{}", class.class);
    }
    assert!(view.assumed.contains(&"attention"));
    let known = |op: &str| view.classes.iter().any(|class| class.class.to_string() == op);
    assert!(view.assumed.iter().all(|op| !known(op)));
    assert!(view.days.is_some_and(|(first, last)| first <= last));
}

#[test]
fn measuring_is_followed_and_stopped() {
    let mut app = app();
    press(&mut app, "-");
    let effects = press(&mut app, "s");
    assert!(matches!(&effects[..], [Effect::Measure { seconds: 15.0, .. }]), "{effects:?}");
    assert!(press(&mut app, "s").is_empty(), "one at a time");
    let number = app.calibration.number;
    let progress = MeasureNews { what: "kernels, 2 devices at work".into(), fraction: 0.25 };
    app.on(Event::News(News::Measuring { number, progress }));
    let shown = picture(&mut app, (80, 24));
    assert!(shown.contains("kernels, 2 devices at work, 25.0 %") && shown.contains("====="), "{shown}");
    assert_eq!(press(&mut app, "<esc>"), [Effect::StopMeasuring]);
    app.on(Event::News(News::Measured { number, outcome: Err("calibration stopped".into()) }));
    assert!(app.calibration.running.is_none());
    assert!(app.notice.as_ref().is_some_and(|notice| !notice.bad && notice.text.contains("stopped")));
    // A finished one is looked at, and figures follow it.
    press(&mut app, "s");
    let number = app.calibration.number;
    let effects = app.on(Event::News(News::Measured { number, outcome: Ok("mine.csv".into()) }));
    assert!(matches!(&effects[..], [Effect::Profile, Effect::Ask { .. }]), "{effects:?}");
    assert!(picture(&mut app, (80, 24)).contains("mine.csv"));
}

/// Measures everything twice as slow as it was.
struct Slow;

impl Workshop for Slow {
    fn train(&self, _: TrainOrder<'_>, _: &mut dyn FnMut(RunNews), _: &Arc<AtomicBool>) -> Result<End, String> {
        Err("nothing is trained here".into())
    }

    fn measure(
        &self,
        job: Option<&Job>,
        seconds: f64,
        tell: &mut dyn FnMut(MeasureNews),
        stop: &Arc<AtomicBool>,
    ) -> Result<Measured, String> {
        assert!(job.is_some_and(|job| job.model.name == "demo-1m"));
        tell(MeasureNews { what: "kernels".into(), fraction: 0.5 });
        // A long measurement ends when it is stopped.
        if seconds > 100.0 {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            return Err("calibration stopped".into());
        }
        let mut profile = (*machine().profile).clone();
        profile.rows.iter_mut().for_each(|row| row.median_seconds *= 2.0);
        let local = LocalMachine {
            predictor: Arc::new(paceline_profiles::Predictor::new(&profile).unwrap()),
            profile: Arc::new(profile),
            ..machine()
        };
        Ok(Measured { local, path: "slow.csv".into() })
    }
}

/// After a measurement the same settings are predicted with it.
#[test]
fn the_desk_measures_and_predicts_with_it() {
    let (sender, events) = channel();
    let mut desk = Desk::open(machine(), sender).with_workshop(Arc::new(Slow));
    let (mut app, effects) = App::new(Settings::from_table(&JOB.parse().unwrap()), Palette::Mono, None);
    let mut follow = |app: &mut App, mut effects: Vec<Effect>, until: &dyn Fn(&App) -> bool| {
        loop {
            effects.drain(..).for_each(|effect| desk.carry_out(effect));
            if until(app) {
                return;
            }
            effects = app.on(events.recv_timeout(Duration::from_secs(60)).unwrap());
        }
    };
    let seconds = |app: &App| app.last.as_ref().unwrap().figures.iteration_seconds;
    follow(&mut app, effects, &|app| !app.waiting);
    let before = seconds(&app);
    let effects = press(&mut app, "<f6>s");
    follow(&mut app, effects, &|app| app.calibration.running.is_none() && !app.waiting);
    assert!((seconds(&app) / before - 2.0).abs() < 0.01, "{} {before}", seconds(&app));
    let effects = press(&mut app, "++s");
    follow(&mut app, effects, &|app| app.calibration.running.as_ref().is_some_and(|at| at.fraction > 0.0));
    let effects = press(&mut app, "<esc>");
    follow(&mut app, effects, &|app| app.calibration.running.is_none());
    assert!((seconds(&app) / before - 2.0).abs() < 0.01);
}
