//! The state of the terminal UI and how events change it. It knows neither the terminal nor the simulator: tests drive it
//! with keys and hand it answers.

use crate::calibration::{self, Calibration};
use crate::event::{Effect, Event, News, OptionNews};
use crate::plans::{Plans, Wish, job_to_search};
use crate::question::Answer;
use crate::search::SearchProgress;
use crate::settings::{KNOBS, Settings, place_of};
use crate::theme::Palette;
use crate::timeline::Timeline;
use crate::training::{self, Training, USUAL_STEPS};
use ratatui::crossterm::event::{
    KeyCode, KeyEvent, KeyEventKind, KeyModifiers, MouseButton, MouseEvent, MouseEventKind,
};
use ratatui::layout::{Position, Rect};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use toml::Table;

/// The views.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum View {
    /// Knobs, memory and time.
    #[default]
    Predict,
    /// The schedule, pass by pass.
    Timeline,
    /// The search.
    Plan,
    /// An execution.
    Run,
    /// What is known of this machine.
    Calibrate,
}

impl View {
    /// In the order of their tabs.
    pub const ALL: [View; 5] = [View::Predict, View::Timeline, View::Plan, View::Run, View::Calibrate];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            View::Predict => "Predict",
            View::Timeline => "Timeline",
            View::Plan => "Plan",
            View::Run => "Run",
            View::Calibrate => "Calibrate",
        }
    }
}

/// What lies under the mouse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A tab.
    Tab(View),
    /// A knob, by its place.
    Knob(usize),
    /// The memory of the ranks.
    Ranks,
    /// A plan, by its place among those that are shown.
    Plan(usize),
    /// A class of the profile, by its place.
    Class(usize),
    /// The ranks of a run.
    Crew,
    /// A cell of the map: the places of its model and of its number of nodes.
    Cell(usize, usize),
    /// The timeline of a rank, from a column on.
    Lane {
        /// Which.
        rank: usize,
        /// Its first column on the screen.
        left: u16,
    },
}

/// A line that tells what happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// What.
    pub text: String,
    /// Whether something is wrong.
    pub bad: bool,
}

/// The state.
#[derive(Debug)]
pub struct App {
    /// The view that is shown.
    pub view: View,
    /// The knobs.
    pub settings: Settings,
    /// The knob with the focus.
    pub knob: usize,
    /// What is typed into it, while it is.
    pub typed: Option<String>,
    /// The prediction of the settings, or why there is none; none while the first is computed.
    pub answer: Option<Result<Answer, String>>,
    /// The latest prediction that there was, shown while the settings are impossible.
    pub last: Option<Answer>,
    /// What figures are held against: the prediction before this one, or a pinned one.
    pub before: Option<Answer>,
    /// Whether that stays.
    pub pinned: bool,
    /// What the values of the knob come to.
    pub options: Vec<OptionNews>,
    /// Of which knob.
    pub options_of: Option<usize>,
    /// Whether an answer is awaited.
    pub waiting: bool,
    /// The first rank that is shown.
    pub first_rank: usize,
    /// The timeline.
    pub timeline: Timeline,
    /// The plans.
    pub plans: Plans,
    /// The execution.
    pub training: Training,
    /// The profile.
    pub calibration: Calibration,
    /// The keys of the job that was opened: the axes that it fixes stay fixed in a search.
    pub job: Table,
    /// Colours.
    pub palette: Palette,
    /// Whether keys are explained.
    pub help: bool,
    /// The line at the bottom.
    pub notice: Option<Notice>,
    /// What lies where, as drawn last.
    pub targets: Vec<(Rect, Target)>,
    question: u64,
}

