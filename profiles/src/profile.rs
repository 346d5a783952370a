//! The profile of a machine and its file: CSV with one row a measurement.
//!
//! Every row repeats the format version and the machine, so that files can be filtered, sorted and read by any tool that
//! reads tables, and a row keeps its meaning wherever it is copied to. Rows of two machines in one file are refused.

use crate::context::Context;
use crate::kernel_key::{DType, KernelKey, KernelOp};
use crate::row::{CollectiveRound, Machine, Overhead, Row, Source, Subject};
use csv::{Position, StringRecord};
use std::collections::HashSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The format written into every row.
pub const PROFILE_FORMAT: &str = "paceline.profile/1";

/// The columns, in order.
pub const COLUMNS: [&str; 16] = [
    "format",
    "kind",
    "op",
    "shape",
    "dtype",
    "busy_devices_count",
    "context",
    "median_seconds",
    "spread_seconds",
    "repetitions_count",
    "source",
    "device",
    "host",
    "cores_count",
    "date_utc",
    "versions",
];

/// What a machine does, as measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// The machine.
    pub machine: Machine,
    /// The measurements, in no particular order.
    pub rows: Vec<Row>,
}

/// Why a profile cannot be read, written or used.
#[derive(Debug, Error)]
pub enum ProfileError {
    /// The file cannot be opened, read or written.
    #[error("profile {path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    /// Reading or writing stopped.
    #[error("profile: {0}")]
    Io(std::io::Error),
    /// Not CSV.
    #[error("profile line {line}: {what}; `paceline calibrate` writes a fresh profile")]
    Csv { line: u64, what: String },
    /// The header is not ours.
    #[error("profile line 1: column {column} is `{found}`, expected `{expected}`; the columns are {}", COLUMNS.join(","))]
    Header { column: usize, found: String, expected: &'static str },
    /// Written by a newer version.
    #[error(
        "profile line {line}: format `{found}` is not `{PROFILE_FORMAT}`, the one that this version reads; update paceline or calibrate again"
    )]
    Format { line: u64, found: String },
    /// A value that makes no sense.
    #[error("profile line {line}: `{value}` in column {column}: {allowed}")]
    Value { line: u64, column: &'static str, value: String, allowed: String },
    /// Rows of two machines.
    #[error("profile line {line} was measured on {other}, the lines before on {first}; keep one file per machine")]
    TwoMachines { line: u64, first: Machine, other: Machine },
    /// No rows.
    #[error("the profile has no rows; `paceline calibrate` measures this machine")]
    Empty,
    /// A fit needs rows that are not there.
    #[error("the profile of {machine} has no {missing}; `paceline calibrate` measures this machine")]
    Incomplete { machine: Machine, missing: &'static str },
    /// The minimiser gave up.
    #[error("cannot fit {what}: {reason}")]
    Fit { what: String, reason: String },
}

/// A profile that describes another machine than the one at hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherMachine {
    /// Where the profile was made.
    pub profile: Machine,
    /// Where it is to be used.
    pub here: Machine,
}

impl std::fmt::Display for OtherMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "the profile was made on {}, this is {}: times will differ; `paceline calibrate` measures this machine",
            self.profile, self.here
        )
    }
}

impl Profile {
    /// An empty profile of a machine.
    pub fn new(machine: Machine) -> Profile {
        Profile { machine, rows: Vec::new() }
    }

    /// Whether the profile was made on another machine than `here`: a reason to warn.
    pub fn made_elsewhere(&self, here: &Machine) -> Option<OtherMachine> {
        (self.machine != *here).then(|| OtherMachine { profile: self.machine.clone(), here: here.clone() })
    }

    /// Takes the rows of a newer profile of the same machine; of two rows that measure the same, the newer one stays.
    ///
    /// # Errors
    /// When the other profile was made elsewhere; this one is then as before.
    pub fn update(&mut self, newer: Profile) -> Result<(), OtherMachine> {
        if let Some(other) = newer.made_elsewhere(&self.machine) {
            return Err(other);
        }
        let what = |row: &Row| (row.subject.clone(), row.busy_devices, row.source, row.context);
        let replaced: HashSet<_> = newer.rows.iter().map(what).collect();
        self.rows.retain(|row| !replaced.contains(&what(row)));
        self.rows.extend(newer.rows);
        Ok(())
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, is of a newer format, or a row is malformed; the error names the line.
    pub fn load(path: &Path) -> Result<Profile, ProfileError> {
        let file =
            std::fs::File::open(path).map_err(|source| ProfileError::File { path: path.to_path_buf(), source })?;
        Profile::read(std::io::BufReader::new(file))
    }

    /// Writes a file, complete or not at all: first beside it, then in its place.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), ProfileError> {
        let failed = |source| ProfileError::File { path: path.to_path_buf(), source };
        let mut beside = path.as_os_str().to_os_string();
        beside.push(".partial");
        let mut bytes = Vec::new();
        self.write(&mut bytes)?;
        std::fs::write(&beside, bytes).map_err(failed)?;
        std::fs::rename(&beside, path).map_err(failed)
    }

