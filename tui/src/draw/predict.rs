//! The view of one configuration: knobs on the left; time, memory and what the values of a knob come to on the right.

use super::{Targets, bars, text};
use crate::app::{App, Target};
use crate::figures::{CLASS_NAMES, Figures, PART_NAMES};
use crate::question::Answer;
use crate::settings::KNOBS;
use crate::theme::Theme;
use paceline_sim::units::{show_bytes, show_percent, show_seconds};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

/// What the bottom line says of the focus.
pub fn hint(app: &App) -> String {
    let knob = &KNOBS[app.knob];
    let usual = knob.usual.map_or(String::new(), |usual| format!(" (default: {usual})"));
    match app.typed {
        Some(_) => format!(" {}: {}{usual}. Enter takes it, Esc does not", knob.key, knob.about),
        None => format!(" {}: {}{usual}", knob.key, knob.about),
    }
}

/// Draws the view.
pub fn draw(frame: &mut Frame, app: &App, theme: &Theme, area: Rect, targets: &mut Targets) {
    let left = if area.width >= 100 { 34 } else { 27 };
    let [knobs, _, right] =
        Layout::horizontal([Constraint::Length(left), Constraint::Length(1), Constraint::Min(0)]).areas(area);
    draw_knobs(frame, app, theme, knobs, targets);
    let mut room = right;
    match (&app.answer, &app.last) {
        (None, _) => frame.render_widget(Paragraph::new(Span::styled("computing ...", theme.dim)), room),
        (Some(Err(why)), last) => {
            let lines = text::wrap(&format!("Impossible: {why}"), usize::from(room.width));
            let height = (lines.len() as u16).min(room.height / 2);
            let styled = lines.into_iter().map(|line| Line::styled(line, theme.bad)).collect::<Vec<_>>();
            frame.render_widget(Paragraph::new(styled), Rect { height, ..room });
            room = below(room, height);
            room = draw_options(frame, app, theme, room);
            if let (Some(last), true) = (last, room.height > 3) {
                let note = Line::styled("the latest that was possible:", theme.dim);
                frame.render_widget(Paragraph::new(note), Rect { height: 1, ..room });
                draw_answer(frame, app, theme, last, None, below(room, 1), targets);
            }
        }
        (Some(Ok(answer)), _) => {
            let room = draw_options(frame, app, theme, room);
            draw_answer(frame, app, theme, answer, app.before.as_ref(), room, targets);
        }
    }
}

fn below(area: Rect, rows: u16) -> Rect {
    let rows = rows.min(area.height);
    Rect { y: area.y + rows, height: area.height - rows, ..area }
}

fn draw_knobs(frame: &mut Frame, app: &App, theme: &Theme, area: Rect, targets: &mut Targets) {
    let rows = usize::from(area.height);
    // The focus stays in sight.
    let first = (app.knob + 1).saturating_sub(rows).min(KNOBS.len().saturating_sub(rows));
    let width = usize::from(area.width);
    for (row, (place, knob)) in KNOBS.iter().enumerate().skip(first).take(rows).enumerate() {
        let here = place == app.knob;
        let line = Rect { y: area.y + row as u16, height: 1, ..area };
        targets.push((line, Target::Knob(place)));
        let value = app.settings.get(knob.key);
        let label = text::fit(&format!(" {}", knob.label), 16.min(width));
        let room = width.saturating_sub(16);
        let line_of = |shown: String, style: Style| {
            Line::from(vec![
                Span::styled(label.clone(), if here { theme.selected } else { Style::new() }),
                Span::styled(shown, style),
            ])
        };
        let shown = match (&app.typed, here) {
            (Some(typed), true) => {
                // The end of what is typed stays in sight.
                let letters: Vec<char> = typed.chars().collect();
                let from = letters.len().saturating_sub(room.saturating_sub(2));
                let tail: String = letters[from..].iter().collect();
                line_of(text::fit(&format!(" {tail}_"), room), theme.selected)
            }
            (_, true) => {
                let inner = text::fit(value.or(knob.usual).unwrap_or("?"), room.saturating_sub(2));
                line_of(format!("<{inner}>"), theme.selected)
            }
            _ => {
                let style = if value.is_some() { Style::new() } else { theme.dim };
                line_of(format!(" {}", text::cut(value.or(knob.usual).unwrap_or("?"), room.saturating_sub(1))), style)
            }
        };
        frame.render_widget(Paragraph::new(shown), line);
    }
}

/// The change from a figure to another, with its sign: less is better, or more.
fn change(theme: &Theme, before: Option<f64>, now: f64, less_is_better: bool) -> Span<'static> {
    let Some(before) = before.filter(|before| before.is_finite() && *before > 0.0) else { return Span::raw("") };
    let share = now / before - 1.0;
    if share.abs() < 5e-5 {
        return Span::styled(" =", theme.dim);
    }
    let style = if (share < 0.0) == less_is_better { theme.good } else { theme.bad };
    Span::styled(format!(" {:+.1} %", share * 100.0), style)
}

