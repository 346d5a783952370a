//! The guideline for plans of this machine: ranks of one process, in groups that a rehearsed link may join.

use super::guideline::Guideline;
use super::table::GuidelineRank;
use crate::configuration::{Configuration, ConfigurationError};
use crate::job::Job;
use paceline_sim::model::trained_elements;
use paceline_sim::program::Precision;

/// The guideline for a configuration of a job, with the seconds of `compute` that were predicted for it. `inside` is the bandwidth at which ranks
/// copy from each other, in bytes per second; that between groups is the job's link, or the same.
///
/// # Errors
/// When the configuration is none of the job.
pub fn rank_here(
    job: &Job,
    configuration: &Configuration,
    compute: f64,
    inside: f64,
) -> Result<GuidelineRank, ConfigurationError> {
    let parameters = job.model.parameters() as f64;
    let trained =
        if job.trainable.is_full() { 1.0 } else { trained_elements(&job.model, &job.trainable) as f64 / parameters };
    let sharing = configuration.sharing;
    let group = sharing.group_size.unwrap_or(configuration.dp).clamp(1, configuration.dp.max(1));
    let across = sharing.link.map_or(inside, |link| link.bytes_per_second as f64);
    let parameters = parameters / f64::from(configuration.pp);
    let guideline = Guideline {
        ranks: f64::from(configuration.dp),
        group: f64::from(group),
        // Without groups there is nothing between them.
        across: if group < configuration.dp { across.min(inside) } else { inside },
        inside,
        parameters,
        trainable: parameters * trained,
        microbatches: f64::from(configuration.microbatches(job)?),
        wire: if job.precision == Precision::Fp32 { 4.0 } else { 2.0 },
        compute,
    };
    Ok(guideline.rank(&configuration.states))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: four ranks in groups of two, half of the parameters trained, a link of a hundredth of the bandwidth inside.
    #[test]
    fn a_plan_of_this_machine() {
        let job = |text: &str| Job::from_table(text.parse().unwrap(), "job").unwrap();
        let plain = "model = 'demo-1m'\nseq = 64\nglobal_batch = 16\ndp = 4\nmicro_batch = 2\ntrainable = 0.5\n";
        let slow = job(&format!("{plain}states = 'NII'\ngroup_size = 2\nlink_bandwidth = '1MB'\n"));
        let configuration = Configuration::of_job(&slow).unwrap();
        let found = rank_here(&slow, &configuration, 1e-3, 1e8).unwrap();
        let bytes = 4.0 * trained_elements(&slow.model, &slow.trainable) as f64;
        // Two microbatches, each reduced in groups of two; an all-reduce of half over the two groups; a gather in each.
        let expected = 2.0 * bytes * 0.5 / 1e8 + 2.0 * (bytes / 2.0) * 0.5 / 1e6 + bytes * 0.5 / 1e8;
        assert!((found.communication / expected - 1.0).abs() < 1e-12, "{found:?} {expected}");
        assert_eq!(found.seconds, found.communication.max(1e-3));
        assert!((found.indicator + found.seconds.ln()).abs() < 1e-12);
        // Without groups every exchange is inside.
        let whole = job(&format!("{plain}states = 'NGG'\nlink_bandwidth = '1MB'\nprecision = 'bf16'\n"));
        let configuration = Configuration::of_job(&whole).unwrap();
        let found = rank_here(&whole, &configuration, 1e-3, 1e8).unwrap();
        assert!((found.communication / (3.0 * (bytes / 2.0) * 0.75 / 1e8) - 1.0).abs() < 1e-12, "{found:?}");
    }
}
