//! By which rounds the collectives of a program are done, where a job leaves that open: for each kind, group and size the
//! algorithm that takes least by the costs of the machine. The choice is data, so that a plan makes the same program wherever it goes.

use crate::prediction::Costs;
use paceline_sim::cost::{CostError, Exchange};
use paceline_sim::program::{Algorithm, Collective, Element, OpKind, Payload, Program};
use paceline_sim::units::{GroupId, Nanos};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a job says about the rounds of collectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Collectives {
    /// The fastest for each size and group.
    Auto,
    /// Everybody reads from everybody.
    Direct,
    /// A ring, where several fast groups take part.
    Ring,
    /// Trees, where several fast groups take part.
    Tree,
    /// Within groups and across them, where several fast groups take part.
    #[default]
    TwoLevel,
}

impl From<Algorithm> for Collectives {
    fn from(algorithm: Algorithm) -> Collectives {
        match algorithm {
            Algorithm::Direct => Collectives::Direct,
            Algorithm::Ring => Collectives::Ring,
            Algorithm::Tree => Collectives::Tree,
            Algorithm::TwoLevel => Collectives::TwoLevel,
        }
    }
}

impl Collectives {
    /// The algorithm over several fast groups; a choice begins with the direct one.
    pub(super) fn over_groups(self) -> Algorithm {
        match self {
            Collectives::Auto | Collectives::Direct => Algorithm::Direct,
            Collectives::Ring => Algorithm::Ring,
            Collectives::Tree => Algorithm::Tree,
            Collectives::TwoLevel => Algorithm::TwoLevel,
        }
    }
}

/// The algorithm of the collectives of one kind, size and shape of group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChosenAlgorithm {
    /// What they do.
    pub collective: Collective,
    /// Members.
    pub members: u32,
    /// Fast groups over which the members are spread.
    pub groups: u32,
    /// The whole array.
    pub bytes: u64,
    /// Fastest.
    pub algorithm: Algorithm,
}

/// Kind, members, fast groups, bytes.
type Key = (Collective, u32, u32, u64);

/// The collectives that carry states, each with what its choice depends on.
fn open(program: &Program) -> impl Iterator<Item = (Key, GroupId, Exchange)> + '_ {
    program.ranks.iter().flat_map(|rank| &rank.ops).zip(elements(program)).filter_map(|(op, element)| match op.kind {
        OpKind::Collective {
            collective,
            group,
            bytes,
            arrangement,
            payload: Payload::Gradients { .. } | Payload::Parameters { .. },
            ..
        } => {
            let held = &program.groups[group.index()];
            let exchange = Exchange { collective, bytes, element: element?, arrangement };
            Some(((collective, held.size, held.fast_groups(), bytes), group, exchange))
        }
        _ => None,
    })
}

/// By op of all ranks: what the buffer of a collective holds.
fn elements(program: &Program) -> impl Iterator<Item = Option<Element>> + '_ {
    program.ranks.iter().flat_map(|rank| {
        rank.ops.iter().map(|op| match op.kind {
            OpKind::Collective { buffer, .. } => Some(rank.buffers[buffer.index()].element),
            _ => None,
        })
    })
}

const ALL: [Algorithm; 4] = [Algorithm::Direct, Algorithm::Ring, Algorithm::Tree, Algorithm::TwoLevel];

/// The fastest algorithm of every collective that carries states, by what each takes alone; of equals the one with fewest rounds.
///
/// # Errors
/// When the program has no costs.
pub fn fastest(program: &Program, costs: &dyn Costs) -> Result<Vec<ChosenAlgorithm>, CostError> {
    let mut best: BTreeMap<Key, (Nanos, usize, Algorithm)> = BTreeMap::new();
    for algorithm in ALL {
        let mut tried = program.clone();
        for op in tried.ranks.iter_mut().flat_map(|rank| &mut rank.ops) {
            if let OpKind::Collective { arrangement, payload, .. } = &mut op.kind
                && matches!(payload, Payload::Gradients { .. } | Payload::Parameters { .. })
            {
                arrangement.algorithm = algorithm;
            }
        }
        let (model, _) = costs.of(&tried)?;
        let mut seen: Vec<Key> = Vec::new();
        for (key, group, exchange) in open(&tried) {
            if seen.contains(&key) {
                continue;
            }
            seen.push(key);
            let rounds = model.collective(&tried, exchange, &tried.groups[group.index()]);
            let time = rounds.iter().fold(Nanos::ZERO, |sum, round| sum + round.link + round.wire + round.work);
            let this = (time, rounds.len(), algorithm);
            best.entry(key)
                .and_modify(|best| *best = if (this.0, this.1) < (best.0, best.1) { this } else { *best })
                .or_insert(this);
        }
    }
    let chosen = |((collective, members, groups, bytes), (_, _, algorithm))| ChosenAlgorithm {
        collective,
        members,
        groups,
        bytes,
        algorithm,
    };
    Ok(best.into_iter().map(chosen).collect())
}

