//! Drawing: a function of the state. Each view has its own file; here the frame around them.

mod bars;
mod calibration;
mod help;
mod plans;
mod plot;
mod predict;
mod text;
mod timeline;
mod training;

use crate::app::{App, Target, View};
use crate::theme::Theme;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

/// The least room that the views are made for.
pub const LEAST: (u16, u16) = (60, 16);

/// What lies where, for the mouse.
pub type Targets = Vec<(Rect, Target)>;

/// Draws the state.
pub fn draw(frame: &mut Frame, app: &App) -> Targets {
    let theme = app.palette.theme();
    let area = frame.area();
    let mut targets = Targets::new();
    if area.width < LEAST.0 || area.height < LEAST.1 {
        let lines = [
            format!("{} x {} is too small.", area.width, area.height),
            format!("Paceline needs {} x {}.", LEAST.0, LEAST.1),
            "q quits.".to_string(),
        ];
        let lines = lines.map(|line| Line::from(text::cut(&line, usize::from(area.width))));
        frame.render_widget(Paragraph::new(lines.to_vec()), area);
        return targets;
    }
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)]).areas(area);
    tabs(frame, app, &theme, head, &mut targets);
    match app.view {
        View::Predict => predict::draw(frame, app, &theme, body, &mut targets),
        View::Timeline => timeline::draw(frame, app, &theme, body, &mut targets),
        View::Plan => plans::draw(frame, app, &theme, body, &mut targets),
        View::Run => training::draw(frame, app, &theme, body, &mut targets),
        View::Calibrate => calibration::draw(frame, app, &theme, body, &mut targets),
    }
    notice(frame, app, &theme, foot);
    if app.help {
        help::draw(frame, app.view, &theme, area);
    }
    targets
}

fn tabs(frame: &mut Frame, app: &App, theme: &Theme, area: Rect, targets: &mut Targets) {
    let labels = View::ALL.iter().enumerate().map(|(place, view)| format!(" F{} {} ", place + 2, view.name()));
    let labels: Vec<String> = labels.collect();
    let right = format!("{} ? keys ", if app.waiting { " computing " } else { "" });
    let wanted = labels.iter().map(String::len).sum::<usize>() + right.len();
    // The name gives way before a tab does.
    let mut spans = Vec::new();
    let mut column = area.x;
    if wanted + 10 <= usize::from(area.width) {
        spans.push(Span::styled(" Paceline ", theme.title));
        column += 10;
    }
    for (view, label) in View::ALL.into_iter().zip(labels) {
        let width = label.len() as u16;
        let here = view == app.view;
        targets.push((Rect::new(column, area.y, width.min(area.right().saturating_sub(column)), 1), Target::Tab(view)));
        column += width;
        spans.push(Span::styled(label, if here { theme.selected } else { theme.dim }));
    }
    frame.render_widget(Paragraph::new(Line::from(spans)), area);
    let width = right.len() as u16;
    if column + width <= area.right() {
        let corner = Rect::new(area.right() - width, area.y, width, 1);
        frame.render_widget(Paragraph::new(Span::styled(right, theme.dim)), corner);
    }
}

/// The line at the bottom: what happened, else what the focus is about.
fn notice(frame: &mut Frame, app: &App, theme: &Theme, area: Rect) {
    let width = usize::from(area.width);
    let (line, style): (String, Style) = match &app.notice {
        Some(notice) => {
            let mark = if notice.bad { " error: " } else { " " };
            (format!("{mark}{}", notice.text), if notice.bad { theme.bad } else { theme.warn })
        }
        None => match app.view {
            View::Predict => (predict::hint(app), theme.dim),
            View::Timeline => (timeline::hint(app), theme.dim),
            View::Plan => (plans::hint(app), theme.dim),
            View::Run => (training::hint(app), theme.dim),
            View::Calibrate => (calibration::hint(app), theme.dim),
        },
    };
    frame.render_widget(Paragraph::new(Span::styled(text::cut(&line, width), style)), area);
}
