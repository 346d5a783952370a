//! Where work happens, off the UI's thread: one thread answers the latest question and drops outdated ones, and searches, runs
//! and measurements have a thread each.

use crate::calibration::ProfileView;
use crate::event::{Effect, Event, News, OptionNews};
use crate::files;
use crate::lanes::Lanes;
use crate::plans::{Cell, MODELS, NODES};
use crate::question::{Answer, LocalMachine, ask, local_job, simulate};
use crate::recorded;
use crate::search::find;
use crate::settings::Settings;
use crate::training::{Begun, End, RunNews};
use crate::workshop::{TrainOrder, Workshop};
use paceline_planner::prediction::predict;
use paceline_profiles::Profile;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use toml::Table;

/// A question as it travels to the thread.
struct Asked {
    question: u64,
    settings: Box<Settings>,
    wanted: Wanted,
}

/// What is asked.
enum Wanted {
    /// The prediction, then what the values of a knob come to.
    Prediction { knob: usize },
    /// The timeline.
    Lanes,
}

/// The way to the threads.
pub struct Desk {
    asked: Sender<Asked>,
    latest: Arc<AtomicU64>,
    local: Machine,
    news: Sender<Event>,
    /// Stops the search under way.
    stop: Arc<AtomicBool>,
    workshop: Option<Arc<dyn Workshop>>,
    /// Stops the run or the measurement under way, of which there is one at a time.
    stop_work: Arc<AtomicBool>,
    work: Option<JoinHandle<()>>,
}

/// This machine as it is known now: a measurement replaces it.
#[derive(Clone)]
struct Machine(Arc<Mutex<LocalMachine>>);

impl Machine {
    fn now(&self) -> LocalMachine {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, local: LocalMachine) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = local;
    }
}

/// Plans that a search keeps.
const KEPT: usize = 500;

impl std::fmt::Debug for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "question {}", self.question)
    }
}

impl Desk {
    /// Starts the thread; it ends with the desk.
    pub fn open(local: LocalMachine, news: Sender<Event>) -> Desk {
        let (asked, questions) = channel();
        let latest = Arc::new(AtomicU64::new(0));
        let of_thread = latest.clone();
        let local = Machine(Arc::new(Mutex::new(local)));
        let (machine, told) = (local.clone(), news.clone());
        std::thread::spawn(move || answer(&machine, &questions, &told, &of_thread));
        Desk { asked, latest, local, news, stop: Arc::default(), workshop: None, stop_work: Arc::default(), work: None }
    }

    /// The same with a workshop, which trains and measures.
    pub fn with_workshop(self, workshop: Arc<dyn Workshop>) -> Desk {
        Desk { workshop: Some(workshop), ..self }
    }

    /// Whether a run or a measurement is under way.
    pub fn is_at_work(&self) -> bool {
        self.work.as_ref().is_some_and(|work| !work.is_finished())
    }

    /// Ends everything, and waits until a run has come to the end of its step and written its checkpoint.
    pub fn close(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.stop_work.store(true, Ordering::Relaxed);
        if let Some(work) = self.work.take() {
            // A thread that panicked has said so.
            drop(work.join());
        }
    }

