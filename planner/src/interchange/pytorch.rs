//! The compute-only CSV of PyTorch's pipeline runtime (`torch.distributed.pipelining`): one row per rank, no header, one
//! action per cell, `<stage><ACTION><microbatch>` with both numbers from 0.
//!
//! | PyTorch | here |
//! | --- | --- |
//! | `F` | F |
//! | `I` (input gradient) | B |
//! | `W` | W |
//! | `B` (full backward) | BW |
//! | `(2F3;5B1)OVERLAP_F_B` | F, then BW, in the order given |
//! | empty cell | idle, left out |
//!
//! The rows define the placement: a stage lives on the rank whose row names it. PyTorch lowers such a file by itself (sends, receives,
//! gathers), and so do we. Recomputation has no cell: PyTorch recomputes inside its backward, so R is left out on writing.

use crate::order::{Action, ComputeOrder, Placement};
use crate::replay::{OrderError, Replayer, StageTimes, Waiting};
use crate::schedules::{action, looped, v_shape};
use paceline_sim::program::Pass;
use std::collections::BTreeMap;
use std::fmt;
use thiserror::Error;

/// Where a cell is; both numbers count from 1, as in a spreadsheet. Row `n` is rank `n - 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    /// Row.
    pub row: usize,
    /// Column.
    pub column: usize,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row {}, column {}", self.row, self.column)
    }
}

/// Why a CSV is no schedule, or a schedule no CSV.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CsvError {
    /// No row with an action.
    #[error("the file has no action; one row per rank is expected, for example `0F0,0F1,0B0,0B1`")]
    Empty,
    /// A rank that does nothing.
    #[error("row {row} (rank {}) has no action; every rank needs at least one stage", .row - 1)]
    EmptyRow { row: usize },
    /// A cell that cannot be read.
    #[error("{at}: `{cell}` is no action; cells are <stage>F|I|W|B<microbatch>, (<cell>;<cell>)OVERLAP_F_B, or empty")]
    Unknown { at: At, cell: String },
    /// A cell of the lowered format.
    #[error(
        "{at}: `{cell}` is communication; give the compute-only form, the sends and receives are added when it is used"
    )]
    Communication { at: At, cell: String },
    /// A number that is too large.
    #[error("{at}: `{cell}` names a number that is too large; stages go to 65534, microbatches to 4294967294")]
    TooLarge { at: At, cell: String },
    /// A stage in two rows.
    #[error("{at}: `{cell}` is in row {}, but stage {stage} is in row {other} already; a stage lives on one rank", .at.row)]
    StageMoved { at: At, cell: String, stage: u32, other: usize },
    /// The same action again.
    #[error("{at}: `{cell}` is there already, at {first}; keep one")]
    Doubled { at: At, cell: String, first: At },
    /// Both `B` and `I` or `W` of one stage and microbatch.
    #[error("{at}: `{cell}` beside `{other}` at {there}; keep either the full backward B, or I and W")]
    BothBackwards { at: At, cell: String, other: String, there: At },
    /// An action before one that it needs, on its own rank.
    #[error("{at}: `{cell}` needs `{needs}`, which comes later, at {there}")]
    WrongOrder { at: At, cell: String, needs: String, there: At },
    /// An action that has to be there. `at` is the cell that asks for it, or the first free cell of the row.
    #[error("{at}: `{cell}` is missing{hint}")]
    Missing { at: At, cell: String, hint: &'static str },
    /// A stage number without any cell.
    #[error("stage {stage} is in no row, but stage {last} is; stages count from 0 without gaps")]
    NoSuchStage { stage: u32, last: u32 },
    /// Ranks that wait for each other for ever.
    #[error("deadlock: {0}")]
    Deadlock(String),
    /// Two copies of the model.
    #[error(
        "{name}: two copies of the model cannot be written, PyTorch takes every microbatch through every stage; use dualpipe-v"
    )]
    TwoCopies { name: String },
}

/// How rows are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// One action after the other.
    #[default]
    Dense,
    /// One column per slot of the unit-time replay, idle slots empty (a full backward is followed by an empty cell).
    Slots,
}

/// Writes an order that [`ComputeOrder::validate`] accepts, one line per rank.
///
/// # Errors
/// When PyTorch cannot express the order: two copies of the model. An order that cannot run has no [`Layout::Slots`].
pub fn write(order: &ComputeOrder, layout: Layout) -> Result<String, CsvError> {
    if order.placement.copies != 1 {
        return Err(CsvError::TwoCopies { name: order.name.clone() });
    }
    let mut replayer = Replayer::default();
    if layout == Layout::Slots {
        replayer
            .run(order, &StageTimes::unit(order.placement.stages()))
            .map_err(|error| CsvError::Deadlock(error.to_string()))?;
    }
    let mut text = String::new();
    for (device, list) in order.actions.iter().enumerate() {
        let mut cells: Vec<String> = Vec::with_capacity(list.len());
        for (place, action) in list.iter().enumerate().filter(|(_, action)| action.pass != Pass::R) {
            if layout == Layout::Slots {
                cells.resize(replayer.starts(device)[place] as usize, String::new());
            }
            cells.push(cell_of(*action));
        }
        text.push_str(&cells.join(","));
        text.push('\n');
    }
    Ok(text)
}

