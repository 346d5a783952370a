//! The timeline: ranks as rows, passes coloured, what the cursor is on, and the memory of its rank.

use super::{Targets, text};
use crate::app::{App, Target};
use crate::lanes::{Lane, Lanes, What};
use crate::theme::Theme;
use crate::timeline::{Shown, Timeline};
use paceline_sim::units::{show_bytes, show_percent, show_seconds};
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

/// What the bottom line says.
pub fn hint(app: &App) -> String {
    if let Some(typed) = &app.timeline.typed {
        return format!(" file of a recorded timeline: {typed}_  (Enter reads it, Esc does not)");
    }
    let both = if app.timeline.measured.is_some() { ", m measured" } else { ", f file" };
    format!(" arrows move, + - zoom, 0 all, c critical path, n next gap{both}; F B X W R O passes, ~ communication")
}

/// Columns of the names of the ranks.
fn margin(lanes: &Lanes) -> u16 {
    lanes.lanes.len().saturating_sub(1).max(1).ilog10() as u16 + 4
}

/// Draws the view.
pub fn draw(frame: &mut Frame, app: &App, theme: &Theme, area: Rect, targets: &mut Targets) {
    let timeline = &app.timeline;
    let Some(lanes) = timeline.lanes() else {
        let (said, style) = match &timeline.predicted {
            Some(Err(why)) => (format!("Impossible: {why}"), theme.bad),
            _ => ("simulating ...".to_string(), theme.dim),
        };
        let lines: Vec<Line> =
            text::wrap(&said, usize::from(area.width)).into_iter().map(|line| Line::styled(line, style)).collect();
        frame.render_widget(Paragraph::new(lines), area);
        return;
    };
    let (from, to) = timeline.window();
    let width = usize::from(area.width);
    let kind = match timeline.shown {
        Shown::Both => "predicted (p) above measured (m)",
        Shown::Measured => "measured",
        Shown::Predicted if lanes.measured => "measured",
        Shown::Predicted => "predicted",
    };
    let busy: f64 = lanes.lanes.iter().map(Lane::busy).sum::<f64>() / lanes.lanes.len().max(1) as f64;
    let other = match (timeline.shown, &timeline.measured) {
        (Shown::Both, Some(measured)) => format!(" ({} in {})", show_seconds(measured.end), timeline.source),
        (Shown::Measured, Some(_)) => format!(" in {}", timeline.source),
        _ => String::new(),
    };
    let head = format!(
        " {kind}, {} ranks, {} per iteration{other}, {} idle; from {} to {}",
        lanes.lanes.len(),
        show_seconds(lanes.end),
        show_percent(1.0 - busy / lanes.end.max(f64::MIN_POSITIVE)),
        show_seconds(from),
        show_seconds(to)
    );
    frame.render_widget(Paragraph::new(Line::styled(text::cut(&head, width), theme.title)), Rect { height: 1, ..area });

    let left = margin(lanes);
    let columns = area.width.saturating_sub(left + 1);
    let both = timeline.shown == Shown::Both && timeline.measured.is_some();
    let rows_each = if both { 2 } else { 1 };
    // Two lines of detail and at least three of memory stay.
    let most = (area.height.saturating_sub(6) / rows_each).max(1);
    let ranks = lanes.lanes.len();
    let shown = ranks.min(usize::from(most));
    let first = timeline.rank.saturating_sub(shown.saturating_sub(1) / 2).min(ranks - shown);
    let mut row = area.y + 1;
    for rank in first..first + shown {
        let mut draw_lane = |mark: char, lanes: &Lanes| {
            let place = Rect { x: area.x, y: row, width: area.width, height: 1 };
            row += 1;
            let Some(lane) = lanes.lanes.get(rank) else { return };
            let mut spans = vec![Span::styled(
                format!("{:>w$}{mark}", format!("r{rank}"), w = usize::from(left) - 1),
                if rank == timeline.rank { theme.selected } else { theme.dim },
            )];
            spans.extend(cells(lane, timeline, theme, usize::from(columns), rank == timeline.rank));
            frame.render_widget(Paragraph::new(Line::from(spans)), place);
            let drawn = Rect { x: area.x + left, y: place.y, width: columns, height: 1 };
            targets.push((drawn, Target::Lane { rank, left: area.x + left }));
        };
        if let (true, Some(measured), Some(Ok(predicted))) = (both, &timeline.measured, &timeline.predicted) {
            draw_lane('p', predicted);
            draw_lane('m', measured);
        } else {
            draw_lane(' ', lanes);
        }
    }
    let rest = Rect { y: row, height: area.bottom().saturating_sub(row), ..area };
    draw_detail(frame, timeline, lanes, theme, rest, shown < ranks);
    let curve = Rect { y: rest.y + 2, height: rest.height.saturating_sub(2).min(12), ..rest };
    draw_memory(frame, timeline, &lanes.lanes[timeline.rank.min(ranks - 1)], theme, curve, left, columns);
}

