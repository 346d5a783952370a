//! A trace drawn in the terminal: ranks as rows, passes coloured, idle time with its reason, memory below.

use crate::failure::Failure;
use crate::screen::Screen;
use paceline_sim::program::Pass;
use paceline_sim::trace::{Moment, Trace};
use paceline_sim::units::show_bytes;

/// Ranks that are drawn; more would not help a reader.
const MOST_ROWS: usize = 32;

/// 256-colour background; the letter says the same without colour. Odd microbatches are paler, so that neighbours part.
fn background(moment: Moment) -> Option<u8> {
    let Moment::Compute { pass, microbatch, .. } = moment else {
        return (moment == Moment::Optimizer).then_some(96);
    };
    let [even, odd] = match pass {
        Pass::F => [25, 67],
        Pass::B => [130, 173],
        Pass::W => [28, 71],
        Pass::BW => [124, 167],
        Pass::R => [238, 242],
    };
    Some(if microbatch.is_multiple_of(2) { even } else { odd })
}

/// Prints a trace.
pub fn show(screen: &Screen, trace: &Trace) -> Result<(), Failure> {
    let digits = trace.ranks.len().saturating_sub(1).max(1).ilog10() as usize + 2;
    let width = screen.width().saturating_sub(digits + 1).min(160);
    for (rank, row) in trace.timeline(width).iter().take(MOST_ROWS).enumerate() {
        let mut line = format!("{:>digits$} ", format!("r{rank}"));
        let mut open = None;
        for &moment in row {
            let wanted = background(moment).filter(|_| screen.color());
            if wanted != open {
                line.push_str(&wanted.map_or("\x1b[0m".into(), |code| format!("\x1b[48;5;{code};38;5;231m")));
                open = wanted;
            }
            line.push(moment.glyph());
        }
        if open.is_some() {
            line.push_str("\x1b[0m");
        }
        screen.line(line.trim_end())?;
    }
    for (rank, traced) in trace.ranks.iter().take(MOST_ROWS).enumerate() {
        if traced.memory.is_empty() || traced.peak_bytes == 0 {
            continue;
        }
        let bars = bars(&traced.memory, trace.makespan.0.max(1), traced.peak_bytes, width);
        let line = format!("{:>digits$} {bars} {}", format!("r{rank}"), show_bytes(traced.peak_bytes));
        screen.line(line)?;
    }
    if trace.ranks.len() > MOST_ROWS {
        screen.line(format!("  and {} more ranks", trace.ranks.len() - MOST_ROWS))?;
    }
    screen.line("  F forward · B backward for inputs · W for weights · X both · R recomputation · O optimizer")?;
    screen.line(
        "  ~ communication shows · - waits for a peer · : waits for its device; below: memory up to each rank's peak",
    )
}

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The highest memory of each column.
fn bars(curve: &[(paceline_sim::units::Nanos, u64)], end: u64, peak: u64, width: usize) -> String {
    let mut highest = vec![0u64; width];
    for (place, &(at, bytes)) in curve.iter().enumerate() {
        let until = curve.get(place + 1).map_or(end, |next| next.0.0);
        let column = |time: u64| ((u128::from(time) * width as u128 / u128::from(end)) as usize).min(width - 1);
        for held in &mut highest[column(at.0)..=column(until.max(at.0))] {
            *held = (*held).max(bytes);
        }
    }
    highest.into_iter().map(|bytes| BARS[((bytes * 8).div_ceil(peak.max(1)) as usize).clamp(1, 8) - 1]).collect()
}
