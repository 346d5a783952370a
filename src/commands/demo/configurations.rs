//! What the demonstration runs beside the best plan: one, two and four ranks; data parallel, pipeline, both; schedules with and
//! without split backwards; with and without recomputation. Those that teach are none of those that test.

use paceline_planner::configuration::Configuration;
use paceline_planner::lower::Sharing;
use paceline_sim::partition::StatePartition;
use paceline_sim::program::Recompute::{self, Full, None as Kept, Selective};

fn configuration(
    dp: u32,
    pp: u32,
    schedule: &str,
    chunks: u32,
    micro_batch: u32,
    recompute: Recompute,
    states: StatePartition,
) -> Configuration {
    Configuration {
        dp,
        pp,
        chunks,
        schedule: schedule.into(),
        micro_batch,
        recompute,
        states,
        sharing: Sharing::default(),
        stage_layers: Vec::new(),
        measured: None,
        collectives: Vec::new(),
    }
}

const WHOLE: StatePartition = StatePartition::NONE;
const ZERO1: StatePartition = StatePartition::ZERO1;

/// Their runs correct the profile.
pub fn teachers() -> Vec<Configuration> {
    vec![
        configuration(1, 1, "1f1b", 1, 4, Kept, WHOLE),
        configuration(2, 1, "1f1b", 1, 2, Kept, ZERO1),
        configuration(2, 1, "1f1b", 1, 1, Full, WHOLE),
        configuration(1, 2, "zb-h1", 1, 2, Kept, WHOLE),
        configuration(1, 2, "interleaved", 2, 2, Full, WHOLE),
        configuration(2, 2, "gpipe", 1, 1, Kept, WHOLE),
        configuration(1, 4, "1f1b", 1, 2, Kept, WHOLE),
    ]
}

/// Their runs are held against the predictions.
pub fn tested() -> Vec<Configuration> {
    vec![
        configuration(1, 1, "1f1b", 1, 1, Kept, WHOLE),
        configuration(1, 1, "1f1b", 1, 2, Full, WHOLE),
        configuration(2, 1, "1f1b", 1, 1, Kept, WHOLE),
        configuration(2, 1, "1f1b", 1, 2, Selective, ZERO1),
        configuration(1, 2, "gpipe", 1, 1, Kept, WHOLE),
        configuration(1, 2, "1f1b", 1, 1, Kept, WHOLE),
        configuration(1, 2, "1f1b", 1, 1, Full, WHOLE),
        configuration(1, 2, "interleaved", 2, 1, Kept, WHOLE),
        configuration(1, 2, "v-half", 2, 1, Kept, WHOLE),
        configuration(1, 4, "gpipe", 1, 1, Full, WHOLE),
        configuration(1, 4, "interleaved", 2, 1, Kept, WHOLE),
        configuration(2, 2, "1f1b", 1, 1, Kept, ZERO1),
        configuration(4, 1, "1f1b", 1, 1, Kept, WHOLE),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn tests_are_unseen_and_cover_what_they_must() {
        let teachers: HashSet<Configuration> = teachers().into_iter().collect();
        let tested = tested();
        assert!(tested.iter().all(|configuration| !teachers.contains(configuration)));
        for ranks in [1, 2, 4] {
            assert!(tested.iter().any(|c| c.ranks() == ranks));
        }
        for schedule in ["gpipe", "1f1b", "interleaved"] {
            assert!(tested.iter().any(|c| c.schedule == schedule && c.pp > 1));
        }
        assert!(tested.iter().any(|c| c.dp > 1 && c.pp > 1) && tested.iter().any(|c| c.dp > 1 && c.pp == 1));
        assert!(tested.iter().any(|c| c.recompute == Full) && tested.len() >= 8);
    }
}
