//! Curves and clouds of points, in dots of Braille: two by four to a cell.

use super::text;
use crate::theme::Theme;
use ratatui::layout::Rect;
use ratatui::style::Style;
use ratatui::text::{Line, Span};

/// Points of one colour.
pub struct Series<'a> {
    /// Places, in the order in which they are joined.
    pub points: &'a [(f64, f64)],
    /// Their colour.
    pub style: Style,
    /// Whether lines join them.
    pub joined: bool,
}

/// What is between two values.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    /// The least.
    pub from: f64,
    /// The most.
    pub to: f64,
}

impl Range {
    /// Around values, a little wider than they need; one value gets some room too.
    pub fn around(values: impl Iterator<Item = f64>) -> Range {
        let finite = values.filter(|value| value.is_finite());
        let (from, to) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        if from > to {
            return Range { from: 0.0, to: 1.0 };
        }
        let room = ((to - from) * 0.05).max(to.abs() * 1e-3).max(1e-12);
        Range { from: from - room, to: to + room }
    }

    fn place(self, value: f64, dots: usize) -> usize {
        let share = ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0);
        (share * dots.saturating_sub(1) as f64).round() as usize
    }
}

/// Columns of the labels on the left.
const MARGIN: usize = 10;

/// The bits of a Braille cell, by column and row.
const DOTS: [[u8; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];

/// What is written around a plot.
pub struct Frame<'a> {
    /// Above it.
    pub title: &'a str,
    /// What its width shows.
    pub across: Range,
    /// What its height shows.
    pub up: Range,
    /// How values of the height are written.
    pub label: &'a dyn Fn(f64) -> String,
    /// What is written at the ends of the width.
    pub ends: (&'a str, &'a str),
}

/// The rows of a plot for an area. Later series lie above earlier ones.
pub fn lines(theme: &Theme, area: Rect, around: &Frame<'_>, series: &[Series<'_>]) -> Vec<Line<'static>> {
    let Frame { title, across, up, label, ends } = *around;
    let (width, height) =
        (usize::from(area.width).saturating_sub(MARGIN + 1), usize::from(area.height).saturating_sub(2));
    if width < 8 || height < 2 {
        return Vec::new();
    }
    let mut cells = vec![(0u8, Style::new()); width * height];
    let (columns, rows) = (width * 2, height * 4);
    for series in series {
        let mut dot = |column: usize, row: usize| {
            let row = rows - 1 - row;
            let cell = &mut cells[row / 4 * width + column / 2];
            if cell.1 != series.style {
                // A cell has one colour.
                *cell = (0, series.style);
            }
            cell.0 |= DOTS[column % 2][row % 4];
        };
        let places = series.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite());
        let mut before: Option<(usize, usize)> = None;
        for &(x, y) in places {
            let (column, row) = (across.place(x, columns), up.place(y, rows));
            dot(column, row);
            if let Some((c, r)) = before.filter(|_| series.joined) {
                let steps = c.abs_diff(column).max(r.abs_diff(row));
                for step in 1..steps {
                    let between = |a: usize, b: usize| {
                        (a as f64 + (b as f64 - a as f64) * step as f64 / steps as f64).round() as usize
                    };
                    dot(between(c, column), between(r, row));
                }
            }
            before = Some((column, row));
        }
    }
    let mut lines = vec![Line::styled(text::cut(title, usize::from(area.width)), theme.title)];
    for (row, cells) in cells.chunks(width).enumerate() {
        let value = match row {
            0 => label(up.to),
            _ if row + 1 == height => label(up.from),
            _ => String::new(),
        };
        let mut spans = vec![Span::styled(format!("{:>MARGIN$}│", text::cut(&value, MARGIN)), theme.dim)];
        let groups = cells.chunk_by(|a, b| a.1 == b.1);
        spans.extend(groups.map(|group| {
            let dots = group.iter().map(|(bits, _)| char::from_u32(0x2800 + u32::from(*bits)).unwrap_or(' '));
            Span::styled(dots.map(|dot| if dot == '\u{2800}' { ' ' } else { dot }).collect::<String>(), group[0].1)
        }));
        lines.push(Line::from(spans));
    }
    let between = width.saturating_sub(ends.0.chars().count() + ends.1.chars().count());
    let below = format!("{:w$}{}{}{}", "", ends.0, " ".repeat(between), ends.1, w = MARGIN + 1);
    lines.push(Line::styled(text::cut(&below, usize::from(area.width)), theme.dim));
    lines
}
