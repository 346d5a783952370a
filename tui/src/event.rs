//! What happens to the state machine, and what it asks of the world. Neither knows a terminal.

use crate::calibration::{MeasureNews, ProfileView};
use crate::lanes::Lanes;
use crate::plans::Cell;
use crate::question::Answer;
use crate::search::{Found, Row, SearchProgress};
use crate::settings::Settings;
use crate::training::RunNews;
use paceline_planner::export::Target;
use ratatui::crossterm::event::{KeyEvent, MouseEvent};
use std::sync::Arc;
use toml::Table;

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
    /// How far a search is.
    Searching {
        /// Which search.
        search: u64,
        /// How far.
        progress: SearchProgress,
    },
    /// A search ended.
    Found {
        /// Which search.
        search: u64,
        /// What it found.
        outcome: Box<Result<Found, String>>,
    },
    /// A cell of the map; the last ends it.
    Cell {
        /// Which search.
        search: u64,
        /// The cell.
        cell: Box<Cell>,
        /// Whether it is the last.
        last: bool,
    },
    /// A file was written, or why not.
    Written(Result<String, String>),
    /// The timeline of the settings.
    Lanes {
        /// Of which question.
        question: u64,
        /// The timeline, or why there is none.
        outcome: Box<Result<Arc<Lanes>, String>>,
    },
    /// A recorded timeline was read.
    Recorded {
        /// From which file.
        path: String,
        /// The timeline, or what is wrong with the file.
        outcome: Box<Result<Arc<Lanes>, String>>,
    },
    /// A run goes on.
    Run {
        /// Which run.
        run: u64,
        /// What it tells.
        news: RunNews,
    },
    /// What is known of this machine.
    Profile(Box<Result<Arc<ProfileView>, String>>),
    /// How far a measurement is.
    Measuring {
        /// Which.
        number: u64,
        /// How far.
        progress: MeasureNews,
    },
    /// A measurement is over: where its profile lies, or why there is none.
    Measured {
        /// Which.
        number: u64,
        /// Its outcome.
        outcome: Result<String, String>,
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
    /// Search the open axes of a job; the search before it stops.
    Search {
        /// Names the search.
        search: u64,
        /// The job.
        job: Box<Table>,
    },
    /// Search the best plan for every model and number of nodes; the search before it stops.
    Map {
        /// Names the search.
        search: u64,
        /// The job; its model and nodes are replaced.
        job: Box<Table>,
    },
    /// Stop the search with what it has found.
    StopSearch,
    /// Write a plan to a file of its own.
    Write(Box<Row>),
    /// Write a plan for a launcher.
    Export {
        /// The plan.
        row: Box<Row>,
        /// The launcher.
        to: Target,
    },
    /// Read a recorded timeline.
    Load(String),
    /// Train.
    Train {
        /// Names the run.
        run: u64,
        /// What.
        settings: Box<Settings>,
        /// Until so many steps are done; the job's where none.
        steps: Option<u64>,
        /// From the latest checkpoint.
        resume: bool,
    },
    /// Stop the run after its present step.
    StopRun,
    /// Look at the profile of this machine.
    Profile,
    /// Measure this machine.
    Measure {
        /// Names the measurement.
        number: u64,
        /// For so long.
        seconds: f64,
        /// What is to be run on it; usual shapes are measured where it is for a cluster.
        settings: Box<Settings>,
    },
    /// Stop measuring.
    StopMeasuring,
    /// Leave.
    Quit,
}