    /// Does what the state machine wants.
    pub fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Ask { question, settings, knob } => {
                self.latest.store(question, Ordering::Release);
                self.ask(Asked { question, settings, wanted: Wanted::Prediction { knob } });
            }
            Effect::Simulate { question, settings } => {
                self.ask(Asked { question, settings, wanted: Wanted::Lanes });
            }
            Effect::Search { search, job } => self.search(move |local, news, stop| {
                let last = Mutex::new(Instant::now());
                let tell = |progress| {
                    // More often than screens refresh is of no use.
                    if let Ok(mut last) = last.lock()
                        && last.elapsed() > Duration::from_millis(30)
                    {
                        *last = Instant::now();
                        drop(news.send(Event::News(News::Searching { search, progress })));
                    }
                    !stop.load(Ordering::Relaxed)
                };
                let outcome = Box::new(find(&job, local, KEPT, &tell));
                drop(news.send(Event::News(News::Found { search, outcome })));
            }),
            Effect::Map { search, job } => self.search(move |local, news, stop| map(search, &job, local, news, stop)),
            Effect::StopSearch => self.stop.store(true, Ordering::Relaxed),
            Effect::Write(row) => self.write(move |local| files::write_plan(&row, local, Path::new("."))),
            Effect::Export { row, to } => self.write(move |local| files::export_plan(&row, local, to, Path::new("."))),
            Effect::Load(path) => {
                let news = self.news.clone();
                std::thread::spawn(move || {
                    let outcome = Box::new(recorded::read(Path::new(path.trim())).map(Arc::new));
                    drop(news.send(Event::News(News::Recorded { path, outcome })));
                });
            }
            Effect::Profile => {
                let (local, news) = (self.local.now(), self.news.clone());
                std::thread::spawn(move || {
                    let outcome = Box::new(ProfileView::of(&local).map(Arc::new));
                    drop(news.send(Event::News(News::Profile(outcome))));
                });
            }
            Effect::Train { run, settings, steps, resume } => {
                let news = self.news.clone();
                let tell = move |told| drop(news.send(Event::News(News::Run { run, news: told })));
                self.work(move |workshop, machine, stop| {
                    let ended = match workshop {
                        Some(workshop) => train(workshop, &machine.now(), &settings, steps, resume, &tell, stop),
                        None => Err("there is no workshop that could train".into()),
                    };
                    tell(RunNews::Ended(ended));
                });
            }
            Effect::Measure { number, seconds, settings } => {
                let news = self.news.clone();
                self.work(move |workshop, machine, stop| {
                    let mut tell = |progress| drop(news.send(Event::News(News::Measuring { number, progress })));
                    let job =
                        if settings.is_local() { local_job(&settings).map(|(job, _)| Some(job)) } else { Ok(None) };
                    let outcome = match (workshop, job) {
                        (Some(workshop), Ok(job)) => workshop.measure(job.as_ref(), seconds, &mut tell, stop),
                        (None, _) => Err("there is no workshop that could measure".into()),
                        (_, Err(why)) => Err(why),
                    };
                    let outcome = outcome.map(|measured| {
                        machine.replace(measured.local);
                        measured.path
                    });
                    drop(news.send(Event::News(News::Measured { number, outcome })));
                });
            }
            Effect::StopRun | Effect::StopMeasuring => self.stop_work.store(true, Ordering::Relaxed),
            Effect::Quit => self.stop.store(true, Ordering::Relaxed),
        }
    }

    /// Stops the search before and starts another on a thread of its own.
    fn search(&mut self, work: impl FnOnce(&LocalMachine, &Sender<Event>, &AtomicBool) + Send + 'static) {
        self.stop.store(true, Ordering::Relaxed);
        self.stop = Arc::default();
        let (local, news, stop) = (self.local.now(), self.news.clone(), self.stop.clone());
        std::thread::spawn(move || work(&local, &news, &stop));
    }

    /// Starts a run or a measurement on a thread of its own. The state machine asks for one at a time.
    fn work(&mut self, work: impl FnOnce(Option<&dyn Workshop>, &Machine, &Arc<AtomicBool>) + Send + 'static) {
        let before = self.work.take();
        self.stop_work.store(true, Ordering::Relaxed);
        self.stop_work = Arc::default();
        let (workshop, machine, stop) = (self.workshop.clone(), self.local.clone(), self.stop_work.clone());
        self.work = Some(std::thread::spawn(move || {
            // What was before is at its end; a panic there was told by its own thread.
            drop(before.map(JoinHandle::join));
            work(workshop.as_deref(), &machine, &stop);
        }));
    }

    /// Writes files on a thread of its own, and tells where they lie.
    fn write(&self, work: impl FnOnce(&LocalMachine) -> Result<String, String> + Send + 'static) {
        let (local, news) = (self.local.now(), self.news.clone());
        std::thread::spawn(move || drop(news.send(Event::News(News::Written(work(&local))))));
    }

    fn ask(&self, asked: Asked) {
        // The thread is gone only when the program ends.
        drop(self.asked.send(asked));
    }
}

