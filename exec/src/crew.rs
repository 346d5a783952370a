//! The threads of a run: one per rank, and the caller, who leads them from step to step.

use crate::effects::Effects;
use crate::error::ExecError;
use crate::fabric::Fabric;
use crate::interpreter::{Hands, run_step};
use paceline_sim::units::RankId;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long the leader sleeps before it looks whether the ranks stand still.
const LOOK_AFTER: Duration = Duration::from_secs(1);

/// Nanoseconds since a run began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub fn start() -> Clock {
        Clock(Instant::now())
    }

    pub fn now(&self) -> u64 {
        // 2^64 nanoseconds are 584 years.
        self.0.elapsed().as_nanos() as u64
    }
}

/// A step as the leader saw it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepTimes {
    pub begin: u64,
    pub end: u64,
}

impl StepTimes {
    pub fn seconds(&self) -> f64 {
        (self.end - self.begin) as f64 * 1e-9
    }
}

/// Leads the rank threads.
pub(crate) struct Lead<'a, 'p, E> {
    fabric: &'a Fabric<'p, E>,
    clock: Clock,
    shared: &'a Shared,
    ranks: u32,
}

struct Shared {
    leader: Thread,
    begin: AtomicU64,
    end: AtomicU64,
    finished: AtomicU32,
}

impl<E: Effects> Lead<'_, '_, E> {
    /// Runs one step on all ranks.
    pub fn step(&self) -> Result<StepTimes, ExecError> {
        let Shared { begin, end, finished, .. } = self.shared;
        finished.store(0, Ordering::Relaxed);
        let began = self.clock.now();
        begin.store(began, Ordering::Relaxed);
        self.fabric.begin_step();
        let mut before = None;
        while finished.load(Ordering::Acquire) < self.ranks && !self.fabric.aborted() {
            let since = Instant::now();
            std::thread::park_timeout(LOOK_AFTER);
            if since.elapsed() < LOOK_AFTER {
                continue;
            }
            // A checked program does not stand still; if it does, an error is better than waiting for ever.
            let now = Some(self.fabric.progress()).filter(|&(_, asleep)| asleep);
            if now.is_some() && now == before && finished.load(Ordering::Acquire) < self.ranks {
                self.fabric.abort(ExecError::Stalled { standing: self.fabric.standing() });
            }
            before = now;
        }
        match self.fabric.take_error() {
            Some(error) => Err(error),
            None => {
                if self.fabric.is_abandoned() {
                    self.fabric.reset();
                }
                Ok(StepTimes { begin: began, end: end.load(Ordering::Relaxed) })
            }
        }
    }
}

/// Stops the rank threads when the leader leaves, in whatever way.
struct StopOnDrop<'a, 'p, E: Effects>(&'a Fabric<'p, E>);

impl<E: Effects> Drop for StopOnDrop<'_, '_, E> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Starts a thread per rank and lets `lead` run steps. Between steps nobody holds the `hands`. With `pin`, the ranks
/// of a device stay on one core.
pub(crate) fn with_crew<E: Effects, H: Hands + Send, R>(
    fabric: &Fabric<E>,
    clock: Clock,
    hands: &[Mutex<H>],
    pin: bool,
    lead: impl FnOnce(&Lead<'_, '_, E>) -> Result<R, ExecError>,
) -> Result<R, ExecError> {
    let shared = Shared {
        leader: std::thread::current(),
        begin: AtomicU64::new(0),
        end: AtomicU64::new(0),
        finished: AtomicU32::new(0),
    };
    let cores = if pin { core_affinity::get_core_ids().unwrap_or_default() } else { Vec::new() };
    let leader = &shared.leader;
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(fabric);
        for (rank, own) in fabric.hosted().zip(hands) {
            let (shared, core) = (&shared, cores.get(fabric.bound.device(rank)).copied());
            let body = move || {
                if let Some(core) = core {
                    // Where the system refuses, threads float as without pinning.
                    core_affinity::set_for_current(core);
                }
                let work = AssertUnwindSafe(|| serve(fabric, clock, shared, rank, own));
                if let Err(panic) = catch_unwind(work) {
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    let message = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
                    fabric.abort(ExecError::Panic { rank: RankId(rank), message: message.into() });
                }
                shared.leader.unpark();
            };
            let thread = std::thread::Builder::new().name(RankId(rank).to_string());
            thread.spawn_scoped(scope, body).map_err(|error| ExecError::Setting {
                key: "ranks",
                value: hands.len().to_string(),
                allowed: format!("the system gives no thread for rank {rank}: {error}; use fewer ranks"),
            })?;
        }
        for stream in 0..fabric.carried_streams() {
            let carry = move || {
                if catch_unwind(AssertUnwindSafe(|| fabric.carry(stream))).is_err() {
                    fabric.abort(ExecError::Program(format!("the exchanges of stream {stream} failed")));
                }
                leader.unpark();
            };
            let thread = std::thread::Builder::new().name(format!("stream {stream}"));
            thread.spawn_scoped(scope, carry).map_err(|error| ExecError::Setting {
                key: "ranks",
                value: hands.len().to_string(),
                allowed: format!("the system gives no thread for communication: {error}"),
            })?;
        }
        if fabric.effects.is_delayed() {
            let watch = || {
                let work = AssertUnwindSafe(|| fabric.watch_link(|| clock.now()));
                if catch_unwind(work).is_err() {
                    fabric.abort(ExecError::Program("the watch over the link between groups failed".into()));
                }
            };
            let thread = std::thread::Builder::new().name("link".into());
            thread.spawn_scoped(scope, watch).map_err(|error| ExecError::Setting {
                key: "ranks",
                value: hands.len().to_string(),
                allowed: format!("the system gives no thread for the link between groups: {error}; use fewer ranks"),
            })?;
        }
        lead(&Lead { fabric, clock, shared: &shared, ranks: hands.len() as u32 })
    })
}

/// A rank's thread: step after step until the fabric stops.
fn serve<E: Effects>(fabric: &Fabric<E>, clock: Clock, shared: &Shared, rank: u32, hands: &Mutex<impl Hands>) {
    fabric.enter(rank);
    let mut done = 0;
    while fabric.drive(rank, || fabric.epoch() > done).is_ok() {
        done += 1;
        let mut hands = hands.lock().unwrap_or_else(PoisonError::into_inner);
        if run_step(fabric, rank, &mut *hands, shared.begin.load(Ordering::Relaxed)).is_err() {
            return;
        }
        drop(hands);
        shared.end.fetch_max(clock.now(), Ordering::Relaxed);
        shared.finished.fetch_add(1, Ordering::Release);
        shared.leader.unpark();
    }
}