impl App {
    /// A state with settings and, where something went wrong before, a notice; and its first question.
    pub fn new(settings: Settings, palette: Palette, notice: Option<Notice>) -> (App, Vec<Effect>) {
        let mut app = App {
            view: View::default(),
            settings,
            knob: 0,
            typed: None,
            answer: None,
            last: None,
            before: None,
            pinned: false,
            options: Vec::new(),
            options_of: None,
            waiting: false,
            first_rank: 0,
            timeline: Timeline::default(),
            plans: Plans::default(),
            training: Training::default(),
            calibration: Calibration::default(),
            job: Table::new(),
            palette,
            help: false,
            notice,
            targets: Vec::new(),
            question: 0,
        };
        if app.notice.is_none() && !app.settings.several.is_empty() {
            let text = format!("the job leaves a choice of {}; the first is shown", app.settings.several.join(", "));
            app.notice = Some(Notice { text, bad: false });
        }
        let ask = app.ask();
        (app, vec![ask])
    }

    /// The question whose answer is awaited or shown.
    pub fn question(&self) -> u64 {
        self.question
    }

    /// Asks for a prediction of the settings as they are.
    pub fn ask(&mut self) -> Effect {
        self.question += 1;
        self.waiting = true;
        Effect::Ask { question: self.question, settings: Box::new(self.settings.clone()), knob: self.knob }
    }

    fn say(&mut self, text: impl Into<String>, bad: bool) {
        self.notice = Some(Notice { text: text.into(), bad });
    }

    /// Remembers what lies where.
    pub fn drawn(&mut self, targets: Vec<(Rect, Target)>) {
        let lane = targets.iter().find(|(_, target)| matches!(target, Target::Lane { .. }));
        if let Some((area, _)) = lane {
            self.timeline.columns = area.width;
        }
        self.targets = targets;
    }

