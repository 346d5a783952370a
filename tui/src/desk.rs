//! Where simulation happens: a thread of its own that answers the latest question and drops outdated ones.

use crate::event::{Effect, Event, News, OptionNews};
use crate::plans::Cell;
use crate::question::{Answer, LocalMachine, ask, simulate};
use crate::search::{find, plan_file};
use crate::settings::Settings;
use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
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

/// The way to the thread.
#[derive(Debug)]
pub struct Desk {
    asked: Sender<Asked>,
    latest: Arc<AtomicU64>,
    local: LocalMachine,
    news: Sender<Event>,
    /// Stops the search under way.
    stop: Arc<AtomicBool>,
}

/// Plans that a search keeps.
const KEPT: usize = 500;

/// Models of the map, from small to large, and numbers of nodes.
const MODELS: [&str; 6] = ["llama-3-8b", "llama-2-13b", "mixtral-8x7b", "llama-3-70b", "gpt3-175b", "llama-3.1-405b"];
const NODES: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

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
        let (machine, told) = (local.clone(), news.clone());
        std::thread::spawn(move || answer(&machine, &questions, &told, &of_thread));
        Desk { asked, latest, local, news, stop: Arc::default() }
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
            Effect::Write(row) => {
                let written = plan_file(&row, &self.local).and_then(|text| {
                    let kind = if row.scored.is_some() { "json" } else { "toml" };
                    write_new(kind, &text).map_err(|error| format!("the plan cannot be written: {error}"))
                });
                drop(self.news.send(Event::News(News::Written(written))));
            }
            Effect::Quit => self.stop.store(true, Ordering::Relaxed),
        }
    }

    /// Stops the search before and starts another on a thread of its own.
    fn search(&mut self, work: impl FnOnce(&LocalMachine, &Sender<Event>, &AtomicBool) + Send + 'static) {
        self.stop.store(true, Ordering::Relaxed);
        self.stop = Arc::default();
        let (local, news, stop) = (self.local.clone(), self.news.clone(), self.stop.clone());
        std::thread::spawn(move || work(&local, &news, &stop));
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

/// Writes a file of a name that is not taken, in the working folder; returns the name.
fn write_new(kind: &str, text: &str) -> io::Result<String> {
    for number in 1..1000 {
        let name = if number == 1 { format!("plan.{kind}") } else { format!("plan-{number}.{kind}") };
        match File::create_new(&name) {
            Ok(mut file) => return file.write_all(text.as_bytes()).map(|()| name),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("plan.* to plan-999.* are all taken"))
}

fn answer(local: &LocalMachine, questions: &Receiver<Asked>, news: &Sender<Event>, latest: &AtomicU64) {
    let mut known: Option<(Settings, Result<Answer, String>)> = None;
    while let Ok(asked) = questions.recv() {
        let outdated = || latest.load(Ordering::Acquire) != asked.question;
        if outdated() {
            continue;
        }
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
            Some((settings, outcome)) if *settings == *asked.settings => outcome.clone(),
            _ => ask(&asked.settings, local),
        };
        known = Some(((*asked.settings).clone(), outcome.clone()));
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
