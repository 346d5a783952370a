//! What the executor itself costs: time outside kernels when every op lasts a given time, and the price of an op and of a
//! message when kernels take no time at all. Ops last by the clock, so that nothing but the executor is measured.

#[path = "../tests/executor/heap.rs"]
mod heap;
#[path = "../tests/executor/toy.rs"]
#[allow(dead_code)] // The bench does not let the toy fail.
mod toy;

use heap::Heap;
use paceline_exec::{
    Dataset, ExecError, Launch, Operands, Parameter, Passes, RunReport, RunSettings, Silent, TiedCopy, run_passes,
};
use paceline_kernels::{Block, Call, Device, KernelError, View};
use paceline_sim::program::{MemoryClass, OpKind, Pass, Tensor};
use paceline_sim::units::StageId;
use std::time::{Duration, Instant};
use toy::{Layout, Toy, VOCAB, program};

/// Passes of one call that lasts as long as the device says; the backward takes two.
struct Timed(Toy);

impl Passes for Timed {
    fn run(&self, kind: &OpKind, launch: &dyn Launch, operands: &dyn Operands) -> Result<(), ExecError> {
        let &OpKind::Compute { pass, stage, microbatch, .. } = kind else { unreachable!() };
        if pass == Pass::F && self.0.has_loss(stage) {
            launch.launch(Call::Zero { x: operands.view(Tensor::Losses)? })?;
        }
        let x = operands.view(Tensor::Parameters { stage, unit: 0 })?;
        let out = match operands.view(Tensor::StageOutput { stage, microbatch }) {
            Ok(out) => out,
            Err(_) => x,
        };
        for _ in 0..if pass == Pass::F { 1 } else { 2 } {
            launch.launch(Call::Copy { from: x, to: out })?;
        }
        Ok(())
    }

    fn parameters(&self, stage: StageId, unit: u16) -> Vec<Parameter> {
        self.0.parameters(stage, unit)
    }

    fn frozen(&self, stage: StageId, unit: u16) -> Vec<Parameter> {
        self.0.frozen(stage, unit)
    }

    fn tied_copy(&self, stage: StageId, unit: u16) -> Option<TiedCopy> {
        self.0.tied_copy(stage, unit)
    }

    fn operands(&self, kind: &OpKind) -> Vec<(Tensor, MemoryClass, u64)> {
        self.0.operands(kind)
    }

    fn has_loss(&self, stage: StageId) -> bool {
        self.0.has_loss(stage)
    }

    fn sequences(&self) -> u32 {
        self.0.sequences()
    }

    fn seq(&self) -> u32 {
        self.0.seq()
    }

    fn vocab(&self) -> u32 {
        self.0.vocab()
    }

    fn digest(&self) -> String {
        self.0.digest()
    }
}

/// Calls of the passes last a given time.
struct Timer(Duration);

impl Device for Timer {
    fn name(&self) -> String {
        "timer".into()
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        Heap.allocate(bytes)
    }

    unsafe fn run(&self, call: &Call) -> Result<(), KernelError> {
        if let Call::Copy { .. } = call {
            let start = Instant::now();
            while start.elapsed() < self.0 {
                std::hint::spin_loop();
            }
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { Heap.run(call) }
    }

    unsafe fn upload(&self, from: &[u8], to: View) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { Heap.upload(from, to) }
    }

    unsafe fn download(&self, from: View, to: &mut [u8]) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { Heap.download(from, to) }
    }
}

fn train(layout: &Layout, call: Duration, steps: u64, pin: bool) -> RunReport {
    let tokens: Vec<u16> = (0..5000u32).map(|k| (k % VOCAB as u32) as u16).collect();
    let data = Dataset::from_tokens("bench", &tokens);
    let settings = RunSettings { pin: Some(pin), ..RunSettings::new(steps, 0.0) };
    run_passes(&program(layout), &Timed(Toy::new(layout)), &Timer(call), &settings, &data, &mut Silent)
        .unwrap_or_else(|error| panic!("{layout:?}: {error}"))
}

fn main() {
    // `cargo test --benches` runs this too; then one short round shows that it works.
    let quick = std::env::args().any(|argument| argument == "--test");
    let (microbatches, steps) = if quick { (4, 2) } else { (32, 8) };
    let base = Layout { stages: 1, microbatches, ..Layout::SINGLE };
    let layouts = [
        ("1 rank, 1 device", base),
        ("2 ranks, 1 device", Layout { pipeline: 2, stages: 2, devices: 1, gpipe: false, ..base }),
        ("2 ranks, 2 devices", Layout { pipeline: 2, stages: 2, devices: 2, gpipe: false, ..base }),
        ("4 ranks, 2 devices", Layout { pipeline: 4, stages: 4, devices: 2, gpipe: false, ..base }),
        ("dp 2, 2 devices", Layout { data: 2, devices: 2, ..base }),
    ];
    println!(
        "{:<20} {:>10} {:>6} {:>16} {:>22}",
        "layout", "kernel", "pinned", "outside kernels", "step over kernel time"
    );
    for (name, layout) in &layouts {
        for kernel in [Duration::ZERO, Duration::from_micros(100), Duration::from_millis(1)] {
            for pin in [false, true] {
                let report = train(layout, kernel, steps, pin);
                // The device with most work bounds the step; per stage and microbatch F is one call and BW two.
                let ranks = layout.data * layout.pipeline;
                let ideal = if layout.data > 1 {
                    f64::from(3 * layout.microbatches)
                } else {
                    let chain = if layout.devices > 1 { layout.pipeline - 1 } else { 0 };
                    f64::from(3 * (layout.microbatches * ranks.div_ceil(layout.devices) + chain))
                } * kernel.as_secs_f64();
                let over = report.median_seconds() - ideal;
                let ops = f64::from(2 * layout.microbatches);
                let share = |value: f64| if kernel.is_zero() { "-".into() } else { format!("{:.2} %", value * 100.0) };
                println!(
                    "{name:<20} {:>7.1} us {pin:>6} {:>16} {:>12} {:>10.2} us/op",
                    kernel.as_secs_f64() * 1e6,
                    share(report.outside_kernels),
                    share(over / ideal),
                    over / ops * 1e6
                );
            }
        }
    }
}
