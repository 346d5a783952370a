//! Reads measured runs: a CSV file with one run per line, as far as its columns go.

use super::words::letters;
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

/// A mebibyte in gibibytes.
const MIB: f64 = 1.0 / 1024.0;
/// A gigabyte of 10^9 bytes in gibibytes.
const GIGABYTE: f64 = 1e9 / (1u64 << 30) as f64;

/// Other names of the columns, as letters and digits only: the flags of the command line, Megatron's and Hugging Face's arguments, what
/// people write; and what their figures are to be multiplied with.
const ALIASES: [(&str, &str, f64); 86] = [
    ("run", "id", 1.0),
    ("name", "id", 1.0),
    ("modelname", "model", 1.0),
    ("numlayers", "layers", 1.0),
    ("nlayers", "layers", 1.0),
    ("nlayer", "layers", 1.0),
    ("numhiddenlayers", "layers", 1.0),
    ("hiddensize", "hidden", 1.0),
    ("dmodel", "hidden", 1.0),
    ("ffnhiddensize", "ffn_hidden", 1.0),
    ("intermediatesize", "ffn_hidden", 1.0),
    ("ffn", "ffn_hidden", 1.0),
    ("numheads", "heads", 1.0),
    ("nheads", "heads", 1.0),
    ("nhead", "heads", 1.0),
    ("numattentionheads", "heads", 1.0),
    ("attentionheads", "heads", 1.0),
    ("numkeyvalueheads", "kv_heads", 1.0),
    ("numquerygroups", "kv_heads", 1.0),
    ("numkvheads", "kv_heads", 1.0),
    ("nkvheads", "kv_heads", 1.0),
    ("vocabsize", "vocab", 1.0),
    ("numexperts", "experts", 1.0),
    ("nexperts", "experts", 1.0),
    ("moeroutertopk", "topk", 1.0),
    ("seqlen", "seq", 1.0),
    ("seqlength", "seq", 1.0),
    ("sequencelength", "seq", 1.0),
    ("contextlength", "seq", 1.0),
    ("paramsbillions", "params_b", 1.0),
    ("params", "params_b", 1e-9),
    ("parameters", "params_b", 1e-9),
    ("gputype", "gpu", 1.0),
    ("gpumodel", "gpu", 1.0),
    ("accelerator", "gpu", 1.0),
    ("device", "gpu", 1.0),
    ("numgpus", "gpus", 1.0),
    ("ngpus", "gpus", 1.0),
    ("ngpu", "gpus", 1.0),
    ("gpucount", "gpus", 1.0),
    ("worldsize", "gpus", 1.0),
    ("network", "interconnect", 1.0),
    ("dtype", "precision", 1.0),
    ("tensorparallel", "tp", 1.0),
    ("tensorparallelsize", "tp", 1.0),
    ("tensormodelparallelsize", "tp", 1.0),
    ("sequenceparallel", "sp", 1.0),
    ("contextparallel", "cp", 1.0),
    ("contextparallelsize", "cp", 1.0),
    ("pipelineparallel", "pp", 1.0),
    ("pipelineparallelsize", "pp", 1.0),
    ("pipelinemodelparallelsize", "pp", 1.0),
    ("chunks", "vpp", 1.0),
    ("vp", "vpp", 1.0),
    ("virtualpipelinesize", "vpp", 1.0),
    ("dataparallel", "dp", 1.0),
    ("dataparallelsize", "dp", 1.0),
    ("expertparallel", "ep", 1.0),
    ("expertparallelsize", "ep", 1.0),
    ("expertmodelparallelsize", "ep", 1.0),
    ("states", "zero_stage_or_fsdp", 1.0),
    ("zero", "zero_stage_or_fsdp", 1.0),
    ("zerostage", "zero_stage_or_fsdp", 1.0),
    ("sharding", "zero_stage_or_fsdp", 1.0),
    ("shardingstrategy", "zero_stage_or_fsdp", 1.0),
    ("microbatch", "mbs", 1.0),
    ("microbatchsize", "mbs", 1.0),
    ("globalbatch", "gbs", 1.0),
    ("globalbatchsize", "gbs", 1.0),
    ("recomputation", "recompute", 1.0),
    ("activationcheckpointing", "recompute", 1.0),
    ("flashattention", "flash_attn", 1.0),
    ("attention", "flash_attn", 1.0),
    ("launcher", "framework", 1.0),
    ("tokenspersecondpergpu", "tokens_per_sec_per_gpu", 1.0),
    ("toksgpu", "tokens_per_sec_per_gpu", 1.0),
    ("tflops", "tflops_per_gpu", 1.0),
    ("iterationseconds", "iter_time_s", 1.0),
    ("steptimes", "iter_time_s", 1.0),
    ("steptimems", "iter_time_s", 1e-3),
    ("itertimems", "iter_time_s", 1e-3),
    ("peakgib", "peak_mem_gib", 1.0),
    ("peakmemorygib", "peak_mem_gib", 1.0),
    ("peakmemgb", "peak_mem_gib", GIGABYTE),
    ("peakmemorygb", "peak_mem_gib", GIGABYTE),
    ("peakmemmib", "peak_mem_gib", MIB),
];

/// Columns by their own names.
const COLUMNS: [&str; 40] = [
    "id",
    "source",
    "url",
    "model",
    "layers",
    "hidden",
    "ffn_hidden",
    "heads",
    "kv_heads",
    "vocab",
    "experts",
    "topk",
    "seq",
    "params_b",
    "gpu",
    "gpus",
    "gpus_per_node",
    "interconnect",
    "precision",
    "tp",
    "sp",
    "cp",
    "pp",
    "vpp",
    "dp",
    "ep",
    "zero_stage_or_fsdp",
    "schedule",
    "mbs",
    "gbs",
    "recompute",
    "flash_attn",
    "framework",
    "tokens_per_sec_per_gpu",
    "tflops_per_gpu",
    "mfu",
    "iter_time_s",
    "peak_mem_gib",
    "outcome",
    "notes",
];

/// The column that a heading means, and what its figures are to be multiplied with.
fn canonical(heading: &str) -> (String, f64) {
    let plain = letters(heading);
    if let Some(column) = COLUMNS.into_iter().find(|column| letters(column) == plain) {
        return (column.to_owned(), 1.0);
    }
    let alias = ALIASES.into_iter().find(|(alias, ..)| *alias == plain);
    alias.map_or((plain, 1.0), |(_, column, factor)| (column.to_owned(), factor))
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
