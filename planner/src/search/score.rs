//! Exact scores: a candidate is lowered and simulated, and its memory walked.

use super::bound::LayerBound;
use super::{Score, Scored};
use crate::configuration::{Configuration, Machine};
use crate::job::Job;
use crate::lower::Form;
use crate::prediction::{Costs, predict};
use paceline_sim::memory::walk;
use paceline_sim::program::Program;
use paceline_sim::units::RankId;

/// Scores by simulation of the full program.
pub struct Simulation<'a> {
    /// The job.
    pub job: &'a Job,
    /// Where it runs.
    pub machine: Machine,
    /// What ops take.
    pub costs: &'a dyn Costs,
    /// Cuts the layers.
    pub cuts: &'a LayerBound<'a>,
}

impl Simulation<'_> {
    /// The candidate with its layers cut and its passes measured, and its program.
    fn lowered(&self, candidate: &Configuration) -> Result<(Configuration, Program), String> {
        let mut candidate = candidate.clone();
        if candidate.stage_layers.is_empty() {
            candidate.stage_layers = self.cuts.cut(&candidate)?;
        }
        let candidate = candidate.measured(self.job, self.machine, self.costs).map_err(|error| error.to_string())?;
        let program = candidate.program_unchecked(self.job, self.machine, Form::Full);
        Ok((candidate, program.map_err(|error| error.to_string())?))
    }
}

impl Score for Simulation<'_> {
    fn bytes(&self, candidate: &Configuration) -> Result<u64, String> {
        let (_, program) = self.lowered(candidate)?;
        let peaks = (0..program.ranks.len() as u32).map(|rank| walk(&program, RankId(rank)).peak_bytes);
        Ok(peaks.max().unwrap_or(0))
    }

    fn predict(&self, candidate: &Configuration) -> Result<Scored, String> {
        let (configuration, program) = self.lowered(candidate)?;
        let (prediction, _) =
            predict(&program, self.costs, self.machine, self.job.memory_limit).map_err(|error| error.to_string())?;
        Ok(Scored { configuration, prediction, guideline: None })
    }
}
