//! Ratios between layers of times: medians where many shapes were measured, the nearest where a number of devices was not.

use crate::class::Class;
use crate::kernel_key::Family;
use std::collections::BTreeMap;

/// Ratios between two layers: medians by class, by family, and over all.
#[derive(Debug, Clone, Default)]
pub(super) struct Ratios {
    pub(super) classes: BTreeMap<Class, f64>,
    families: BTreeMap<Family, f64>,
    all: Option<f64>,
}

impl Ratios {
    pub(super) fn new(pairs: impl Iterator<Item = (Class, f64)>) -> Ratios {
        let mut classes: BTreeMap<Class, Vec<f64>> = BTreeMap::new();
        let mut families: BTreeMap<Family, Vec<f64>> = BTreeMap::new();
        let mut all = Vec::new();
        for (class, ratio) in pairs {
            classes.entry(class).or_default().push(ratio);
            families.entry(class.family()).or_default().push(ratio);
            all.push(ratio);
        }
        Ratios {
            classes: classes.into_iter().filter_map(|(class, ratios)| Some((class, median(ratios)?))).collect(),
            families: families.into_iter().filter_map(|(family, ratios)| Some((family, median(ratios)?))).collect(),
            all: median(all),
        }
    }

    pub(super) fn of(&self, class: Class) -> f64 {
        let found = self.classes.get(&class).or_else(|| self.families.get(&class.family())).copied();
        found.or(self.all).unwrap_or(1.0)
    }

    /// How these ratios compare with others, for a class if both know it, else for its family, else over all.
    pub(super) fn over(&self, others: &Ratios, class: Class) -> Option<f64> {
        let of_class = || Some(self.classes.get(&class)? / others.classes.get(&class)?);
        let of_family = || Some(self.families.get(&class.family())? / others.families.get(&class.family())?);
        of_class().or_else(of_family).or_else(|| Some(self.all? / others.all?))
    }
}

/// The middle value; of an even number, the mean of the two.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// The entry whose number is nearest to `wanted` in ratio; of two equally near, the smaller.
pub(super) fn nearest<T>(entries: &BTreeMap<u32, T>, wanted: u32) -> Option<&T> {
    let distance = |&n: &u32| (f64::from(n.max(1)) / f64::from(wanted.max(1))).ln().abs();
    entries.iter().min_by(|(a, _), (b, _)| distance(a).total_cmp(&distance(b))).map(|(_, entry)| entry)
}
