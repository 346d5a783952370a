//! The state of the plan view: a search under way, what it found, and how that is sorted, filtered and shown.

use crate::search::{Found, Row, SearchProgress};
use crate::settings::Settings;
use paceline_planner::export::Target;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use serde::{Deserialize, Serialize};
use toml::Table;

/// Keys of a job that a search may choose. Everything else is what is searched for.
const AXES: [&str; 12] =
    ["micro_batch", "tp", "sp", "cp", "pp", "chunks", "ep", "dp", "states", "group_size", "schedule", "recompute"];

/// What rows are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sort {
    /// Fastest first.
    #[default]
    Time,
    /// Least memory first.
    Memory,
    /// Smallest share of bubbles first.
    Bubble,
    /// By their names.
    Configuration,
}

/// How plans are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// A row each.
    #[default]
    Table,
    /// Memory against throughput.
    Pareto,
    /// The best of every model and number of nodes.
    Map,
}

/// The best plan of a model on a number of nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    /// Its model.
    pub model: String,
    /// Its nodes.
    pub nodes: u32,
    /// The plan, or why there is none.
    pub best: Result<Row, String>,
}

/// What the keys of this view ask for.
#[derive(Debug, Clone, PartialEq)]
pub enum Wish {
    /// Start a search.
    Search,
    /// Stop it.
    Stop,
    /// Start the map.
    Map,
    /// Open a plan in Predict.
    Open(Box<Row>),
    /// Write a plan to a file.
    Write(Box<Row>),
    /// Write a plan for a launcher.
    Export(Box<Row>, Target),
}

/// The state.
#[derive(Debug, Default)]
pub struct Plans {
    /// Names the search whose news count.
    pub search: u64,
    /// Whether it is under way.
    pub running: bool,
    /// How far it is.
    pub progress: SearchProgress,
    /// What it found, or what is wrong with the job.
    pub found: Option<Result<Found, String>>,
    /// Whether it is of the map.
    pub mapping: bool,
    /// Cells of the map, as they come.
    pub cells: Vec<Cell>,
    /// How plans are shown.
    pub shape: Shape,
    /// What rows are sorted by.
    pub sort: Sort,
    /// Only rows whose configuration contains all of these words.
    pub filter: String,
    /// Whether the filter is being typed.
    pub typing: bool,
    /// Whether a launcher is being chosen.
    pub choosing: bool,
    /// The row with the focus, of those that are shown.
    pub at: usize,
    /// The cell with the focus: its place in the lists of models and of nodes.
    pub cell: (usize, usize),
}

/// Models of the map, from small to large, and numbers of nodes.
pub(crate) const MODELS: [&str; 6] =
    ["llama-3-8b", "llama-2-13b", "mixtral-8x7b", "llama-3-70b", "gpt3-175b", "llama-3.1-405b"];
pub(crate) const NODES: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

/// The job whose open axes are searched: what to train on what from the knobs, and of the axes only those that the job fixed.
pub fn job_to_search(settings: &Settings, opened: &Table) -> Table {
    let mut job = settings.table();
    for axis in AXES {
        job.remove(axis);
        if let Some(fixed) = opened.get(axis) {
            job.insert(axis.to_owned(), fixed.clone());
        }
    }
    job
}

impl Plans {
    /// The rows that are shown, in their order, with their places among all.
    pub fn rows(&self) -> Vec<(usize, &Row)> {
        let Some(Ok(found)) = &self.found else { return Vec::new() };
        let words: Vec<&str> = self.filter.split_whitespace().collect();
        let wanted = |row: &&Row| words.iter().all(|word| row.configuration.contains(word));
        let mut rows: Vec<(usize, &Row)> = found.rows.iter().enumerate().filter(|(_, row)| wanted(row)).collect();
        let bubble = |row: &Row| row.figures.time.bubble / row.figures.iteration_seconds;
        match self.sort {
            Sort::Time => {}
            Sort::Memory => rows.sort_by(|a, b| a.1.figures.fullest().1.total_cmp(&b.1.figures.fullest().1)),
            Sort::Bubble => rows.sort_by(|a, b| bubble(a.1).total_cmp(&bubble(b.1))),
            Sort::Configuration => rows.sort_by(|a, b| a.1.configuration.cmp(&b.1.configuration)),
        }
        rows
    }

    /// Models of the map, in the order in which they came.
    pub fn models(&self) -> Vec<&str> {
        let mut models: Vec<&str> = Vec::new();
        for cell in &self.cells {
            if !models.contains(&cell.model.as_str()) {
                models.push(&cell.model);
            }
        }
        models
    }

