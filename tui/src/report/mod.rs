//! A plan as one HTML file that needs nothing else: figures, memory, timeline, plans, accuracy and where the figures come from.

mod svg;

pub use svg::timeline as timeline_svg;

use crate::figures::{CLASS_NAMES, Figures, PART_NAMES};
use crate::lanes::Lanes;
use crate::question::Answer;
use crate::search::Found;
use paceline_sim::units::{show_bytes, show_percent, show_seconds};
use serde_json::{Value, json};
use std::fmt::Write;
use svg::escape;

/// A statement on how accurate predictions are: what was compared, and the error.
#[derive(Debug, Clone, PartialEq)]
pub struct Accuracy {
    /// What was compared.
    pub what: String,
    /// How many.
    pub count: usize,
    /// Median of the absolute relative errors.
    pub median: Option<f64>,
    /// The largest, or the 90th percentile: as the heading says.
    pub worst: Option<f64>,
}

/// Everything that a report says.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The prediction.
    pub answer: Answer,
    /// The configuration in a line.
    pub configuration: String,
    /// The keys of the job.
    pub job: toml::Table,
    /// The document that `paceline predict --json` prints.
    pub json: Value,
    /// The timeline.
    pub lanes: Lanes,
    /// A measured one.
    pub measured: Option<Lanes>,
    /// The best plans of the job.
    pub found: Option<Found>,
    /// How accurate predictions are.
    pub accuracy: Vec<Accuracy>,
    /// What the accuracy is of, and the meaning of its columns.
    pub accuracy_note: String,
}