fn draw_answer(
    frame: &mut Frame,
    app: &App,
    theme: &Theme,
    answer: &Answer,
    before: Option<&Answer>,
    area: Rect,
    targets: &mut Targets,
) {
    let figures = &answer.figures;
    let width = usize::from(area.width);
    let mut lines: Vec<Line> = Vec::new();
    lines.push(Line::styled(text::cut(&answer.title, width), theme.title));
    let was = before.map(|before| &before.figures);
    lines.push(Line::from(vec![
        Span::styled(format!("{} per iteration", show_seconds(figures.iteration_seconds)), theme.title),
        change(theme, was.map(|f| f.iteration_seconds), figures.iteration_seconds, true),
        Span::raw(format!("  {:.0} tokens/s per GPU", figures.tokens_per_second_per_gpu)),
        change(theme, was.map(|f| f.tokens_per_second_per_gpu), figures.tokens_per_second_per_gpu, false),
    ]));
    let mut speed = Vec::new();
    if let Some(mfu) = figures.mfu {
        speed.push(Span::raw(format!("MFU {}", show_percent(mfu))));
        speed.push(change(theme, was.and_then(|f| f.mfu), mfu, false));
    }
    if let Some(hfu) = figures.hfu {
        speed.push(Span::raw(format!("  HFU {}", show_percent(hfu))));
    }
    speed.push(Span::raw(format!("  {} GPUs, {} microbatches", answer.devices, answer.microbatches)));
    lines.push(Line::from(speed));
    lines.push(budget_line(app, answer));
    lines.extend(time_lines(theme, figures, was, width, area.height >= 30));
    let height = (lines.len() as u16).min(area.height);
    frame.render_widget(Paragraph::new(lines), Rect { height, ..area });
    draw_memory(frame, app, theme, figures, was, below(area, height), targets);
}

fn budget_line(app: &App, answer: &Answer) -> Line<'static> {
    let budget = &answer.budget;
    let mut line = format!("{:.3e} tokens per day", budget.tokens_per_day);
    if let Some(tokens) = app.settings.budget("tokens") {
        line += &format!("; {tokens:.2e} tokens: {:.1} days, {:.0} GPU-hours", budget.days, budget.gpu_hours);
        if app.settings.budget("price").is_some() {
            line += &format!(", ${:.0}", budget.cost);
        }
    }
    Line::raw(line)
}

fn time_lines(theme: &Theme, figures: &Figures, was: Option<&Figures>, width: usize, tall: bool) -> Vec<Line<'static>> {
    let parts = figures.parts();
    let cells = bars::stack(&parts, figures.iteration_seconds, width);
    let bar = cells.iter().enumerate().map(|(part, cells)| {
        let (glyph, style) = theme.part(part);
        Span::styled(glyph.to_string().repeat(*cells), style)
    });
    let mut lines = vec![Line::from(bar.collect::<Vec<_>>())];
    let mut row: Vec<Span> = Vec::new();
    let mut used = 0;
    for (part, seconds) in parts.into_iter().enumerate().filter(|(_, seconds)| *seconds > 0.0) {
        let (glyph, style) = theme.part(part);
        let share = seconds / figures.iteration_seconds;
        let before = was.map(|was| was.parts()[part]);
        let label = if tall {
            format!(" {:<14} {:>8}  {:>6}", PART_NAMES[part].0, show_seconds(seconds), show_percent(share))
        } else {
            format!(" {} {}  ", PART_NAMES[part].0, show_percent(share))
        };
        let wide = label.chars().count() + 1;
        if tall || used + wide > width {
            if !row.is_empty() {
                lines.push(Line::from(std::mem::take(&mut row)));
            }
            used = 0;
        }
        used += wide;
        row.push(Span::styled(glyph.to_string(), style));
        row.push(Span::raw(label));
        if tall {
            row.push(change(theme, before, seconds, true));
        }
    }
    lines.push(Line::from(row));
    lines
}

