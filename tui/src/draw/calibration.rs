//! The calibrate view: which parts of the profile are measured, fitted or assumed, and how well its curves foretell what they
//! have not seen.

use super::plot::{self, Range, Series};
use super::{Targets, bars, text};
use crate::app::{App, Target};
use crate::calibration::{Calibration, ClassView, ProfileView};
use crate::theme::Theme;
use paceline_sim::units::{show_bytes, show_percent, show_seconds};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

/// What the bottom line says.
pub fn hint(app: &App) -> String {
    let calibration = &app.calibration;
    if calibration.running.is_some() {
        return " Esc stops measuring; nothing is kept then".into();
    }
    let local = app.settings.is_local();
    let what = if local { "the kernels of the settings" } else { "the usual kernels" };
    format!(" s measures {what} for {}, + - longer or shorter, arrows: class", show_seconds(calibration.seconds(local)))
}

/// Draws the view.
pub fn draw(frame: &mut Frame, app: &App, theme: &Theme, area: Rect, targets: &mut Targets) {
    let calibration = &app.calibration;
    let width = usize::from(area.width);
    let mut lines = Vec::new();
    if let Some(at) = &calibration.running {
        let said = if calibration.stopping { "stopping" } else { "measuring" };
        let bar = width.saturating_sub(2).min(60);
        let done = (at.fraction.clamp(0.0, 1.0) * bar as f64).round() as usize;
        lines.push(Line::styled(
            text::cut(&format!(" {said}: {}, {}", at.what, show_percent(at.fraction)), width),
            theme.title,
        ));
        let glyph = if theme.is_mono() { "=" } else { "█" };
        lines.push(Line::styled(format!(" {}{}", glyph.repeat(done), "·".repeat(bar - done)), theme.good));
    }
    let profile = match &calibration.profile {
        Some(Ok(profile)) => profile,
        other => {
            let (said, style) = match other {
                Some(Err(why)) => (format!(" the profile cannot be used: {why}"), theme.bad),
                _ => (" fitting ...".to_string(), theme.dim),
            };
            lines.extend(text::wrap(&said, width).into_iter().map(|line| Line::styled(line, style)));
            frame.render_widget(Paragraph::new(lines), area);
            return;
        }
    };
    lines.extend(head(app, profile, theme, width));
    let height = (lines.len() as u16).min(area.height);
    frame.render_widget(Paragraph::new(lines), Rect { height, ..area });
    let rest = Rect { y: area.y + height, height: area.height - height, ..area };
    let (table, plot) = if area.width >= 100 {
        let [table, plot] = Layout::horizontal([Constraint::Length(58), Constraint::Min(0)]).areas(rest);
        (table, Rect { height: plot.height.min(24), ..plot })
    } else {
        let most = rest.height.saturating_sub(8);
        let [table, plot] =
            Layout::vertical([Constraint::Length(most.max(rest.height / 2)), Constraint::Min(0)]).areas(rest);
        (table, plot)
    };
    draw_table(frame, calibration, profile, theme, table, targets);
    if let Some(class) = calibration.focused() {
        draw_residuals(frame, class, theme, plot);
    }
}

/// Where the profile comes from, and where the figures of the settings come from.
fn head(app: &App, profile: &ProfileView, theme: &Theme, width: usize) -> Vec<Line<'static>> {
    let [measured, in_runs, stated] = profile.rows;
    let days = match &profile.days {
        Some((first, last)) if first == last => format!(" on {first}"),
        Some((first, last)) => format!(" from {first} to {last}"),
        None => String::new(),
    };
    let mut lines = vec![
        Line::styled(text::cut(&format!(" {}", profile.machine), width), theme.title),
        Line::raw(text::cut(
            &format!(
                " {}: {measured} rows measured alone, {in_runs} in runs, {stated} stated by vendors{days}",
                profile.origin
            ),
            width,
        )),
    ];
    if !profile.assumed.is_empty() {
        let said = format!(" never measured, assumed from the others: {}", profile.assumed.join(", "));
        lines.push(Line::styled(text::cut(&said, width), theme.warn));
    }
    if let Some(answer) = &app.last {
        let from = &answer.figures.provenance;
        let shares = [
            ("measured", from.measured, theme.good),
            ("fitted", from.fitted, theme.accent),
            ("datasheet", from.datasheet, theme.warn),
            ("assumed", from.assumed, theme.bad),
        ];
        let mut spans = vec![Span::raw(" predicted time of the settings: ")];
        for (name, share, style) in shares.iter().filter(|(_, share, _)| *share > 0.0) {
            spans.push(Span::styled(format!("{} {name}  ", show_percent(*share)), *style));
        }
        lines.push(Line::from(spans));
        let cells = bars::stack(&shares.map(|(_, share, _)| share), 1.0, width.saturating_sub(2).min(60));
        let glyphs = if theme.is_mono() { ['m', 'f', 'd', 'a'] } else { ['█'; 4] };
        let bar = cells.iter().enumerate().map(|(n, cells)| {
            Span::styled(
                glyphs[n].to_string().repeat(*cells),
                shares[n].2.remove_modifier(ratatui::style::Modifier::all()),
            )
        });
        lines.push(Line::from(std::iter::once(Span::raw(" ")).chain(bar).collect::<Vec<_>>()));
        if !app.settings.is_local() {
            let said = format!(" of the cluster, not of this profile: {}", answer.source);
            lines.push(Line::styled(text::cut(&said, width), theme.dim));
        }
    }
    lines
}