    /// Numbers of nodes of the map.
    pub fn nodes(&self) -> Vec<u32> {
        let mut nodes: Vec<u32> = self.cells.iter().map(|cell| cell.nodes).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// A cell of the map.
    pub fn cell_of(&self, model: &str, nodes: u32) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.model == model && cell.nodes == nodes)
    }

    /// The plan with the focus.
    pub fn focused(&self) -> Option<&Row> {
        if self.shape == Shape::Map {
            let (models, nodes) = (self.models(), self.nodes());
            let cell = self.cell_of(models.get(self.cell.0)?, *nodes.get(self.cell.1)?)?;
            return cell.best.as_ref().ok();
        }
        self.rows().get(self.at).map(|(_, row)| *row)
    }

    /// Whether no other row has both less memory and more throughput.
    pub fn is_best_trade(&self, row: &Row) -> bool {
        let Some(Ok(found)) = &self.found else { return false };
        let (peak, time) = (row.figures.fullest().1, row.figures.iteration_seconds);
        !found.rows.iter().any(|other| {
            let (other_peak, other_time) = (other.figures.fullest().1, other.figures.iteration_seconds);
            other_peak <= peak && other_time <= time && (other_peak < peak || other_time < time)
        })
    }

    /// Whether keys are letters of an answer.
    pub fn is_asking(&self) -> bool {
        self.typing || self.choosing
    }

    /// Takes a key.
    pub fn key(&mut self, key: KeyEvent) -> Option<Wish> {
        if self.choosing {
            self.choosing = false;
            let KeyCode::Char(letter) = key.code else { return None };
            let target = Target::ALL.into_iter().find(|target| target.name().starts_with(letter))?;
            return self.focused().cloned().map(|row| Wish::Export(Box::new(row), target));
        }
        if self.typing {
            match key.code {
                KeyCode::Esc => {
                    self.typing = false;
                    self.filter.clear();
                }
                KeyCode::Enter => self.typing = false,
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Char(letter) if !key.modifiers.contains(KeyModifiers::CONTROL) => self.filter.push(letter),
                _ => {}
            }
            self.at = 0;
            return None;
        }
        let most = match self.shape {
            Shape::Map => self.models().len(),
            _ => self.rows().len(),
        };
        let at = if self.shape == Shape::Map { &mut self.cell.0 } else { &mut self.at };
        match key.code {
            KeyCode::Down | KeyCode::Char('j') => *at = (*at + 1).min(most.saturating_sub(1)),
            KeyCode::Up | KeyCode::Char('k') => *at = at.saturating_sub(1),
            KeyCode::PageDown => *at = (*at + 10).min(most.saturating_sub(1)),
            KeyCode::PageUp => *at = at.saturating_sub(10),
            KeyCode::Home | KeyCode::Char('g') => *at = 0,
            KeyCode::End | KeyCode::Char('G') => *at = most.saturating_sub(1),
            KeyCode::Right | KeyCode::Char('l') if self.shape == Shape::Map => {
                self.cell.1 = (self.cell.1 + 1).min(self.nodes().len().saturating_sub(1));
            }
            KeyCode::Left | KeyCode::Char('h') if self.shape == Shape::Map => {
                self.cell.1 = self.cell.1.saturating_sub(1)
            }
            KeyCode::Char('s') => return Some(Wish::Search),
            KeyCode::Esc if self.running => return Some(Wish::Stop),
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Char('e') => self.choosing = self.focused().is_some(),
            KeyCode::Char('o') => {
                self.sort = match self.sort {
                    Sort::Time => Sort::Memory,
                    Sort::Memory => Sort::Bubble,
                    Sort::Bubble => Sort::Configuration,
                    Sort::Configuration => Sort::Time,
                };
                self.at = 0;
            }
            KeyCode::Char('v') => {
                self.shape = match self.shape {
                    Shape::Table => Shape::Pareto,
                    Shape::Pareto => Shape::Map,
                    Shape::Map => Shape::Table,
                }
            }
            KeyCode::Char('m') => {
                self.shape = Shape::Map;
                return Some(Wish::Map);
            }
            KeyCode::Enter => {
                return Some(self.focused().map_or(Wish::Search, |row| Wish::Open(Box::new(row.clone()))));
            }
            KeyCode::Char('w') => return self.focused().map(|row| Wish::Write(Box::new(row.clone()))),
            _ => {}
        }
        None
    }
}