/// The best plan of every model on every number of nodes.
fn map(search: u64, job: &Table, local: &LocalMachine, news: &Sender<Event>, stop: &AtomicBool) {
    let on_cluster = !Settings::from_table(job).is_local();
    for (row, model) in MODELS.into_iter().enumerate() {
        for (column, nodes) in NODES.into_iter().enumerate() {
            let mut job = job.clone();
            job.insert("model".into(), model.into());
            job.insert("nodes".into(), i64::from(nodes).into());
            let best = if on_cluster {
                find(&job, local, 1, &|_| !stop.load(Ordering::Relaxed)).and_then(|found| {
                    let nothing = found.nothing.unwrap_or_else(|| "no plan".into());
                    found.rows.into_iter().next().ok_or(nothing)
                })
            } else {
                Err("the map is of clusters; choose one in Predict".into())
            };
            let last = row + 1 == MODELS.len() && column + 1 == NODES.len();
            let stopped = stop.load(Ordering::Relaxed);
            let cell = Box::new(Cell { model: model.into(), nodes, best });
            let told = news.send(Event::News(News::Cell { search, cell, last: last || stopped }));
            if stopped || told.is_err() {
                return;
            }
        }
    }
}

/// Lowers and predicts what the settings say, and has it trained.
fn train(
    workshop: &dyn Workshop,
    local: &LocalMachine,
    settings: &Settings,
    steps: Option<u64>,
    resume: bool,
    tell: &dyn Fn(RunNews),
    stop: &Arc<AtomicBool>,
) -> Result<End, String> {
    let (job, configuration) = local_job(settings)?;
    let machine = local.machine.for_job(&job);
    let program = configuration.program(&job, machine).map_err(|error| error.to_string())?;
    let (prediction, trace) =
        predict(&program, &*local.predictor, machine, job.memory_limit).map_err(|error| error.to_string())?;
    tell(RunNews::Begun(Box::new(Begun {
        title: format!("{}: {configuration}", job.model.name),
        predicted_seconds: prediction.iteration_seconds,
        predicted_peaks: trace.ranks.iter().map(|rank| rank.peak_bytes).collect(),
        limit_bytes: prediction.memory.limit_bytes,
        predicted: Arc::new(Lanes::of_trace(&trace)),
    })));
    let order = TrainOrder { job: &job, program: &program, steps: steps.unwrap_or(job.train.steps), resume };
    workshop.train(order, &mut |news| tell(news), stop)
}

fn answer(machine: &Machine, questions: &Receiver<Asked>, news: &Sender<Event>, latest: &AtomicU64) {
    let mut known: Option<(Settings, Arc<Profile>, Result<Answer, String>)> = None;
    while let Ok(asked) = questions.recv() {
        let outdated = || latest.load(Ordering::Acquire) != asked.question;
        if outdated() {
            continue;
        }
        let local = &machine.now();
        let knob = match asked.wanted {
            Wanted::Prediction { knob } => knob,
            Wanted::Lanes => {
                let outcome = Box::new(simulate(&asked.settings, local).map(Arc::new));
                if news.send(Event::News(News::Lanes { question: asked.question, outcome })).is_err() {
                    return;
                }
                continue;
            }
        };
        let outcome = match &known {
            // What was predicted with another profile is outdated.
            Some((settings, profile, outcome))
                if *settings == *asked.settings && Arc::ptr_eq(profile, &local.profile) =>
            {
                outcome.clone()
            }
            _ => ask(&asked.settings, local),
        };
        known = Some(((*asked.settings).clone(), local.profile.clone(), outcome.clone()));
        let told = News::Answer { question: asked.question, outcome: Box::new(outcome) };
        if news.send(Event::News(told)).is_err() {
            return;
        }
        let mut options = Vec::new();
        for value in asked.settings.options(knob) {
            if outdated() {
                break;
            }
            let outcome = ask(&asked.settings.with(knob, &value), local);
            let outcome = outcome.map(|answer| (answer.figures.iteration_seconds, answer.figures.fits));
            options.push(OptionNews { value, outcome });
        }
        if !outdated() && news.send(Event::News(News::Options { question: asked.question, knob, options })).is_err() {
            return;
        }
    }
}
