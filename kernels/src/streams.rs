//! Streams of work that is done late: what emulated devices have in place of a GPU's streams.
//!
//! Work is queued and done when somebody waits for it, in an order that a GPU may take: each stream in its own order, and what follows a
//! moment after that moment. Beyond that the order is as unkind as possible, so a wait that is missing shows in results. Work is done
//! by the thread that waits, one piece at a time.

use crate::device::{Block, KernelError};
use crate::queue::{Moment, Sequence};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// In which of the possible orders late work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Only what is waited for and what that follows: everything else stays behind as long as it can.
    Late,
    /// Now and then a piece of any stream, drawn by this seed, also before anybody waits.
    Drawn(u64),
}

/// Work, later, once or often.
pub(crate) type Task = Arc<dyn Fn() -> Result<(), KernelError> + Send + Sync>;

/// A device with streams, whose memory outlasts the work on it.
pub(crate) trait Late: Send + Sync {
    fn streams(&self) -> &Streams;

    /// Memory goes, and nothing is queued any more that uses it.
    fn forget(&self, _block: &dyn Block) {}
}

/// Memory of such a device: all work is done before it goes.
pub(crate) struct Kept<L: Late> {
    pub block: Box<dyn Block>,
    pub core: Arc<L>,
}

impl<L: Late> Block for Kept<L> {
    fn address(&self) -> u64 {
        self.block.address()
    }

    fn bytes(&self) -> usize {
        self.block.bytes()
    }
}

impl<L: Late> Drop for Kept<L> {
    fn drop(&mut self) {
        self.core.streams().finish_all();
        self.core.forget(&*self.block);
    }
}

enum Item {
    Work(Task),
    Set { moment: usize, turn: u64 },
    Follow { moment: usize, turn: u64, on: usize },
}

/// A moment is set again and again: each time is a turn.
#[derive(Default)]
struct Mark {
    /// Turns asked for, and the stream of the last.
    turns: u64,
    on: usize,
    /// Turns that have come, and when the last did.
    passed: u64,
    when: Option<Instant>,
}

/// What a step of a stream came to.
enum Stepped {
    /// The next piece of work is done, or there is none.
    Done,
    /// It follows a moment that is to come on this stream.
    Held(usize),
}

struct State {
    queues: Vec<VecDeque<Item>>,
    marks: Vec<Mark>,
    idle: Vec<usize>,
    pace: Pace,
    random: u64,
    failure: Option<KernelError>,
    /// Streams whose work is kept, and what was kept before.
    keeping: Vec<(usize, Vec<Task>)>,
    sequences: Vec<Vec<Task>>,
}

/// The streams of an emulated device.
pub(crate) struct Streams(Mutex<State>);

