//! Correcting a profile by what real runs showed: times inside a run differ from times measured alone, because caches
//! hold what the last kernel left.

use crate::class::Class;
use crate::context::{Conditions, Context};
use crate::predictor::{Predictor, median};
use crate::profile::{Profile, ProfileError};
use crate::row::{Row, Source, Subject};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A corrected profile, and what the correction did.
#[derive(Debug, Clone, PartialEq)]
pub struct Recalibration {
    /// The profile with the runs' rows in it.
    pub profile: Profile,
    /// By class, in order of time in the runs.
    pub classes: Vec<Correction>,
}

/// How far the profile was off for one class, over all its calls in the runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Correction {
    /// Which.
    pub class: Class,
    /// Calls in the runs.
    pub count: u64,
    /// Their time in the runs.
    pub seconds: f64,
    /// Their time as foretold by the profile before.
    pub before_seconds: f64,
    /// And after.
    pub after_seconds: f64,
}

impl Correction {
    /// Relative error of the profile before.
    pub fn error_before(&self) -> f64 {
        self.before_seconds / self.seconds - 1.0
    }

    /// And after.
    pub fn error_after(&self) -> f64 {
        self.after_seconds / self.seconds - 1.0
    }
}

/// Adds the times that runs showed (`traced`: one row for each subject and run, with its number of calls) to a profile.
/// They answer for their own shapes in runs of their context; other shapes and contexts are scaled by what these show. What runs showed
/// before of the same subject is replaced. A profile without measurements of its own becomes one of these rows.
///
/// # Errors
/// When a fit fails, or neither the profile nor the runs know a kernel time.
pub fn recalibrate(profile: &Profile, traced: &[Row]) -> Result<Recalibration, ProfileError> {
    let mut merged: BTreeMap<Place, Vec<&Row>> = BTreeMap::new();
    for row in traced {
        merged.entry(place(row)).or_default().push(row);
    }
    let mut corrected = profile.clone();
    corrected.rows.retain(|row| row.source != Source::Trace || !merged.contains_key(&place(row)));
    for rows in merged.values() {
        corrected.rows.extend(pooled(rows));
    }
    let after = Predictor::new(&corrected)?;
    // A profile that knows nothing foretells nothing.
    let before = match Predictor::new(profile) {
        Err(ProfileError::Incomplete { .. }) => None,
        other => Some(other?),
    };
    let mut classes: BTreeMap<Class, Correction> = BTreeMap::new();
    for row in traced {
        let class = Class::of(&row.subject);
        let calls = row.repetitions as f64;
        let foretold = |predictor: &Predictor| estimate(predictor, row) * calls;
        let entry = classes.entry(class).or_insert(Correction {
            class,
            count: 0,
            seconds: 0.0,
            before_seconds: 0.0,
            after_seconds: 0.0,
        });
        entry.count += row.repetitions;
        entry.seconds += row.median_seconds * calls;
        entry.before_seconds += before.as_ref().map_or(0.0, foretold);
        entry.after_seconds += foretold(&after);
    }
    let mut classes: Vec<Correction> = classes.into_values().collect();
    classes.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(Recalibration { profile: corrected, classes })
}

/// What a row of a run answers for.
type Place<'r> = (&'r Subject, u32, Option<Context>);

fn place(row: &Row) -> Place<'_> {
    (&row.subject, row.busy_devices, row.context)
}

fn estimate(predictor: &Predictor, row: &Row) -> f64 {
    let under = Conditions { busy: row.busy_devices, context: row.context };
    match &row.subject {
        Subject::Kernel(key) => predictor.kernel(key, under),
        &Subject::Transfer { bytes } => predictor.transfer(bytes, under),
        &Subject::Collective { round, members, bytes } => predictor.collective(round, members, bytes, under),
        &Subject::Overhead(overhead) => predictor.overhead(overhead, under),
    }
    .seconds
}

/// A run whose time for a subject is further than this from the median run was disturbed, not different: the caches that
/// one configuration finds warm and another does not make a smaller difference to most kernels.
const DISTURBED: f64 = 1.5;

/// One row for all runs: the mean, each run weighing as its calls, without runs that were disturbed.
fn pooled(rows: &[&Row]) -> Option<Row> {
    let middle = median(rows.iter().map(|row| row.median_seconds).collect())?;
    let usual = |row: &&&Row| (1.0 / DISTURBED..DISTURBED).contains(&(row.median_seconds / middle));
    let mut kept: Vec<&Row> = rows.iter().filter(usual).copied().collect();
    if kept.is_empty() {
        // Two runs that far apart: the machine was slower in one of them.
        kept.extend(rows.iter().min_by(|a, b| a.median_seconds.total_cmp(&b.median_seconds)));
    }
    let last = *kept.last()?;
    let repetitions: u64 = kept.iter().map(|row| row.repetitions).sum();
    let mean = |value: fn(&Row) -> f64| {
        kept.iter().map(|row| value(row) * row.repetitions as f64).sum::<f64>() / repetitions as f64
    };
    Some(Row {
        median_seconds: mean(|row| row.median_seconds),
        spread_seconds: mean(|row| row.spread_seconds),
        repetitions,
        source: Source::Trace,
        ..last.clone()
    })
}

#[cfg(test)]
mod tests;
