//! Schedules for the terminal: the list, one with its timeline and memory, several side by side.

use super::{Document, Studied};
use crate::failure::Failure;
use crate::screen::{Screen, Style};
use crate::table::{Table, show_percent, show_seconds};
use paceline_planner::drawing::text_cells;
use paceline_planner::order::ComputeOrder;
use paceline_planner::schedules::SCHEDULES;
use paceline_sim::program::Pass;
use paceline_sim::units::show_bytes;

/// Every schedule with its summary.
pub fn list(screen: &Screen) -> Result<(), Failure> {
    if screen.json() {
        let names: Vec<_> =
            SCHEDULES.iter().map(|s| serde_json::json!({ "name": s.name, "summary": s.summary })).collect();
        return screen.document(&serde_json::json!({ "format": "paceline.schedule-names/1", "schedules": names }));
    }
    let mut table = Table::new(["name", "what it is"]);
    for schedule in SCHEDULES {
        table.row([schedule.name, schedule.summary]);
    }
    table.print(screen)
}

/// 256-colour background of a pass; the letter says the same without colour.
fn background(pass: Pass, chunk: u32) -> u8 {
    match (pass, chunk % 2) {
        (Pass::F, 0) => 25,
        (Pass::F, _) => 67,
        (Pass::B, 0) => 130,
        (Pass::B, _) => 173,
        (Pass::W, 0) => 28,
        (Pass::W, _) => 71,
        (Pass::BW, 0) => 124,
        (Pass::BW, _) => 167,
        (Pass::R, _) => 240,
    }
}

/// The timeline of one schedule, its memory, and the figures.
pub fn one(screen: &Screen, studied: &Studied) -> Result<(), Failure> {
    let Studied { order, timing, curve, document, .. } = studied;
    let digits = document.p.saturating_sub(1).max(1).ilog10() as usize + 1;
    let width = screen.width().saturating_sub(digits + 1);
    for (device, row) in text_cells(order, timing, width).iter().enumerate() {
        let mut line = format!("{device:>digits$} ");
        let mut open = None;
        for cell in row {
            let wanted = cell.action.map(|action| background(action.pass, cell.chunk)).filter(|_| screen.color());
            if wanted != open {
                line.push_str(&wanted.map_or("\x1b[0m".into(), |code| format!("\x1b[48;5;{code};38;5;231m")));
                open = wanted;
            }
            line.push(cell.glyph);
        }
        if open.is_some() {
            line.push_str("\x1b[0m");
        }
        screen.line(line)?;
    }
    screen.line("")?;
    let unit = document.memory_unit;
    screen.line(screen.style(Style::Bold, format!("Activation memory over the same time, in {unit}")))?;
    let highest = curve.iter().flatten().copied().fold(0.0, f64::max);
    let columns = text_cells(order, timing, width).first().map_or(0, Vec::len);
    for (device, held) in curve.iter().enumerate() {
        let bars = sparkline(held, &timing.start[device], timing.makespan(), columns.min(width), highest);
        screen.line(format!("{device:>digits$} {bars}"))?;
    }
    screen.line("")?;
    let peak = document.peak.iter().copied().fold(0.0, f64::max);
    let unsplit = document.peak_unsplit.iter().copied().fold(0.0, f64::max);
    let mut table = Table::new([document.name.as_str(), ""]);
    table.row([
        "devices x microbatches",
        &format!(
            "{} x {}, {} per device, placement {}",
            document.p,
            document.m,
            chunks(document.chunks),
            document.placement
        ),
    ]);
    table.row(["makespan", &time(document, document.makespan)]);
    table.row([
        "lower bound",
        &format!(
            "{} ({}), gap {}",
            time(document, document.lower_bound),
            document.lower_bound_reason,
            show_percent(document.gap)
        ),
    ]);
    table.row(["bubble of the longest span", &show_percent(document.bubble_span)]);
    table.row(["bubble of the makespan", &show_percent(document.bubble_makespan)]);
    table.row([
        "peak",
        &format!(
            "{} (all freed at W: {}) {}",
            held(document, peak),
            held(document, unsplit),
            if unit == "bytes" { "" } else { unit }
        ),
    ]);
    table.row(["generated in", &show_seconds(document.generation_seconds)]);
    table.print(screen)?;
    screen.line(legend(order))
}

fn chunks(count: usize) -> String {
    if count == 1 { "1 stage".into() } else { format!("{count} stages") }
}

