//! Hosts that run ahead of a device: ops are only queued, and wait for each other on the device. Whatever order the device takes, results
//! are those of a host that waits for every op; and every wait is needed or free: without it there is a race, or nothing changes.

use paceline_exec::{Dataset, ExecError, RunReport, RunSettings, Silent, run};
use paceline_kernels::{
    Block, Call, CpuDevice, Device, KernelError, LateDevice, Moment, Pace, Queue, Queues, Sequence, View,
};
use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::Job;
use paceline_sim::program::Program;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

fn program(layout: &str) -> Program {
    let lines = format!("seq = 8\nglobal_batch = 8\nmicro_batch = 1\n{layout}\n");
    let job = Job::from_table(lines.parse().unwrap(), "job.toml").unwrap();
    Configuration::of_job(&job).unwrap().program(&job, Machine { devices: 1, flops_per_second: None }).unwrap()
}

fn train(program: &Program, steps: u64, device: &dyn Device, run_ahead: bool) -> Result<RunReport, ExecError> {
    let mut settings = RunSettings::new(steps, 1e-2);
    (settings.capture_gradients, settings.poison, settings.run_ahead) = (true, true, run_ahead);
    settings.graphs = true;
    run(program, device, &settings, &Dataset::bundled(), &mut Silent)
}

fn assert_same_bits(what: &str, found: &RunReport, expected: &RunReport) {
    let losses = |report: &RunReport| -> Vec<(u64, u64)> {
        report.steps.iter().map(|step| (step.loss.to_bits(), step.gradient_norm.to_bits())).collect()
    };
    assert_eq!(losses(found), losses(expected), "{what}");
    assert!(found.gradients == expected.gradients, "{what}: gradients differ");
    assert!(found.parameters == expected.parameters, "{what}: parameters differ");
    assert_eq!(found.memory, expected.memory, "{what}");
}

#[test]
fn whatever_order_the_device_takes_the_bits_are_the_same() {
    let llama = "model = 'demo-1m'";
    let gpt = "model = 'demo-gpt-1m'";
    for (model, layout) in [
        (llama, "pp = 2\nschedule = '1f1b'"),
        (llama, "pp = 4\nschedule = 'zb-h2'\nrecompute = 'full'"),
        (gpt, "pp = 2\nschedule = 'zb-v'"),
        (gpt, "pp = 2\ndp = 2\nschedule = 'interleaved'\nstates = 'zero1'"),
        (llama, "pp = 2\nschedule = 'dualpipe'"),
        (llama, "dp = 4\ngroup_size = 2\nstates = 'GIG'\ncollectives = 'ring'"),
        (gpt, "dp = 4\nstates = 'zero3'\nprecision = 'bf16-fp32-gradients'\ncollectives = 'tree'"),
        (llama, "pp = 2\nschedule = 'zb-h1'\nbarrier_every = 2"),
    ] {
        let lines = format!("{model}\n{layout}");
        let program = program(&lines);
        let expected = train(&program, 5, &CpuDevice::new(), true).unwrap();
        for pace in [Pace::Late, Pace::Drawn(7), Pace::Drawn(8)] {
            let found = train(&program, 5, &LateDevice::new(pace), true).unwrap();
            assert_same_bits(&format!("{lines} {pace:?}"), &found, &expected);
            // Times are the device's: nothing ends before it begins, and what waits begins after what it waits for.
            for (rank, events) in program.ranks.iter().zip(found.trace.ranks.iter().map(|rank| &rank.events)) {
                for (op, event) in rank.ops.iter().zip(events) {
                    assert!(event.ready <= event.start && event.start <= event.end, "{lines}: {event:?}");
                    for wait in &op.waits {
                        assert!(events[wait.index()].end <= event.start, "{lines}: {event:?} waits for {wait}");
                    }
                }
            }
            assert!(!found.kernels.is_empty() && found.kernels.iter().all(|kernel| kernel.count > 0));
        }
        assert_same_bits(&lines, &train(&program, 5, &LateDevice::new(Pace::Late), false).unwrap(), &expected);
    }
}

/// A device on which one wait of a queue for a moment is lost.
struct Forgetful {
    inner: LateDevice,
    waits: Arc<AtomicU32>,
    lost: u32,
}

