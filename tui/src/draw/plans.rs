//! The plan view: a search under way, its plans as a table, as memory against throughput, or as a map over models and nodes.

use super::{Targets, text};
use crate::app::{App, Target};
use crate::plans::{Cell, MODELS, NODES, Plans, Shape, Sort};
use crate::search::Row;
use crate::theme::Theme;
use paceline_planner::export::Target as Launcher;
use paceline_sim::units::{show_bytes, show_percent, show_seconds};
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

/// What the bottom line says.
pub fn hint(app: &App) -> String {
    if app.plans.typing {
        return format!(" filter: {}_  (Enter keeps it, Esc clears it)", app.plans.filter);
    }
    if app.plans.choosing {
        let names = Launcher::ALL.map(Launcher::name).map(|name| format!("({}){}", &name[..1], &name[1..]));
        return format!(" export for: {}; Esc for none", names.join(" "));
    }
    " s search, Esc stop, o order, / filter, v table, Pareto, map, m compute the map, Enter open, w write, e export"
        .into()
}

/// Draws the view.
pub fn draw(frame: &mut Frame, app: &App, theme: &Theme, area: Rect, targets: &mut Targets) {
    let plans = &app.plans;
    let width = usize::from(area.width);
    let head = text::wrap(&summary(plans), width.saturating_sub(1));
    let lines: Vec<Line> = head.into_iter().take(3).map(|line| Line::styled(format!(" {line}"), theme.title)).collect();
    let height = lines.len() as u16;
    frame.render_widget(Paragraph::new(lines), Rect { height, ..area });
    let rest = Rect { y: area.y + height, height: area.height - height, ..area };
    match plans.shape {
        Shape::Table => table(frame, plans, theme, rest, targets),
        Shape::Pareto => pareto(frame, plans, theme, rest),
        Shape::Map => map(frame, plans, theme, rest, targets),
    }
}

fn summary(plans: &Plans) -> String {
    let best = |seconds: Option<f64>| seconds.map_or(String::new(), |s| format!(", best {}", show_seconds(s)));
    if plans.running && plans.mapping {
        let (done, all) = (plans.cells.len(), MODELS.len() * NODES.len());
        return format!("searching: {done} of {all} cells of the map");
    }
    if plans.running {
        let at = &plans.progress;
        let gap = match (at.best, at.bound) {
            (Some(best), Some(bound)) if bound > 0.0 => format!(", {:.2} times the bound", best / bound),
            _ => String::new(),
        };
        return format!(
            "searching: {} of {} candidates, {} too large, {} impossible{}{gap}",
            at.decided,
            at.candidates,
            at.memory,
            at.invalid,
            best(at.best)
        );
    }
    match &plans.found {
        None => "no search yet; s starts one over the axes that the job leaves open".into(),
        Some(Err(why)) => format!("no search: {why}"),
        Some(Ok(found)) => {
            let [memory, bound, invalid] = found.pruned;
            let counts = format!(
                "{} candidates in {}: {} predicted, {memory} too large, {bound} slower by bound, {invalid} impossible{}",
                found.candidates,
                show_seconds(found.search_seconds),
                found.simulated,
                found.gap.map_or(String::new(), |gap| format!("; best {:.2} times the bound", 1.0 + gap))
            );
            match &found.nothing {
                Some(nothing) => format!("{nothing} ({counts})"),
                None => counts,
            }
        }
    }
}

