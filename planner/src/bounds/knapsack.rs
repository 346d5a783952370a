//! The most work that activations held at one time can stand for: a small knapsack, exact where it stays small.

/// Activations of one kind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    /// Memory of one.
    pub size: f64,
    /// Work of one.
    pub work: f64,
    /// How many there can be.
    pub most: u32,
}

/// Branches looked at before the fractional relaxation has to do (it is a bound as well).
const MOST_BRANCHES: u32 = 4096;

/// The most work of whole items that fit into `room` together; of all items when there is no limit.
pub(super) fn most_work(items: &[Item], room: Option<f64>) -> f64 {
    let all = |items: &[Item]| items.iter().map(|i| i.work * f64::from(i.most)).sum::<f64>();
    let Some(room) = room else { return all(items) };
    // Sums of sizes carry rounding; an item more than fits would only weaken the bound.
    let room = room * (1.0 + 1e-9);
    let (weightless, mut items): (Vec<Item>, Vec<Item>) = items.iter().partition(|i| i.size <= 0.0);
    items.sort_by(|a, b| (b.work * a.size).total_cmp(&(a.work * b.size)));
    let mut best = 0.0;
    let mut branches = 0;
    let exact = branch(&items, room, 0.0, &mut best, &mut branches);
    all(&weightless) + if exact { best } else { fractional(&items, room) }
}

/// Takes from the densest kind on, allowing a fraction of the last one.
fn fractional(items: &[Item], mut room: f64) -> f64 {
    let mut work = 0.0;
    for item in items {
        let count = (room / item.size).clamp(0.0, f64::from(item.most));
        work += count * item.work;
        room -= count * item.size;
    }
    work
}

/// Depth first over the counts of each kind, most first, cut off by the fractional bound. False when there are too many branches.
fn branch(items: &[Item], room: f64, taken: f64, best: &mut f64, branches: &mut u32) -> bool {
    *branches += 1;
    if *branches > MOST_BRANCHES {
        return false;
    }
    *best = best.max(taken);
    let Some((item, rest)) = items.split_first() else { return true };
    let most = (room / item.size).floor().min(f64::from(item.most)) as u32;
    for count in (0..=most).rev() {
        let left = room - f64::from(count) * item.size;
        let with = taken + f64::from(count) * item.work;
        if with + fractional(rest, left) <= *best * (1.0 + 1e-12) && with <= *best {
            break;
        }
        if !branch(rest, left, with, best, branches) {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_items_only() {
        let items = [Item { size: 3.0, work: 4.0, most: 10 }, Item { size: 2.0, work: 2.5, most: 10 }];
        // Two of the first and one of the second fill 8 of 8.
        assert_eq!(most_work(&items, Some(8.0)), 10.5);
        assert_eq!(most_work(&items, Some(1.0)), 0.0);
        assert_eq!(most_work(&items, None), 65.0);
        assert_eq!(most_work(&[Item { size: 1.0, work: 1.0, most: 2 }], Some(9.0)), 2.0);
    }
}
