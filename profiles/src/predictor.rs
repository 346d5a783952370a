//! Times from a profile: exact where measured, interpolated elsewhere, and each with its provenance.
//!
//! A time is looked up in layers, each correcting the one below:
//! 1. a curve per operator through the points measured while the usual number of devices worked;
//! 2. the ratio to that when another number of devices works (they share caches and bandwidth);
//! 3. what other work of the machine adds at the mean ([`Overhead::Interference`]): a row is a median, a step is a sum;
//! 4. the ratio of times inside real runs to times measured alone, by the context of the run as far as the operator meets it.
//!
//! A layer that has the very shape answers for it; a ratio is the median over the shapes that both layers have, of
//! the operator, else of its family, else of all. A shape that runs of other contexts showed keeps its own ratio, moved as
//! the contexts differ for those shapes of its operator that runs of both showed: other shapes would tell shapes apart, not contexts.
//! Where there are none, its operator's ratio in the context that is asked about answers, else its own as it is. Ratios of runs on
//! another number of devices are moved as these numbers differ in runs of one context that had both.

mod curves;
mod ratios;

use crate::class::Class;
use crate::context::{Conditions, Context};
use crate::curve::Sample;
use crate::estimate::{Estimate, Provenance};
use crate::fit::{Line, Point};
use crate::kernel_key::{DType, Family, KernelKey, KernelOp};
use crate::profile::{Profile, ProfileError};
use crate::row::{CollectiveRound, Overhead, Row, Source, Subject};
use crate::work::Work;
use curves::{Curve, Group, Place, Shape, left_out};
pub use curves::{Foretold, Residual};
pub(crate) use ratios::median;
use ratios::{Ratios, nearest};
use std::collections::{BTreeMap, HashMap};

/// Foretells times from a profile.
#[derive(Debug, Clone)]
pub struct Predictor {
    /// Seconds by subject, devices at work and source, of what was timed by itself.
    exact: HashMap<(Subject, u32, Source), f64>,
    /// Seconds inside runs.
    traced: HashMap<(Subject, u32, Option<Context>), f64>,
    /// How many devices worked when the curves were measured.
    usual_busy: u32,
    curves: BTreeMap<Group, Curve>,
    /// Over all kernels of a family, and over all.
    families: BTreeMap<Family, Line>,
    general: Line,
    /// By number of devices at work: ratio to the curves.
    busy: BTreeMap<u32, Ratios>,
    /// By number of devices at work: the mean of many calls over their median, less one.
    interference: BTreeMap<u32, f64>,
    /// Ratios of times in runs to times measured alone: by context and devices at work, and over all runs.
    runs: BTreeMap<Run, Ratios>,
    all_runs: Ratios,
    /// By subject and run.
    shapes: HashMap<Subject, Vec<(Run, f64)>>,
    /// From one kind of run to another, by class: median ratio of the shapes that both showed.
    between: BTreeMap<(Run, Run, Class), f64>,
    residuals: BTreeMap<Class, Vec<Sample>>,
    /// Narrow calls over 32-bit ones; `None` where none was measured.
    narrow: Option<Ratios>,
    /// Narrow operands are widened before a kernel computes.
    widens: bool,
}

/// Points of a class from which a curve is drawn, where its 32-bit twin can be asked instead.
const ENOUGH: usize = 4;

/// A kind of run: its context, and how many devices worked.
type Run = (Option<Context>, u32);