fn table(frame: &mut Frame, plans: &Plans, theme: &Theme, area: Rect, targets: &mut Targets) {
    let rows = plans.rows();
    if area.height < 2 {
        return;
    }
    let mark = |sort: Sort, name: &str| if plans.sort == sort { format!("{name}*") } else { name.to_owned() };
    let head = format!(
        " {:>4} {:>9} {:>12} {:>7} {:>8} {:>11}  {}",
        "",
        mark(Sort::Time, "time"),
        "tokens/s/GPU",
        "MFU",
        mark(Sort::Bubble, "bubble"),
        mark(Sort::Memory, "peak"),
        mark(Sort::Configuration, "configuration")
    );
    let width = usize::from(area.width);
    let mut lines = vec![Line::styled(text::cut(&head, width), theme.dim)];
    let room = usize::from(area.height) - 1;
    let first = (plans.at + 1).saturating_sub(room).min(rows.len().saturating_sub(room));
    for (shown, (place, row)) in rows.iter().enumerate().skip(first).take(room) {
        let f = &row.figures;
        let line = format!(
            " {:>4} {:>9} {:>12.0} {:>7} {:>8} {:>11}  {}",
            place + 1,
            show_seconds(f.iteration_seconds),
            f.tokens_per_second_per_gpu,
            f.mfu.map_or("-".into(), show_percent),
            show_percent(f.time.bubble / f.iteration_seconds),
            show_bytes(f.fullest().1.round() as u64),
            row.configuration
        );
        targets.push((Rect { y: area.y + lines.len() as u16, height: 1, ..area }, Target::Plan(shown)));
        let style = if shown == plans.at { theme.selected } else { Style::new() };
        lines.push(Line::styled(text::fit(&line, width), style));
    }
    if rows.is_empty() && matches!(&plans.found, Some(Ok(found)) if !found.rows.is_empty()) {
        lines.push(Line::styled(format!(" no plan contains {:?}", plans.filter), theme.dim));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

/// Plans as points: memory to the right, throughput upwards.
fn pareto(frame: &mut Frame, plans: &Plans, theme: &Theme, area: Rect) {
    let rows = plans.rows();
    let (width, height) = (usize::from(area.width).saturating_sub(12), usize::from(area.height).saturating_sub(4));
    if rows.is_empty() || width < 10 || height < 3 {
        return;
    }
    let peak = |row: &Row| row.figures.fullest().1;
    let speed = |row: &Row| row.figures.tokens_per_second_per_gpu;
    let range = |of: &dyn Fn(&Row) -> f64| {
        let values = || rows.iter().map(|(_, row)| of(row));
        let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
        (least, (most - least).max(most * 1e-9))
    };
    let ((x0, dx), (y0, dy)) = (range(&peak), range(&speed));
    let mut grid = vec![vec![(' ', Style::new()); width]; height];
    // The focus is drawn last, over whatever shares its place.
    let order = rows.iter().enumerate().filter(|(n, _)| *n != plans.at).chain(rows.iter().enumerate().nth(plans.at));
    for (n, (_, row)) in order {
        let column = ((peak(row) - x0) / dx * (width - 1) as f64).round() as usize;
        let line = height - 1 - ((speed(row) - y0) / dy * (height - 1) as f64).round() as usize;
        grid[line][column] = match (n == plans.at, plans.is_best_trade(row)) {
            (true, _) => ('@', theme.selected),
            (false, true) => ('*', theme.good),
            (false, false) if grid[line][column].0 == ' ' => ('.', theme.dim),
            _ => continue,
        };
    }
    let mut lines: Vec<Line> = Vec::new();
    for (n, row) in grid.iter().enumerate() {
        let label = if n == 0 {
            format!("{:>9.0} ", y0 + dy)
        } else if n == height - 1 {
            format!("{y0:>9.0} ")
        } else {
            " ".repeat(10)
        };
        let mut spans = vec![Span::styled(format!("{label}|"), theme.dim)];
        spans.extend(
            row.chunk_by(|a, b| a.1 == b.1).map(|g| Span::styled(g.iter().map(|c| c.0).collect::<String>(), g[0].1)),
        );
        lines.push(Line::from(spans));
    }
    let (least, most) = (show_bytes(x0 as u64), show_bytes((x0 + dx) as u64));
    let between = width.saturating_sub(least.len() + most.len());
    lines.push(Line::styled(format!("{:11}{least}{}{most}", "", " ".repeat(between)), theme.dim));
    lines.push(Line::styled(
        " tokens/s per GPU over peak memory; * no plan has less memory and more speed; @ focus",
        theme.dim,
    ));
    if let Some(row) = plans.focused() {
        let line = format!(
            " {}: {}, {}",
            row.configuration,
            show_seconds(row.figures.iteration_seconds),
            show_bytes(peak(row) as u64)
        );
        lines.push(Line::styled(text::cut(&line, usize::from(area.width)), theme.title));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

/// Columns of the names of the models.
const NAMES: usize = 19;

/// MFU of the best plan by model and number of nodes, and with room also which plan.
fn map(frame: &mut Frame, plans: &Plans, theme: &Theme, area: Rect, targets: &mut Targets) {
    let (models, nodes) = (plans.models(), plans.nodes());
    if models.is_empty() {
        let said = if plans.running {
            " the first cells are under way"
        } else {
            " m computes the map: the best plan of every model and number of nodes"
        };
        frame.render_widget(Paragraph::new(Line::styled(said, theme.dim)), area);
        return;
    }
    let room = usize::from(area.width).saturating_sub(NAMES + 1);
    let wide = (room / nodes.len().max(1)).clamp(7, 17);
    // The head, an empty line and three lines on the focus stay.
    let tall = if wide >= 13 && usize::from(area.height) >= models.len() * 3 + 5 { 3 } else { 1 };
    let mut head = format!(" {:<NAMES$}", "MFU; nodes:");
    for n in &nodes {
        head += &format!("{n:>wide$}");
    }
    let mut lines = vec![Line::styled(text::cut(&head, usize::from(area.width)), theme.dim)];
    for (row, model) in models.iter().enumerate() {
        for part in 0..tall {
            let name = if part == 0 { *model } else { "" };
            let mut spans = vec![Span::raw(format!(" {}", text::fit(name, NAMES)))];
            for (column, n) in nodes.iter().enumerate() {
                let here = plans.cell == (row, column);
                let (said, style) = cell(plans.cell_of(model, *n), part, theme);
                let style = if here { theme.selected } else { style };
                // One column between cells.
                spans.push(Span::raw(" "));
                spans.push(Span::styled(format!("{:>w$}", text::cut(&said, wide - 1), w = wide - 1), style));
            }
            lines.push(Line::from(spans));
        }
        for column in 0..nodes.len() {
            let x = area.x + (1 + NAMES + column * wide) as u16;
            let y = area.y + (1 + row * tall) as u16;
            let place = Rect::new(x, y, wide as u16, tall as u16).intersection(area);
            targets.push((place, Target::Cell(row, column)));
        }
    }
    lines.push(Line::raw(""));
    let (model, n) = (models.get(plans.cell.0), nodes.get(plans.cell.1));
    if let (Some(model), Some(n)) = (model, n) {
        let at = format!("{model} on {n} {}", if *n == 1 { "node" } else { "nodes" });
        let said = match plans.cell_of(model, *n).map(|cell| &cell.best) {
            Some(Ok(best)) => format!(
                "{at}: {}, {:.0} tokens/s per GPU, {}",
                show_seconds(best.figures.iteration_seconds),
                best.figures.tokens_per_second_per_gpu,
                best.configuration
            ),
            Some(Err(why)) => format!("{at}: {why}"),
            None => format!("{at} is under way"),
        };
        lines.extend(
            text::wrap(&said, usize::from(area.width).saturating_sub(2))
                .into_iter()
                .map(|l| Line::raw(format!(" {l}"))),
        );
    }
    frame.render_widget(Paragraph::new(lines), area);
}

/// A line of a cell: the MFU, then how the model is cut, then the rest of the plan.
fn cell(cell: Option<&Cell>, part: usize, theme: &Theme) -> (String, Style) {
    match cell.map(|cell| &cell.best) {
        None => (if part == 0 { "..." } else { "" }.to_string(), theme.dim),
        Some(Err(_)) => (if part == 0 { "none" } else { "" }.to_string(), theme.dim),
        Some(Ok(best)) => {
            let mfu = best.figures.mfu.unwrap_or(0.0);
            let number = |key: &str| best.job.get(key).and_then(toml::Value::as_integer).unwrap_or(1);
            let word = |key: &str| best.job.get(key).and_then(toml::Value::as_str);
            let said = match part {
                0 => format!("{:.1}", mfu * 100.0),
                1 => {
                    let cuts = [("d", "dp"), ("t", "tp"), ("c", "cp"), ("p", "pp"), ("e", "ep")];
                    let cuts = cuts.map(|(letter, key)| (letter, number(key))).into_iter().filter(|(_, n)| *n > 1);
                    cuts.map(|(letter, n)| format!("{letter}{n}")).collect::<Vec<_>>().join(" ")
                }
                _ => {
                    let kept = word("recompute").filter(|kind| *kind != "none").map_or("", |kind| &kind[..1]);
                    format!("mb{} {} {kept}", number("micro_batch"), word("states").unwrap_or("-"))
                        .trim_end()
                        .to_owned()
                }
            };
            (said, theme.heat(mfu / 0.6))
        }
    }
}