struct ForgetfulQueue {
    inner: Box<dyn Queue>,
    waits: Arc<AtomicU32>,
    lost: u32,
}

macro_rules! forward {
    () => {
        fn name(&self) -> String {
            self.inner.name()
        }

        fn is_host(&self) -> bool {
            false
        }

        fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
            self.inner.allocate(bytes)
        }

        unsafe fn run(&self, call: &Call) -> Result<(), KernelError> {
            // SAFETY: the caller's promise.
            unsafe { self.inner.run(call) }
        }

        fn complete(&self) -> Result<(), KernelError> {
            self.inner.complete()
        }

        unsafe fn upload(&self, from: &[u8], to: View) -> Result<(), KernelError> {
            // SAFETY: the caller's promise.
            unsafe { self.inner.upload(from, to) }
        }

        unsafe fn download(&self, from: View, to: &mut [u8]) -> Result<(), KernelError> {
            // SAFETY: the caller's promise.
            unsafe { self.inner.download(from, to) }
        }
    };
}

impl Device for Forgetful {
    forward!();

    fn queues(&self) -> Option<&dyn Queues> {
        Some(self)
    }
}

impl Device for ForgetfulQueue {
    forward!();
}

impl Queue for ForgetfulQueue {
    fn set(&self, moment: Moment) -> Result<(), KernelError> {
        self.inner.set(moment)
    }

    fn follow(&self, moment: Moment) -> Result<(), KernelError> {
        match self.waits.fetch_add(1, Ordering::Relaxed) {
            number if number == self.lost => Ok(()),
            _ => self.inner.follow(moment),
        }
    }

    fn keep(&self) -> Result<(), KernelError> {
        self.inner.keep()
    }

    fn kept(&self) -> Result<Sequence, KernelError> {
        self.inner.kept()
    }

    unsafe fn replay(&self, sequence: Sequence) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.replay(sequence) }
    }
}

impl Queues for Forgetful {
    fn open(&self) -> Result<Box<dyn Queue>, KernelError> {
        Ok(Box::new(ForgetfulQueue { inner: self.inner.open()?, waits: self.waits.clone(), lost: self.lost }))
    }

    fn moment(&self) -> Result<Moment, KernelError> {
        self.inner.moment()
    }

    fn release(&self, moments: &[Moment]) {
        self.inner.release(moments);
    }

    fn reach(&self, moment: Moment) -> Result<(), KernelError> {
        self.inner.reach(moment)
    }

    fn seconds(&self, from: Moment, to: Moment) -> Result<f64, KernelError> {
        self.inner.seconds(from, to)
    }
}

/// Loses one wait after the other: the run ends with a race, or with the same bits because another wait orders the same work.
#[test]
fn a_wait_that_is_lost_is_a_race_or_was_not_needed() {
    for layout in [
        "model = 'demo-1m'\nglobal_batch = 3\npp = 2\nschedule = '1f1b'",
        "model = 'demo-gpt-1m'\nglobal_batch = 2\ndp = 2\nstates = 'zero1'",
    ] {
        let layout = format!("seq = 4\nmicro_batch = 1\n{layout}\n");
        let job = Job::from_table(layout.parse().unwrap(), "job.toml").unwrap();
        let program =
            Configuration::of_job(&job).unwrap().program(&job, Machine { devices: 1, flops_per_second: None }).unwrap();
        let run = |lost: u32| {
            let waits = Arc::new(AtomicU32::new(0));
            let device = Forgetful { inner: LateDevice::new(Pace::Drawn(u64::from(lost))), waits: waits.clone(), lost };
            (train(&program, 1, &device, true), waits.load(Ordering::Relaxed))
        };
        let (expected, waits) = run(u32::MAX);
        let expected = expected.unwrap();
        let mut races = 0;
        let tried = (0..waits).step_by((waits / 60).max(1) as usize);
        for lost in tried.clone() {
            match run(lost).0 {
                Ok(found) => assert_same_bits(&format!("{layout} without wait {lost}"), &found, &expected),
                Err(error) => {
                    let said = error.to_string();
                    assert!(said.contains("may still be working on"), "{layout} without wait {lost}: {said}");
                    races += 1;
                }
            }
        }
        println!("{waits} waits; {races} of {} that were lost are races", tried.len());
        assert!(races >= 10, "{layout}: {races} races");
    }
}
