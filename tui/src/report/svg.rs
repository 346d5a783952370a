//! A timeline as SVG: a lane per rank with its passes (hover for names and times), and under it the memory that the rank holds.

use crate::lanes::{Lane, Lanes, What};
use paceline_sim::program::Pass;
use paceline_sim::units::{show_bytes, show_seconds};
use std::fmt::Write;

/// Width of the drawing and heights of a lane's parts, in SVG units.
const WIDTH: f64 = 1200.0;
const MARGIN: f64 = 44.0;
const BAR: f64 = 20.0;
const CURVE: f64 = 16.0;
const LANE: f64 = BAR + CURVE + 8.0;
const HEAD: f64 = 24.0;

/// Colour of work: distinct in lightness too, so that it also reads in grey.
fn colour(what: What) -> &'static str {
    match what {
        What::Pass { pass: Pass::F, .. } => "#3b6fb6",
        What::Pass { pass: Pass::B, .. } => "#d9792b",
        What::Pass { pass: Pass::W, .. } => "#6aa84f",
        What::Pass { pass: Pass::BW, .. } => "#b3474f",
        What::Pass { pass: Pass::R, .. } => "#8e8e8e",
        What::Communication => "#2a9d8f",
        What::Optimizer => "#7d5ba6",
    }
}

/// Text that XML may hold.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            // Control characters are not allowed in XML at all.
            c if c.is_control() && c != '\n' && c != '\t' => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// The drawing.
pub fn timeline(lanes: &Lanes) -> String {
    let height = HEAD + LANE * lanes.lanes.len() as f64 + 22.0;
    let total = WIDTH + MARGIN + 12.0;
    let scale = if lanes.end > 0.0 { WIDTH / lanes.end } else { 0.0 };
    let most = lanes.lanes.iter().map(|lane| lane.peak_bytes).fold(0.0, f64::max);
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" font-family="sans-serif" font-size="11" role="img">"#
    );
    let _ = writeln!(svg, r#"<rect width="{total}" height="{height}" fill="white"/>"#);
    let kind = if lanes.measured { "measured" } else { "predicted" };
    let _ = writeln!(
        svg,
        r#"<text x="{MARGIN}" y="15">{kind}: {} ranks, {}; under each rank its memory, to {}</text>"#,
        lanes.lanes.len(),
        show_seconds(lanes.end),
        show_bytes(most.round() as u64)
    );
    for (rank, lane) in lanes.lanes.iter().enumerate() {
        let top = HEAD + LANE * rank as f64;
        let _ = writeln!(svg, r#"<text x="4" y="{}">r{rank}</text>"#, top + 14.0);
        let _ = writeln!(svg, r##"<rect x="{MARGIN}" y="{top}" width="{WIDTH}" height="{BAR}" fill="#eeeeee"/>"##);
        for gap in &lane.gaps {
            let _ = writeln!(
                svg,
                r##"<rect x="{:.2}" y="{top}" width="{:.2}" height="{BAR}" fill="#eeeeee"><title>idle for {}: {}</title></rect>"##,
                MARGIN + gap.start * scale,
                (gap.end - gap.start) * scale,
                show_seconds(gap.end - gap.start),
                escape(&gap.why)
            );
        }
        for span in &lane.spans {
            let width = (span.end - span.start) * scale;
            let stroke = if span.critical { r##" stroke="#111111" stroke-width="0.8""## } else { "" };
            let faint = matches!(span.what, What::Pass { microbatch, .. } if microbatch % 2 == 1);
            let _ = write!(
                svg,
                r#"<rect x="{:.2}" y="{top}" width="{width:.2}" height="{BAR}" fill="{}"{}{stroke}><title>{}, {} to {}{}</title></rect>"#,
                MARGIN + span.start * scale,
                colour(span.what),
                if faint { r#" fill-opacity="0.75""# } else { "" },
                escape(&span.what.describe()),
                show_seconds(span.start),
                show_seconds(span.end),
                if span.critical { ", on the critical path" } else { "" }
            );
            if let What::Pass { microbatch, .. } = span.what
                && width > 7.0 * (microbatch.max(1).ilog10() + 1) as f64
            {
                let _ = write!(
                    svg,
                    r#"<text x="{:.2}" y="{}" fill="white" font-size="10" text-anchor="middle" pointer-events="none">{microbatch}</text>"#,
                    MARGIN + (span.start + span.end) / 2.0 * scale,
                    top + 14.0
                );
            }
            svg.push('\n');
        }
        curve(&mut svg, lane, top + BAR + 2.0, scale, most, lanes.end);
    }
    let foot = HEAD + LANE * lanes.lanes.len() as f64 + 12.0;
    let mut x = MARGIN;
    let pass = |pass| What::Pass { pass, stage: 0, microbatch: 0 };
    for (what, name) in [
        (pass(Pass::F), "forward"),
        (pass(Pass::BW), "backward"),
        (pass(Pass::B), "backward for inputs"),
        (pass(Pass::W), "backward for weights"),
        (pass(Pass::R), "recomputation"),
        (What::Communication, "exposed communication"),
        (What::Optimizer, "optimizer"),
    ] {
        let _ = writeln!(
            svg,
            r#"<rect x="{x}" y="{}" width="10" height="10" fill="{}"/><text x="{}" y="{foot}">{name}</text>"#,
            foot - 9.0,
            colour(what),
            x + 14.0
        );
        x += 34.0 + 6.2 * name.len() as f64;
    }
    svg.push_str("</svg>\n");
    svg
}

fn curve(svg: &mut String, lane: &Lane, top: f64, scale: f64, most: f64, end: f64) {
    if most <= 0.0 || lane.memory.is_empty() {
        return;
    }
    let y = |bytes: f64| top + CURVE * (1.0 - bytes / most);
    let mut path = format!("M{MARGIN:.2} {:.2}", top + CURVE);
    for (place, (from, bytes)) in lane.memory.iter().enumerate() {
        let until = lane.memory.get(place + 1).map_or(end, |next| next.0);
        let _ = write!(
            path,
            "L{:.2} {:.2}L{:.2} {:.2}",
            MARGIN + from * scale,
            y(*bytes),
            MARGIN + until * scale,
            y(*bytes)
        );
    }
    let _ = writeln!(
        svg,
        r##"<path d="{path}L{:.2} {:.2}Z" fill="#c9b8dd"><title>memory, {} at most</title></path>"##,
        MARGIN + end * scale,
        top + CURVE,
        show_bytes(lane.peak_bytes.round() as u64)
    );
}