fn draw_detail(frame: &mut Frame, timeline: &Timeline, lanes: &Lanes, theme: &Theme, area: Rect, more: bool) {
    let what = match (timeline.span(), timeline.gap()) {
        (Some(span), _) => format!(
            "{}, {}{}",
            span.what.describe(),
            took(span, timeline.counterpart()),
            if span.critical { ", on the critical path" } else { "" }
        ),
        (None, Some(gap)) => format!("idle for {}: {}", show_seconds(gap.end - gap.start), gap.why),
        (None, None) => "nothing".into(),
    };
    let more = if more { format!(" (r{} of {})", timeline.rank, lanes.lanes.len()) } else { String::new() };
    let line = format!(" r{} at {}{more}: {what}", timeline.rank, show_seconds(timeline.cursor));
    let lane = &lanes.lanes[timeline.rank.min(lanes.lanes.len() - 1)];
    let memory = format!(
        " memory of r{}: {} here, {} at most",
        timeline.rank,
        show_bytes(lane.bytes_at(timeline.cursor).round() as u64),
        show_bytes(lane.peak_bytes.round() as u64)
    );
    let width = usize::from(area.width);
    let lines =
        vec![Line::styled(text::cut(&line, width), theme.accent), Line::styled(text::cut(&memory, width), theme.title)];
    frame.render_widget(Paragraph::new(lines), Rect { height: area.height.min(2), ..area });
}

/// How long a span takes, and how long it took.
fn took(span: &crate::lanes::Span, measured: Option<&crate::lanes::Span>) -> String {
    let predicted = span.end - span.start;
    match measured.map(|span| span.end - span.start) {
        None => show_seconds(predicted),
        Some(measured) => format!(
            "predicted {}, measured {} ({:+.1} %)",
            show_seconds(predicted),
            show_seconds(measured),
            (predicted / measured - 1.0) * 100.0
        ),
    }
}

/// What fills a column: the work that takes most of it, none where idleness does.
fn filling(lane: &Lane, from: f64, to: f64) -> Option<usize> {
    let first = lane.spans.partition_point(|span| span.end <= from);
    let mut best: Option<(usize, f64)> = None;
    let mut worked = 0.0;
    for (place, span) in lane.spans.iter().enumerate().skip(first).take_while(|(_, span)| span.start < to) {
        let within = span.end.min(to) - span.start.max(from);
        worked += within;
        if best.is_none_or(|(_, most)| within > most) {
            best = Some((place, within));
        }
    }
    best.filter(|_| worked * 2.0 >= to - from).map(|(place, _)| place)
}

fn cells(lane: &Lane, timeline: &Timeline, theme: &Theme, columns: usize, here: bool) -> Vec<Span<'static>> {
    let (from, to) = timeline.window();
    let step = (to - from) / columns.max(1) as f64;
    let filled: Vec<Option<usize>> =
        (0..columns).map(|c| filling(lane, from + c as f64 * step, from + (c + 1) as f64 * step)).collect();
    let cursor = (((timeline.cursor - from) / step.max(f64::MIN_POSITIVE)) as usize).min(columns.saturating_sub(1));
    let mut row: Vec<(char, Style)> = Vec::with_capacity(columns);
    for group in filled.chunk_by(|a, b| a == b) {
        let Some(place) = group[0] else {
            row.extend(std::iter::repeat_n(('·', theme.dim), group.len()));
            continue;
        };
        let span = &lane.spans[place];
        let mut style = theme.work(span.what);
        if span.critical {
            style = style.add_modifier(Modifier::UNDERLINED);
        }
        let letter = span.what.letter();
        let label = match span.what {
            What::Pass { microbatch, .. } => format!("{letter}{microbatch}"),
            _ => letter.to_string(),
        };
        let fits = label.len() < group.len();
        let mut glyphs = label.chars();
        let plain = if theme.is_mono() { '-' } else { ' ' };
        row.extend(group.iter().enumerate().map(|(at, _)| {
            let glyph = match (fits, at) {
                (true, _) => glyphs.next().unwrap_or(plain),
                (false, 0) => letter,
                (false, _) => plain,
            };
            (glyph, style)
        }));
    }
    if here && let Some(cell) = row.get_mut(cursor) {
        cell.1 = cell.1.add_modifier(Modifier::REVERSED | Modifier::BOLD);
        if theme.is_mono() {
            cell.0 = '|';
        }
    }
    let groups = row.chunk_by(|a, b| a.1 == b.1);
    groups.map(|g| Span::styled(g.iter().map(|(glyph, _)| *glyph).collect::<String>(), g[0].1)).collect()
}

const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The highest memory of each column, up to the highest of all.
fn draw_memory(
    frame: &mut Frame,
    timeline: &Timeline,
    lane: &Lane,
    theme: &Theme,
    area: Rect,
    left: u16,
    columns: u16,
) {
    if area.height == 0 || lane.peak_bytes <= 0.0 {
        return;
    }
    let (from, to) = timeline.window();
    let step = (to - from) / f64::from(columns.max(1));
    let rows = usize::from(area.height);
    let eighths: Vec<usize> = (0..columns)
        .map(|column| {
            let at = from + f64::from(column) * step;
            let share = lane.most_bytes(at, at + step) / lane.peak_bytes;
            (share * (rows * 8) as f64).round() as usize
        })
        .collect();
    let lines: Vec<Line> = (0..rows)
        .map(|row| {
            let below = (rows - 1 - row) * 8;
            let bar: String = eighths.iter().map(|e| EIGHTHS[e.saturating_sub(below).min(8)]).collect();
            Line::from(vec![Span::raw(" ".repeat(usize::from(left))), Span::styled(bar, theme.class(3).1)])
        })
        .collect();
    frame.render_widget(Paragraph::new(lines), area);
}
