//! Logs of nccl-tests, of every version from 1.x on, as they are printed, copied and shortened by people.
//!
//! A log holds one or more runs. The column plan is read from the header line above the rows, not guessed from the number
//! of cells, because old versions leave out or blank columns. Lines of launchers and of NCCL's own debugging in between are noise; a
//! row that such noise has torn is reported with its line number.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// One half of a row: the test into another buffer, or in place.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Half {
    /// Time of one call in seconds.
    pub seconds: f64,
    /// Algorithm bandwidth as printed, in 10^9 bytes per second.
    pub algbw: f64,
    /// Bus bandwidth as printed.
    pub busbw: f64,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CollectiveRow {
    /// Its line in the file, from 1.
    pub line: usize,
    /// The run within the file, from 0.
    pub run: usize,
    /// Size of the whole buffer in bytes, as printed.
    pub bytes: u64,
    /// Elements, per rank or in all as the test counts.
    pub count: u64,
    /// Element type.
    pub dtype: String,
    /// Reduction; empty without one.
    pub redop: String,
    /// Out of place.
    pub out_of_place: Option<Half>,
    /// In place.
    pub in_place: Option<Half>,
}

/// One run: its header and what follows from it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Run {
    /// The test's name, where it is printed, for example `all_reduce_perf`.
    pub test: String,
    /// Ranks, where the rank lines or the rows tell.
    pub ranks: Option<u64>,
    /// Names of the GPUs in the rank lines, each once.
    pub gpus: Vec<String>,
    /// Hosts in the rank lines, each once.
    pub hosts: Vec<String>,
    /// In a gather-type test: ranks that the ratio of size and count shows.
    pub counted_ranks: Option<u64>,
}

/// A line that looks like a row and is none.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("line {line}: {reason}")]
pub struct Malformed {
    /// Its number, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// A log as read.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct NcclLog {
    /// Its runs.
    pub runs: Vec<Run>,
    /// All rows in the order of the file.
    pub rows: Vec<CollectiveRow>,
    /// Lines that were left out.
    pub malformed: Vec<Malformed>,
}

/// Whether malformed lines are left out or refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// They are left out and listed.
    Skip,
    /// The first one is an error.
    Refuse,
}

/// A log that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LogError {
    /// A malformed line, refused.
    #[error("nccl-tests log: {0}; run again without strict reading to leave such lines out")]
    Malformed(Malformed),
    /// Not a log.
    #[error("nccl-tests log: no table of sizes and times found in {lines} lines; give the text that nccl-tests prints")]
    NoTable { lines: usize },
}

const TYPES: [&str; 15] = [
    "int8", "uint8", "int32", "uint32", "int64", "uint64", "half", "float", "double", "bfloat16", "f8e4m3", "f8e5m2",
    "fp8_e4m3", "fp8_e5m2", "char",
];
const OPERATIONS: [&str; 7] = ["sum", "prod", "max", "min", "avg", "mulsum", "none"];

/// The columns of a table.
#[derive(Debug, Clone, Copy)]
struct Plan {
    redop: bool,
    root: bool,
    /// Cells of a half: time, two bandwidths, the check, and intervals where they are printed.
    half: usize,
    halves: usize,
    /// Seconds of the printed unit of time.
    unit: f64,
}

/// Reads a log.
///
/// # Errors
/// When it holds no table, or when a malformed line is to be refused.
pub fn read(text: &str, strictness: Strictness) -> Result<NcclLog, LogError> {
    let mut log = NcclLog::default();
    let mut plan: Option<Plan> = None;
    let mut pending = Run::default();
    let mut lines = 0;
    for (n, raw) in text.lines().enumerate() {
        lines = n + 1;
        let line = strip(raw);
        let body = line.trim_start_matches('#').trim();
        if let Some(test) = body.strip_prefix("Collective test starting:") {
            pending.test = test.trim().to_owned();
        } else if body.starts_with("nThread ") && plan.is_some() && !log.rows.is_empty() {
            // Parameters begin a run; of an earlier one nothing is kept.
            plan = None;
        } else if let Some(rank) = body.strip_prefix("Rank ") {
            if plan.take().is_some() {
                pending = Run { test: pending.test, ..Run::default() };
            }
            rank_line(rank, &mut pending);
        } else if let Some(found) = header(body) {
            plan = Some(found);
            log.runs.push(std::mem::take(&mut pending));
        } else if body.starts_with("(B)") || body.starts_with("(bytes)") {
            // Units: the oldest version printed milliseconds.
            if let Some(plan) = plan.as_mut().filter(|_| body.contains("(ms)")) {
                plan.unit = 1e-3;
            }
        } else if let Some(plan) = plan {
            match row(&line, plan) {
                None => {}
                Some(Ok(mut row)) => {
                    row.line = n + 1;
                    row.run = log.runs.len() - 1;
                    log.rows.push(row);
                }
                Some(Err(reason)) => {
                    let malformed = Malformed { line: n + 1, reason };
                    if strictness == Strictness::Refuse {
                        return Err(LogError::Malformed(malformed));
                    }
                    log.malformed.push(malformed);
                }
            }
        }
    }
    if log.runs.is_empty() {
        return Err(LogError::NoTable { lines });
    }
    for n in 0..log.runs.len() {
        log.runs[n].counted_ranks = counted_ranks(log.rows.iter().filter(|row| row.run == n));
    }
    Ok(log)
}

