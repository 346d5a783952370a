//! Pictures of a replayed schedule: a grid of cells for a terminal (colours are the command line's job) and an SVG with
//! the memory curve of every device.

use crate::order::{Action, ComputeOrder};
use crate::replay::Timing;
use paceline_sim::program::Pass;
use std::fmt::Write;

/// One character of a terminal picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// What to print.
    pub glyph: char,
    /// The action that it belongs to; `None` when the device idles.
    pub action: Option<Action>,
    /// The chunk of the action's stage on its device, from 0.
    pub chunk: u32,
}

const IDLE: Cell = Cell { glyph: '·', action: None, chunk: 0 };

/// One row of cells per device, at most `width` wide: every action as its letter and its microbatch where there is room, its letter
/// where there is not. Actions that are shorter than a column may share one; then the longer part of it wins.
pub fn text_cells(order: &ComputeOrder, timing: &Timing, width: usize) -> Vec<Vec<Cell>> {
    let makespan = timing.makespan();
    let label = 2 + order.microbatches.saturating_sub(1).max(1).ilog10() as usize;
    let shortest = durations(timing).filter(|d| *d > 0.0).fold(f64::INFINITY, f64::min);
    // As wide as every label needs, unless the terminal is narrower.
    let wanted = if shortest.is_finite() { (makespan / shortest * (label + 1) as f64).ceil() } else { 0.0 };
    let columns = (wanted.min(width as f64)) as usize;
    let scale = if makespan > 0.0 { columns as f64 / makespan } else { 0.0 };
    let chunk_of = chunks(order);
    let rows = order.actions.iter().zip(timing.start.iter().zip(&timing.end));
    rows.map(|(list, (starts, ends))| {
        let mut row = vec![IDLE; columns];
        for (action, (start, end)) in list.iter().zip(starts.iter().zip(ends)) {
            let first = ((start * scale).round() as usize).min(columns);
            let last = ((end * scale).round() as usize).min(columns);
            let name = format!("{}{}", letter(action.pass), action.microbatch.0);
            let fits = name.len() <= last - first;
            let mut glyphs = name.chars().take(if fits { name.len() } else { 1 });
            for cell in &mut row[first..last] {
                let chunk = chunk_of[action.stage.index()];
                *cell = Cell { glyph: glyphs.next().unwrap_or('-'), action: Some(*action), chunk };
            }
        }
        row
    })
    .collect()
}

/// [`text_cells`] as lines, one per device, with the device's number in front. A fused backward shows as `X`.
pub fn render_text(order: &ComputeOrder, timing: &Timing, width: usize) -> String {
    let digits = order.actions.len().saturating_sub(1).max(1).ilog10() as usize + 1;
    let mut text = String::new();
    for (device, row) in text_cells(order, timing, width.saturating_sub(digits + 1)).iter().enumerate() {
        let cells: String = row.iter().map(|cell| cell.glyph).collect();
        let _ = writeln!(text, "{device:>digits$} {cells}");
    }
    text
}

/// One letter per pass; `X` is the fused backward.
pub fn letter(pass: Pass) -> char {
    match pass {
        Pass::F => 'F',
        Pass::B => 'B',
        Pass::W => 'W',
        Pass::BW => 'X',
        Pass::R => 'R',
    }
}

/// Colour of a pass: distinct in lightness as well, so that it also reads in grey. Later chunks are drawn paler.
fn colour(pass: Pass) -> &'static str {
    match pass {
        Pass::F => "#3b6fb6",
        Pass::B => "#d9792b",
        Pass::W => "#6aa84f",
        Pass::BW => "#b3474f",
        Pass::R => "#8e8e8e",
    }
}

fn durations(timing: &Timing) -> impl Iterator<Item = f64> + '_ {
    timing.start.iter().flatten().zip(timing.end.iter().flatten()).map(|(start, end)| end - start)
}

/// By stage: its number among the stages of its device.
fn chunks(order: &ComputeOrder) -> Vec<u32> {
    let devices = &order.placement.device_of_stage;
    (0..devices.len()).map(|stage| devices[..stage].iter().filter(|d| **d == devices[stage]).count() as u32).collect()
}

/// Width of the drawing area and heights of a row's parts, in SVG units.
const WIDTH: f64 = 1200.0;
const MARGIN: f64 = 44.0;
const BAR: f64 = 20.0;
const CURVE: f64 = 16.0;
const GAP: f64 = 6.0;
const HEAD: f64 = 46.0;

