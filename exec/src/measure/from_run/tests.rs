use super::*;
use crate::exchange_times::ExchangeTimes;
use crate::kernel_times::KernelTimes;
use crate::report::StepReport;
use paceline_profiles::{CollectiveRound, KernelKey, KernelOp, Machine, Profile};
use paceline_sim::program::{
    Buffer, Coordinates, Device, Direction, Element, MemoryClass, Message, Op, PROGRAM_FORMAT, RankProgram, Tensor,
    Workload,
};
use paceline_sim::trace::{Event, Origin, RankTrace, TRACE_FORMAT, Trace};
use paceline_sim::units::{BufferId, DeviceId, MicrobatchId, Nanos, OpId, RankId, StageId};
use smallvec::SmallVec;

const BYTES: u64 = 4096;

fn key(elements: u32) -> KernelKey {
    KernelKey::new(KernelOp::Add, &[elements]).unwrap()
}

fn reduction() -> Subject {
    Subject::Collective { round: CollectiveRound::Reduce, members: 2, bytes: 1 << 20 }
}

/// One rank that receives twice and then has an op to compute.
fn program() -> Program {
    let (stage, microbatch) = (StageId(0), MicrobatchId(0));
    let op = |stream, kind| Op {
        stream,
        kind,
        waits: SmallVec::new(),
        alloc: SmallVec::new(),
        uses: SmallVec::new(),
        free: SmallVec::new(),
    };
    let message = Message { direction: Direction::Forward, stage, microbatch };
    let receive = OpKind::Recv { peer: RankId(0), message, buffer: BufferId(0) };
    let tensor = Tensor::StageInput { stage, microbatch };
    Program {
        format: PROGRAM_FORMAT.into(),
        workload: Workload::Abstract,
        microbatches: 1,
        devices: vec![Device { name: "cpu:0".into(), node: 0 }],
        groups: vec![],
        stages: vec![],
        ranks: vec![RankProgram {
            device: DeviceId(0),
            coordinates: Coordinates::default(),
            stages: vec![],
            buffers: vec![Buffer {
                class: MemoryClass::ReceivedActivation,
                bytes: BYTES,
                tensor,
                start: 0,
                element: Element::F32,
            }],
            persistent: vec![],
            ops: vec![op(Stream(2), receive), op(Stream(2), receive), op(Stream::COMPUTE, OpKind::Join)],
        }],
    }
}

/// Four steps, of which the first warms up and the last was held up.
fn report() -> RunReport {
    let program = program();
    let step = |n: u64, seconds| StepReport {
        step: n,
        seconds,
        loss: 1.0,
        gradient_norm: 1.0,
        learning_rate: 1e-3,
        tokens_per_second: 1.0,
    };
    let kernel = |elements, count, total_seconds| KernelTimes {
        key: key(elements),
        count,
        total_seconds,
        least_seconds: 0.0,
        median_seconds: 1e-9,
    };
    let spans = [(0, 10), (20, 50), (50, 60)];
    let events = program.ranks[0].ops.iter().zip(spans).enumerate().map(|(n, (op, (start, end)))| Event {
        op: OpId(n as u32),
        kind: op.kind,
        stream: op.stream,
        ready: Nanos(start),
        start: Nanos(start),
        end: Nanos(end),
        wait: None,
    });
    RunReport {
        steps: [(1, 9.0), (2, 1.0), (3, 1.0), (4, 2.5)].map(|(n, seconds)| step(n, seconds)).to_vec(),
        held_out: vec![],
        tokens_per_step: 1,
        trace: Trace {
            format: TRACE_FORMAT.into(),
            origin: Origin::Measured,
            makespan: Nanos(60),
            ranks: vec![RankTrace {
                events: events.collect(),
                memory: vec![],
                peak_bytes: 0,
                peak_by_class: Default::default(),
            }],
        },
        trace_step: 2,
        memory: vec![],
        kernels: vec![kernel(64, 6, 3.0), kernel(128, 3, 0.6)],
        exchanges: vec![
            ExchangeTimes { subject: reduction(), count: 4, total_seconds: 8e-5 },
            ExchangeTimes { subject: Subject::Overhead(Overhead::Message), count: 2, total_seconds: 6e-5 },
        ],
        outside_kernels: 0.1,
        busy_seconds: vec![1.0, 1.0, 2.5],
        stopped: false,
        checkpoint: None,
        gradients: Default::default(),
        parameters: Default::default(),
    }
}

fn seconds(rows: &[Row], subject: Subject) -> f64 {
    rows.iter().find(|row| row.subject == subject).unwrap().median_seconds
}

#[test]
fn kernels_of_a_typical_step_add_up_to_it() {
    let rows = rows_of_run(&program(), &report(), None);
    assert!(rows.iter().all(|row| row.source == Source::Trace && row.busy_devices == 1));
    // The ranks were busy for 1, 1 and 2.5 seconds of the counted steps: the typical one is two thirds of the mean.
    let typical = 1.0 / 1.5;
    assert!((seconds(&rows, Subject::Kernel(key(64))) - 0.5 * typical).abs() < 1e-12);
    assert!((seconds(&rows, Subject::Kernel(key(128))) - 0.2 * typical).abs() < 1e-12);
    // Copies of 10 and 30 nanoseconds.
    assert!((seconds(&rows, Subject::Transfer { bytes: BYTES }) - 20e-9).abs() < 1e-15);
    // Parts of rounds and hand-overs at the mean.
    assert!((seconds(&rows, reduction()) - 2e-5).abs() < 1e-15);
    assert!((seconds(&rows, Subject::Overhead(Overhead::Message)) - 3e-5).abs() < 1e-15);
    // A tenth of the time was outside the 3.6 seconds of kernels, and there was one op in each of three steps.
    let outside = 3.6 * typical / 9.0;
    assert!((seconds(&rows, Subject::Overhead(Overhead::Op)) - outside / 3.0).abs() < 1e-12);
}