fn legend(order: &ComputeOrder) -> String {
    let has = |pass| order.actions.iter().flatten().any(|action| action.pass == pass);
    let all = [
        (Pass::F, "F forward"),
        (Pass::B, "B backward for the input"),
        (Pass::W, "W backward for the weights"),
        (Pass::BW, "X fused backward"),
        (Pass::R, "R recomputation"),
    ];
    let words: Vec<&str> = all.into_iter().filter(|(pass, _)| has(*pass)).map(|(_, words)| words).collect();
    format!("  {}", words.join(" · "))
}

const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The memory after each action's start, over time.
fn sparkline(held: &[f64], starts: &[f64], makespan: f64, columns: usize, highest: f64) -> String {
    let mut bars = vec![' '; columns];
    for (place, (&value, &start)) in held.iter().zip(starts).enumerate() {
        let end = starts.get(place + 1).copied().unwrap_or(makespan);
        let at = |t: f64| ((t / makespan.max(f64::MIN_POSITIVE) * columns as f64).round() as usize).min(columns);
        let level = if highest > 0.0 { (value / highest * 8.0).ceil() as usize } else { 0 };
        for bar in &mut bars[at(start)..at(end).max(at(start))] {
            *bar = BARS[level.min(8)];
        }
    }
    bars.into_iter().collect::<String>().trim_end().to_string()
}

/// Several side by side, best makespan marked.
pub fn comparison<'a>(
    screen: &Screen,
    documents: impl Iterator<Item = &'a Document>,
    limit: Option<&str>,
) -> Result<(), Failure> {
    let documents: Vec<&Document> = documents.collect();
    let fitting = |d: &&&Document| d.fits != Some(false);
    let best = documents.iter().filter(fitting).map(|d| d.makespan).fold(f64::INFINITY, f64::min);
    let mut table = Table::new([
        "schedule",
        "stages/device",
        "makespan",
        "bubble of span",
        "bubble of makespan",
        "peak",
        "bound",
        "gap",
        "",
    ]);
    for document in &documents {
        let over = document.fits == Some(false);
        let style = if over { Some(Style::Dim) } else { (document.makespan <= best).then_some(Style::Good) };
        let remark = if over {
            "over the limit"
        } else if document.makespan <= best {
            "best"
        } else {
            ""
        };
        table.styled(
            style,
            [
                document.name.clone(),
                document.chunks.to_string(),
                time(document, document.makespan),
                show_percent(document.bubble_span),
                show_percent(document.bubble_makespan),
                held(document, document.peak.iter().copied().fold(0.0, f64::max)),
                time(document, document.lower_bound),
                show_percent(document.gap),
                remark.to_string(),
            ],
        );
    }
    table.print(screen)?;
    let at = limit.map_or(String::new(), |limit| format!(", memory limit {limit}"));
    let unit = documents.first().map_or("microbatch-stages", |document| document.memory_unit);
    screen.line(format!(
        "  peak of activations in {unit}{at}; gap: makespan above the lower bound of its own placement"
    ))?;
    // Where one device's work does not explain the bound, its reason is news.
    let mut said: Vec<&str> = Vec::new();
    for document in documents.iter().filter(|d| d.gap > FAR || d.lower_bound_reason.starts_with("every state")) {
        if !said.contains(&document.lower_bound_reason.as_str()) {
            said.push(&document.lower_bound_reason);
            let bubble = 1.0 - (1.0 - document.bubble_makespan) * document.makespan / document.lower_bound;
            screen.line(format!(
                "  no order of {}'s stages is shorter than {} (bubble {}) within its memory: {}",
                document.name,
                time(document, document.lower_bound),
                show_percent(bubble),
                document.lower_bound_reason
            ))?;
        }
    }
    Ok(())
}

/// A gap from which on a comparison says where its bound comes from.
const FAR: f64 = 0.01;

fn time(document: &Document, value: f64) -> String {
    if document.time_unit == "seconds" { show_seconds(value) } else { show(value) }
}

fn held(document: &Document, value: f64) -> String {
    if document.memory_unit == "bytes" { show_bytes(value as u64) } else { show(value) }
}

/// A figure with four significant digits.
fn show(value: f64) -> String {
    let digits = if value.abs() >= 1000.0 {
        1
    } else if value.abs() >= 10.0 {
        2
    } else {
        3
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}