/// A self-contained SVG: one lane per device with its actions (hover for the name and the times), and under each lane the memory that
/// the device holds, from `memory` as [`crate::replay::memory_curve`] gives it, drawn to the largest value of all devices.
pub fn render_svg(order: &ComputeOrder, timing: &Timing, memory: &[Vec<f64>]) -> String {
    let lane = BAR + CURVE + GAP;
    let height = HEAD + lane * order.actions.len() as f64 + 8.0;
    let scale = if timing.makespan() > 0.0 { WIDTH / timing.makespan() } else { 0.0 };
    let largest = memory.iter().flatten().copied().fold(0.0, f64::max);
    let chunk_of = chunks(order);
    let mut svg = String::new();
    let total = WIDTH + MARGIN + 10.0;
    let _ = writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" font-family="sans-serif" font-size="11">"#
    );
    let _ = writeln!(svg, r#"<rect width="{total}" height="{height}" fill="white"/>"#);
    let _ = writeln!(
        svg,
        r#"<text x="{MARGIN}" y="16" font-size="13">{}: {} devices, {} microbatches, makespan {}, bubble {:.2} % of the makespan, {:.2} % of the longest span</text>"#,
        escape(&order.name),
        order.actions.len(),
        order.microbatches,
        short(timing.makespan()),
        100.0 * timing.bubble_makespan(),
        100.0 * timing.bubble_span()
    );
    legend(&mut svg, order, largest);
    for (device, list) in order.actions.iter().enumerate() {
        let top = HEAD + lane * device as f64;
        let _ = writeln!(svg, r#"<text x="4" y="{:.1}">{device}</text>"#, top + BAR - 6.0);
        for (place, action) in list.iter().enumerate() {
            let (start, end) = (timing.start[device][place], timing.end[device][place]);
            let paler = 1.0 - 0.3 * f64::from(chunk_of[action.stage.index()].min(2));
            let (x, width) = (MARGIN + start * scale, (end - start) * scale);
            let _ = write!(
                svg,
                r#"<g><title>{action}: {} to {}</title><rect x="{x:.2}" y="{top:.1}" width="{width:.2}" height="{BAR}" fill="{}" fill-opacity="{paler:.1}" stroke="white" stroke-width="0.4"/>"#,
                short(start),
                short(end),
                colour(action.pass)
            );
            let name = action.microbatch.0.to_string();
            if width > 7.0 * name.len() as f64 {
                let ink = if paler > 0.8 { "white" } else { "black" };
                let _ = write!(
                    svg,
                    r#"<text x="{:.2}" y="{:.1}" text-anchor="middle" fill="{ink}">{name}</text>"#,
                    x + width / 2.0,
                    top + BAR - 6.0
                );
            }
            svg.push_str("</g>\n");
        }
        if let Some(curve) = memory.get(device).filter(|_| largest > 0.0) {
            let base = top + BAR + CURVE;
            let mut path = format!("M{MARGIN:.2} {base:.1}");
            for (place, held) in curve.iter().enumerate().take(list.len()) {
                let x = MARGIN + timing.start[device][place] * scale;
                let _ = write!(path, " H{x:.2} V{:.2}", base - held / largest * (CURVE - 2.0));
            }
            let last = timing.end[device].last().map_or(MARGIN, |end| MARGIN + end * scale);
            let peak = curve.iter().copied().fold(0.0, f64::max);
            let _ = writeln!(
                svg,
                r##"<path d="{path} H{last:.2} V{base:.1} Z" fill="#e4dcef" stroke="#7a5ea8" stroke-width="0.6"><title>device {device}: peak {}</title></path>"##,
                short(peak)
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn legend(svg: &mut String, order: &ComputeOrder, largest: f64) {
    let mut x = MARGIN;
    let names = [
        (Pass::F, "forward"),
        (Pass::B, "backward, input"),
        (Pass::W, "backward, weights"),
        (Pass::BW, "backward, fused"),
        (Pass::R, "recomputation"),
    ];
    for (pass, name) in names {
        if !order.actions.iter().flatten().any(|action| action.pass == pass) {
            continue;
        }
        let _ = writeln!(
            svg,
            r#"<rect x="{x}" y="26" width="10" height="10" fill="{}"/><text x="{}" y="35">{name}</text>"#,
            colour(pass),
            x + 14.0
        );
        x += 34.0 + 6.2 * name.len() as f64;
    }
    if largest > 0.0 {
        let _ =
            writeln!(svg, r#"<text x="{x}" y="35">memory curve up to {}; later chunks paler</text>"#, short(largest));
    }
}

/// At most four significant decimals, no trailing zeros.
fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::{StageMemory, StageTimes, memory_curve, replay};
    use crate::schedules::{Request, build};

    fn drawn(name: &str, p: u32, m: u32, width: usize) -> String {
        let order = build(name, &Request::new(p, m)).unwrap();
        let timing = replay(&order, &StageTimes::unit(order.placement.stages())).unwrap();
        render_text(&order, &timing, width)
    }

    #[test]
    fn text_shows_letters_numbers_and_idle_slots() {
        assert_eq!(
            drawn("1f1b", 2, 2, 80),
            "0 F0-F1-······X0----···X1----\n\
             1 ···F0-X0----F1-X1----······\n"
        );
        // Too narrow for numbers on the short passes.
        assert_eq!(drawn("1f1b", 2, 2, 11), "0 FF··X0·X1\n1 ·FX0FX1··\n");
        assert_eq!(drawn("gpipe", 1, 1, 0), "0 \n");
    }

    #[test]
    fn svg_has_every_action_and_curve_once() {
        let mut order = build("v-half", &Request::new(4, 8)).unwrap();
        order.name = "a<b&c".into();
        let timing = replay(&order, &StageTimes::unit(8)).unwrap();
        let memory = memory_curve(&order, &StageMemory::microbatch_stages(&order.placement, 4, 0.0));
        let svg = render_svg(&order, &timing, &memory);
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("a&lt;b&amp;c: 4 devices, 8 microbatches"));
        for action in order.actions.iter().flatten() {
            assert_eq!(svg.matches(&format!("<title>{action}: ")).count(), 1, "{action}");
        }
        assert_eq!(svg.matches(": peak 3</title>").count(), 4);
        assert_eq!(svg.matches("<g>").count(), svg.matches("</g>").count());
    }
}
