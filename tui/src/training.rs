//! The state of the run view: what trains, how far it is, and what its ranks do.

use crate::activity::Activity;
use crate::lanes::Lanes;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use std::sync::Arc;

/// What a run was begun with.
#[derive(Debug, Clone, PartialEq)]
pub struct Begun {
    /// Model and configuration in one line.
    pub title: String,
    /// Predicted seconds of a step.
    pub predicted_seconds: f64,
    /// Predicted highest bytes of each rank.
    pub predicted_peaks: Vec<u64>,
    /// What a rank may hold.
    pub limit_bytes: Option<u64>,
    /// The predicted timeline.
    pub predicted: Arc<Lanes>,
}

/// A step that is done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Its number, from 1 on.
    pub step: u64,
    /// Seconds.
    pub seconds: f64,
    /// Mean over the tokens of the global batch.
    pub loss: f64,
    /// Global norm of the gradients, before clipping.
    pub gradient_norm: f64,
    /// Tokens of the global batch over the seconds.
    pub tokens_per_second: f64,
}

/// A step looked at as a whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Look {
    /// Its number.
    pub step: u64,
    /// What its ranks did.
    pub ranks: Vec<Activity>,
    /// Its timeline.
    pub lanes: Arc<Lanes>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    /// Whether it was asked to.
    pub stopped: bool,
    /// The timeline of its median step.
    pub lanes: Arc<Lanes>,
}

/// What a run tells.
#[derive(Debug, Clone, PartialEq)]
pub enum RunNews {
    /// It begins.
    Begun(Box<Begun>),
    /// A step is done.
    Step(Step),
    /// What happened in a step.
    Look(Box<Look>),
    /// Loss on held-out data after so many steps.
    HeldOut(u64, f64),
    /// A checkpoint was written.
    Saved(String),
    /// It is over.
    Ended(Result<End, String>),
}

/// Where a run is.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Phase {
    /// There was none yet.
    #[default]
    Idle,
    /// It was asked for.
    Starting,
    /// Step by step.
    Training,
    /// After the present step it stops.
    Stopping,
    /// All steps are done.
    Done,
    /// It stopped when asked to.
    Stopped,
    /// It failed, and why.
    Failed(String),
}

/// What the keys of this view ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Train the settings.
    Start {
        /// From the latest checkpoint.
        resume: bool,
    },
    /// Stop after the present step.
    Stop,
}

/// The state.
#[derive(Debug, Default)]
pub struct Training {
    /// Names the run whose news count.
    pub run: u64,
    /// Where it is.
    pub phase: Phase,
    /// Steps to be done in all; the job's while there is none.
    pub steps_wanted: Option<u64>,
    /// What is typed for that, while it is.
    pub typed: Option<String>,
    /// What the run was begun with.
    pub begun: Option<Begun>,
    /// Steps of this run and of those that it goes on from.
    pub steps: Vec<Step>,
    /// Loss on held-out data by steps done.
    pub held_out: Vec<(u64, f64)>,
    /// The latest step that was looked at.
    pub look: Option<Look>,
    /// The latest checkpoint.
    pub checkpoint: Option<String>,
    /// The first rank that is shown.
    pub first_rank: usize,
}

/// Steps where neither the job nor anybody says how many.
pub const USUAL_STEPS: u64 = 100;