impl Predictor {
    /// Fits the curves of a profile. Of rows that measure the same, the last counts.
    ///
    /// # Errors
    /// When the profile has no kernel at all, or a fit fails.
    pub fn new(profile: &Profile) -> Result<Predictor, ProfileError> {
        let (mut exact, mut traced) = (HashMap::new(), HashMap::new());
        for row in &profile.rows {
            let subject = row.subject.clone();
            match row.source {
                Source::Trace => {
                    let context = row.context.map(|context| context.met_by(Class::of(&subject)));
                    traced.insert((subject, row.busy_devices, context), row.median_seconds)
                }
                source => exact.insert((subject, row.busy_devices, source), row.median_seconds),
            };
        }
        let usual_busy = usual_busy(&profile.rows);
        let disturbed = |row: &&Row| row.subject == Subject::Overhead(Overhead::Interference);
        let interference = profile.rows.iter().filter(disturbed).map(|row| (row.busy_devices, row.median_seconds));

        // The points of each curve: what was measured as usual; where a class has nothing of that kind, what there is.
        let mut samples: BTreeMap<Class, BTreeMap<Subject, (f64, Source)>> = BTreeMap::new();
        let rank = |row: &Row| (row.source == Source::Trace, row.busy_devices != usual_busy, row.source);
        let best = |class: Class| profile.rows.iter().filter(|r| Class::of(&r.subject) == class).map(rank).min();
        let mut levels: BTreeMap<Class, Option<(bool, bool)>> = BTreeMap::new();
        for row in &profile.rows {
            let class = Class::of(&row.subject);
            let level =
                *levels.entry(class).or_insert_with(|| best(class).map(|(traced, unusual, _)| (traced, unusual)));
            let (traced, unusual, source) = rank(row);
            if level != Some((traced, unusual)) {
                continue;
            }
            let known = samples.entry(class).or_default();
            match known.get(&row.subject) {
                Some(&(_, before)) if before < source => {}
                _ => {
                    known.insert(row.subject.clone(), (row.median_seconds, source));
                }
            }
        }

        let mut groups: BTreeMap<Group, (Class, Vec<Sample>, bool)> = BTreeMap::new();
        let mut residuals: BTreeMap<Class, Vec<Sample>> = BTreeMap::new();
        for (&class, subjects) in &samples {
            for (subject, &(seconds, source)) in subjects {
                let Some((group, place)) = Place::of(subject) else { continue };
                let sample = place.sample(seconds);
                residuals.entry(class).or_default().push(sample.clone());
                let entry = groups.entry(group).or_insert_with(|| (class, Vec::new(), false));
                entry.1.push(sample);
                entry.2 |= source == Source::Datasheet;
            }
        }
        let mut families: BTreeMap<Family, Vec<Point>> = BTreeMap::new();
        let mut all = Vec::new();
        let mut curves = BTreeMap::new();
        for (group, (class, samples, datasheet)) in groups {
            if let Group::Kernel(op, _) = group {
                families.entry(op.family()).or_default().extend(samples.iter().map(|s| s.point));
                all.extend(samples.iter().map(|s| s.point));
            }
            curves.insert(group, Curve { shape: Shape::new(class, &samples)?, datasheet });
        }
        if all.is_empty() {
            let machine = profile.machine.clone();
            return Err(ProfileError::Incomplete { machine, missing: "kernel times" });
        }
        let families = families
            .into_iter()
            .map(|(family, points)| Ok((family, Line::fit(&format!("{family:?}"), &points)?)))
            .collect::<Result<_, ProfileError>>()?;
        let mut predictor = Predictor {
            exact,
            traced,
            usual_busy,
            curves,
            families,
            general: Line::fit("all kernels", &all)?,
            busy: BTreeMap::new(),
            interference: interference.collect(),
            runs: BTreeMap::new(),
            all_runs: Ratios::default(),
            shapes: HashMap::new(),
            between: BTreeMap::new(),
            residuals,
            narrow: None,
            widens: profile.machine.is_host(),
        };
        predictor.learn_contention(&profile.rows);
        predictor.learn_formats(&profile.rows);
        predictor.learn_runs();
        Ok(predictor)
    }

    /// The second layer: ratios of times with another number of devices at work.
    fn learn_contention(&mut self, rows: &[Row]) {
        let mut pairs: BTreeMap<u32, Vec<(Class, f64)>> = BTreeMap::new();
        for row in rows.iter().filter(|row| row.source != Source::Trace && row.busy_devices != self.usual_busy) {
            if let Some(below) = self.curve(&row.subject).filter(|below| below.seconds > 0.0) {
                let ratio = row.median_seconds / below.seconds;
                pairs.entry(row.busy_devices).or_default().push((Class::of(&row.subject), ratio));
            }
        }
        self.busy = pairs.into_iter().map(|(busy, pairs)| (busy, Ratios::new(pairs.into_iter()))).collect();
        self.busy.entry(self.usual_busy).or_default();
    }