impl Streams {
    /// With the first stream, number zero.
    pub fn new(pace: Pace) -> Streams {
        let random = if let Pace::Drawn(seed) = pace { seed ^ 0x9e37_79b9_7f4a_7c15 } else { 0 };
        Streams(Mutex::new(State {
            queues: vec![VecDeque::new()],
            marks: Vec::new(),
            idle: Vec::new(),
            pace,
            random,
            failure: None,
            keeping: Vec::new(),
            sequences: Vec::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another stream.
    pub fn open(&self) -> usize {
        let mut state = self.lock();
        state.queues.push(VecDeque::new());
        state.queues.len() - 1
    }

    pub fn moment(&self) -> Moment {
        let mut state = self.lock();
        let place = state.idle.pop().unwrap_or_else(|| {
            state.marks.push(Mark::default());
            state.marks.len() - 1
        });
        Moment(place as u64)
    }

    /// Moments that come again must be new: the turns that are still queued keep their numbers.
    pub fn release(&self, moments: &[Moment]) {
        self.lock().idle.extend(moments.iter().map(|moment| moment.0 as usize));
    }

    /// Queues work. On the first stream it is done at once, after what that follows: whoever knows no streams notices none.
    pub fn run(&self, on: usize, task: Task) -> Result<(), KernelError> {
        let mut state = self.lock();
        if on == 0 {
            let follows = !state.queues[0].is_empty();
            drop(state);
            if follows {
                self.finish(0)?;
            }
            return task();
        }
        if let Some((_, kept)) = state.keeping.iter_mut().find(|(stream, _)| *stream == on) {
            kept.push(task);
            return Ok(());
        }
        state.queues[on].push_back(Item::Work(task));
        state.wander();
        Ok(())
    }

    /// Keeps the work of a stream instead of doing it.
    pub fn keep(&self, on: usize) {
        self.lock().keeping.push((on, Vec::new()));
    }

    /// What was kept of a stream; nothing where it did not keep.
    pub fn kept(&self, on: usize) -> Sequence {
        let mut state = self.lock();
        let place = state.keeping.iter().position(|(stream, _)| *stream == on);
        let kept = place.map(|place| state.keeping.swap_remove(place).1);
        state.sequences.push(kept.unwrap_or_default());
        Sequence(state.sequences.len() - 1)
    }

    /// Queues what was kept.
    pub fn replay(&self, on: usize, sequence: Sequence) -> Result<(), KernelError> {
        let tasks = self.lock().sequences[sequence.0].clone();
        tasks.into_iter().try_for_each(|task| self.run(on, task))
    }

    pub fn set(&self, on: usize, moment: Moment) {
        let mut state = self.lock();
        let place = moment.0 as usize;
        let mark = &mut state.marks[place];
        (mark.turns, mark.on) = (mark.turns + 1, on);
        let turn = mark.turns;
        state.queues[on].push_back(Item::Set { moment: place, turn });
    }

    pub fn follow(&self, on: usize, moment: Moment) {
        let mut state = self.lock();
        let place = moment.0 as usize;
        let (turn, there) = (state.marks[place].turns, state.marks[place].on);
        state.queues[on].push_back(Item::Follow { moment: place, turn, on: there });
    }

    /// Does everything that a stream has, and tells what went wrong since this was asked last, on any stream.
    pub fn finish(&self, on: usize) -> Result<(), KernelError> {
        let mut state = self.lock();
        state.until(on, |state| state.queues[on].is_empty());
        state.failure.take().map_or(Ok(()), Err)
    }

    /// Does everything there is. What went wrong is kept for [`Streams::finish`].
    pub fn finish_all(&self) {
        let mut state = self.lock();
        for on in 0..state.queues.len() {
            state.until(on, |state| state.queues[on].is_empty());
        }
    }

    /// Waits for a moment as it was set last.
    pub fn reach(&self, moment: Moment) -> Result<(), KernelError> {
        let mut state = self.lock();
        let place = moment.0 as usize;
        let (turn, on) = (state.marks[place].turns, state.marks[place].on);
        state.until(on, |state| state.marks[place].passed >= turn);
        state.failure.take().map_or(Ok(()), Err)
    }

    /// `None` where one of them has not come.
    pub fn seconds(&self, from: Moment, to: Moment) -> Option<f64> {
        let state = self.lock();
        let when = |moment: Moment| state.marks[moment.0 as usize].when;
        Some(when(to)?.saturating_duration_since(when(from)?).as_secs_f64())
    }
}

impl State {
    /// Does work of a stream, and of others as the pace says, until `done`. What a stream follows was queued before, so somebody can
    /// always go on.
    fn until(&mut self, on: usize, done: impl Fn(&State) -> bool) {
        while !done(self) {
            let first = if let Pace::Drawn(_) = self.pace { self.draw(self.queues.len()) } else { on };
            let mut next = first;
            while let Stepped::Held(other) = self.step(next) {
                next = other;
            }
        }
    }

    /// Now and then work is done before anybody waits for it.
    fn wander(&mut self) {
        if let Pace::Drawn(_) = self.pace
            && self.draw(3) == 0
        {
            for _ in 0..self.draw(4) {
                let on = self.draw(self.queues.len());
                self.step(on);
            }
        }
    }

    fn draw(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (self.random >> 33) as usize % below
    }

    /// The next item of a stream, if it can be done.
    fn step(&mut self, on: usize) -> Stepped {
        match self.queues[on].front() {
            Some(&Item::Follow { moment, turn, on }) if self.marks[moment].passed < turn => return Stepped::Held(on),
            _ => {}
        }
        match self.queues[on].pop_front() {
            Some(Item::Work(task)) => {
                if let Err(error) = task() {
                    self.failure.get_or_insert(error);
                }
            }
            Some(Item::Set { moment, turn }) => {
                let mark = &mut self.marks[moment];
                (mark.passed, mark.when) = (mark.passed.max(turn), Some(Instant::now()));
            }
            Some(Item::Follow { .. }) | None => {}
        }
        Stepped::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Letters in the order in which they are done.
    fn letter(said: &Arc<Mutex<String>>, letter: char) -> Task {
        let said = said.clone();
        Arc::new(move || {
            said.lock().unwrap().push(letter);
            Ok(())
        })
    }

    #[test]
    fn late_work_is_done_when_it_is_needed_and_not_before() {
        let (streams, said) = (Streams::new(Pace::Late), Arc::default());
        let (one, two, three) = (streams.open(), streams.open(), streams.open());
        let moment = streams.moment();
        for (on, name) in [(one, 'a'), (one, 'b')] {
            streams.run(on, letter(&said, name)).unwrap();
        }
        streams.set(one, moment);
        streams.run(one, letter(&said, 'c')).unwrap();
        streams.run(two, letter(&said, 'd')).unwrap();
        streams.follow(two, moment);
        streams.run(two, letter(&said, 'e')).unwrap();
        streams.run(three, letter(&said, 'f')).unwrap();
        assert_eq!(*said.lock().unwrap(), "");
        streams.finish(two).unwrap();
        assert_eq!(*said.lock().unwrap(), "dabe", "of the first what leads to the moment, of the third nothing");
        // Set again: who follows now follows the second turn.
        streams.set(one, moment);
        streams.follow(three, moment);
        streams.run(three, letter(&said, 'g')).unwrap();
        streams.reach(moment).unwrap();
        assert_eq!(*said.lock().unwrap(), "dabec");
        streams.finish_all();
        assert_eq!(*said.lock().unwrap(), "dabecfg");
        streams.run(0, letter(&said, 'h')).unwrap();
        assert_eq!(*said.lock().unwrap(), "dabecfgh", "the first stream does its work at once");
        let never = streams.moment();
        streams.follow(one, never);
        streams.finish(one).unwrap();
        assert_eq!(streams.seconds(moment, never), None);
    }

    /// Every order that the streams allow is drawn by some seed, and no other.
    #[test]
    fn drawn_orders_are_all_that_are_possible() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..400 {
            let (streams, said) = (Streams::new(Pace::Drawn(seed)), Arc::default());
            let (one, two) = (streams.open(), streams.open());
            let moment = streams.moment();
            streams.run(one, letter(&said, 'a')).unwrap();
            streams.set(one, moment);
            streams.run(one, letter(&said, 'b')).unwrap();
            streams.run(two, letter(&said, 'c')).unwrap();
            streams.follow(two, moment);
            streams.run(two, letter(&said, 'd')).unwrap();
            streams.finish_all();
            seen.insert(said.lock().unwrap().clone());
        }
        // All shuffles of ab and cd with d after a.
        let possible = ["abcd", "acbd", "acdb", "cabd", "cadb"];
        assert_eq!(seen.iter().map(String::as_str).collect::<Vec<_>>(), possible);
    }

    #[test]
    fn what_is_kept_is_done_again_and_again_in_its_order() {
        let (streams, said) = (Streams::new(Pace::Drawn(3)), Arc::default());
        let (one, two) = (streams.open(), streams.open());
        streams.run(one, letter(&said, 'x')).unwrap();
        streams.keep(one);
        streams.run(one, letter(&said, 'a')).unwrap();
        streams.run(two, letter(&said, '.')).unwrap();
        streams.run(one, letter(&said, 'b')).unwrap();
        let kept = streams.kept(one);
        streams.finish_all();
        let done = |said: &Arc<Mutex<String>>| said.lock().unwrap().replace('.', "");
        assert_eq!(done(&said), "x");
        for _ in 0..2 {
            streams.replay(one, kept).unwrap();
        }
        streams.run(one, letter(&said, 'y')).unwrap();
        streams.finish_all();
        assert_eq!(done(&said), "xababy");
    }

    #[test]
    fn what_goes_wrong_is_told_once() {
        let streams = Streams::new(Pace::Late);
        let one = streams.open();
        for n in 0..2 {
            let what = n.to_string();
            let wrong = Arc::new(move || Err(KernelError::Machine { device: "streams".into(), what: what.clone() }));
            streams.run(one, wrong).unwrap();
        }
        assert_eq!(streams.finish(one).unwrap_err().to_string(), "device streams: 0");
        streams.finish(one).unwrap();
    }
}
