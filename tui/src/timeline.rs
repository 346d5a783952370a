//! The state of the timeline: which part of it is seen, and what the cursor is on.

use crate::lanes::{Gap, Lanes, Span};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use std::sync::Arc;

/// Which timelines are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shown {
    /// The simulated one.
    #[default]
    Predicted,
    /// The measured one.
    Measured,
    /// Both, rank by rank, predicted above measured.
    Both,
}

/// The state.
#[derive(Debug, Default)]
pub struct Timeline {
    /// The simulated timeline, or why there is none; none while it is computed.
    pub predicted: Option<Result<Arc<Lanes>, String>>,
    /// The question that it answers.
    pub question: u64,
    /// A measured one.
    pub measured: Option<Arc<Lanes>>,
    /// Where that comes from, for people.
    pub source: String,
    /// The path that is typed, while it is.
    pub typed: Option<String>,
    /// Which are drawn.
    pub shown: Shown,
    /// The rank with the cursor.
    pub rank: usize,
    /// The time of the cursor in seconds.
    pub cursor: f64,
    /// The first time that is seen.
    pub from: f64,
    /// Seconds that are seen; 0 for all.
    pub span: f64,
    /// Columns of the drawing, as drawn last.
    pub columns: u16,
}

impl Timeline {
    /// The timeline that the cursor is on.
    pub fn lanes(&self) -> Option<&Arc<Lanes>> {
        match (self.shown, &self.measured, &self.predicted) {
            (Shown::Measured, Some(measured), _) => Some(measured),
            (_, _, Some(Ok(predicted))) => Some(predicted),
            (_, Some(measured), _) => Some(measured),
            _ => None,
        }
    }

    /// End of what there is to see, in seconds.
    pub fn end(&self) -> f64 {
        let predicted = self.predicted.as_ref().and_then(|p| p.as_ref().ok()).map_or(0.0, |lanes| lanes.end);
        let measured = self.measured.as_ref().map_or(0.0, |lanes| lanes.end);
        match self.shown {
            Shown::Predicted if predicted > 0.0 => predicted,
            Shown::Measured if measured > 0.0 => measured,
            _ => predicted.max(measured),
        }
    }

    /// The part that is seen, from and to, in seconds.
    pub fn window(&self) -> (f64, f64) {
        let end = self.end();
        if self.span <= 0.0 || self.span >= end { (0.0, end) } else { (self.from, self.from + self.span) }
    }

    /// The span under the cursor.
    pub fn span(&self) -> Option<&Span> {
        self.lanes()?.lanes.get(self.rank)?.span_at(self.cursor)
    }

    /// The gap under the cursor.
    pub fn gap(&self) -> Option<&Gap> {
        self.lanes()?.lanes.get(self.rank)?.gap_at(self.cursor)
    }

    /// A new timeline was computed.
    pub fn tell(&mut self, question: u64, predicted: Result<Arc<Lanes>, String>) {
        self.question = question;
        self.predicted = Some(predicted);
        self.whole();
        let ranks = self.lanes().map_or(0, |lanes| lanes.lanes.len());
        self.rank = self.rank.min(ranks.saturating_sub(1));
    }

    /// A measured timeline is there; it is shown with the predicted one.
    pub fn load(&mut self, source: impl Into<String>, measured: Arc<Lanes>) {
        self.source = source.into();
        self.measured = Some(measured);
        self.shown = Shown::Both;
        self.whole();
        let ranks = self.lanes().map_or(0, |lanes| lanes.lanes.len());
        self.rank = self.rank.min(ranks.saturating_sub(1));
    }

    /// The span of the other timeline that does the same as the one under the cursor, where both are shown.
    pub fn counterpart(&self) -> Option<&Span> {
        if self.shown != Shown::Both {
            return None;
        }
        let what = self.span()?.what;
        let lane = self.measured.as_ref()?.lanes.get(self.rank)?;
        lane.spans.iter().find(|span| span.what == what)
    }

    fn whole(&mut self) {
        (self.from, self.span) = (0.0, 0.0);
        self.cursor = self.cursor.clamp(0.0, self.end());
    }

    fn step(&self) -> f64 {
        let (from, to) = self.window();
        (to - from) / f64::from(self.columns.max(1))
    }

    /// Moves the cursor, and the window with it.
    fn go(&mut self, time: f64) {
        let end = self.end();
        self.cursor = time.clamp(0.0, end);
        let (from, to) = self.window();
        if self.span > 0.0 && !(from..to).contains(&self.cursor) {
            self.from = (self.cursor - self.span / 2.0).clamp(0.0, (end - self.span).max(0.0));
        }
    }

