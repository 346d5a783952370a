//! Predicted against measured, as an SVG: one dot per run, one colour per source, both axes logarithmic.

use super::Scored;
use std::fmt::Write;

const SIDE: f64 = 640.0;
const MARGIN: f64 = 60.0;
/// Paul Tol's colours, which people with colour-blindness can tell apart.
const COLOURS: [&str; 10] =
    ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777"];

/// The scatter plot of times.
pub fn scatter(rows: &[Scored]) -> String {
    let points: Vec<(f64, f64, &Scored)> = rows
        .iter()
        .filter_map(|r| r.measured_iteration_seconds.map(|t| (t, r.predicted_iteration_seconds, r)))
        .filter(|(x, y, _)| *x > 0.0 && *y > 0.0)
        .collect();
    let values = || points.iter().flat_map(|p| [p.0, p.1]);
    let low = values().fold(f64::INFINITY, f64::min).min(1.0).log10().floor();
    let high = values().fold(0.0, f64::max).max(1.0).log10().ceil().max(low + 1.0);
    let place = |value: f64| (value.log10() - low) / (high - low) * SIDE;
    let x = |value: f64| MARGIN + place(value);
    let y = |value: f64| MARGIN + SIDE - place(value);
    let mut sources: Vec<&str> = points.iter().map(|p| p.2.source.as_str()).collect();
    sources.sort_unstable();
    sources.dedup();

    let (width, height) = (SIDE + 2.0 * MARGIN + 180.0, SIDE + 2.0 * MARGIN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut line = |a: (f64, f64), b: (f64, f64), style: &str| {
        let _ = writeln!(
            svg,
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {style}/>",
            x(a.0),
            y(a.1),
            x(b.0),
            y(b.1)
        );
    };
    let (least, most) = (10f64.powf(low), 10f64.powf(high));
    for power in low as i32..=high as i32 {
        let at = 10f64.powi(power);
        line((at, least), (at, most), "stroke=\"#dddddd\"");
        line((least, at), (most, at), "stroke=\"#dddddd\"");
    }
    line((least, least), (most, most), "stroke=\"black\"");
    for ratio in [1.1, 1.0 / 1.1] {
        let from = if ratio > 1.0 { (least, least * ratio) } else { (least / ratio, least) };
        let to = if ratio > 1.0 { (most / ratio, most) } else { (most, most * ratio) };
        line(from, to, "stroke=\"#999999\" stroke-dasharray=\"4 4\"");
    }
    for power in low as i32..=high as i32 {
        let at = 10f64.powi(power);
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{at} s</text>",
            x(at),
            MARGIN + SIDE + 18.0
        );
        let _ =
            writeln!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{at} s</text>", MARGIN - 6.0, y(at) + 4.0);
    }
    for (measured, predicted, row) in &points {
        let colour = colour(&sources, &row.source);
        let _ = writeln!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"{colour}\" fill-opacity=\"0.5\"/>",
            x(*measured),
            y(*predicted)
        );
    }
    for (n, source) in sources.iter().enumerate() {
        let top = MARGIN + 20.0 * n as f64;
        let left = MARGIN + SIDE + 16.0;
        let _ = writeln!(svg, "<circle cx=\"{left}\" cy=\"{top}\" r=\"5\" fill=\"{}\"/>", colour(&sources, source));
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\">{}</text>", left + 10.0, top + 4.0, escape(source));
    }
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">measured iteration; dashed: 10 % off</text>",
        MARGIN + SIDE / 2.0,
        MARGIN + SIDE + 42.0
    );
    let _ = writeln!(
        svg,
        "<text transform=\"translate(16 {}) rotate(-90)\" text-anchor=\"middle\">predicted iteration</text>",
        MARGIN + SIDE / 2.0
    );
    svg.push_str("</svg>\n");
    svg
}

fn colour(sources: &[&str], source: &str) -> &'static str {
    let n = sources.iter().position(|s| *s == source).unwrap_or(0);
    COLOURS[n % COLOURS.len()]
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
