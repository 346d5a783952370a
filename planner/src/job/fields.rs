//! Typed access to the keys of a table, with errors that name key, value and what is allowed.

use super::JobError;
use crate::job::error::JobError::{Missing, UnknownKey, Unsupported, Value as Wrong};
use std::str::FromStr;
use toml::{Table, Value};

/// A table that is being read.
pub(super) struct Fields<'a> {
    table: Table,
    origin: &'a str,
    /// What stands before a key in errors, for example `train.`.
    prefix: &'static str,
    known: &'static [&'static str],
}

const COUNT: &str = "a whole number from 1 to 4294967295";

impl<'a> Fields<'a> {
    pub fn new(table: Table, origin: &'a str, known: &'static [&'static str]) -> Fields<'a> {
        Fields { table, origin, prefix: "", known }
    }

    /// The fields of a table within this one; empty when it is absent.
    pub fn inner(
        &self,
        key: &'static str,
        prefix: &'static str,
        known: &'static [&'static str],
    ) -> Result<Fields<'a>, JobError> {
        let table = match self.table.get(key) {
            None => Table::new(),
            Some(Value::Table(table)) => table.clone(),
            Some(other) => return Err(self.wrong(key, other, "a table")),
        };
        let fields = Fields { table, origin: self.origin, prefix, known };
        fields.refuse_unknown()?;
        Ok(fields)
    }

    pub fn refuse_unknown(&self) -> Result<(), JobError> {
        let Some(key) = self.table.keys().find(|key| !self.known.contains(&key.as_str())) else { return Ok(()) };
        let plain = key.replace('-', "_").to_lowercase();
        let nearest = self
            .known
            .iter()
            .map(|known| (distance(&plain, known), known))
            .filter(|(away, known)| *away <= 2.max(known.len() / 3))
            .min()
            .map(|(_, known)| format!("{}{known}", self.prefix));
        Err(UnknownKey {
            origin: self.origin.into(),
            key: format!("{}{key}", self.prefix),
            nearest,
            known: self.known.join(", "),
        })
    }

    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub fn wrong(&self, key: &str, value: &Value, allowed: &str) -> JobError {
        Wrong { origin: self.origin.into(), key: self.name(key), value: show(value), allowed: allowed.into() }
    }

    pub fn unsupported(&self, key: &str, value: String, allowed: &str) -> JobError {
        Unsupported { origin: self.origin.into(), key: self.name(key), value, allowed: allowed.into() }
    }

    /// The value of a key as it would stand in a file; empty when it is absent.
    pub fn show(&self, key: &str) -> String {
        self.table.get(key).map(show).unwrap_or_default()
    }

    fn missing(&self, key: &str, allowed: &str) -> JobError {
        Missing { origin: self.origin.into(), key: self.name(key), allowed: allowed.into() }
    }