/// Takes away what launchers put before a line: `[job,rank]<stdout>:`, `N:` and rank tags `[N]`, before a row or inside one.
fn strip(raw: &str) -> String {
    let mut line = raw.trim();
    loop {
        let before = line;
        if let Some(at) = line.find(">:").filter(|_| line.starts_with('[')) {
            line = line[at + 2..].trim_start();
        }
        if let Some(rest) = tag(line) {
            line = rest.trim_start();
        }
        if let Some((number, rest)) = line.split_once(':')
            && !number.is_empty()
            && number.bytes().all(|b| b.is_ascii_digit())
            && rest.starts_with([' ', '#'])
        {
            line = rest.trim_start();
        }
        if line == before {
            break;
        }
    }
    // Rank tags inside.
    line.split_whitespace().filter(|cell| tag(cell) != Some("")).collect::<Vec<_>>().join(" ")
}

/// What follows `[N]`.
fn tag(text: &str) -> Option<&str> {
    let (number, rest) = text.strip_prefix('[')?.split_once(']')?;
    (!number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some(rest)
}

/// `0 Group 0 Pid 33 on host device 0 [0x10] NVIDIA A100-SXM4-40GB`.
fn rank_line(text: &str, run: &mut Run) {
    let cells: Vec<&str> = text.split_whitespace().collect();
    let Some(rank) = cells.first().and_then(|c| c.parse::<u64>().ok()).and_then(|r| r.checked_add(1)) else { return };
    run.ranks = Some(run.ranks.map_or(rank, |r| r.max(rank)));
    let after = |word: &str| cells.iter().position(|c| *c == word).map(|n| n + 1);
    if let Some(host) = after("on").and_then(|n| cells.get(n))
        && run.hosts.iter().all(|h| h != host)
    {
        run.hosts.push((*host).to_owned());
    }
    // The tag of the bus was taken away if it was a bare number; the name is what follows it.
    let at = after("device")
        .and_then(|n| cells[n.min(cells.len())..].iter().position(|c| c.starts_with('[')).map(|m| n + m + 1));
    if let Some(name) = at.map(|n| cells[n.min(cells.len())..].join(" ")).filter(|name| !name.is_empty())
        && !run.gpus.contains(&name)
    {
        run.gpus.push(name);
    }
}

/// The plan of a header line `size count type ...`; `None` for any other line.
fn header(body: &str) -> Option<Plan> {
    let cells: Vec<&str> = body.split_whitespace().collect();
    let named = |names: &[&str]| cells.iter().filter(|c| names.contains(c)).count();
    let begins = matches!(cells.first(), Some(&"size" | &"bytes")) && named(&["type"]) == 1;
    let halves = named(&["time", "cputime"]);
    if !begins || !(1..=2).contains(&halves) {
        return None;
    }
    let first = cells.iter().position(|c| matches!(*c, "time" | "cputime"))?;
    let next = cells.iter().skip(first + 1).position(|c| matches!(*c, "time" | "cputime"));
    let half = next.map_or(cells.len() - first, |n| n + 1).min(8);
    // The oldest version prints milliseconds and says so with its first column.
    let unit = if cells[0] == "bytes" { 1e-3 } else { 1e-6 };
    Some(Plan { redop: named(&["redop", "op"]) == 1, root: named(&["root"]) == 1, half: half.max(4), halves, unit })
}

/// Reads a row; `None` for a line that is none.
fn row(line: &str, plan: Plan) -> Option<Result<CollectiveRow, String>> {
    let cells: Vec<&str> = line.split_whitespace().collect();
    let bytes: u64 = cells.first()?.parse().ok()?;
    let Some(count) = cells.get(1).and_then(|c| c.parse::<u64>().ok()) else {
        // A number alone at the start of a line is often the end of a torn row.
        return (cells.len() >= plan.half)
            .then(|| Err("a row without its element count; torn by other output?".into()));
    };
    let dtype = *cells.get(2)?;
    if !TYPES.contains(&dtype) && dtype != "int" {
        return (cells.len() > plan.half).then(|| Err(format!("{dtype:?} is no element type")));
    }
    let mut at = 3;
    let mut redop = String::new();
    if plan.redop {
        // Blank in the old all-to-all.
        if let Some(cell) = cells.get(at).filter(|c| OPERATIONS.contains(c)) {
            redop = if *cell == "none" { String::new() } else { (*cell).to_owned() };
            at += 1;
        }
    }
    if plan.root {
        if cells.get(at).and_then(|c| c.parse::<i64>().ok()).is_none() {
            return Some(Err("a row without its root; aborted or torn".into()));
        }
        at += 1;
    }
    let read_half = |which: usize| {
        let start = at + which * plan.half;
        let cell =
            |n: usize| cells.get(start + n).and_then(|c| c.parse::<f64>().ok()).filter(|v| v.is_finite() && *v >= 0.0);
        let half = Half { seconds: cell(0)? * plan.unit, algbw: cell(1)?, busbw: cell(2)? };
        Some(half)
    };
    let out_of_place = read_half(0);
    let in_place = if plan.halves > 1 { read_half(1) } else { None };
    if out_of_place.is_none() && in_place.is_none() {
        return Some(Err("a row without a complete time; aborted or torn".into()));
    }
    Some(Ok(CollectiveRow { line: 0, run: 0, bytes, count, dtype: dtype.to_owned(), redop, out_of_place, in_place }))
}

/// Bytes of an element.
fn element(dtype: &str) -> u64 {
    match dtype {
        "int8" | "uint8" | "char" | "f8e4m3" | "f8e5m2" | "fp8_e4m3" | "fp8_e5m2" => 1,
        "half" | "bfloat16" => 2,
        "int64" | "uint64" | "double" => 8,
        _ => 4,
    }
}

/// Ranks of a gather-type test, whose size is `ranks * count * element`; `None` for others and without rows.
fn counted_ranks<'a>(rows: impl Iterator<Item = &'a CollectiveRow>) -> Option<u64> {
    let mut found = None;
    for row in rows.filter(|row| row.count > 0) {
        let part = row.count.checked_mul(element(&row.dtype))?;
        if !row.bytes.is_multiple_of(part) {
            return None;
        }
        let ranks = row.bytes / part;
        if ranks < 2 || found.is_some_and(|f| f != ranks) {
            return None;
        }
        found = Some(ranks);
    }
    found
}

