//! Where simulation happens: a thread of its own that answers the latest question and drops outdated ones.

use crate::event::{Effect, Event, News, OptionNews};
use crate::question::{Answer, LocalMachine, ask};
use crate::settings::Settings;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

/// A question as it travels to the thread.
struct Asked {
    question: u64,
    settings: Box<Settings>,
    knob: usize,
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
        if let Effect::Ask { question, settings, knob } = effect {
            self.latest.store(question, Ordering::Release);
            // The thread is gone only when the program ends.
            drop(self.asked.send(Asked { question, settings, knob }));
        }
    }
}

fn answer(local: &LocalMachine, questions: &Receiver<Asked>, news: &Sender<Event>, latest: &AtomicU64) {
    let mut known: Option<(Settings, Result<Answer, String>)> = None;
    while let Ok(asked) = questions.recv() {
        let outdated = || latest.load(Ordering::Acquire) != asked.question;
        if outdated() {
            continue;
        }
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
        for value in asked.settings.options(asked.knob) {
            if outdated() {
                break;
            }
            let outcome = ask(&asked.settings.with(asked.knob, &value), local);
            let outcome = outcome.map(|answer| (answer.figures.iteration_seconds, answer.figures.fits));
            options.push(OptionNews { value, outcome });
        }
        if !outdated()
            && news.send(Event::News(News::Options { question: asked.question, knob: asked.knob, options })).is_err()
        {
            return;
        }
    }
}
