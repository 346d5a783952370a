//! Ranks that do not fit into the memory of their device are refused before anything runs: which rank, which classes, how much.

use paceline_exec::{Dataset, RunSettings, Silent, run};
use paceline_kernels::{Block, Call, CpuDevice, Device, KernelError, View};
use paceline_planner::configuration::{Configuration, Machine};
use paceline_planner::job::Job;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A CPU that says how much memory it has.
struct Small {
    cpu: CpuDevice,
    free: u64,
    taken: AtomicUsize,
}

impl Device for Small {
    fn name(&self) -> String {
        "small".into()
    }

    fn memory(&self) -> Result<Option<(u64, u64)>, KernelError> {
        Ok(Some((self.free, 1 << 30)))
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        self.cpu.allocate(bytes)
    }

    unsafe fn run(&self, call: &Call) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.cpu.run(call) }
    }

    unsafe fn upload(&self, from: &[u8], to: View) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.cpu.upload(from, to) }
    }

    unsafe fn download(&self, from: View, to: &mut [u8]) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.cpu.download(from, to) }
    }
}

#[test]
fn the_first_rank_that_does_not_fit_is_named_with_its_classes() {
    let lines = "model = 'demo-1m'\nseq = 16\nglobal_batch = 4\nmicro_batch = 1\npp = 2\nschedule = '1f1b'\n";
    let job = Job::from_table(lines.parse().unwrap(), "job.toml").unwrap();
    let configuration = Configuration::of_job(&job).unwrap();
    let program = configuration.program(&job, Machine { devices: 1, flops_per_second: None }).unwrap();
    let attempt = |free: u64| {
        let device = Small { cpu: CpuDevice::new(), free, taken: AtomicUsize::new(0) };
        let report = run(&program, &device, &RunSettings::new(1, 1e-3), &Dataset::bundled(), &mut Silent);
        (report, device.taken.into_inner())
    };
    let (report, _) = attempt(1 << 30);
    let reserved: Vec<u64> = report.unwrap().memory.iter().map(|memory| memory.reserved_bytes).collect();
    // Both ranks and the room for sums; one byte less is too little for the second rank.
    let exactly = reserved.iter().sum::<u64>() + (8 << 20);
    assert!(attempt(exactly).0.is_ok());
    let (refused, taken) = attempt(exactly - 1);
    let message = refused.err().unwrap().to_string();
    assert_eq!(taken, 0, "nothing was allocated");
    for part in [
        "r1 needs ",
        "optimizer states ",
        "parameters ",
        "on small, which has ",
        "the ranks before it take",
        "micro_batch",
    ] {
        assert!(message.contains(part), "{part:?} in {message}");
    }
    let message = attempt(1000).0.err().unwrap().to_string();
    assert!(message.starts_with("r0 needs "), "{message}");
}