impl CollectiveRow {
    /// The better of both halves: first sizes hold the set-up of connections, and noise only slows.
    pub fn seconds(&self) -> Option<f64> {
        [self.out_of_place, self.in_place].into_iter().flatten().map(|h| h.seconds).min_by(f64::total_cmp)
    }

    /// Bus bandwidth of the better half in bytes per second: computed from size and time, because the printed figure has two
    /// digits after the point, with the printed ratio of bus and algorithm bandwidth. `None` where nothing moved.
    pub fn bus_bandwidth(&self) -> Option<f64> {
        let half = [self.out_of_place, self.in_place]
            .into_iter()
            .flatten()
            .filter(|h| h.seconds > 0.0 && h.algbw > 0.0)
            .min_by(|a, b| a.seconds.total_cmp(&b.seconds))?;
        let bandwidth = self.bytes as f64 / half.seconds * half.busbw / half.algbw;
        (self.bytes > 0 && bandwidth >= 1.0 && bandwidth.is_finite()).then_some(bandwidth)
    }
}

impl NcclLog {
    /// Latency in seconds and bus bandwidth in bytes per second of a run: the fit of [`crate::Line`] to its rows that moved
    /// anything.
    ///
    /// # Errors
    /// When fewer than two sizes moved anything, or the fit fails.
    pub fn fit(&self, run: usize) -> Result<crate::Line, crate::ProfileError> {
        let points: Vec<crate::fit::Point> = self
            .rows
            .iter()
            .filter(|row| row.run == run && row.bytes > 0)
            .filter_map(|row| row.seconds().filter(|s| *s > 0.0).map(|s| (row.bytes, s)))
            .map(|(bytes, seconds)| crate::fit::Point { flops: 0.0, bytes: bytes as f64, seconds })
            .collect();
        if points.len() < 2 {
            let reason = format!("{} usable sizes, at least 2 needed", points.len());
            return Err(crate::ProfileError::Fit { what: format!("run {run} of the nccl-tests log"), reason });
        }
        crate::Line::fit("nccl-tests log", &points)
    }
}

#[cfg(test)]
mod tests;