/// Colours of memory classes and of parts of time.
const CLASS_COLOURS: [&str; 7] = ["#3b6fb6", "#d9792b", "#6aa84f", "#7d5ba6", "#2a9d8f", "#c9a227", "#9a9a9a"];
const PART_COLOURS: [&str; 9] =
    ["#6aa84f", "#c9a227", "#3b6fb6", "#5b9bd5", "#2a9d8f", "#4ab8c4", "#3d7d6b", "#d5d5d5", "#7d5ba6"];

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;margin:2rem auto;padding:0 1rem;color:#1c1c1c}\
h1{font-size:1.5rem;margin-bottom:0}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #ddd}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #eee}\
td:first-child,th:first-child,td.text,th.text{text-align:left}.big{font-size:1.2rem}.bad{color:#a32121;font-weight:600}.good{color:#23702a}\
.dim{color:#666}svg{width:100%;height:auto}.key{display:inline-block;width:.8em;height:.8em;margin-right:.3em}\
@media(prefers-color-scheme:dark){body{background:#16181b;color:#e6e6e6}h2{border-color:#444}td,th{border-color:#333}.dim{color:#a0a0a0}\
.bad{color:#ff9c9c}.good{color:#8fd694}}";

/// The page.
pub fn html(report: &Report) -> String {
    let answer = &report.answer;
    let figures = &answer.figures;
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <link rel=\"icon\" href=\"data:,\"><title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n<p class=\"dim\">{}</p>\n",
        escape(&report.configuration),
        title = escape(&answer.title),
    );
    headline(&mut page, answer);
    let _ = write!(page, "<h2>Time</h2>\n{}", time(figures));
    let _ = write!(page, "<h2>Memory</h2>\n{}", memory(figures));
    let _ = write!(page, "<h2>Timeline</h2>\n<figure id=\"timeline\">{}</figure>\n", svg::timeline(&report.lanes));
    if let Some(measured) = &report.measured {
        let error = report.lanes.end / measured.end - 1.0;
        let _ = write!(
            page,
            "<p>Measured: {}, predicted {:+.1} %.</p>\n<figure id=\"measured\">{}</figure>\n",
            show_seconds(measured.end),
            error * 100.0,
            svg::timeline(measured)
        );
    }
    if let Some(found) = &report.found {
        plans(&mut page, found);
    }
    accuracy(&mut page, report);
    let _ = write!(page, "<h2>Where the figures come from</h2>\n{}", provenance(answer));
    let job = toml::to_string(&report.job).unwrap_or_default();
    let _ = write!(page, "<h2>Job</h2>\n<pre>{}</pre>\n", escape(&job));
    // The figures once more for machines; `<` could end the element.
    let json = report.json.to_string().replace('<', "\\u003c");
    let _ = write!(page, "<script type=\"application/json\" id=\"prediction\">{json}</script>\n</body></html>\n");
    page
}

fn headline(page: &mut String, answer: &Answer) {
    let figures = &answer.figures;
    let mut line = format!(
        "<p class=\"big\"><b id=\"iteration\" data-value=\"{}\">{}</b> per iteration, <b id=\"speed\" data-value=\"{}\">{:.0}</b> tokens/s per device",
        figures.iteration_seconds,
        show_seconds(figures.iteration_seconds),
        figures.tokens_per_second_per_gpu,
        figures.tokens_per_second_per_gpu
    );
    if let (Some(mfu), Some(hfu)) = (figures.mfu, figures.hfu) {
        let _ = write!(
            line,
            ", MFU <b id=\"mfu\" data-value=\"{mfu}\">{}</b>, HFU {}",
            show_percent(mfu),
            show_percent(hfu)
        );
    }
    let (rank, peak) = figures.fullest();
    let whole = |bytes: f64| show_bytes(bytes.round() as u64);
    let verdict = match figures.limit_bytes {
        Some(limit) if figures.fits => format!("<span class=\"good\">fits: {} of {}</span>", whole(peak), whole(limit)),
        Some(limit) => format!("<span class=\"bad\">does not fit: {} of {}</span>", whole(peak), whole(limit)),
        None => format!("{}, no limit", whole(peak)),
    };
    let _ = write!(
        page,
        "{line}</p>\n<p>Memory of the fullest rank (r{rank}) <b id=\"peak\" data-value=\"{peak}\"></b>{verdict}. {} devices, {} microbatches, {:.3e} tokens per day.</p>\n",
        answer.devices, answer.microbatches, answer.budget.tokens_per_day
    );
}

/// A stacked bar: names, values and colours, to a scale, with a mark.
fn bar(parts: &[(&str, f64, &str, String)], scale: f64, mark: Option<f64>) -> String {
    let mut x = 0.0;
    let mut svg = String::from("<svg viewBox=\"0 0 1000 22\" preserveAspectRatio=\"none\" style=\"height:22px\">");
    for (name, value, colour, shown) in parts {
        let width = value / scale * 1000.0;
        let _ = write!(
            svg,
            "<rect x=\"{x:.2}\" width=\"{width:.2}\" height=\"22\" fill=\"{colour}\"><title>{name} {shown}</title></rect>"
        );
        x += width;
    }
    if let Some(mark) = mark {
        let _ = write!(
            svg,
            "<rect x=\"{:.2}\" width=\"2\" height=\"22\" fill=\"#c00\"><title>limit</title></rect>",
            (mark / scale * 1000.0).min(998.0)
        );
    }
    svg + "</svg>"
}

fn time(figures: &Figures) -> String {
    let parts: Vec<(&str, f64, &str, String)> = figures
        .parts()
        .into_iter()
        .enumerate()
        .filter(|(_, seconds)| *seconds > 0.0)
        .map(|(part, seconds)| (PART_NAMES[part].0, seconds, PART_COLOURS[part], show_seconds(seconds)))
        .collect();
    let mut text = bar(&parts, figures.iteration_seconds, None) + "\n<table id=\"time\">";
    for (name, seconds, colour, shown) in &parts {
        let _ = write!(
            text,
            "<tr><td><span class=\"key\" style=\"background:{colour}\"></span>{name}</td><td data-value=\"{seconds}\">{shown}</td><td>{}</td></tr>",
            show_percent(seconds / figures.iteration_seconds)
        );
    }
    text + "</table>\n"
}

fn memory(figures: &Figures) -> String {
    let scale = figures.peak_bytes.iter().copied().chain(figures.limit_bytes).fold(f64::MIN_POSITIVE, f64::max);
    let whole = |bytes: f64| show_bytes(bytes.round() as u64);
    let mut text =
        String::from("<table id=\"memory\"><tr><th>rank</th><th class=\"text\" style=\"width:40%\"></th><th>peak</th>");
    for (class, (name, _)) in CLASS_NAMES.iter().enumerate() {
        let _ =
            write!(text, "<th><span class=\"key\" style=\"background:{}\"></span>{name}</th>", CLASS_COLOURS[class]);
    }
    text.push_str("</tr>\n");
    for (rank, classes) in figures.by_class.iter().enumerate() {
        let parts: Vec<(&str, f64, &str, String)> = classes
            .iter()
            .enumerate()
            .map(|(class, bytes)| (CLASS_NAMES[class].0, *bytes, CLASS_COLOURS[class], whole(*bytes)))
            .collect();
        let peak = figures.peak_bytes[rank];
        let over = figures.limit_bytes.is_some_and(|limit| peak > limit);
        let _ = write!(
            text,
            "<tr><td>r{rank}</td><td class=\"text\">{}</td><td data-value=\"{peak}\"{}>{}</td>",
            bar(&parts, scale, figures.limit_bytes),
            if over { " class=\"bad\"" } else { "" },
            whole(peak)
        );
        for bytes in classes {
            let _ = write!(text, "<td>{}</td>", whole(*bytes));
        }
        text.push_str("</tr>\n");
    }
    text + "</table>\n"
}

fn plans(page: &mut String, found: &Found) {
    page.push_str("<h2>Plans</h2>\n");
    if let Some(nothing) = &found.nothing {
        let _ = writeln!(page, "<p class=\"bad\">{}</p>", escape(nothing));
    }
    let [memory, bound, invalid] = found.pruned;
    let _ = writeln!(
        page,
        "<p>{} candidates in {}: {} predicted, {memory} too large, {bound} slower by their bound, {invalid} impossible{}.</p>",
        found.candidates,
        show_seconds(found.search_seconds),
        found.simulated,
        found
            .gap
            .map_or(String::new(), |gap| format!("; the best takes {:.2} times what no plan can be below", 1.0 + gap))
    );
    page.push_str("<table id=\"plans\"><tr><th></th><th>time</th><th>tokens/s per device</th><th>MFU</th><th>bubble</th><th>peak</th><th class=\"text\">configuration</th></tr>\n");
    for (place, row) in found.rows.iter().enumerate() {
        let f = &row.figures;
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td data-value=\"{}\">{}</td><td>{:.0}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"text\">{}</td></tr>",
            place + 1,
            f.iteration_seconds,
            show_seconds(f.iteration_seconds),
            f.tokens_per_second_per_gpu,
            f.mfu.map_or("-".into(), show_percent),
            show_percent(f.time.bubble / f.iteration_seconds),
            show_bytes(f.fullest().1.round() as u64),
            escape(&row.configuration)
        );
    }
    page.push_str("</table>\n");
}

fn accuracy(page: &mut String, report: &Report) {
    let _ = write!(page, "<h2>Accuracy</h2>\n<p>{}</p>\n", escape(&report.accuracy_note));
    if report.accuracy.is_empty() {
        return;
    }
    page.push_str(
        "<table id=\"accuracy\"><tr><th></th><th>points</th><th>median error</th><th>worst error</th></tr>\n",
    );
    let share = |error: Option<f64>| error.map_or("-".into(), show_percent);
    for line in &report.accuracy {
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&line.what),
            line.count,
            share(line.median),
            share(line.worst)
        );
    }
    page.push_str("</table>\n");
}

fn provenance(answer: &Answer) -> String {
    let from = &answer.figures.provenance;
    let shares = [
        ("measured", from.measured),
        ("interpolated or fitted", from.fitted),
        ("from datasheets", from.datasheet),
        ("assumed from other operators", from.assumed),
    ];
    let mut text = String::from("<table id=\"provenance\">");
    for (name, share) in shares.into_iter().filter(|(_, share)| *share > 0.0) {
        let _ = write!(text, "<tr><td>{name}</td><td>{} of the predicted time</td></tr>", show_percent(share));
    }
    let _ = write!(text, "</table>\n<p class=\"dim\">{}</p>\n", escape(&answer.source));
    text
}

/// A timeline as a Chrome trace-event file, for ui.perfetto.dev; times there are microseconds.
pub fn perfetto(lanes: &Lanes) -> Value {
    let mut events = Vec::new();
    for (rank, lane) in lanes.lanes.iter().enumerate() {
        events.push(
            json!({ "ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": { "name": format!("r{rank}") } }),
        );
        for span in &lane.spans {
            events.push(json!({
                "ph": "X", "name": span.what.describe(), "cat": span.what.letter().to_string(), "pid": rank, "tid": 0,
                "ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6, "args": { "critical": span.critical },
            }));
        }
        for (at, bytes) in &lane.memory {
            events
                .push(json!({ "ph": "C", "name": "memory", "pid": rank, "ts": at * 1e6, "args": { "bytes": bytes } }));
        }
    }
    let origin = if lanes.measured { "measured" } else { "predicted" };
    json!({ "traceEvents": events, "displayTimeUnit": "ms", "otherData": { "origin": origin } })
}
