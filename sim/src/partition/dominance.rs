//! Which triples are worth having: those that no other one beats on every network.
//!
//! A triple is dominated when another one cuts every state at least as finely and takes no more time whatever the network, for
//! any number of microbatches. "Whatever the network" is a family of price lists for the collectives: rings, collectives in two
//! levels, and switches that reduce on the way, over links of any ratio. A collective over all ranks is always the cheapest of
//! its flat and its two-level form, and a reduction whose outcome contains another's is one way to get that. PaRO (section 3.2)
//! finds by argument what these prices compute: optimizer states cut less finely than gradients or parameters buy nothing.

use super::StatePartition;
use super::exchange::{Exchange, Kind, Scope};

/// Ranks and groups at which prices are compared.
const SHAPES: [(f64, f64); 3] = [(4.0, 2.0), (32.0, 8.0), (1024.0, 8.0)];
/// Bandwidth inside a group over that between groups.
const RATIOS: [f64; 4] = [1.0, 4.0, 25.0, 1000.0];
/// Microbatches of a step.
const ACCUMULATION: [f64; 2] = [2.0, 64.0];

/// A network as a price list: time units per state.
#[derive(Debug, Clone, Copy)]
struct Prices {
    ranks: f64,
    group: f64,
    /// Bandwidth inside a group; between groups it is 1.
    inside: f64,
    /// Switches reduce: an all-reduce moves each byte once instead of twice.
    switches: bool,
    /// Shares of the network adapters: one per rank, or one for the whole group.
    shared: bool,
    /// Time of starting a collective.
    start: f64,
}

impl Prices {
    fn passes(&self, kind: Kind) -> f64 {
        if kind == Kind::AllReduce && !self.switches { 2.0 } else { 1.0 }
    }

    fn inside(&self, kind: Kind) -> f64 {
        self.start + self.passes(kind) * (self.group - 1.0) / self.group / self.inside
    }

    fn across(&self, kind: Kind) -> f64 {
        let groups = self.ranks / self.group;
        let carried = if self.shared { 1.0 } else { 1.0 / self.group };
        self.start + self.passes(kind) * carried * (groups - 1.0) / groups
    }

    /// Over all ranks: flat over the slower link, or in two levels.
    fn world(&self, kind: Kind) -> f64 {
        let flat = self.start + self.passes(kind) * (self.ranks - 1.0) / self.ranks;
        let levels = match kind {
            Kind::AllReduce => {
                self.inside(Kind::ReduceScatter) + self.across(Kind::AllReduce) + self.inside(Kind::AllGather)
            }
            // The two levels run at once where they use different links, so that they start together.
            _ => self.inside(kind) + self.across(kind) - self.start,
        };
        flat.min(levels)
    }

    fn of(&self, exchange: Exchange) -> f64 {
        match exchange.scope {
            Scope::Group => self.inside(exchange.kind),
            Scope::Across => self.across(exchange.kind),
            Scope::World => self.world(exchange.kind),
        }
    }

    /// From accumulated gradients to those of the optimizer. A reduction over all ranks gives every part as well.
    fn gradient_sync(&self, triple: &StatePartition) -> f64 {
        let direct: f64 = triple.gradient_sync().into_iter().map(|e| self.of(e)).sum();
        let whole = StatePartition { optimizer: super::Level::Whole, ..*triple };
        let by_discarding: f64 = whole.gradient_sync().into_iter().map(|e| self.of(e)).sum();
        direct.min(by_discarding)
    }

    fn parameter_sync(&self, triple: &StatePartition) -> f64 {
        let price = triple.parameter_sync().map_or(0.0, |e| self.of(e));
        // Gathering across groups is part of gathering over all ranks.
        price.min(self.world(Kind::AllGather))
    }

    fn step(&self, triple: &StatePartition, microbatches: f64) -> f64 {
        let gather = triple.parameter_gather().map_or(0.0, |e| self.of(e));
        let reduce = triple.gradient_reduction().map_or(0.0, |e| self.of(e));
        microbatches * (2.0 * gather + reduce) + self.gradient_sync(triple) + self.parameter_sync(triple)
    }

    fn family() -> impl Iterator<Item = Prices> {
        let each = |(ranks, group)| {
            RATIOS.into_iter().flat_map(move |inside| {
                [(false, false), (false, true), (true, false), (true, true)].into_iter().flat_map(
                    move |(switches, shared)| {
                        [0.0, 0.1].map(|start| Prices { ranks, group, inside, switches, shared, start })
                    },
                )
            })
        };
        SHAPES.into_iter().flat_map(each)
    }
}

/// A finer triple that takes no more time on any network, if there is one; the finest of them.
pub fn dominator(triple: &StatePartition) -> Option<StatePartition> {
    let never_slower = |other: &StatePartition| {
        Prices::family().all(|prices| {
            ACCUMULATION.iter().all(|s| prices.step(other, *s) <= prices.step(triple, *s) * (1.0 + 1e-12))
        })
    };
    StatePartition::all().filter(|other| other.is_finer_than(triple)).filter(never_slower).last()
}

/// Whether no other triple takes less memory and no more time on any network.
pub fn effective(triple: &StatePartition) -> bool {
    dominator(triple).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PaRO, section 3.2: 14 of the 27 are effective.
    #[test]
    fn the_effective_set_is_the_published_one() {
        let found: Vec<String> = StatePartition::all().filter(effective).map(|t| t.letters()).collect();
        let published =
            ["NNN", "NNI", "NNG", "NII", "NIG", "NGG", "INI", "ING", "III", "IIG", "IGG", "GNG", "GIG", "GGG"];
        assert_eq!(found, published);
    }

    /// Every dominated triple holds optimizer states less finely than gradients or parameters; its dominator does not.
    #[test]
    fn what_dominates() {
        for triple in StatePartition::all() {
            let coarse = triple.optimizer < triple.gradients || triple.optimizer < triple.parameters;
            let by = dominator(&triple);
            assert_eq!(by.is_some(), coarse, "{}", triple.letters());
            if let Some(by) = by {
                assert!(effective(&by), "{} by {}", triple.letters(), by.letters());
            }
        }
        let of = |t: &str| t.parse::<StatePartition>().unwrap();
        for (dominated, by) in [("NIN", "NII"), ("NGI", "NGG"), ("IIN", "III"), ("IGI", "IGG"), ("GGN", "GGG")] {
            assert_eq!(dominator(&of(dominated)), Some(of(by)), "{dominated}");
        }
    }
}
