//! The run view: loss and step times as curves, predicted against measured, and what each rank does.

use super::plot::{self, Range, Series};
use super::{Targets, bars, text};
use crate::activity::KIND_NAMES;
use crate::app::{App, Target};
use crate::theme::Theme;
use crate::training::{Phase, Training};
use paceline_sim::units::{show_bytes, show_percent, show_seconds};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

/// What the bottom line says.
pub fn hint(app: &App) -> String {
    let training = &app.training;
    if let Some(typed) = &training.typed {
        return format!(" steps: {typed}_  (Enter takes it, Esc does not)");
    }
    if training.is_running() {
        return " Esc stops after the present step, with a checkpoint; the other views go on working".into();
    }
    let steps = training.target(app.job_steps());
    format!(" s trains the settings of Predict for {steps} steps, r goes on from the checkpoint, + - or digits: steps")
}

/// Draws the view.
pub fn draw(frame: &mut Frame, app: &App, theme: &Theme, area: Rect, targets: &mut Targets) {
    let training = &app.training;
    let width = usize::from(area.width);
    let mut lines = head(app, theme, width);
    if training.steps.is_empty() {
        if training.phase == Phase::Idle {
            lines.push(Line::raw(""));
            lines.extend(introduction(app, width).into_iter().map(Line::raw));
        }
        frame.render_widget(Paragraph::new(lines), area);
        return;
    }
    let height = (lines.len() as u16).min(area.height);
    frame.render_widget(Paragraph::new(lines), Rect { height, ..area });
    let rest = Rect { y: area.y + height, height: area.height - height, ..area };
    let ranks = training.look.as_ref().map_or(0, |look| look.ranks.len()) as u16;
    // A heading and a legend with the ranks; curves get what is left, and at least half.
    let crew_height = (ranks + 2).min(rest.height / 2);
    let [curves, crew] = Layout::vertical([Constraint::Min(0), Constraint::Length(crew_height)]).areas(rest);
    let [left, right] = Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(curves);
    draw_loss(frame, training, theme, left);
    draw_times(frame, training, theme, right);
    draw_crew(frame, training, theme, crew, targets);
}

fn introduction(app: &App, width: usize) -> Vec<String> {
    let said = if app.settings.is_local() {
        "s trains the model of the settings on the cores of this machine, exactly as it is simulated. Meanwhile the loss, the step \
         times against the prediction, and what each rank does are shown here; at the end the median step is in Timeline, \
         under the predicted one."
    } else {
        "The settings are of a cluster, and a run is on this machine. Set cluster to local in Predict and choose a small model, \
         such as demo-3m with a sequence of 256; or open a job of this machine: paceline tui job.toml."
    };
    text::wrap(said, width.saturating_sub(2)).into_iter().map(|line| format!(" {line}")).collect()
}

/// What runs, how far it is, and its figures.
fn head(app: &App, theme: &Theme, width: usize) -> Vec<Line<'static>> {
    let training = &app.training;
    let done = training.steps.last().map_or(0, |step| step.step);
    let target = training.target(app.job_steps());
    let (phase, style) = match &training.phase {
        Phase::Idle => ("no run yet".to_string(), theme.title),
        Phase::Starting => ("making ready".to_string(), theme.title),
        Phase::Training => (format!("training: step {done} of {target}"), theme.good),
        Phase::Stopping => (format!("stopping after the present step; {done} of {target} are done"), theme.warn),
        Phase::Done => (format!("done: {done} steps"), theme.good),
        Phase::Stopped => (format!("stopped after step {done} of {target}; r goes on"), theme.warn),
        Phase::Failed(why) => (format!("failed: {why}"), theme.bad),
    };
    let mut lines: Vec<Line> = text::wrap(&phase, width.saturating_sub(1))
        .into_iter()
        .take(3)
        .map(|l| Line::styled(format!(" {l}"), style))
        .collect();
    if let Some(begun) = &training.begun {
        lines.push(Line::raw(text::cut(&format!(" {}", begun.title), width)));
    }
    if let Some(step) = training.steps.last() {
        let held_out =
            training.held_out.last().map_or(String::new(), |(at, loss)| format!(", held out {loss:.3} after {at}"));
        let line = format!(
            " loss {:.3}{held_out}; gradient norm {:.3}; {:.0} tokens/s",
            step.loss, step.gradient_norm, step.tokens_per_second
        );
        lines.push(Line::styled(text::cut(&line, width), theme.title));
    }
    if let (Some(begun), Some(measured)) = (&training.begun, training.median_seconds()) {
        let error = begun.predicted_seconds / measured - 1.0;
        lines.push(Line::from(vec![
            Span::raw(format!(
                " step: predicted {}, measured {} (median of {}): ",
                show_seconds(begun.predicted_seconds),
                show_seconds(measured),
                training.steps.len()
            )),
            Span::styled(format!("{:+.1} %", error * 100.0), if error.abs() <= 0.1 { theme.good } else { theme.warn }),
        ]));
    }
    if let Some(path) = &training.checkpoint {
        lines.push(Line::styled(text::cut(&format!(" checkpoint {path}"), width), theme.dim));
    }
    lines
}

