//! What happens to the state machine, and what it asks of the world. Neither knows a terminal.

use crate::lanes::Lanes;
use crate::question::Answer;
use crate::settings::Settings;
use ratatui::crossterm::event::{KeyEvent, MouseEvent};
use std::sync::Arc;

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// A key was pressed.
    Key(KeyEvent),
    /// The mouse.
    Mouse(MouseEvent),
    /// The terminal has another size.
    Resize,
    /// The desk has news.
    News(News),
}

/// What the desk found out. Numbers name the question, so that outdated answers are dropped.
#[derive(Debug)]
pub enum News {
    /// The prediction of the settings.
    Answer {
        /// Of which question.
        question: u64,
        /// The prediction, or why there is none.
        outcome: Box<Result<Answer, String>>,
    },
    /// What the values of a knob come to.
    Options {
        /// Of which question.
        question: u64,
        /// Which knob.
        knob: usize,
        /// Value by value.
        options: Vec<OptionNews>,
    },
    /// The timeline of the settings.
    Lanes {
        /// Of which question.
        question: u64,
        /// The timeline, or why there is none.
        outcome: Box<Result<Arc<Lanes>, String>>,
    },
}

/// What one value of a knob comes to.
#[derive(Debug, Clone, PartialEq)]
pub struct OptionNews {
    /// The value.
    pub value: String,
    /// Seconds per iteration and whether it fits, or why it cannot be.
    pub outcome: Result<(f64, bool), String>,
}

/// What the state machine wants done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Predict, then try the values of a knob.
    Ask {
        /// Names the question.
        question: u64,
        /// What to predict.
        settings: Box<Settings>,
        /// The knob.
        knob: usize,
    },
    /// Simulate every pass, for the timeline.
    Simulate {
        /// Names the question.
        question: u64,
        /// What to simulate.
        settings: Box<Settings>,
    },
    /// Leave.
    Quit,
}
