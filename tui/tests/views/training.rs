//! The run view.

use crate::stage::{SIZES, answer, lanes, machine, picture, press, tell};
use paceline_planner::job::Job;
use paceline_sim::trace::Trace;
use paceline_tui::activity::{Activity, KINDS, activities};
use paceline_tui::app::{App, View};
use paceline_tui::calibration::{MeasureNews, Measured};
use paceline_tui::desk::Desk;
use paceline_tui::event::{Effect, Event, News};
use paceline_tui::lanes::Lanes;
use paceline_tui::question::LocalMachine;
use paceline_tui::settings::Settings;
use paceline_tui::theme::Palette;
use paceline_tui::timeline::Shown;
use paceline_tui::training::{Begun, End, Look, Phase, RunNews, Step};
use paceline_tui::workshop::{TrainOrder, Workshop};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

const JOB: &str = "model = 'demo-1m'\nseq = 64\nglobal_batch = 4\npp = 2\n[train]\nsteps = 40\n";

fn app() -> App {
    let (mut app, _) = App::new(Settings::from_table(&JOB.parse().unwrap()), Palette::Mono, None);
    tell(&mut app, Ok(answer(2, 1.0)));
    assert!(press(&mut app, "<f5>").is_empty());
    assert_eq!(app.view, View::Run);
    app
}

fn news(app: &mut App, news: RunNews) {
    let run = app.training.run;
    app.on(Event::News(News::Run { run, news }));
}

fn step(number: u64) -> Step {
    let n = number as f64;
    Step {
        step: number,
        seconds: 0.1 + 0.002 * (n * 2.4).sin(),
        loss: 2.0 + 3.0 / n,
        gradient_norm: 0.5,
        tokens_per_second: 2560.0,
    }
}

fn rank(busy: f64) -> Activity {
    let seconds = [busy / 3.0, busy * 2.0 / 3.0, 0.0, 0.004, 0.006, 0.09 - busy];
    Activity { seconds, peak_bytes: 40 << 20, moved_bytes: 6e6, moving_seconds: 0.004 }
}

/// A run of two ranks after some steps.
fn begin(app: &mut App, ranks: usize, steps: u64) {
    let effects = press(app, "s");
    assert!(matches!(&effects[..], [Effect::Train { resume: false, steps: None, .. }]), "{effects:?}");
    let begun = Begun {
        title: "demo-1m: pp 2 1f1b".into(),
        predicted_seconds: 0.102,
        predicted_peaks: vec![40 << 20; ranks],
        limit_bytes: Some(64 << 20),
        predicted: Arc::new(lanes("1f1b", 2, 4)),
    };
    news(app, RunNews::Begun(Box::new(begun)));
    news(app, RunNews::HeldOut(0, 5.5));
    for number in 1..=steps {
        news(app, RunNews::Step(step(number)));
    }
    let ranks = (0..ranks).map(|n| rank(0.08 - 0.002 * n as f64)).collect();
    let look = Look { step: steps, ranks, lanes: Arc::new(lanes("1f1b", 2, 4)) };
    news(app, RunNews::Look(Box::new(look)));
}

#[test]
fn as_it_looks() {
    for size in SIZES {
        let mut app = app();
        begin(&mut app, 2, 24);
        insta::assert_snapshot!(format!("run-{}x{}", size.0, size.1), picture(&mut app, size));
    }
    let mut app = app();
    insta::assert_snapshot!("run-none-yet", picture(&mut app, (80, 24)));
    begin(&mut app, 24, 3);
    press(&mut app, "<pgdn>");
    insta::assert_snapshot!("run-24-ranks", picture(&mut app, (80, 24)));
    for (width, height) in [(60, 16), (61, 17), (300, 100)] {
        picture(&mut app, (width, height));
    }
}

#[test]
fn a_run_is_stopped_and_goes_on_with_its_curve() {
    let mut app = app();
    begin(&mut app, 2, 12);
    let shown = picture(&mut app, (120, 40));
    assert!(shown.contains("training: step 12 of 40") && shown.contains("1.40 GiB/s"), "{shown}");
    assert!(shown.contains("predicted 102 ms, measured"), "{shown}");
    // It cannot be started twice, and stops once.
    assert!(press(&mut app, "sr").is_empty());
    assert_eq!(press(&mut app, "<esc>"), [Effect::StopRun]);
    assert_eq!(app.training.phase, Phase::Stopping);
    news(&mut app, RunNews::Step(step(13)));
    news(&mut app, RunNews::Saved("job.checkpoints/step-00000013".into()));
    let end = End { stopped: true, lanes: Arc::new(lanes("gpipe", 2, 4)) };
    news(&mut app, RunNews::Ended(Ok(end)));
    let shown = picture(&mut app, (120, 40));
    assert!(shown.contains("stopped after step 13 of 40; r goes on") && shown.contains("step-00000013"), "{shown}");
    // Its median step lies under the predicted one.
    assert!(app.timeline.measured.is_some() && app.timeline.shown == Shown::Both);
    let effects = press(&mut app, "r");
    assert!(matches!(&effects[..], [Effect::Train { resume: true, steps: None, .. }]));
    news(&mut app, RunNews::Step(step(14)));
    assert_eq!(app.training.steps.iter().map(|step| step.step).collect::<Vec<_>>(), (1..=14).collect::<Vec<_>>());
    // News of the run before do not count any more.
    let run = app.training.run - 1;
    app.on(Event::News(News::Run { run, news: RunNews::Ended(Err("old".into())) }));
    assert!(app.training.is_running());
    news(&mut app, RunNews::Ended(Err("the loss is NaN".into())));
    assert!(picture(&mut app, (80, 24)).contains("failed: the loss is NaN"));
}