/// Gives the collectives of a program the algorithms that were chosen for them.
pub fn choose(program: &mut Program, chosen: &[ChosenAlgorithm]) {
    let by_key: BTreeMap<Key, Algorithm> =
        chosen.iter().map(|c| ((c.collective, c.members, c.groups, c.bytes), c.algorithm)).collect();
    let shapes: Vec<(u32, u32)> = program.groups.iter().map(|group| (group.size, group.fast_groups())).collect();
    for op in program.ranks.iter_mut().flat_map(|rank| &mut rank.ops) {
        let OpKind::Collective { collective, group, bytes, payload, arrangement, .. } = &mut op.kind else { continue };
        let (members, groups) = shapes[group.index()];
        if let Payload::Gradients { .. } | Payload::Parameters { .. } = payload
            && let Some(&algorithm) = by_key.get(&(*collective, members, groups, *bytes))
        {
            arrangement.algorithm = algorithm;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::configuration::{Configuration, Machine};
    use crate::job::Job;
    use paceline_profiles::Shares;
    use paceline_sim::cost::{CostModel, Round};
    use paceline_sim::program::{Group, Op, Step, check, rounds};
    use paceline_sim::units::RankId;
    use smallvec::SmallVec;

    /// Each round takes `hand_over`, and what crosses between groups the link's time.
    #[derive(Debug, Clone, Copy)]
    struct Slow {
        hand_over: Nanos,
    }

    impl CostModel for Slow {
        fn compute(&self, _: &Program, _: RankId, _: &Op) -> Nanos {
            Nanos(1000)
        }

        fn transfer(&self, _: &Program, _: RankId, _: RankId, _: u64) -> Round {
            Round::default()
        }

        fn collective(&self, _: &Program, exchange: Exchange, group: &Group) -> SmallVec<[Round; 2]> {
            let (members, groups) = (group.size, group.fast_groups());
            let part = exchange.arrangement.part_of(exchange.bytes, members, 4);
            let link = |step: Step| {
                let link = group.crossing.and_then(|crossing| crossing.link);
                link.map_or(Nanos::ZERO, |link| link.busy(step.crossing(members, groups, part)))
            };
            let steps = rounds(exchange.collective, exchange.arrangement.algorithm, members, groups);
            steps.into_iter().map(|step| Round { link: link(step), wire: self.hand_over, ..Round::default() }).collect()
        }
    }

    impl Costs for Slow {
        fn of(&self, _: &Program) -> Result<(Box<dyn CostModel>, Shares), CostError> {
            Ok((Box::new(*self), Shares::default()))
        }
    }

    const JOB: &str = "model = 'demo-1m'\nseq = 8\nglobal_batch = 4\ndp = 4\nstates = 'GGG'\ngroup_size = 2\ncollectives = 'auto'\n\
        link_bandwidth = '100MB'\n";

    /// Over all four ranks a part crosses four times directly, three times on the ring, twice in two levels; where hand-overs cost
    /// more than that, one round is best.
    #[test]
    fn sizes_and_hand_overs_decide() {
        let job = Job::from_table(JOB.parse().unwrap(), "test").unwrap();
        let machine = Machine { devices: 2, flops_per_second: None };
        let open = Configuration::of_job(&job).unwrap();
        let algorithms = |hand_over| -> Vec<Algorithm> {
            let decided = open.clone().measured(&job, machine, &Slow { hand_over }).unwrap();
            let program = decided.program(&job, machine).unwrap();
            check(&program).unwrap();
            // The same again from the decision alone.
            assert_eq!(decided.program(&job, machine).unwrap(), program);
            super::open(&program).map(|(_, _, exchange)| exchange.arrangement.algorithm).collect()
        };
        let fast = algorithms(Nanos(10));
        assert!(!fast.is_empty() && fast.iter().all(|&a| a == Algorithm::TwoLevel), "{fast:?}");
        assert!(algorithms(Nanos(1_000_000_000)).iter().all(|&a| a == Algorithm::Direct));
        // In between, the large arrays of the blocks go in two levels and those of the ends directly.
        let some = algorithms(Nanos(1_000_000));
        assert!(some.contains(&Algorithm::TwoLevel) && some.contains(&Algorithm::Direct), "{some:?}");
    }
}