    pub fn text(&self, key: &str, allowed: &str) -> Result<String, JobError> {
        match self.table.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(self.wrong(key, other, allowed)),
            None => Err(self.missing(key, allowed)),
        }
    }

    pub fn optional_text(&self, key: &str) -> Result<Option<String>, JobError> {
        if self.table.contains_key(key) { self.text(key, "a text").map(Some) } else { Ok(None) }
    }

    pub fn count(&self, key: &str) -> Result<u32, JobError> {
        self.optional_count(key)?.ok_or_else(|| self.missing(key, COUNT))
    }

    pub fn optional_count(&self, key: &str) -> Result<Option<u32>, JobError> {
        self.table.get(key).map(|value| self.as_count(key, value)).transpose()
    }

    fn as_count(&self, key: &str, value: &Value) -> Result<u32, JobError> {
        match value {
            Value::Integer(n) if (1..=i64::from(u32::MAX)).contains(n) => Ok(*n as u32),
            other => Err(self.wrong(key, other, COUNT)),
        }
    }

    /// A whole number from zero on.
    pub fn whole(&self, key: &str) -> Result<Option<u64>, JobError> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) if *n >= 0 => Ok(Some(*n as u64)),
            Some(other) => Err(self.wrong(key, other, "a whole number from 0 on")),
        }
    }

    /// A number within a range.
    pub fn number(&self, key: &str, allowed: &str, within: impl Fn(f64) -> bool) -> Result<Option<f64>, JobError> {
        let Some(value) = self.table.get(key) else { return Ok(None) };
        let number = match value {
            Value::Float(x) => *x,
            Value::Integer(n) => *n as f64,
            other => return Err(self.wrong(key, other, allowed)),
        };
        if number.is_finite() && within(number) { Ok(Some(number)) } else { Err(self.wrong(key, value, allowed)) }
    }

    /// The values of an axis: one, or a list.
    fn axis(&self, key: &str, allowed: &str) -> Result<Vec<&Value>, JobError> {
        match self.table.get(key) {
            None => Ok(Vec::new()),
            Some(list @ Value::Array(values)) if values.is_empty() => {
                Err(self.wrong(key, list, &format!("{allowed}, or a list of such; leave the key out to search it")))
            }
            Some(Value::Array(values)) => Ok(values.iter().collect()),
            Some(value) => Ok(vec![value]),
        }
    }

    pub fn counts(&self, key: &str) -> Result<Vec<u32>, JobError> {
        let values = self.axis(key, COUNT)?;
        sorted(values.into_iter().map(|value| self.as_count(key, value)))
    }

    pub fn names(&self, key: &str, known: &[&str]) -> Result<Vec<String>, JobError> {
        let allowed = known.join(", ");
        let values = self.axis(key, &allowed)?;
        sorted(values.into_iter().map(|value| match value {
            Value::String(name) if known.contains(&name.as_str()) => Ok(name.clone()),
            other => Err(self.wrong(key, other, &allowed)),
        }))
    }

    pub fn choices<T: Copy + PartialEq>(&self, key: &str, known: &[(&str, T)]) -> Result<Vec<T>, JobError> {
        let allowed = known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let mut all = Vec::new();
        for value in self.axis(key, &allowed)? {
            let named = value.as_str().and_then(|text| known.iter().find(|(name, _)| *name == text));
            let Some(&(_, choice)) = named else { return Err(self.wrong(key, value, &allowed)) };
            if !all.contains(&choice) {
                all.push(choice);
            }
        }
        Ok(all)
    }

    /// Values of an axis that say themselves what their text means.
    pub fn parsed<T: FromStr + PartialEq>(&self, key: &str, allowed: &str) -> Result<Vec<T>, JobError> {
        let mut all = Vec::new();
        for value in self.axis(key, allowed)? {
            let parsed = value.as_str().and_then(|text| text.parse().ok());
            let choice = parsed.ok_or_else(|| self.wrong(key, value, allowed))?;
            if !all.contains(&choice) {
                all.push(choice);
            }
        }
        Ok(all)
    }

    /// One value that says itself what its text means; a number is its own text.
    pub fn parsed_or_number<T: FromStr>(&self, key: &str, allowed: &str) -> Result<Option<T>, JobError> {
        let Some(value) = self.table.get(key) else { return Ok(None) };
        let text = match value {
            Value::String(text) => Some(text.clone()),
            Value::Float(_) | Value::Integer(_) => Some(value.to_string()),
            _ => None,
        };
        let parsed = text.and_then(|text| text.parse().ok());
        parsed.map(Some).ok_or_else(|| self.wrong(key, value, allowed))
    }

    pub fn truth(&self, key: &str) -> Result<Option<bool>, JobError> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Boolean(truth)) => Ok(Some(*truth)),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    /// A number of bytes, or a text with a unit.
    pub fn bytes(&self, key: &str) -> Result<Option<u64>, JobError> {
        const ALLOWED: &str = "bytes as a whole number, or a size such as \"80GiB\", \"512MiB\" or \"40GB\"";
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) if *n > 0 => Ok(Some(*n as u64)),
            Some(value @ Value::String(text)) => {
                parse_bytes(text).map(Some).ok_or_else(|| self.wrong(key, value, ALLOWED))
            }
            Some(other) => Err(self.wrong(key, other, ALLOWED)),
        }
    }
}

fn sorted<T: Ord>(values: impl Iterator<Item = Result<T, JobError>>) -> Result<Vec<T>, JobError> {
    let mut all = values.collect::<Result<Vec<T>, _>>()?;
    all.sort();
    all.dedup();
    Ok(all)
}

fn show(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Bytes from a text such as `80GiB` or `1048576`: powers of 1024 with an `i`, of 1000 without.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    };
    let bytes = number.parse::<f64>().ok()? * factor as f64;
    (1.0..1e18).contains(&bytes).then_some(bytes.round() as u64)
}

/// Insertions, deletions and replacements from one word to another (Levenshtein 1966).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}