/// A cell in PyTorch's letters.
fn cell_of(action: Action) -> String {
    let letter = match action.pass {
        Pass::F | Pass::R => 'F',
        Pass::B => 'I',
        Pass::W => 'W',
        Pass::BW => 'B',
    };
    format!("{}{letter}{}", action.stage.0, action.microbatch.0)
}

/// Reads a compute-only CSV and checks all that a schedule promises. The order carries `name`; its placement is called
/// `loop` or `v` where it is one of these, else `custom`.
///
/// # Errors
/// The first mistake, with its row and column.
pub fn read(text: &str, name: &str) -> Result<ComputeOrder, CsvError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text).trim_end();
    let rows: Vec<Vec<(Action, At)>> =
        text.lines().enumerate().map(|(row, line)| read_row(line, row + 1)).collect::<Result<_, _>>()?;
    if rows.iter().all(Vec::is_empty) {
        return Err(CsvError::Empty);
    }
    if let Some(row) = rows.iter().position(Vec::is_empty) {
        return Err(CsvError::EmptyRow { row: row + 1 });
    }
    let device_of_stage = placement_of(&rows)?;
    let microbatches = check_passes(&rows, &device_of_stage)?;
    let devices = rows.len() as u32;
    let chunks = device_of_stage.len() as u32 / devices;
    let known = [looped(devices, chunks.max(1)), v_shape(devices)];
    let placement = known.into_iter().find(|known| known.device_of_stage == device_of_stage).unwrap_or(Placement {
        name: "custom".into(),
        device_of_stage,
        copies: 1,
    });
    let order = ComputeOrder {
        name: name.to_owned(),
        microbatches,
        placement,
        actions: rows.iter().map(|row| row.iter().map(|(action, _)| *action).collect()).collect(),
    };
    match order.validate() {
        Ok(()) => Ok(order),
        Err(OrderError::Deadlock(waiting)) => Err(CsvError::Deadlock(locate(&waiting, &rows))),
        Err(other) => Err(CsvError::Deadlock(other.to_string())),
    }
}

fn read_row(line: &str, row: usize) -> Result<Vec<(Action, At)>, CsvError> {
    let mut actions = Vec::new();
    for (index, cell) in line.split(',').enumerate() {
        let at = At { row, column: index + 1 };
        let cell = cell.trim().trim_matches('"').trim();
        if cell.is_empty() {
            continue;
        }
        match cell.strip_prefix('(').and_then(|rest| rest.strip_suffix(")OVERLAP_F_B")) {
            Some(inner) if inner.contains(';') => {
                for part in inner.split(';') {
                    actions.push((read_cell(part.trim(), at)?, at));
                }
            }
            Some(_) => return Err(CsvError::Unknown { at, cell: cell.to_owned() }),
            None => actions.push((read_cell(cell, at)?, at)),
        }
    }
    Ok(actions)
}

fn read_cell(cell: &str, at: At) -> Result<Action, CsvError> {
    let unknown = || CsvError::Unknown { at, cell: cell.to_owned() };
    let letters = cell.find(|c: char| !c.is_ascii_digit()).filter(|end| *end > 0).ok_or_else(unknown)?;
    let (stage, rest) = cell.split_at(letters);
    let digits = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
    let (kind, microbatch) = rest.split_at(digits);
    let communicates = ["SEND", "RECV", "UNSHARD", "RESHARD", "REDUCE", "WAIT"];
    if communicates.iter().any(|word| kind.starts_with(word)) {
        return Err(CsvError::Communication { at, cell: cell.to_owned() });
    }
    let pass = match kind {
        "F" => Pass::F,
        "I" => Pass::B,
        "W" => Pass::W,
        "B" => Pass::BW,
        _ => return Err(unknown()),
    };
    if microbatch.is_empty() || !microbatch.bytes().all(|b| b.is_ascii_digit()) {
        return Err(unknown());
    }
    let too_large = || CsvError::TooLarge { at, cell: cell.to_owned() };
    let stage = stage.parse::<u32>().ok().filter(|stage| *stage < u32::from(u16::MAX)).ok_or_else(too_large)?;
    let microbatch = microbatch.parse::<u32>().ok().filter(|b| *b < u32::MAX).ok_or_else(too_large)?;
    Ok(action(pass, stage, microbatch))
}

/// The rank of every stage, from the rows that name it.
fn placement_of(rows: &[Vec<(Action, At)>]) -> Result<Vec<u32>, CsvError> {
    let mut rank_of: BTreeMap<u32, usize> = BTreeMap::new();
    for (action, at) in rows.iter().flatten() {
        let stage = u32::from(action.stage.0);
        let rank = *rank_of.entry(stage).or_insert(at.row - 1);
        if rank != at.row - 1 {
            return Err(CsvError::StageMoved { at: *at, cell: cell_of(*action), stage, other: rank + 1 });
        }
    }
    let last = rank_of.keys().next_back().copied().unwrap_or(0);
    for (expected, (stage, _)) in (0..).zip(&rank_of) {
        if *stage != expected {
            return Err(CsvError::NoSuchStage { stage: expected, last });
        }
    }
    Ok(rank_of.into_values().map(|rank| rank as u32).collect())
}