    /// Reads CSV.
    ///
    /// # Errors
    /// As for [`Profile::load`].
    pub fn read(from: impl Read) -> Result<Profile, ProfileError> {
        let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(from);
        let mut profile: Option<Profile> = None;
        let mut record = StringRecord::new();
        let mut header = true;
        loop {
            let more = reader.read_record(&mut record).map_err(|error| csv_error(error, reader.position()))?;
            if !more {
                break;
            }
            let line = record.position().map_or(1, Position::line);
            if header {
                check_header(&record)?;
                header = false;
                continue;
            }
            let (machine, row) = Fields { record: &record, line }.row()?;
            let profile = profile.get_or_insert_with(|| Profile::new(machine.clone()));
            if profile.machine != machine {
                return Err(ProfileError::TwoMachines { line, first: profile.machine.clone(), other: machine });
            }
            profile.rows.push(row);
        }
        profile.ok_or(ProfileError::Empty)
    }

    /// Writes CSV, sorted by subject so that two profiles can be compared line by line.
    ///
    /// # Errors
    /// When the writer fails.
    pub fn write(&self, to: impl Write) -> Result<(), ProfileError> {
        let failed = |error: csv::Error| ProfileError::Io(std::io::Error::other(error));
        let mut writer = csv::Writer::from_writer(to);
        writer.write_record(COLUMNS).map_err(failed)?;
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        rows.sort_by_key(|row| (&row.subject, row.source, row.busy_devices, row.context));
        for row in rows {
            writer
                .write_record([
                    PROFILE_FORMAT,
                    row.subject.kind(),
                    row.subject.op(),
                    &row.subject.shape(),
                    row.subject.dtype(),
                    &row.busy_devices.to_string(),
                    &row.context.map_or_else(String::new, |context| context.to_string()),
                    // `{:e}` prints the shortest text that reads back as the same number.
                    &format!("{:e}", row.median_seconds),
                    &format!("{:e}", row.spread_seconds),
                    &row.repetitions.to_string(),
                    row.source.name(),
                    &self.machine.device,
                    &self.machine.host,
                    &self.machine.cores.to_string(),
                    &row.date,
                    &row.versions,
                ])
                .map_err(failed)?;
        }
        writer.flush().map_err(ProfileError::Io)
    }
}

fn csv_error(error: csv::Error, position: &Position) -> ProfileError {
    let line = error.position().unwrap_or(position).line();
    match error.into_kind() {
        csv::ErrorKind::Io(error) => ProfileError::Io(error),
        csv::ErrorKind::Utf8 { err, .. } => ProfileError::Csv { line, what: err.to_string() },
        other => ProfileError::Csv { line, what: format!("{other:?}") },
    }
}

fn check_header(record: &StringRecord) -> Result<(), ProfileError> {
    // Spreadsheets like to begin a file with a byte order mark.
    let found = |n: usize| record.get(n).unwrap_or("").trim_start_matches('\u{feff}');
    match COLUMNS.iter().enumerate().find(|&(n, expected)| found(n) != *expected) {
        Some((n, expected)) => Err(ProfileError::Header { column: n + 1, found: found(n).into(), expected }),
        None => Ok(()),
    }
}

/// The fields of one line.
struct Fields<'a> {
    record: &'a StringRecord,
    line: u64,
}

