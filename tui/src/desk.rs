//! Where simulation happens: a thread of its own that answers the latest question and drops outdated ones.

use crate::event::{Effect, Event, News, OptionNews};
use crate::question::{Answer, LocalMachine, ask, simulate};
use crate::settings::Settings;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

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
}

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
        std::thread::spawn(move || answer(&local, &questions, &news, &of_thread));
        Desk { asked, latest }
    }

    /// Does what the state machine wants.
    pub fn carry_out(&self, effect: Effect) {
        match effect {
            Effect::Ask { question, settings, knob } => {
                self.latest.store(question, Ordering::Release);
                self.ask(Asked { question, settings, wanted: Wanted::Prediction { knob } });
            }
            Effect::Simulate { question, settings } => {
                self.ask(Asked { question, settings, wanted: Wanted::Lanes });
            }
            Effect::Quit => {}
        }
    }

    fn ask(&self, asked: Asked) {
        // The thread is gone only when the program ends.
        drop(self.asked.send(asked));
    }
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