impl Training {
    /// Whether a run is under way.
    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Training | Phase::Stopping)
    }

    /// Median seconds of a step; the first, which pays for fresh memory, is left out where there are more.
    pub fn median_seconds(&self) -> Option<f64> {
        let mut seconds: Vec<f64> =
            self.steps.iter().skip(usize::from(self.steps.len() > 1)).map(|step| step.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds.get(seconds.len() / 2).copied()
    }

    /// A run begins: what is known of the one before goes, unless it goes on from it.
    pub fn begin(&mut self, resume: bool) {
        self.run += 1;
        self.phase = Phase::Starting;
        self.look = None;
        self.begun = None;
        if !resume {
            self.steps.clear();
            self.held_out.clear();
            self.checkpoint = None;
        }
    }

    /// Takes news; the timeline of its median step when the run is over.
    pub fn tell(&mut self, news: RunNews) -> Option<Arc<Lanes>> {
        match news {
            RunNews::Begun(begun) => {
                self.begun = Some(*begun);
                if self.phase == Phase::Starting {
                    self.phase = Phase::Training;
                }
            }
            RunNews::Step(step) => {
                // A checkpoint may lie before the last step that was seen.
                self.steps.retain(|before| before.step < step.step);
                self.steps.push(step);
            }
            RunNews::Look(look) => self.look = Some(*look),
            RunNews::HeldOut(step, loss) => {
                self.held_out.retain(|(before, _)| *before < step);
                self.held_out.push((step, loss));
            }
            RunNews::Saved(path) => self.checkpoint = Some(path),
            RunNews::Ended(Ok(end)) => {
                self.phase = if end.stopped { Phase::Stopped } else { Phase::Done };
                return Some(end.lanes);
            }
            RunNews::Ended(Err(why)) => self.phase = Phase::Failed(why),
        }
        None
    }

    /// Steps that the next run would have done at its end, where the job says `usual`.
    pub fn target(&self, usual: u64) -> u64 {
        self.steps_wanted.unwrap_or(usual)
    }

    /// Takes a key. `usual` are the steps of the job.
    pub fn key(&mut self, key: KeyEvent, usual: u64) -> Option<Wish> {
        if let Some(typed) = &mut self.typed {
            match key.code {
                KeyCode::Char(digit @ '0'..='9') if typed.len() < 9 => typed.push(digit),
                KeyCode::Char('u') if key.modifiers.contains(KeyModifiers::CONTROL) => typed.clear(),
                KeyCode::Backspace => drop(typed.pop()),
                KeyCode::Enter => {
                    self.steps_wanted = typed.parse().ok().filter(|steps| *steps > 0);
                    self.typed = None;
                }
                KeyCode::Esc => self.typed = None,
                _ => {}
            }
            return None;
        }
        let ranks = self.look.as_ref().map_or(0, |look| look.ranks.len());
        match key.code {
            KeyCode::Char('s') | KeyCode::Enter if !self.is_running() => {
                return Some(Wish::Start { resume: false });
            }
            KeyCode::Char('r') if !self.is_running() => {
                let done = self.steps.last().map_or(0, |step| step.step);
                // What is done already is no reason to do nothing.
                if self.target(usual) <= done {
                    self.steps_wanted = Some(done + usual);
                }
                return Some(Wish::Start { resume: true });
            }
            KeyCode::Esc | KeyCode::Char('x') if self.is_running() => {
                self.phase = Phase::Stopping;
                return Some(Wish::Stop);
            }
            KeyCode::Char('+' | '=' | 'l') | KeyCode::Right => {
                self.steps_wanted = Some((self.target(usual) * 2).min(100_000_000));
            }
            KeyCode::Char('-' | 'h') | KeyCode::Left => self.steps_wanted = Some((self.target(usual) / 2).max(1)),
            KeyCode::Char(digit @ '1'..='9') => self.typed = Some(digit.to_string()),
            KeyCode::Down | KeyCode::Char('j') => self.first_rank = (self.first_rank + 1).min(ranks.saturating_sub(1)),
            KeyCode::Up | KeyCode::Char('k') => self.first_rank = self.first_rank.saturating_sub(1),
            KeyCode::PageDown => self.first_rank = (self.first_rank + 8).min(ranks.saturating_sub(1)),
            KeyCode::PageUp => self.first_rank = self.first_rank.saturating_sub(8),
            KeyCode::Home | KeyCode::Char('g') => self.first_rank = 0,
            KeyCode::End | KeyCode::Char('G') => self.first_rank = ranks.saturating_sub(1),
            _ => {}
        }
        None
    }
}