impl Fields<'_> {
    fn get(&self, column: &'static str) -> &str {
        let index = COLUMNS.iter().position(|&c| c == column);
        index.and_then(|index| self.record.get(index)).unwrap_or("")
    }

    fn refuse(&self, column: &'static str, allowed: impl Into<String>) -> ProfileError {
        let value = self.get(column).to_string();
        ProfileError::Value { line: self.line, column, value, allowed: allowed.into() }
    }

    fn row(&self) -> Result<(Machine, Row), ProfileError> {
        if self.get("format") != PROFILE_FORMAT {
            return Err(ProfileError::Format { line: self.line, found: self.get("format").into() });
        }
        if self.record.len() != COLUMNS.len() {
            let what = format!("{} fields, expected {}", self.record.len(), COLUMNS.len());
            return Err(ProfileError::Csv { line: self.line, what });
        }
        let machine = Machine {
            device: self.get("device").into(),
            host: self.get("host").into(),
            cores: self.whole("cores_count")?,
        };
        let row = Row {
            subject: self.subject()?,
            busy_devices: self.whole("busy_devices_count")?,
            context: self.context()?,
            median_seconds: self.seconds("median_seconds", |s| s > 0.0, "a time above zero is needed")?,
            spread_seconds: self.seconds("spread_seconds", |s| s >= 0.0, "a time is needed")?,
            repetitions: self.whole("repetitions_count")?,
            source: self.one_of("source", &Source::ALL, Source::name)?,
            date: self.get("date_utc").into(),
            versions: self.get("versions").into(),
        };
        Ok((machine, row))
    }

    fn context(&self) -> Result<Option<Context>, ProfileError> {
        match self.get("context") {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|allowed: String| self.refuse("context", allowed)),
        }
    }

    fn subject(&self) -> Result<Subject, ProfileError> {
        match self.get("kind") {
            "kernel" => {
                let op: KernelOp =
                    self.get("op").parse().map_err(|e: crate::KeyError| self.refuse("op", e.to_string()))?;
                let key = KernelKey::from_shape(op, self.get("shape"));
                let key = key.map_err(|e| self.refuse("shape", e.to_string()))?;
                let dtype = match self.get("dtype") {
                    "" => DType::F32,
                    _ => self.one_of("dtype", &DType::ALL, DType::name)?,
                };
                Ok(Subject::Kernel(key.with(dtype)))
            }
            "transfer" => {
                self.one_of("op", &["copy"], |name| name)?;
                let [bytes] = self.numbers(["bytes"])?;
                Ok(Subject::Transfer { bytes })
            }
            "collective-work" => {
                let round = self.one_of("op", &CollectiveRound::ALL, CollectiveRound::name)?;
                let [members, bytes] = self.numbers(["members", "bytes"])?;
                let members = u32::try_from(members).map_err(|_| self.refuse("shape", "too many members"))?;
                Ok(Subject::Collective { round, members, bytes })
            }
            "overhead" => Ok(Subject::Overhead(self.one_of("op", &Overhead::ALL, Overhead::name)?)),
            _ => Err(self.refuse("kind", "kernel, transfer, collective-work or overhead is needed")),
        }
    }

    /// `name=number` for each name, separated by semicolons.
    fn numbers<const N: usize>(&self, names: [&str; N]) -> Result<[u64; N], ProfileError> {
        let parts: Vec<&str> = self.get("shape").split(';').collect();
        let mut numbers = [0; N];
        let fits = parts.len() == N
            && names.iter().zip(&parts).zip(&mut numbers).all(|((name, part), number)| {
                let value = part.strip_prefix(name).and_then(|rest| rest.strip_prefix('='));
                value.and_then(|v| v.parse().ok()).filter(|&v| v > 0).map(|v| *number = v).is_some()
            });
        let expected = || names.map(|name| format!("{name}=N")).join(";");
        if fits { Ok(numbers) } else { Err(self.refuse("shape", format!("expected {}", expected()))) }
    }

    fn whole<T: std::str::FromStr + PartialOrd + From<u8>>(&self, column: &'static str) -> Result<T, ProfileError> {
        let value = self.get(column).parse().ok().filter(|v| *v >= T::from(1));
        value.ok_or_else(|| self.refuse(column, "a whole number from 1 on is needed"))
    }

    fn seconds(&self, column: &'static str, fits: fn(f64) -> bool, allowed: &str) -> Result<f64, ProfileError> {
        let value = self.get(column).parse().ok().filter(|v: &f64| v.is_finite() && fits(*v));
        value.ok_or_else(|| self.refuse(column, allowed))
    }

    fn one_of<T: Copy>(&self, column: &'static str, all: &[T], name: fn(T) -> &'static str) -> Result<T, ProfileError> {
        let found = all.iter().copied().find(|&one| name(one) == self.get(column));
        let names = || all.iter().map(|&one| name(one)).collect::<Vec<_>>().join(", ");
        found.ok_or_else(|| self.refuse(column, format!("allowed: {}", names())))
    }
}

#[cfg(test)]
mod tests;