    /// What other number formats cost, from calls that were measured beside 32-bit ones of their class.
    fn learn_formats(&mut self, rows: &[Row]) {
        let ratio = |row: &Row| match &row.subject {
            Subject::Kernel(key) if key.dtype != DType::F32 && row.source != Source::Trace => {
                let wide = Subject::Kernel(key.clone().with(DType::F32));
                let wide = self.measured_median(&wide, row.busy_devices).filter(|wide| wide.seconds > 0.0)?;
                Some((Class::of(&row.subject), row.median_seconds / wide.seconds))
            }
            _ => None,
        };
        let ratios: Vec<(Class, f64)> = rows.iter().filter_map(ratio).collect();
        self.narrow = (!ratios.is_empty()).then(|| Ratios::new(ratios.into_iter()));
    }

    /// The last layer: ratios of times inside runs.
    fn learn_runs(&mut self) {
        let mut pairs: BTreeMap<Run, Vec<(Class, f64)>> = BTreeMap::new();
        let mut shapes: HashMap<Subject, Vec<(Run, f64)>> = HashMap::new();
        for ((subject, busy, context), seconds) in &self.traced {
            if let Some(below) = self.measured(subject, *busy).filter(|below| below.seconds > 0.0) {
                let (run, ratio) = ((*context, *busy), seconds / below.seconds);
                pairs.entry(run).or_default().push((Class::of(subject), ratio));
                shapes.entry(subject.clone()).or_default().push((run, ratio));
            }
        }
        let mut between: BTreeMap<(Run, Run, Class), Vec<f64>> = BTreeMap::new();
        for (subject, runs) in &shapes {
            for &(from, before) in runs {
                for &(to, after) in runs.iter().filter(|(to, _)| *to != from) {
                    between.entry((from, to, Class::of(subject))).or_default().push(after / before);
                }
            }
        }
        self.all_runs = Ratios::new(pairs.values().flatten().copied());
        self.runs = pairs.into_iter().map(|(run, pairs)| (run, Ratios::new(pairs.into_iter()))).collect();
        self.between = between.into_iter().filter_map(|(of, ratios)| Some((of, median(ratios)?))).collect();
        self.shapes = shapes;
    }

    /// The runs most like those that are asked about: of the same context with about as many devices at work, else, of those
    /// that compute the same again, the ones like them in most other respects. `None` where no run was like that.
    fn like(&self, class: Class, under: Conditions) -> Option<Run> {
        let wanted = under.context?;
        let likeness = |run: &Run| {
            let context = run.0.filter(|context| context.recomputed == wanted.recomputed)?;
            Some((context.likeness(wanted), context == wanted || self.runs[run].classes.contains_key(&class)))
        };
        let most = self.runs.keys().filter_map(likeness).max()?;
        let fitting = self.runs.keys().filter(|run| likeness(run) == Some(most));
        nearest(&fitting.map(|&run| (run.1, run)).collect(), under.busy).copied()
    }

    /// What runs of some kind say of other numbers of devices at work: how the ratios of a class differ between these numbers in
    /// other contexts, where runs of one context showed both. A measurement that something disturbed while so many devices worked is made up
    /// for by that.
    fn between_counts(&self, from: u32, to: u32, class: Class) -> f64 {
        if from == to {
            return 1.0;
        }
        let meets = |context: Option<Context>| context.is_none_or(|context| context.met_by(class) == context);
        let runs = self.runs.iter().filter(|((context, busy), _)| *busy == from && meets(*context));
        let changes = runs.filter_map(|((context, _), before)| {
            let after = self.runs.get(&(*context, to))?;
            after.over(before, class)
        });
        median(changes.collect()).unwrap_or(1.0)
    }

    /// How much longer a class lasts in the runs most like those that are asked about than alone; the median over all runs where none is
    /// like them.
    fn class_inside(&self, class: Class, under: Conditions) -> f64 {
        let of_run = |run: Run| Some(self.runs.get(&run)?.of(class) * self.between_counts(run.1, under.busy, class));
        self.like(class, under).and_then(of_run).unwrap_or_else(|| self.all_runs.of(class))
    }

