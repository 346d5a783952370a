//! Reads measured runs: a CSV file with one run per line, as far as its columns ([`super::columns`]) go.

use super::columns::canonical;
use std::collections::HashMap;
use thiserror::Error;

/// One line of the file.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its line in the file, from 1.
    pub line: u64,
    columns: std::sync::Arc<HashMap<String, usize>>,
    cells: Vec<String>,
}

/// A file that is no list of runs.
#[derive(Debug, Error)]
pub enum ReadError {
    /// Not CSV.
    #[error("runs: {0}")]
    Csv(#[from] csv::Error),
    /// Columns that nothing can be said without.
    #[error("runs: column{} {} missing; needed are {}, of the others every one helps", if .missing.len() > 1 { "s" } else { "" }, .missing.join(", "), NEEDED.join(", "))]
    Columns { missing: Vec<&'static str> },
    /// A figure that cannot be.
    #[error("runs, line {line}: {column} = {value:?}, but it has to be {allowed}")]
    Figure { line: u64, column: &'static str, value: String, allowed: &'static str },
    /// A count that no run has.
    #[error("runs, line {line}: {column} = {value}, more than the {most} that are computed with; is the row shifted?")]
    TooLarge { line: u64, column: &'static str, value: f64, most: f64 },
}

/// Columns without which a run cannot be predicted.
pub const NEEDED: [&str; 6] = ["layers", "hidden", "heads", "seq", "gpu", "gpus"];

/// Columns of numbers above zero, where they are given.
const POSITIVE: [&str; 7] = ["layers", "hidden", "heads", "seq", "gpus", "iter_time_s", "peak_mem_gib"];
/// Columns of numbers that may be zero, where they are given: a count of zero says as much as an empty cell.
const COUNTS: [&str; 18] = [
    "ffn_hidden",
    "kv_heads",
    "vocab",
    "gbs",
    "mbs",
    "dp",
    "gpus_per_node",
    "params_b",
    "tp",
    "cp",
    "pp",
    "vpp",
    "ep",
    "experts",
    "topk",
    "tokens_per_sec_per_gpu",
    "tflops_per_gpu",
    "mfu",
];

/// The largest counts that a run can have: a hundred times and more of what anyone has run, and small enough to compute with.
const MOST: [(&str, f64); 18] = [
    ("layers", 1e4),
    ("hidden", 2e5),
    ("ffn_hidden", 1e6),
    ("heads", 1e4),
    ("kv_heads", 1e4),
    ("vocab", 1e7),
    ("experts", 1e4),
    ("topk", 1e4),
    ("seq", 1e8),
    ("gpus", 1e7),
    ("gpus_per_node", 1e4),
    ("tp", 1e7),
    ("cp", 1e7),
    ("pp", 1e4),
    ("vpp", 1e4),
    ("dp", 1e7),
    ("ep", 1e7),
    ("mbs", 1e6),
];
/// The same for the global batch, in sequences.
const MOST_SEQUENCES: f64 = 1e8;

/// Reads a file.
///
/// # Errors
/// When it is no CSV, lacks a needed column, or has figures that are no finite numbers or negative.
pub fn read(text: &str) -> Result<Vec<Row>, ReadError> {
    let mut reader = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::All).from_reader(text.as_bytes());
    let mut columns: HashMap<String, usize> = HashMap::new();
    let mut factors: HashMap<usize, f64> = HashMap::new();
    for (n, name) in reader.headers()?.iter().enumerate() {
        let (name, factor) = canonical(name);
        // Of two columns that mean the same, the first counts.
        if let std::collections::hash_map::Entry::Vacant(free) = columns.entry(name) {
            free.insert(n);
            if factor != 1.0 {
                factors.insert(n, factor);
            }
        }
    }
    let missing: Vec<&str> = NEEDED.into_iter().filter(|c| !columns.contains_key(*c)).collect();
    if !missing.is_empty() {
        return Err(ReadError::Columns { missing });
    }
    let columns = std::sync::Arc::new(columns);
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record?;
        let line = record.position().map_or(0, csv::Position::line);
        let cells = record.iter().enumerate().map(|(n, cell)| match (factors.get(&n), figure(cell)) {
            (Some(factor), Some(value)) => (factor * value).to_string(),
            _ => cell.to_owned(),
        });
        let row = Row { line, columns: columns.clone(), cells: cells.collect() };
        row.check()?;
        rows.push(row);
    }
    Ok(rows)
}

/// A figure as people write it: `1,024`, `~ 8`, `41.2 %`.
fn figure(text: &str) -> Option<f64> {
    let text = text.trim().trim_start_matches(['~', '\u{2248}']).trim_end_matches('%').trim();
    if let Ok(value) = text.parse() {
        return Some(value);
    }
    // Commas between groups of three digits.
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let mut groups = whole.split(',');
    let first = groups.next()?;
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    let grouped = whole.contains(',') && (1..=3).contains(&first.len()) && digits(first) && digits(fraction);
    if !grouped || !groups.all(|group| group.len() == 3 && digits(group)) {
        return None;
    }
    text.replace(',', "").parse().ok()
}

impl Row {
    /// A cell; empty when the file lacks the column.
    pub fn text(&self, column: &str) -> &str {
        self.columns.get(column).and_then(|n| self.cells.get(*n)).map_or("", String::as_str)
    }