    /// Sees `by` times as much around a time.
    pub fn zoom(&mut self, by: f64, around: f64) {
        let end = self.end();
        let (from, to) = self.window();
        let span = (to - from) * by;
        if span >= end {
            self.whole();
        } else if span > end * 1e-5 {
            let share = ((around - from) / (to - from)).clamp(0.0, 1.0);
            self.span = span;
            self.from = (around - share * span).clamp(0.0, end - span);
        }
    }

    fn pan(&mut self, by: f64) {
        if self.span > 0.0 {
            let most = (self.end() - self.span).max(0.0);
            self.from = (self.from + by * self.span).clamp(0.0, most);
            self.cursor = self.cursor.clamp(self.from, self.from + self.span);
        }
    }

    /// The time and the rank of a place on the drawing.
    pub fn point(&mut self, column: u16, rank: usize) {
        let (from, _) = self.window();
        self.cursor = from + (f64::from(column) + 0.5) * self.step();
        self.rank = rank;
    }

    /// Takes a key while a path is typed; returns the path when it is whole.
    pub fn type_key(&mut self, key: KeyEvent) -> Option<String> {
        let typed = self.typed.as_mut()?;
        match key.code {
            KeyCode::Char('u') if key.modifiers.contains(KeyModifiers::CONTROL) => typed.clear(),
            KeyCode::Char(letter) if !key.modifiers.contains(KeyModifiers::CONTROL) => typed.push(letter),
            KeyCode::Backspace => drop(typed.pop()),
            KeyCode::Esc => self.typed = None,
            KeyCode::Enter => return self.typed.take().filter(|path| !path.trim().is_empty()),
            _ => {}
        }
        None
    }

    /// Takes a key; whether it was one of the timeline's.
    pub fn key(&mut self, code: KeyCode) -> bool {
        let ranks = self.lanes().map_or(0, |lanes| lanes.lanes.len());
        match code {
            KeyCode::Down | KeyCode::Char('j') => self.rank = (self.rank + 1).min(ranks.saturating_sub(1)),
            KeyCode::Up | KeyCode::Char('k') => self.rank = self.rank.saturating_sub(1),
            KeyCode::Right | KeyCode::Char('l') => self.go(self.cursor + self.step()),
            KeyCode::Left | KeyCode::Char('h') => self.go(self.cursor - self.step()),
            KeyCode::PageDown | KeyCode::Char('L') => self.pan(0.5),
            KeyCode::PageUp | KeyCode::Char('H') => self.pan(-0.5),
            KeyCode::Home | KeyCode::Char('g') => self.go(0.0),
            KeyCode::End | KeyCode::Char('G') => self.go(self.end()),
            KeyCode::Char('+' | '=' | 'i') => self.zoom(0.5, self.cursor),
            KeyCode::Char('-' | 'o') => self.zoom(2.0, self.cursor),
            KeyCode::Char('0') => self.whole(),
            KeyCode::Char('f') => self.typed = Some(String::new()),
            KeyCode::Char('c') => self.next_critical(),
            KeyCode::Char('n') => self.next_gap(),
            KeyCode::Char('m') if self.measured.is_some() => {
                self.shown = match self.shown {
                    Shown::Predicted => Shown::Measured,
                    Shown::Measured => Shown::Both,
                    Shown::Both => Shown::Predicted,
                };
                self.whole();
            }
            _ => return false,
        }
        true
    }

    fn next_critical(&mut self) {
        let Some(lanes) = self.lanes().cloned() else { return };
        // From within a critical span, the next one; else the one after the cursor.
        let from = self.span().filter(|span| span.critical).map_or(self.cursor, |span| span.start);
        if let Some((rank, span)) = lanes.next_critical(from) {
            self.rank = rank;
            self.go(span.start + (span.end - span.start) * 0.5);
        }
    }

    fn next_gap(&mut self) {
        let Some(lanes) = self.lanes().cloned() else { return };
        let Some(lane) = lanes.lanes.get(self.rank) else { return };
        let middle = |gap: &Gap| gap.start + (gap.end - gap.start) * 0.5;
        let next = lane.gaps.iter().find(|gap| middle(gap) > self.cursor).or(lane.gaps.first());
        if let Some(gap) = next {
            self.go(middle(gap));
        }
    }
}
