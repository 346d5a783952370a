//! Given times: for schedules under study, where stages have times and nothing else.

use super::{CostModel, Exchange, Round};
use crate::program::{Group, Op, OpKind, Pass, Program};
use crate::units::{Nanos, RankId};
use smallvec::{SmallVec, smallvec};

/// Times of one microbatch in one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StageTimes {
    /// F, and R.
    pub forward: Nanos,
    /// B.
    pub input: Nanos,
    /// W. `BW` takes B and W together.
    pub weight: Nanos,
}

/// Costs that are given instead of measured. Communication takes wire time and no device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FixedTimes {
    /// By stage; a stage beyond the end has the times of the last one.
    pub stages: Vec<StageTimes>,
    /// Every message.
    pub transfer: Nanos,
    /// Every collective.
    pub collective: Nanos,
    /// Every unit's optimizer step, and as much again to validate one that was taken ahead.
    pub optimizer: Nanos,
}

impl FixedTimes {
    /// The same times in all stages, and nothing else takes time.
    pub fn uniform(forward: Nanos, input: Nanos, weight: Nanos, transfer: Nanos) -> FixedTimes {
        let stages = vec![StageTimes { forward, input, weight }];
        FixedTimes { stages, transfer, ..FixedTimes::default() }
    }
}

impl CostModel for FixedTimes {
    /// A pass over some units of a stage takes their share of its time; the shares of all units add up exactly.
    fn compute(&self, program: &Program, _: RankId, op: &Op) -> Nanos {
        match op.kind {
            OpKind::Compute { pass, stage, first, end, .. } => {
                let last = self.stages.last().copied().unwrap_or_default();
                let times = self.stages.get(stage.index()).copied().unwrap_or(last);
                let whole = match pass {
                    Pass::F | Pass::R => times.forward,
                    Pass::B => times.input,
                    Pass::W => times.weight,
                    Pass::BW => times.input + times.weight,
                };
                let units = program.stages.get(stage.index()).map_or(1, |stage| stage.units.len().max(1)) as u128;
                let until = |unit: u16| (u128::from(whole.0) * u128::from(unit).min(units) / units) as u64;
                Nanos(until(end.max(first)) - until(first))
            }
            OpKind::Optimizer { .. } | OpKind::OptimizerAhead { .. } | OpKind::Validate { .. } => self.optimizer,
            _ => Nanos::ZERO,
        }
    }

    fn transfer(&self, _: &Program, _: RankId, _: RankId, _: u64) -> Round {
        Round { wire: self.transfer, ..Round::default() }
    }

    fn collective(&self, _: &Program, _: Exchange, _: &Group) -> SmallVec<[Round; 2]> {
        smallvec![Round { wire: self.collective, ..Round::default() }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{PROGRAM_FORMAT, Stage, Stream, Unit, Workload};
    use crate::units::{MicrobatchId, StageId};

    fn program(units: usize) -> Program {
        Program {
            format: PROGRAM_FORMAT.into(),
            workload: Workload::Abstract,
            microbatches: 1,
            devices: vec![],
            groups: vec![],
            stages: vec![Stage { units: vec![Unit { layers: vec![] }; units] }; 3],
            ranks: vec![],
        }
    }

    fn op(pass: Pass, stage: u16, first: u16, end: u16) -> Op {
        let kind = OpKind::Compute { pass, stage: StageId(stage), microbatch: MicrobatchId(0), first, end };
        Op::bare(Stream::COMPUTE, kind, &[])
    }

    #[test]
    fn passes_take_their_times() {
        let times = FixedTimes::uniform(Nanos(10), Nanos(20), Nanos(7), Nanos(3));
        let program = program(1);
        let cost = |pass, stage| times.compute(&program, RankId(0), &op(pass, stage, 0, 1)).0;
        let costs: Vec<u64> = [Pass::F, Pass::B, Pass::W, Pass::BW, Pass::R].map(|pass| cost(pass, 2)).to_vec();
        assert_eq!(costs, [10, 20, 7, 27, 10]);
        assert_eq!(times.transfer(&program, RankId(0), RankId(1), 99), Round { wire: Nanos(3), ..Round::default() });
        let mut uneven = times.clone();
        uneven.stages.push(StageTimes { forward: Nanos(11), ..StageTimes::default() });
        let cost = |stage| uneven.compute(&program, RankId(0), &op(Pass::F, stage, 0, 1)).0;
        assert_eq!([cost(0), cost(1), cost(2)], [10, 11, 11]);
    }

    #[test]
    fn units_share_the_time_of_their_stage_without_rest() {
        let times = FixedTimes::uniform(Nanos(10), Nanos(0), Nanos(0), Nanos(0));
        let program = program(3);
        let cost = |first, end| times.compute(&program, RankId(0), &op(Pass::F, 0, first, end)).0;
        assert_eq!([cost(0, 1), cost(1, 2), cost(2, 3)], [3, 3, 4]);
        assert_eq!(cost(0, 3), 10);
    }
}