    /// Takes an event.
    pub fn on(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Key(key) if key.kind == KeyEventKind::Release => Vec::new(),
            Event::Key(key) => self.key(key),
            Event::Mouse(mouse) => self.mouse(mouse),
            Event::Resize => Vec::new(),
            Event::News(news) => self.news(news),
        }
    }

    fn news(&mut self, news: News) -> Vec<Effect> {
        match news {
            News::Answer { question, outcome } if question == self.question => {
                self.waiting = false;
                let fresh = outcome.as_ref().as_ref().ok();
                if let Some(answer) = fresh
                    && self.last.as_ref() != Some(answer)
                {
                    if !self.pinned {
                        self.before = self.last.take();
                    }
                    self.last = Some(answer.clone());
                }
                self.answer = Some(*outcome);
            }
            News::Options { question, knob, options } if question == self.question => {
                self.options = options;
                self.options_of = Some(knob);
            }
            News::Lanes { question, outcome } if question == self.question => {
                self.timeline.tell(question, *outcome);
            }
            News::Searching { search, progress } if search == self.plans.search => self.plans.progress = progress,
            News::Found { search, outcome } if search == self.plans.search => {
                self.plans.running = false;
                self.plans.at = 0;
                self.plans.found = Some(*outcome);
            }
            News::Cell { search, cell, last } if search == self.plans.search => {
                self.plans.running &= !last;
                self.plans.cells.push(*cell);
            }
            News::Written(Ok(path)) => self.say(format!("written to {path}"), false),
            News::Written(Err(why)) => self.say(why, true),
            News::Recorded { path, outcome } => match *outcome {
                Ok(lanes) => {
                    self.timeline.load(path, lanes);
                    self.say("m shows predicted, measured or both", false);
                }
                Err(why) => self.say(why, true),
            },
            News::Run { run, news } if run == self.training.run => {
                if let Some(lanes) = self.training.tell(news) {
                    self.timeline.load("the latest run", lanes);
                }
            }
            News::Profile(outcome) => self.calibration.profile = Some(*outcome),
            News::Measuring { number, progress }
                if number == self.calibration.number && self.calibration.running.is_some() =>
            {
                self.calibration.running = Some(progress);
            }
            News::Measured { number, outcome } if number == self.calibration.number => {
                self.calibration.running = None;
                return match outcome {
                    Ok(path) => {
                        self.say(format!("measured; the profile lies in {path}, and figures follow it"), false);
                        vec![Effect::Profile, self.ask()]
                    }
                    Err(why) => {
                        self.say(why, !self.calibration.stopping);
                        Vec::new()
                    }
                };
            }
            // Answers to what is not asked any more.
            _ => {}
        }
        Vec::new()
    }

    fn key(&mut self, key: KeyEvent) -> Vec<Effect> {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if control && matches!(key.code, KeyCode::Char('c' | 'q')) {
            return vec![Effect::Quit];
        }
        if self.help {
            self.help = false;
            return Vec::new();
        }
        if self.typed.is_some() && self.view == View::Predict {
            return self.type_key(key);
        }
        self.notice = None;
        match self.view {
            View::Plan if self.plans.is_asking() => return self.plan_key(key),
            View::Timeline if self.timeline.typed.is_some() => {
                return self.timeline.type_key(key).map(Effect::Load).into_iter().collect();
            }
            View::Run if self.training.typed.is_some() => return self.run_key(key),
            _ => {}
        }
        match key.code {
            KeyCode::Char('q') => return vec![Effect::Quit],
            KeyCode::Char('?') | KeyCode::F(1) => self.help = true,
            KeyCode::Char('t') => self.palette = self.palette.next(),
            KeyCode::Tab => return self.step_view(1),
            KeyCode::BackTab => return self.step_view(View::ALL.len() - 1),
            KeyCode::F(n @ 2..) if usize::from(n) - 2 < View::ALL.len() => {
                return self.show(View::ALL[usize::from(n) - 2]);
            }
            _ => match self.view {
                View::Predict => return self.predict_key(key),
                View::Timeline => drop(self.timeline.key(key.code)),
                View::Plan => return self.plan_key(key),
                View::Run => return self.run_key(key),
                View::Calibrate => return self.calibrate_key(key),
            },
        }
        Vec::new()
    }

    fn step_view(&mut self, by: usize) -> Vec<Effect> {
        let at = View::ALL.iter().position(|view| *view == self.view).unwrap_or(0);
        self.show(View::ALL[(at + by) % View::ALL.len()])
    }

    /// Shows a view.
    pub fn show(&mut self, view: View) -> Vec<Effect> {
        self.view = view;
        let outdated = self.timeline.question != self.question;
        if view == View::Timeline && outdated {
            self.timeline.predicted = None;
            return vec![Effect::Simulate { question: self.question, settings: Box::new(self.settings.clone()) }];
        }
        if view == View::Calibrate && self.calibration.profile.is_none() {
            return vec![Effect::Profile];
        }
        Vec::new()
    }

    fn run_key(&mut self, key: KeyEvent) -> Vec<Effect> {
        let usual = self.job_steps();
        match self.training.key(key, usual) {
            None => Vec::new(),
            Some(training::Wish::Stop) => vec![Effect::StopRun],
            Some(training::Wish::Start { .. }) if self.calibration.running.is_some() => {
                self.say("this machine is being measured, and a run would spoil that; Esc in Calibrate stops it", true);
                Vec::new()
            }
            Some(training::Wish::Start { .. }) if !self.settings.is_local() => {
                self.say("a run is on this machine: set cluster to local in Predict, with a model of its size", true);
                Vec::new()
            }
            Some(training::Wish::Start { resume }) => {
                self.training.begin(resume);
                let (run, steps) = (self.training.run, self.training.steps_wanted);
                vec![Effect::Train { run, settings: Box::new(self.settings.clone()), steps, resume }]
            }
        }
    }

    /// Steps that the job asks for.
    pub fn job_steps(&self) -> u64 {
        let steps = self.settings.rest("train").and_then(|train| train.get("steps")?.as_integer());
        steps.and_then(|steps| u64::try_from(steps).ok()).filter(|steps| *steps > 0).unwrap_or(USUAL_STEPS)
    }

    fn calibrate_key(&mut self, key: KeyEvent) -> Vec<Effect> {
        match self.calibration.key(key) {
            None => Vec::new(),
            Some(calibration::Wish::Stop) => vec![Effect::StopMeasuring],
            Some(calibration::Wish::Measure) if self.training.is_running() => {
                self.say("a run is under way, and would spoil what is measured; Esc in Run stops it", true);
                Vec::new()
            }
            Some(calibration::Wish::Measure) => {
                self.calibration.begin();
                let seconds = self.calibration.seconds(self.settings.is_local());
                vec![Effect::Measure {
                    number: self.calibration.number,
                    seconds,
                    settings: Box::new(self.settings.clone()),
                }]
            }
        }
    }

    fn predict_key(&mut self, key: KeyEvent) -> Vec<Effect> {
        let ranks = self.last.as_ref().map_or(0, |answer| answer.figures.peak_bytes.len());
        match key.code {
            KeyCode::Down | KeyCode::Char('j') => return self.focus((self.knob + 1) % KNOBS.len()),
            KeyCode::Up | KeyCode::Char('k') => return self.focus((self.knob + KNOBS.len() - 1) % KNOBS.len()),
            KeyCode::Home | KeyCode::Char('g') => return self.focus(0),
            KeyCode::End | KeyCode::Char('G') => return self.focus(KNOBS.len() - 1),
            KeyCode::Right | KeyCode::Char('l' | '+') => return self.turn(self.knob, true),
            KeyCode::Left | KeyCode::Char('h' | '-') => return self.turn(self.knob, false),
            KeyCode::Enter | KeyCode::Char('i') => {
                self.typed = Some(self.settings.get(KNOBS[self.knob].key).unwrap_or_default().to_owned());
            }
            KeyCode::Char(digit @ '0'..='9') => self.typed = Some(digit.to_string()),
            KeyCode::Backspace | KeyCode::Delete | KeyCode::Char('x') => {
                let before = self.settings.clone();
                self.settings.reset(self.knob);
                return self.changed(&before);
            }
            KeyCode::Char('p') => {
                self.pinned = !self.pinned;
                if self.pinned {
                    self.before = self.last.clone();
                    self.say("pinned: figures are held against these settings until p is pressed again", false);
                }
            }
            KeyCode::PageDown => self.first_rank = (self.first_rank + 8).min(ranks.saturating_sub(1)),
            KeyCode::PageUp => self.first_rank = self.first_rank.saturating_sub(8),
            _ => {}
        }
        Vec::new()
    }

    fn plan_key(&mut self, key: KeyEvent) -> Vec<Effect> {
        let Some(wish) = self.plans.key(key) else { return Vec::new() };
        match wish {
            Wish::Stop => vec![Effect::StopSearch],
            Wish::Write(row) => vec![Effect::Write(row)],
            Wish::Export(row, to) => vec![Effect::Export { row, to }],
            Wish::Search => {
                self.begin_search();
                let job = Box::new(job_to_search(&self.settings, &self.job));
                vec![Effect::Search { search: self.plans.search, job }]
            }
            Wish::Map => {
                self.begin_search();
                self.plans.mapping = true;
                self.plans.cells.clear();
                let job = Box::new(job_to_search(&self.settings, &self.job));
                vec![Effect::Map { search: self.plans.search, job }]
            }
            Wish::Open(row) => {
                let budgets = ["tokens", "price"].map(|key| (place_of(key), self.settings.get(key).map(str::to_owned)));
                self.settings = Settings::from_table(&row.job);
                self.settings.opened = row.scored.as_ref().map(|scored| Arc::new(scored.configuration.clone()));
                for (place, value) in budgets {
                    if let (Some(place), Some(value)) = (place, value) {
                        self.settings = self.settings.with(place, &value);
                    }
                }
                self.view = View::Predict;
                self.first_rank = 0;
                self.say(format!("opened: {}", row.configuration), false);
                vec![self.ask()]
            }
        }
    }

    fn begin_search(&mut self) {
        self.plans.search += 1;
        self.plans.running = true;
        self.plans.mapping = false;
        self.plans.progress = SearchProgress::default();
    }

    fn type_key(&mut self, key: KeyEvent) -> Vec<Effect> {
        let Some(typed) = self.typed.as_mut() else { return Vec::new() };
        match key.code {
            KeyCode::Char('u') if key.modifiers.contains(KeyModifiers::CONTROL) => typed.clear(),
            KeyCode::Char(letter) if !key.modifiers.contains(KeyModifiers::CONTROL) => typed.push(letter),
            KeyCode::Backspace => drop(typed.pop()),
            KeyCode::Esc => {
                self.typed = None;
                self.notice = None;
            }
            KeyCode::Enter | KeyCode::Tab | KeyCode::Down | KeyCode::Up => {
                let before = self.settings.clone();
                let typed = typed.clone();
                match self.settings.set(self.knob, &typed) {
                    Ok(()) => {
                        self.typed = None;
                        self.notice = None;
                        return self.changed(&before);
                    }
                    // What was typed stays, to be mended.
                    Err(why) => self.say(why, true),
                }
            }
            _ => {}
        }
        Vec::new()
    }

    fn focus(&mut self, knob: usize) -> Vec<Effect> {
        if knob == self.knob {
            return Vec::new();
        }
        self.knob = knob;
        vec![self.ask()]
    }

    fn turn(&mut self, knob: usize, up: bool) -> Vec<Effect> {
        let before = self.settings.clone();
        self.knob = knob;
        self.settings.turn(knob, up);
        self.changed(&before)
    }

    fn changed(&mut self, before: &Settings) -> Vec<Effect> {
        if self.settings == *before {
            return Vec::new();
        }
        self.first_rank = 0;
        vec![self.ask()]
    }

    fn mouse(&mut self, mouse: MouseEvent) -> Vec<Effect> {
        let at = Position::new(mouse.column, mouse.row);
        let target = self.targets.iter().find(|(area, _)| area.contains(at)).map(|(_, target)| *target);
        let pressed = mouse.kind == MouseEventKind::Down(MouseButton::Left);
        let wheel = match mouse.kind {
            MouseEventKind::ScrollUp => Some(true),
            MouseEventKind::ScrollDown => Some(false),
            _ => None,
        };
        if self.help && (pressed || wheel.is_some()) {
            self.help = false;
            return Vec::new();
        }
        match (target, wheel) {
            (Some(Target::Tab(view)), _) if pressed => return self.show(view),
            (Some(Target::Knob(knob)), _) if pressed && self.typed.is_none() => return self.focus(knob),
            (Some(Target::Knob(knob)), Some(up)) if self.typed.is_none() => return self.turn(knob, up),
            (Some(Target::Lane { rank, left }), _) if pressed => self.timeline.point(mouse.column - left, rank),
            (Some(Target::Lane { rank, left }), Some(up)) => {
                self.timeline.point(mouse.column - left, rank);
                self.timeline.zoom(if up { 0.5 } else { 2.0 }, self.timeline.cursor);
            }
            (Some(Target::Plan(row)), _) if pressed => self.plans.at = row,
            (Some(Target::Plan(_)), Some(up)) => {
                let code = if up { KeyCode::Up } else { KeyCode::Down };
                return self.plan_key(KeyEvent::from(code));
            }
            (Some(Target::Class(place)), _) if pressed => self.calibration.at = place,
            (Some(Target::Class(_)), Some(up)) => {
                let code = if up { KeyCode::Up } else { KeyCode::Down };
                return self.calibrate_key(KeyEvent::from(code));
            }
            (Some(Target::Cell(model, nodes)), _) if pressed => self.plans.cell = (model, nodes),
            (Some(Target::Crew), Some(up)) => {
                let code = if up { KeyCode::Up } else { KeyCode::Down };
                return self.run_key(KeyEvent::from(code));
            }
            (Some(Target::Ranks), Some(up)) => {
                let code = if up { KeyCode::PageUp } else { KeyCode::PageDown };
                return self.predict_key(KeyEvent::from(code));
            }
            _ => {}
        }
        Vec::new()
    }
}