#[test]
fn overheads_are_split_as_they_were_measured() {
    let row = |subject, median_seconds| Row {
        subject,
        busy_devices: 1,
        context: None,
        median_seconds,
        spread_seconds: 0.0,
        repetitions: 1,
        source: Source::Measured,
        date: String::new(),
        versions: String::new(),
    };
    let machine = Machine { device: "cpu".into(), host: "test".into(), cores: 1 };
    // Three ops of 6 and nine calls of 1: the ops take two thirds.
    let measured = [
        row(Subject::Kernel(key(64)), 0.5),
        row(Subject::Overhead(Overhead::Op), 6e-6),
        row(Subject::Overhead(Overhead::Call), 1e-6),
    ];
    let predictor = Predictor::new(&Profile { machine, rows: measured.to_vec() }).unwrap();
    let rows = rows_of_run(&program(), &report(), Some(&predictor));
    let outside = 3.6 / 1.5 / 9.0;
    assert!((seconds(&rows, Subject::Overhead(Overhead::Op)) - outside * 2.0 / 3.0 / 3.0).abs() < 1e-12);
    assert!((seconds(&rows, Subject::Overhead(Overhead::Call)) - outside / 3.0 / 9.0).abs() < 1e-12);
}

/// Of three runs, one in a slow minute and one that went well: the third counts. Of two, the mean.
#[test]
fn the_run_in_the_middle_counts() {
    let slower = |factor: f64| {
        let mut report = report();
        report.kernels.iter_mut().for_each(|times| times.total_seconds *= factor);
        report.exchanges.iter_mut().for_each(|times| times.total_seconds *= factor);
        report
    };
    let rows = |factors: &[f64]| {
        let reports: Vec<RunReport> = factors.iter().map(|&factor| slower(factor)).collect();
        rows_of_runs(&program(), &reports, None)
    };
    let one = rows_of_run(&program(), &report(), None);
    let three = rows(&[1.3, 0.9, 1.0]);
    assert_eq!(one.len(), three.len());
    for row in &one {
        let scaled = |factor: f64| if row.subject == (Subject::Transfer { bytes: BYTES }) { 1.0 } else { factor };
        assert!((seconds(&three, row.subject.clone()) / row.median_seconds - 1.0).abs() < 1e-9, "{:?}", row.subject);
        let two = seconds(&rows(&[1.3, 0.9]), row.subject.clone());
        assert!((two / row.median_seconds - scaled(1.1)).abs() < 1e-9, "{:?}", row.subject);
    }
    let calls = |rows: &[Row]| rows.iter().map(|row| row.repetitions).sum::<u64>();
    assert_eq!(calls(&three), 3 * calls(&one));
}

/// Each of three runs was slow in other kernels: no run was as fast as each kernel is in the middle.
#[test]
fn kernels_together_take_as_long_as_in_the_run_in_the_middle() {
    let slow_in = |slow: &[usize]| {
        let mut report = report();
        slow.iter().for_each(|&n| report.kernels[n].total_seconds *= 2.0);
        report
    };
    let reports = [slow_in(&[0]), slow_in(&[1]), slow_in(&[])];
    let total = |rows: &[Row]| {
        let kernels = rows.iter().filter(|row| matches!(row.subject, Subject::Kernel(_)));
        kernels.map(|row| row.median_seconds * row.repetitions as f64).sum::<f64>()
    };
    let mut totals = reports.each_ref().map(|report| total(&rows_of_run(&program(), report, None)));
    totals.sort_by(f64::total_cmp);
    assert!(totals[0] < totals[1] && totals[1] < totals[2], "{totals:?}");
    let rows = rows_of_runs(&program(), &reports, None);
    assert!((total(&rows) / 3.0 / totals[1] - 1.0).abs() < 1e-9, "{} and {totals:?}", total(&rows) / 3.0);
    // What is no kernel is as it was.
    assert_eq!(seconds(&rows, reduction()), seconds(&rows_of_run(&program(), &reports[2], None), reduction()));
}

#[test]
fn disturbed_runs_show_it() {
    let with_fastest = |seconds: f64| {
        let mut report = report();
        for times in &mut report.kernels {
            times.least_seconds = seconds * times.total_seconds / times.count as f64;
        }
        disturbance(&report)
    };
    // A typical step takes two thirds of the mean one.
    assert!((with_fastest(2.0 / 3.0) - 1.0).abs() < 1e-12);
    assert!((with_fastest(1.0 / 3.0) - 2.0).abs() < 1e-12);
    assert!(with_fastest(1.0 / 3.0) > DISTURBED_RUN);
    assert_eq!(disturbance(&report()), 1.0, "nothing is known");
}