/// Where the passes of one stage and microbatch are: the place within the row's list, and the cell.
#[derive(Default, Clone, Copy)]
struct Found {
    f: Option<(usize, At)>,
    b: Option<(usize, At)>,
    w: Option<(usize, At)>,
    bw: Option<(usize, At)>,
}

/// Checks that every stage has F and a backward of every microbatch in the right order; returns the number of microbatches.
fn check_passes(rows: &[Vec<(Action, At)>], device_of_stage: &[u32]) -> Result<u32, CsvError> {
    let mut found: BTreeMap<(u16, u32), Found> = BTreeMap::new();
    for row in rows {
        for (place, (action, at)) in row.iter().enumerate() {
            let entry = found.entry((action.stage.0, action.microbatch.0)).or_default();
            let slot = match action.pass {
                Pass::F | Pass::R => &mut entry.f,
                Pass::B => &mut entry.b,
                Pass::W => &mut entry.w,
                Pass::BW => &mut entry.bw,
            };
            if let Some((_, first)) = *slot {
                return Err(CsvError::Doubled { at: *at, cell: cell_of(*action), first });
            }
            *slot = Some((place, *at));
        }
    }
    let microbatches = found.keys().map(|(_, microbatch)| microbatch + 1).max().unwrap_or(0);
    // Keys come sorted by stage, then microbatch: a gap shows as a number out of step.
    let mut expected = (0u16, 0u32);
    let gap = |(stage, microbatch): (u16, u32)| {
        let row = device_of_stage[stage as usize] as usize;
        let column = rows[row].last().map_or(1, |(_, at)| at.column + 1);
        CsvError::Missing {
            at: At { row: row + 1, column },
            cell: cell_of(action(Pass::F, u32::from(stage), microbatch)),
            hint: ": every stage computes every microbatch",
        }
    };
    for (key, entry) in &found {
        if key.0 != expected.0 {
            if expected.1 != microbatches {
                return Err(gap(expected));
            }
            expected = (key.0, 0);
        }
        if *key != expected {
            return Err(gap(expected));
        }
        check_entry(*key, *entry)?;
        expected.1 += 1;
    }
    if expected.1 != microbatches {
        return Err(gap(expected));
    }
    Ok(microbatches)
}

fn check_entry((stage, microbatch): (u16, u32), found: Found) -> Result<(), CsvError> {
    let cell = |pass| cell_of(action(pass, u32::from(stage), microbatch));
    let missing = |asks: Option<(usize, At)>, pass, hint| {
        let at = asks.map_or(At { row: 1, column: 1 }, |(_, at)| at);
        Err(CsvError::Missing { at, cell: cell(pass), hint })
    };
    if let (Some((_, at)), Some((pass, (_, there)))) =
        (found.bw, found.b.map(|b| (Pass::B, b)).or(found.w.map(|w| (Pass::W, w))))
    {
        return Err(CsvError::BothBackwards { at: there, cell: cell(pass), other: cell(Pass::BW), there: at });
    }
    let backward = found.bw.or(found.b);
    let Some(f) = found.f else {
        return missing(backward.or(found.w), Pass::F, ", and its backward is here");
    };
    let Some(backward) = backward else {
        return match found.w {
            Some(w) => missing(Some(w), Pass::B, ", and its W is here"),
            None => missing(Some(f), Pass::BW, " (or I and W), and its F is here"),
        };
    };
    let pass = if found.bw.is_some() { Pass::BW } else { Pass::B };
    let ordered = |first: (usize, At), needs: Pass, second: (usize, At), then: Pass| {
        if first.0 < second.0 {
            Ok(())
        } else {
            Err(CsvError::WrongOrder { at: second.1, cell: cell(then), needs: cell(needs), there: first.1 })
        }
    };
    ordered(f, Pass::F, backward, pass)?;
    match (found.b, found.w) {
        (Some(b), Some(w)) => ordered(b, Pass::B, w, Pass::W),
        (Some(b), None) => missing(Some(b), Pass::W, ", and its I is here"),
        _ => Ok(()),
    }
}

/// A chain of waits in the file's own words.
fn locate(waiting: &[Waiting], rows: &[Vec<(Action, At)>]) -> String {
    let place = |device: usize, wanted: Action| {
        let at = rows[device].iter().find(|(action, _)| *action == wanted).map(|(_, at)| at.to_string());
        format!("`{}` ({})", cell_of(wanted), at.unwrap_or_else(|| format!("row {}", device + 1)))
    };
    let parts: Vec<String> =
        waiting.iter().map(|w| format!("{} waits for {}", place(w.device, w.action), place(w.on, w.needs))).collect();
    parts.join("; ")
}

#[cfg(test)]
mod tests;