#[test]
fn steps_are_typed_turned_and_raised_where_all_are_done() {
    let mut app = app();
    press(&mut app, "+");
    assert_eq!(app.training.steps_wanted, Some(80));
    press(&mut app, "--");
    assert_eq!(app.training.steps_wanted, Some(20));
    press(&mut app, "3<backspace>15<enter>");
    assert_eq!(app.training.steps_wanted, Some(15));
    press(&mut app, "9<esc>");
    assert_eq!(app.training.steps_wanted, Some(15));
    begin_with(&mut app, 15);
    let effects = press(&mut app, "r");
    assert!(matches!(&effects[..], [Effect::Train { resume: true, steps: Some(55), .. }]), "{effects:?}");
}

fn begin_with(app: &mut App, steps: u64) {
    press(app, "s");
    for number in 1..=steps {
        news(app, RunNews::Step(step(number)));
    }
    news(app, RunNews::Ended(Ok(End { stopped: false, lanes: Arc::new(lanes("1f1b", 2, 4)) })));
    assert_eq!(app.training.phase, Phase::Done);
}

/// What a run needs is said where it is not there, and nothing starts.
#[test]
fn what_cannot_run_says_so() {
    let (mut app, _) = App::new(Settings::usual(), Palette::Mono, None);
    press(&mut app, "<f5>");
    assert!(picture(&mut app, (80, 24)).contains("of a cluster"));
    assert!(press(&mut app, "s").is_empty());
    assert!(picture(&mut app, (80, 24)).contains("a run is on this machine"));
    let (mut app, _) = App::new(Settings::from_table(&JOB.parse().unwrap()), Palette::Mono, None);
    press(&mut app, "<f6>s<f5>");
    assert!(press(&mut app, "s").is_empty());
    assert!(picture(&mut app, (80, 24)).contains("being measured"));
}

/// Counts steps instead of training, and looks at the simulated step.
struct Cardboard;

impl Workshop for Cardboard {
    fn train(
        &self,
        order: TrainOrder<'_>,
        tell: &mut dyn FnMut(RunNews),
        stop: &Arc<AtomicBool>,
    ) -> Result<End, String> {
        if order.resume {
            return Err("no checkpoint in nowhere".into());
        }
        let trace = predicted(order, &machine());
        for number in 1..=order.steps {
            tell(RunNews::Step(step(number)));
            if stop.load(Ordering::Relaxed) {
                return Ok(End { stopped: true, lanes: Arc::new(Lanes::of_trace(&trace)) });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let ranks = activities(order.program, &trace);
        tell(RunNews::Look(Box::new(Look { step: 1, ranks, lanes: Arc::new(Lanes::of_trace(&trace)) })));
        Ok(End { stopped: false, lanes: Arc::new(Lanes::of_trace(&trace)) })
    }

    fn measure(
        &self,
        _: Option<&Job>,
        _: f64,
        _: &mut dyn FnMut(MeasureNews),
        _: &Arc<AtomicBool>,
    ) -> Result<Measured, String> {
        Err("cardboard measures nothing".into())
    }
}

fn predicted(order: TrainOrder<'_>, local: &LocalMachine) -> Trace {
    let machine = local.machine.for_job(order.job);
    paceline_planner::prediction::predict(order.program, &*local.predictor, machine, None).unwrap().1
}

/// Through the desk: begun, trained to the end, stopped before it, and refused; and what the ranks did adds up.
#[test]
fn the_desk_trains() {
    let (sender, events) = channel();
    let mut desk = Desk::open(machine(), sender).with_workshop(Arc::new(Cardboard));
    let mut app = app();
    let mut follow = |app: &mut App, keys: &str| {
        for effect in press(app, keys) {
            desk.carry_out(effect);
        }
        while app.training.is_running() {
            app.on(events.recv_timeout(Duration::from_secs(60)).unwrap());
        }
    };
    follow(&mut app, "3<enter>s");
    assert_eq!((app.training.phase.clone(), app.training.steps.len()), (Phase::Done, 3));
    let begun = app.training.begun.clone().unwrap();
    assert!(begun.title.contains("demo-1m") && begun.predicted_peaks.len() == 2);
    let look = app.training.look.clone().unwrap();
    for (rank, peak) in look.ranks.iter().zip(&begun.predicted_peaks) {
        let all: f64 = rank.seconds.iter().sum();
        assert!((all / begun.predicted_seconds - 1.0).abs() < 1e-6, "{rank:?}");
        assert!(rank.seconds[0] > 0.0 && rank.seconds[1] > rank.seconds[0] && rank.seconds[3] > 0.0);
        assert_eq!((rank.peak_bytes, rank.seconds.len()), (*peak, KINDS));
    }
    // Four microbatches of one sequence: 64 tokens of 128 numbers forward to the second rank, and back to the first; between
    // them also the gradient norm.
    let message = 64.0 * f64::from(width()) * 4.0 * 4.0;
    for rank in &look.ranks {
        let beside = rank.moved_bytes - message;
        assert!((0.0..message * 0.05).contains(&beside), "{} {message}", rank.moved_bytes);
        assert!(rank.bandwidth().is_some_and(|speed| speed > 1e6));
    }
    follow(&mut app, "9<backspace>100000<enter>s<esc>");
    assert_eq!(app.training.phase, Phase::Stopped);
    assert!(app.training.steps.len() < 1000);
    follow(&mut app, "r");
    assert_eq!(app.training.phase, Phase::Failed("no checkpoint in nowhere".into()));
    desk.close();
}

fn width() -> u32 {
    let job = Job::from_table(JOB.parse().unwrap(), "job").unwrap();
    job.model.hidden
}