    /// How much longer a subject lasts in runs than alone, where runs showed anything.
    fn inside(&self, subject: &Subject, under: Conditions) -> f64 {
        let class = Class::of(subject);
        let like = self.like(class, under);
        let counts = like.map_or(1.0, |(_, busy)| self.between_counts(busy, under.busy, class));
        let moved = |&(run, ratio): &(Run, f64)| match like {
            Some(like) if like != run => Some(ratio * self.between.get(&(run, like, class))?),
            _ => Some(ratio),
        };
        let runs = || self.shapes.get(subject).into_iter().flatten();
        let of_class = || like.and_then(|run| self.runs.get(&run)?.classes.get(&class).copied());
        let own = median(runs().filter_map(moved).collect()).or_else(of_class).map(|ratio| ratio * counts);
        let unmoved = || median(runs().map(|(_, ratio)| *ratio).collect());
        own.or_else(unmoved).unwrap_or_else(|| self.all_runs.of(class))
    }

    /// Time of a kernel. Where little of its number format was measured, it is as much longer than the same call on 32-bit
    /// operands as the calls that were measured in both formats; a product with something fused into it that was not measured is the
    /// sum of its parts.
    pub fn kernel(&self, key: &KernelKey, under: impl Into<Conditions>) -> Estimate {
        let asked = under.into();
        let class = Class::Kernel(key.op, key.dtype);
        let under = asked.met_by(class);
        let found = self.narrow_by_wide(key, under).or_else(|| self.seconds(&Subject::Kernel(key.clone()), under));
        if let Some(found) = found {
            return found;
        }
        let parts = key.parts();
        let seconds = if parts.is_empty() {
            let Work { flops, bytes } = Work::of(key);
            let line = self.families.get(&key.op.family()).unwrap_or(&self.general);
            let contention = nearest(&self.busy, under.busy).map_or(1.0, |ratios| ratios.of(class));
            let inside = self.class_inside(class, under);
            line.seconds(flops, bytes) * contention * self.interference(under.busy) * inside
        } else {
            parts.iter().map(|part| self.kernel(part, asked).seconds).sum()
        };
        Estimate { seconds, provenance: Provenance::Assumed }
    }

    /// A narrow call by its 32-bit twin, unless it was measured or there are enough others of its class for a curve.
    fn narrow_by_wide(&self, key: &KernelKey, under: Conditions) -> Option<Estimate> {
        if key.dtype == DType::F32 {
            return None;
        }
        let subject = Subject::Kernel(key.clone());
        let class = Class::of(&subject);
        let points = self.residuals.get(&class).map_or(0, Vec::len);
        let measured = || self.exact.keys().any(|(of, ..)| *of == subject);
        if self.shapes.contains_key(&subject) || points >= ENOUGH || (points > 0 && measured()) {
            return None;
        }
        let wide = self.seconds(&Subject::Kernel(key.clone().with(DType::F32)), under)?;
        let seconds = match &self.narrow {
            Some(ratios) => wide.seconds * ratios.of(class),
            None if self.widens => wide.seconds + self.moving(widened_bytes(key)).seconds,
            // A device that computes on narrow numbers does so at a pace that only it can tell.
            None => wide.seconds,
        };
        let same = self.narrow.as_ref().is_some_and(|ratios| ratios.classes.contains_key(&class));
        let provenance = if same { wide.provenance.max(Provenance::Fitted) } else { Provenance::Assumed };
        Some(Estimate { seconds, provenance })
    }

    /// Time of the copy of a message by its receiver.
    pub fn transfer(&self, bytes: u64, under: impl Into<Conditions>) -> Estimate {
        if bytes == 0 {
            return Estimate { seconds: 0.0, provenance: Provenance::Measured };
        }
        let found = self.seconds(&Subject::Transfer { bytes }, under.into());
        found.unwrap_or_else(|| self.moving(2.0 * bytes as f64))
    }