fn draw_table(
    frame: &mut Frame,
    calibration: &Calibration,
    profile: &ProfileView,
    theme: &Theme,
    area: Rect,
    targets: &mut Targets,
) {
    if area.height < 2 {
        return;
    }
    let width = usize::from(area.width);
    let head = format!(" {:<24} {:>6} {:>5} {:>8} {:>8}", "class", "alone", "runs", "median", "worst");
    let mut lines = vec![Line::styled(text::cut(&head, width), theme.dim)];
    let room = usize::from(area.height) - 1;
    let first = (calibration.at + 1).saturating_sub(room).min(profile.classes.len().saturating_sub(room));
    let share = |error: Option<f64>| error.map_or("-".into(), show_percent);
    for (place, class) in profile.classes.iter().enumerate().skip(first).take(room) {
        let line = format!(
            " {} {:>6} {:>5} {:>8} {:>8}",
            text::fit(&class.class.to_string(), 24),
            class.rows[0],
            class.rows[1],
            share(class.residual.as_ref().and_then(|residual| residual.median_error)),
            share(class.residual.as_ref().and_then(|residual| residual.worst_error))
        );
        targets.push((Rect { y: area.y + lines.len() as u16, height: 1, ..area }, Target::Class(place)));
        let style = if place == calibration.at { theme.selected } else { Style::new() };
        lines.push(Line::styled(text::fit(&line, width.saturating_sub(1)), style));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

/// Errors of a class over the size of its work: each point foretold by the others.
fn draw_residuals(frame: &mut Frame, class: &ClassView, theme: &Theme, area: Rect) {
    let name = class.class;
    if class.points.is_empty() {
        let said = format!(" {name}: no curve; its time is looked up as it was measured");
        let lines: Vec<Line> =
            text::wrap(&said, usize::from(area.width)).into_iter().map(|line| Line::styled(line, theme.dim)).collect();
        frame.render_widget(Paragraph::new(lines), area);
        return;
    }
    // Work that computes is measured in FLOPs, the rest in bytes.
    let computes = class.points.iter().any(|point| point.flops > 0.0);
    let size = |flops: f64, bytes: f64| if computes { flops } else { bytes };
    let points: Vec<(f64, f64)> = class
        .points
        .iter()
        .map(|point| (size(point.flops, point.bytes).max(1.0).log10(), point.error() * 100.0))
        .collect();
    let across = Range::around(points.iter().map(|(x, _)| *x));
    let most = points.iter().map(|(_, error)| error.abs()).fold(5.0, f64::max);
    let zero = [(across.from, 0.0), (across.to, 0.0)];
    let show = |power: f64| {
        let value = 10f64.powf(power);
        if computes { format!("{value:.1e} FLOP") } else { show_bytes(value.round() as u64) }
    };
    let (least, largest) = points.iter().fold((f64::INFINITY, 0.0f64), |(a, b), (x, _)| (a.min(*x), b.max(*x)));
    let around = plot::Frame {
        title: &format!("{name}: error of each of {} points, foretold by the others", points.len()),
        across,
        up: Range { from: -most, to: most },
        label: &|error| format!("{error:+.0} %"),
        ends: (&show(least), &show(largest)),
    };
    let lines = plot::lines(
        theme,
        area,
        &around,
        &[
            Series { points: &zero, style: theme.dim, joined: true },
            Series { points: &points, style: theme.accent, joined: false },
        ],
    );
    frame.render_widget(Paragraph::new(lines), area);
}
