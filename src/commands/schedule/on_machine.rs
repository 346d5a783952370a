//! Stage times, activation bytes and the room for activations of a job on this machine, so that schedules are compared for the model
//! that will run, its uneven stages included.

use super::Arguments;
use super::times::Sizes;
use crate::failure::Failure;
use crate::job_source::JobSource;
use crate::local::Local;
use crate::screen::Screen;
use crate::size::parse_bytes;
use paceline_planner::configuration::{Configuration, Machine, RECOMPUTING};
use paceline_planner::job::Job;
use paceline_planner::schedules::{Request, Schedule};
use paceline_planner::search::bound::LayerBound;
use std::path::Path;

/// A job, and the machine that prices it.
pub struct OnMachine {
    job: Job,
    local: Local,
}

impl OnMachine {
    /// Reads the job and opens the machine. `-p` and `--memory-limit` replace the job's keys.
    pub fn open(screen: &Screen, path: &Path, arguments: &Arguments) -> Result<OnMachine, Failure> {
        let source = JobSource { job: Some(path.to_owned()), ..JobSource::default() };
        if source.cluster()?.is_some() {
            return Err(Failure::bad_input(format!(
                "--job {}: it names a cluster, but stage times come from this machine's profile (cluster = \"local\"); give times with --f, --b, --w, or predict schedules with `paceline predict`",
                path.display()
            )));
        }
        let mut job = source.read()?;
        match (arguments.devices, job.pp.as_slice()) {
            (Some(devices), _) => job.pp = vec![devices],
            (None, [_]) => {}
            (None, [] | [_, _, ..]) => job.pp = vec![super::DEVICES],
        }
        if let Some(text) = &arguments.memory_limit {
            let bytes =
                parse_bytes(text).map_err(|error| Failure::bad_input(format!("--memory-limit {text}: {error}")))?;
            job.memory_limit = Some(bytes);
        }
        Ok(OnMachine { job, local: Local::open(screen, arguments.profile.as_deref())? })
    }

    /// For people.
    pub fn headline(&self) -> String {
        format!("{}, {} tokens per step, {}", self.job.model.name, self.job.tokens_per_step(), self.local.origin)
    }

    /// What is asked of a schedule: the job's devices and microbatches.
    pub fn request(&self, schedule: &Schedule, chunks: Option<u32>) -> Result<Request, Failure> {
        let configuration = self.configuration(schedule, chunks)?;
        let microbatches = configuration.microbatches(&self.job).map_err(Failure::bad_input)?;
        Ok(Request { chunks, ..Request::new(configuration.pp, microbatches) })
    }

    fn configuration(&self, schedule: &Schedule, chunks: Option<u32>) -> Result<Configuration, Failure> {
        if schedule.name == RECOMPUTING {
            return Err(Failure::bad_input(format!(
                "{RECOMPUTING}: its recomputation is priced by `paceline predict --schedule {RECOMPUTING}`; leave it out with --job, or set recompute = \"full\" for all schedules"
            )));
        }
        let mut job = self.job.clone();
        job.schedule = vec![schedule.name.to_string()];
        job.chunks = chunks.into_iter().collect();
        Configuration::of_job(&job).map_err(Failure::bad_input)
    }

    /// Times and sizes of the stages of a schedule, the layers cut so that the busiest device does as little as can be.
    pub fn sizes(&self, schedule: &Schedule, chunks: Option<u32>) -> Result<Sizes, Failure> {
        let mut configuration = self.configuration(schedule, chunks)?;
        let machine: Machine = self.local.machine.for_job(&self.job);
        let costs = &self.local.predictor;
        let cut = LayerBound::new(&self.job, machine, costs).cut(&configuration);
        configuration.stage_layers = cut.map_err(|why| Failure::bad_input(format!("{}: {why}", schedule.name)))?;
        let measured = configuration.measure(&self.job, machine, costs).map_err(Failure::bad_input)?;
        Ok(Sizes { times: measured.times(), memory: measured.memory(), limit: measured.limit() })
    }
}