fn draw_loss(frame: &mut Frame, training: &Training, theme: &Theme, area: Rect) {
    let losses: Vec<(f64, f64)> = training.steps.iter().map(|step| (step.step as f64, step.loss)).collect();
    let held_out: Vec<(f64, f64)> = training.held_out.iter().map(|(step, loss)| (*step as f64, *loss)).collect();
    let values = losses.iter().chain(&held_out).map(|(_, loss)| *loss);
    let title = if held_out.is_empty() { "loss" } else { "loss (line), held out (dots)" };
    let (first, last) = (losses[0].0, losses[losses.len() - 1].0);
    let around = plot::Frame {
        title,
        across: Range { from: first.min(held_out.first().map_or(first, |at| at.0)), to: last.max(first + 1.0) },
        up: Range::around(values),
        label: &|loss| format!("{loss:.2}"),
        ends: (&format!("step {first:.0}"), &format!("{last:.0}")),
    };
    let lines = plot::lines(
        theme,
        area,
        &around,
        &[
            Series { points: &losses, style: theme.good, joined: true },
            Series { points: &held_out, style: theme.warn, joined: false },
        ],
    );
    frame.render_widget(Paragraph::new(lines), area);
}

fn draw_times(frame: &mut Frame, training: &Training, theme: &Theme, area: Rect) {
    let times: Vec<(f64, f64)> = training.steps.iter().map(|step| (step.step as f64, step.seconds)).collect();
    let (first, last) = (times[0].0, times[times.len() - 1].0.max(times[0].0 + 1.0));
    let predicted = training.begun.as_ref().map(|begun| begun.predicted_seconds);
    let line: Vec<(f64, f64)> = predicted.map(|p| vec![(first, p), (last, p)]).unwrap_or_default();
    // A first step that pays for fresh memory would flatten the others.
    let values = times.iter().skip(usize::from(times.len() > 3)).chain(&line).map(|(_, seconds)| *seconds);
    let around = plot::Frame {
        title: "step times (dots), predicted (line)",
        across: Range { from: first, to: last },
        up: Range::around(values),
        label: &show_seconds,
        ends: (&format!("step {first:.0}"), &format!("{:.0}", times[times.len() - 1].0)),
    };
    let lines = plot::lines(
        theme,
        area,
        &around,
        &[
            Series { points: &line, style: theme.dim, joined: true },
            Series { points: &times, style: theme.accent, joined: false },
        ],
    );
    frame.render_widget(Paragraph::new(lines), area);
}

/// What each rank did in the latest step, its memory, and how fast its communication was.
fn draw_crew(frame: &mut Frame, training: &Training, theme: &Theme, area: Rect, targets: &mut Targets) {
    let Some(look) = training.look.as_ref().filter(|_| area.height >= 3) else { return };
    targets.push((area, Target::Crew));
    let ranks = look.ranks.len();
    let step: f64 = look.ranks.iter().map(|rank| rank.seconds.iter().sum()).fold(0.0, f64::max);
    let moved: f64 = look.ranks.iter().map(|rank| rank.moved_bytes).sum();
    let head = format!(
        " step {} by rank: time, memory{}; {} moved",
        look.step,
        training.begun.as_ref().map_or(String::new(), |_| " of what was predicted".into()),
        show_bytes(moved.round() as u64)
    );
    let width = usize::from(area.width);
    let mut lines = vec![Line::styled(text::cut(&head, width), theme.title)];
    let room = usize::from(area.height) - 2;
    let first = training.first_rank.min(ranks.saturating_sub(room));
    let digits = ranks.saturating_sub(1).max(1).ilog10() as usize + 2;
    let bar = width.saturating_sub(digits + 2 + 44).max(8);
    for (rank, activity) in look.ranks.iter().enumerate().skip(first).take(room) {
        let mut spans = vec![Span::raw(format!(" {:>digits$} ", format!("r{rank}")))];
        for (kind, cells) in bars::stack(&activity.seconds, step, bar).into_iter().enumerate() {
            let (glyph, style) = theme.kind(kind);
            spans.push(Span::styled(glyph.to_string().repeat(cells), style));
        }
        let worked =
            1.0 - (activity.seconds[4] + activity.seconds[5]) / activity.seconds.iter().sum::<f64>().max(1e-12);
        let predicted = training.begun.as_ref().and_then(|begun| begun.predicted_peaks.get(rank).copied());
        let memory = match predicted {
            Some(bytes) if bytes == activity.peak_bytes => format!("{} as predicted", show_bytes(bytes)),
            Some(bytes) => format!("{} of {}", show_bytes(activity.peak_bytes), show_bytes(bytes)),
            None => show_bytes(activity.peak_bytes),
        };
        let over = training.begun.as_ref().and_then(|begun| begun.limit_bytes).is_some_and(|l| activity.peak_bytes > l);
        spans.push(Span::raw(format!(" {:>7}", show_percent(worked))));
        spans.push(Span::styled(format!(" {memory:>23}"), if over { theme.bad } else { Style::new() }));
        let speed = activity.bandwidth().map_or("-".into(), |speed| format!("{}/s", show_bytes(speed.round() as u64)));
        spans.push(Span::styled(format!(" {speed:>11}"), theme.dim));
        lines.push(Line::from(spans));
    }
    let mut legend = vec![Span::raw(" ")];
    for (kind, (name, _)) in KIND_NAMES.iter().enumerate() {
        let (glyph, style) = theme.kind(kind);
        legend.push(Span::styled(glyph.to_string(), style));
        legend.push(Span::raw(format!(" {name}  ")));
    }
    if ranks > room {
        legend.push(Span::styled(format!("r{first}.. of {ranks}"), theme.dim));
    }
    lines.push(Line::from(legend));
    frame.render_widget(Paragraph::new(lines), area);
}