    /// A cell as a number; `None` when it is empty, `unknown` or `n/a`.
    pub fn number(&self, column: &str) -> Option<f64> {
        figure(self.text(column))
    }

    /// A cell as a count.
    pub fn count(&self, column: &str) -> Option<u64> {
        self.number(column).filter(|n| *n >= 0.0 && n.fract() == 0.0).map(|n| n as u64)
    }

    fn check(&self) -> Result<(), ReadError> {
        for (columns, least, allowed) in [
            (&POSITIVE[..], f64::MIN_POSITIVE, "a finite number above zero, or empty"),
            (&COUNTS[..], 0.0, "a finite number not below zero, or empty"),
        ] {
            for column in columns {
                let value = self.text(column);
                let unknown = ["", "-", "?", "na", "n/a", "unknown", "none"];
                if unknown.iter().any(|u| value.eq_ignore_ascii_case(u)) {
                    continue;
                }
                if !figure(value).is_some_and(|n| n.is_finite() && n >= least) {
                    return Err(ReadError::Figure { line: self.line, column, value: value.to_owned(), allowed });
                }
            }
        }
        for (column, most) in MOST.into_iter().chain([("gbs", MOST_SEQUENCES)]) {
            if let Some(value) = self.number(column).filter(|n| *n > most) {
                return Err(ReadError::TooLarge { line: self.line, column, value, most });
            }
        }
        Ok(())
    }

    /// The part of the notes after `key=`, up to the next semicolon.
    pub fn note(&self, key: &str) -> Option<&str> {
        let parts = self.text("notes").split(';').map(str::trim);
        parts.filter_map(|part| part.strip_prefix(key)).find_map(|rest| rest.strip_prefix('=')).map(str::trim)
    }

    /// Whether the notes contain a phrase; case does not matter.
    pub fn noted(&self, phrase: &str) -> bool {
        self.text("notes").to_ascii_lowercase().contains(&phrase.to_ascii_lowercase())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "id,source,layers,hidden,heads,seq,gpu,gpus,iter_time_s,notes\n";

    #[test]
    fn cells_and_notes() {
        let rows = read(&format!("{HEAD}a,s,2,64,4,128,A100,8,,tied_emb=True; MLA; moe_ffn=2048\n")).unwrap();
        assert_eq!(rows[0].line, 2);
        assert_eq!(rows[0].count("layers"), Some(2));
        assert_eq!(rows[0].number("iter_time_s"), None);
        assert_eq!(rows[0].number("absent"), None);
        assert_eq!(rows[0].note("moe_ffn"), Some("2048"));
        assert!(rows[0].noted("mla") && !rows[0].noted("gqa"));
    }

    #[test]
    fn bad_files_say_what_and_where() {
        let error = read("id,layers\na,1\n").unwrap_err().to_string();
        assert!(error.contains("hidden") && error.contains("gpus"), "{error}");
        for (time, phrase) in [("-1", "iter_time_s = \"-1\""), ("NaN", "NaN"), ("fast", "fast"), ("inf", "inf")] {
            let error = read(&format!("{HEAD}a,s,2,64,4,128,A100,8,{time},\n")).unwrap_err().to_string();
            assert!(error.contains("line 2") && error.contains(phrase), "{error}");
        }
        assert!(read(&format!("{HEAD}a,s,0,64,4,128,A100,8,1,\n")).is_err());
        let error = read(&format!("{HEAD}a,s,1e12,64,4,128,A100,8,1,\n")).unwrap_err().to_string();
        assert!(error.contains("line 2: layers = 1000000000000, more than the 10000"), "{error}");
    }
}