    /// Time of one member's part of a round of a collective over an array of `bytes`.
    pub fn collective(
        &self,
        round: CollectiveRound,
        members: u32,
        bytes: u64,
        under: impl Into<Conditions>,
    ) -> Estimate {
        if bytes == 0 || members <= 1 {
            return Estimate { seconds: 0.0, provenance: Provenance::Measured };
        }
        let subject = Subject::Collective { round, members, bytes };
        let found = self.seconds(&subject, under.into());
        found.unwrap_or_else(|| self.moving(Place::of(&subject).map_or(0.0, |(_, place)| place.bytes)))
    }

    /// A cost of the executor; nothing (assumed) where the profile does not know it.
    pub fn overhead(&self, overhead: Overhead, under: impl Into<Conditions>) -> Estimate {
        let subject = Subject::Overhead(overhead);
        let Conditions { busy, context } = under.into().met_by(Class::of(&subject));
        let inside = |like: &dyn Fn(Option<Context>) -> bool| {
            let times = self.traced.iter().filter(|((of, _, run), _)| *of == subject && like(*run));
            nearest(&times.map(|((_, busy, _), &seconds)| (*busy, seconds)).collect(), busy).copied()
        };
        let stated = |source: Source| {
            let times = self.exact.iter().filter(|((of, _, s), _)| *of == subject && *s == source);
            nearest(&times.map(|((_, busy, _), &seconds)| (*busy, seconds)).collect(), busy).copied()
        };
        // What is measured alone of ops on a shared device has the pauses between them in it, so they are added only where runs like the
        // one that is asked about told both apart.
        let paused = matches!(overhead, Overhead::Turn | Overhead::Wake);
        let alike = |run: Option<Context>| match (run, context) {
            (Some(run), Some(context)) => !paused || run.shared == context.shared,
            _ => true,
        };
        let of_runs = inside(&|run| run == context).or_else(|| inside(&alike)).map(|s| (s, Source::Trace));
        let of_source = |source| stated(source).map(|seconds| (seconds, source));
        match of_runs.or_else(|| of_source(Source::Measured)).or_else(|| of_source(Source::Datasheet)) {
            Some((seconds, source)) => Estimate { seconds, provenance: provenance(source) },
            None => match overhead {
                // What sharing adds is unknown then; what is common is not.
                Overhead::SharedOp => self.overhead(Overhead::Op, busy),
                Overhead::SharedMessage => self.overhead(Overhead::Message, busy),
                // Profiles of before it was measured by itself.
                Overhead::Round => self.overhead(Overhead::Message, busy),
                _ => Estimate { seconds: 0.0, provenance: Provenance::Assumed },
            },
        }
    }

    /// Moving bytes as kernels do.
    fn moving(&self, bytes: f64) -> Estimate {
        let line = self.families.get(&Family::Memory).unwrap_or(&self.general);
        Estimate { seconds: line.seconds(0.0, bytes), provenance: Provenance::Assumed }
    }

    /// Through all layers; `None` where nothing of the class was measured.
    pub fn seconds(&self, subject: &Subject, under: impl Into<Conditions>) -> Option<Estimate> {
        let under = under.into().met_by(Class::of(subject));
        if let Some(&seconds) = self.traced.get(&(subject.clone(), under.busy, under.context)) {
            return Some(Estimate { seconds, provenance: Provenance::Measured });
        }
        let below = self.measured(subject, under.busy)?;
        Some(if self.runs.is_empty() { below } else { below.scaled(self.inside(subject, under)) })
    }

    /// Measured alone, or as interpolated from that, at the mean over many calls.
    fn measured(&self, subject: &Subject, busy: u32) -> Option<Estimate> {
        let median = self.measured_median(subject, busy)?;
        Some(Estimate { seconds: median.seconds * self.interference(busy), ..median })
    }

    /// The mean of many calls over their median, while so many devices work.
    fn interference(&self, busy: u32) -> f64 {
        1.0 + nearest(&self.interference, busy).copied().unwrap_or(0.0)
    }