/// Memory of each rank, by class, against the limit.
fn draw_memory(
    frame: &mut Frame,
    app: &App,
    theme: &Theme,
    figures: &Figures,
    was: Option<&Figures>,
    area: Rect,
    targets: &mut Targets,
) {
    if area.height < 3 {
        return;
    }
    targets.push((area, Target::Ranks));
    let (fullest, peak) = figures.fullest();
    let whole = |bytes: f64| show_bytes(bytes.round() as u64);
    let limit = figures.limit_bytes;
    let mut head = vec![match limit {
        Some(limit) if figures.fits => {
            Span::styled(format!("memory: fits, {} of {}", whole(peak), whole(limit)), theme.good)
        }
        Some(limit) => {
            Span::styled(format!("memory: DOES NOT FIT, {} over {}", whole(peak - limit), whole(limit)), theme.bad)
        }
        None => Span::raw(format!("memory: {}, no limit", whole(peak))),
    }];
    head.push(change(theme, was.map(|was| was.fullest().1), peak, true));
    let mut lines = vec![Line::from(head)];
    let ranks = figures.peak_bytes.len();
    let digits = ranks.saturating_sub(1).max(1).ilog10() as usize + 2;
    let width = usize::from(area.width).saturating_sub(digits + 1 + 12);
    let scale = figures.peak_bytes.iter().copied().chain(limit).fold(0.0, f64::max);
    // A line each for the legend, and for the ranks that do not fit here.
    let classes: Vec<usize> =
        (0..CLASS_NAMES.len()).filter(|c| figures.by_class.iter().any(|of| of[*c] > 0.0)).collect();
    let legend = legend_lines(theme, figures, fullest, &classes, usize::from(area.width));
    let mut room = usize::from(area.height).saturating_sub(1 + legend.len());
    let first = app.first_rank.min(ranks.saturating_sub(1));
    if ranks > room {
        room = room.saturating_sub(1);
    }
    let first = first.min(ranks.saturating_sub(room));
    let mark = limit.map(|limit| ((limit / scale * width as f64).round() as usize).min(width.saturating_sub(1)));
    for rank in (first..ranks).take(room) {
        let cells = bars::stack(&figures.by_class[rank], scale, width);
        let mut row: Vec<(char, Style)> = Vec::with_capacity(width);
        for (class, cells) in cells.iter().enumerate() {
            let cell = theme.class(class);
            row.extend(std::iter::repeat_n(cell, *cells));
        }
        row.resize(width, (' ', Style::new()));
        let over = limit.is_some_and(|limit| figures.peak_bytes[rank] > limit);
        if let Some(mark) = mark
            && mark < row.len()
        {
            row[mark] = ('│', if over { theme.bad } else { theme.dim });
        }
        let mut spans = vec![Span::raw(format!("{:>digits$} ", format!("r{rank}")))];
        for group in row.chunk_by(|a, b| a == b) {
            spans.push(Span::styled(group.iter().map(|(glyph, _)| *glyph).collect::<String>(), group[0].1));
        }
        let style = if over { theme.bad } else { Style::new() };
        spans.push(Span::styled(format!(" {:>10}", whole(figures.peak_bytes[rank])), style));
        if over {
            spans.push(Span::styled("!", theme.bad));
        }
        lines.push(Line::from(spans));
    }
    if ranks > room {
        let last = first + room;
        let more =
            format!("ranks {first}..{} of {ranks}; r{fullest} is the fullest (PgUp PgDn)", last.saturating_sub(1));
        lines.push(Line::styled(text::cut(&more, usize::from(area.width)), theme.dim));
    }
    lines.extend(legend);
    frame.render_widget(Paragraph::new(lines), area);
}

/// Which colour is which class, with the bytes of the fullest rank.
fn legend_lines(
    theme: &Theme,
    figures: &Figures,
    fullest: usize,
    classes: &[usize],
    width: usize,
) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    let mut row = Vec::new();
    let mut used = 0;
    for &class in classes {
        let (glyph, style) = theme.class(class);
        let bytes = figures.by_class.get(fullest).map_or(0.0, |of| of[class]);
        let label = format!(" {} {}  ", CLASS_NAMES[class].0, show_bytes(bytes.round() as u64));
        let wide = label.chars().count() + 1;
        if used + wide > width && !row.is_empty() {
            lines.push(Line::from(std::mem::take(&mut row)));
            used = 0;
        }
        used += wide;
        row.push(Span::styled(glyph.to_string(), style));
        row.push(Span::raw(label));
    }
    lines.push(Line::from(row));
    lines
}

/// What the values of the knob come to, at the bottom; the impossible ones are marked and say why. Returns the room above.
fn draw_options(frame: &mut Frame, app: &App, theme: &Theme, area: Rect) -> Rect {
    if app.options_of != Some(app.knob) || app.options.is_empty() || area.height < 12 {
        return area;
    }
    let knob = &KNOBS[app.knob];
    let now = app.settings.get(knob.key).or(knob.usual);
    let most = if area.height >= 30 { 12 } else { 4 };
    let width = usize::from(area.width);
    let at = app.options.iter().position(|option| Some(option.value.as_str()) == now).unwrap_or(0);
    let first = at.saturating_sub(most / 2).min(app.options.len().saturating_sub(most));
    let shown = &app.options[first..(first + most).min(app.options.len())];
    let names = shown.iter().map(|option| option.value.chars().count()).max().unwrap_or(0).clamp(4, 24);
    let mut lines = vec![Line::styled(text::cut(&format!("{} could be", knob.label), width), theme.dim)];
    for option in shown {
        let here = Some(option.value.as_str()) == now;
        let (mark, said, style) = match &option.outcome {
            Ok((seconds, true)) => ("+", show_seconds(*seconds), Style::new()),
            Ok((seconds, false)) => ("!", format!("{}, does not fit", show_seconds(*seconds)), theme.warn),
            Err(why) => ("x", why.clone(), theme.dim),
        };
        let name = text::fit(&option.value, names);
        lines.push(Line::from(vec![
            Span::styled(format!("{} ", if here { ">" } else { " " }), theme.accent),
            Span::styled(format!("{mark} {name} {}", text::cut(&said, width.saturating_sub(names + 5))), style),
        ]));
    }
    let height = lines.len() as u16;
    let place = Rect { y: area.bottom() - height, height, ..area };
    frame.render_widget(Paragraph::new(lines), place);
    Rect { height: area.height - height, ..area }
}
