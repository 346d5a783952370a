//! The state of the calibrate view: what is known of this machine and how well, and a measurement under way.

use crate::question::LocalMachine;
use paceline_profiles::{Class, Foretold, KernelOp, Residual, Source, Subject};
use ratatui::crossterm::event::{KeyCode, KeyEvent};
use std::collections::BTreeSet;
use std::sync::Arc;

/// A class of what was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassView {
    /// Which.
    pub class: Class,
    /// Rows measured by themselves, inside runs, and stated by a vendor.
    pub rows: [usize; 3],
    /// Every point beside what the others foretell for it; none where each time is looked up as it was measured.
    pub points: Vec<Foretold>,
    /// How well its curve foretells what it has not seen, where it has one.
    pub residual: Option<Residual>,
}

/// A profile as it is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct ProfileView {
    /// Where it comes from.
    pub origin: String,
    /// The machine that it describes.
    pub machine: String,
    /// Rows measured by themselves, inside runs, and stated by a vendor.
    pub rows: [usize; 3],
    /// The first and the last day of its rows.
    pub days: Option<(String, String)>,
    /// Class by class.
    pub classes: Vec<ClassView>,
    /// Operators without a row: what they take is assumed from others.
    pub assumed: Vec<&'static str>,
}

impl ProfileView {
    /// Of a machine. Every class is fitted once for each of its points, which takes a moment.
    ///
    /// # Errors
    /// When a fit fails.
    pub fn of(local: &LocalMachine) -> Result<ProfileView, String> {
        let rows = &local.profile.rows;
        let count = |wanted: &dyn Fn(&Subject) -> bool| {
            [Source::Measured, Source::Trace, Source::Datasheet]
                .map(|source| rows.iter().filter(|row| row.source == source && wanted(&row.subject)).count())
        };
        let mut residuals = local.predictor.residuals().map_err(|error| error.to_string())?;
        let mut classes = Vec::new();
        for class in rows.iter().map(|row| Class::of(&row.subject)).collect::<BTreeSet<_>>() {
            let place = residuals.iter().position(|residual| residual.class == class);
            classes.push(ClassView {
                class,
                rows: count(&|subject| Class::of(subject) == class),
                points: local.predictor.foretold(class).map_err(|error| error.to_string())?,
                residual: place.map(|place| residuals.swap_remove(place)),
            });
        }
        let known =
            |op: &KernelOp| rows.iter().any(|row| matches!(&row.subject, Subject::Kernel(key) if key.op == *op));
        let days = rows.iter().map(|row| row.date.as_str());
        Ok(ProfileView {
            origin: local.origin.clone(),
            machine: local.profile.machine.to_string(),
            rows: count(&|_| true),
            days: days.clone().min().zip(days.max()).map(|(first, last)| (first.to_owned(), last.to_owned())),
            classes,
            assumed: KernelOp::ALL.into_iter().filter(|op| !known(op)).map(KernelOp::name).collect(),
        })
    }
}

/// How far a measurement is.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasureNews {
    /// What is measured.
    pub what: String,
    /// Part of the whole that is done, from 0 to 1.
    pub fraction: f64,
}

/// What a measurement came to.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The machine with it.
    pub local: LocalMachine,
    /// Where the profile lies.
    pub path: String,
}

/// What the keys of this view ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Start a measurement.
    Measure,
    /// Stop it; nothing is kept.
    Stop,
}

/// The state.
#[derive(Debug, Default)]
pub struct Calibration {
    /// Names the measurement whose news count.
    pub number: u64,
    /// How far it is, while it is under way.
    pub running: Option<MeasureNews>,
    /// Whether it was asked to stop.
    pub stopping: bool,
    /// The profile, or what is wrong with it; none while it is looked at.
    pub profile: Option<Result<Arc<ProfileView>, String>>,
    /// The class with the focus.
    pub at: usize,
    /// Doublings of the usual time of a measurement.
    pub effort: i32,
}

impl Calibration {
    /// Seconds that a measurement takes: the command line's, doubled or halved by the keys.
    pub fn seconds(&self, of_job: bool) -> f64 {
        (if of_job { 30.0 } else { 90.0 }) * 2f64.powi(self.effort)
    }

    /// The class with the focus.
    pub fn focused(&self) -> Option<&ClassView> {
        self.profile.as_ref()?.as_ref().ok()?.classes.get(self.at)
    }

    /// A measurement begins.
    pub fn begin(&mut self) {
        self.number += 1;
        self.stopping = false;
        self.running = Some(MeasureNews { what: "making ready".into(), fraction: 0.0 });
    }

    /// Takes a key.
    pub fn key(&mut self, key: KeyEvent) -> Option<Wish> {
        let classes = self.profile.as_ref().and_then(|p| p.as_ref().ok()).map_or(0, |profile| profile.classes.len());
        let last = classes.saturating_sub(1);
        match key.code {
            KeyCode::Down | KeyCode::Char('j') => self.at = (self.at + 1).min(last),
            KeyCode::Up | KeyCode::Char('k') => self.at = self.at.saturating_sub(1),
            KeyCode::PageDown => self.at = (self.at + 10).min(last),
            KeyCode::PageUp => self.at = self.at.saturating_sub(10),
            KeyCode::Home | KeyCode::Char('g') => self.at = 0,
            KeyCode::End | KeyCode::Char('G') => self.at = last,
            KeyCode::Char('+' | '=' | 'l') | KeyCode::Right => self.effort = (self.effort + 1).min(6),
            KeyCode::Char('-' | 'h') | KeyCode::Left => self.effort = (self.effort - 1).max(-4),
            KeyCode::Char('s') if self.running.is_none() => return Some(Wish::Measure),
            KeyCode::Esc | KeyCode::Char('x') if self.running.is_some() => {
                self.stopping = true;
                return Some(Wish::Stop);
            }
            _ => {}
        }
        None
    }
}