    /// The median of many calls.
    fn measured_median(&self, subject: &Subject, busy: u32) -> Option<Estimate> {
        for source in [Source::Measured, Source::Datasheet] {
            if let Some(&seconds) = self.exact.get(&(subject.clone(), busy, source)) {
                return Some(Estimate { seconds, provenance: provenance(source) });
            }
        }
        let usual = self.curve(subject)?;
        // One count only means that devices do not share, or that nobody looked.
        if busy == self.usual_busy || self.busy.len() == 1 {
            return Some(usual);
        }
        nearest(&self.busy, busy).map(|ratios| usual.scaled(ratios.of(Class::of(subject))))
    }

    /// The lowest layer: the usual number of devices at work.
    fn curve(&self, subject: &Subject) -> Option<Estimate> {
        for source in [Source::Measured, Source::Datasheet] {
            if let Some(&seconds) = self.exact.get(&(subject.clone(), self.usual_busy, source)) {
                return Some(Estimate { seconds, provenance: provenance(source) });
            }
        }
        let (group, place) = Place::of(subject)?;
        let curve = match group {
            Group::Collective(round, members) => {
                let others: BTreeMap<u32, &Curve> = self
                    .curves
                    .iter()
                    .filter_map(|(group, curve)| match group {
                        Group::Collective(r, n) if *r == round => Some((*n, curve)),
                        _ => None,
                    })
                    .collect();
                nearest(&others, members).copied()
            }
            group => self.curves.get(&group),
        }?;
        let provenance = if curve.datasheet { Provenance::Datasheet } else { Provenance::Fitted };
        Some(Estimate { seconds: curve.shape.seconds(&place), provenance })
    }

    /// How well each class is known.
    ///
    /// # Errors
    /// When a fit fails.
    pub fn residuals(&self) -> Result<Vec<Residual>, ProfileError> {
        let mut residuals = Vec::with_capacity(self.residuals.len());
        for (&class, samples) in &self.residuals {
            let line = Shape::new(class, samples)?.line();
            let errors: Vec<f64> = left_out(class, samples)?.iter().map(|point| point.error().abs()).collect();
            residuals.push(Residual {
                class,
                points: samples.len(),
                line,
                worst_error: errors.iter().copied().reduce(f64::max),
                median_error: median(errors),
            });
        }
        Ok(residuals)
    }

    /// Every measured point of a class beside what the others foretell for it; none where there is a single point.
    ///
    /// # Errors
    /// When a fit fails.
    pub fn foretold(&self, class: Class) -> Result<Vec<Foretold>, ProfileError> {
        self.residuals.get(&class).map_or(Ok(Vec::new()), |samples| left_out(class, samples))
    }
}

/// Bytes that a host moves to widen the operands of a narrow call and to round its results: two are read and four written for each
/// value, or the other way round.
fn widened_bytes(key: &KernelKey) -> f64 {
    let values = match key.op {
        // Done on the numbers as they are.
        KernelOp::Zero | KernelOp::Copy | KernelOp::Cast => 0.0,
        // Gradients alone are narrow.
        KernelOp::AdamW | KernelOp::AdamWAhead => key.dims.first().map_or(0.0, |&len| f64::from(len)),
        _ => Work::of(key).bytes / key.dtype.bytes() as f64,
    };
    6.0 * values
}

fn provenance(source: Source) -> Provenance {
    match source {
        Source::Measured | Source::Trace => Provenance::Measured,
        Source::Datasheet => Provenance::Datasheet,
    }
}

/// The number of devices at work in most of the measured kernel rows (of equally many, the larger number).
fn usual_busy(rows: &[Row]) -> u32 {
    let mut counts: BTreeMap<(bool, u32), usize> = BTreeMap::new();
    for row in rows.iter().filter(|row| matches!(row.subject, Subject::Kernel(_))) {
        *counts.entry((row.source != Source::Trace, row.busy_devices)).or_default() += 1;
    }
    let measured = counts.keys().any(|&(measured, _)| measured);
    counts
        .into_iter()
        .filter(|&((m, _), _)| m == measured)
        .max_by_key(|&((_, busy), count)| (count, busy))
        .map_or(1, |((_, busy), _)| busy)
}

#[cfg(test)]
mod tests;
