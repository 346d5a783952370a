//! A network between threads of one process, over memory that all of them reach: what NCCL does between GPUs, by the definitions of
//! its operations. It runs and tests the same ways through the executor where there are no GPUs.

use crate::device::{DType, KernelError, View};
use crate::network::{Channel, Joint, Network};
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a thread that waits looks whether it shall give up.
const LOOK: Duration = Duration::from_millis(5);

/// The network; all threads share one.
#[derive(Debug, Default)]
pub struct ThreadNetwork {
    rooms: Mutex<HashMap<Vec<u8>, Arc<Room>>>,
    invitations: Mutex<u64>,
}

#[derive(Debug, Default)]
struct Room {
    state: Mutex<Gathering>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Gathering {
    came: u32,
    /// By member, in this turn.
    batches: HashMap<u32, Vec<Joint>>,
    turn: u64,
    failure: Option<String>,
}

#[derive(Debug)]
struct Seat {
    room: Arc<Room>,
    members: u32,
    member: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(what: impl Into<String>) -> KernelError {
    KernelError::Machine { device: "network of threads".into(), what: what.into() }
}

impl Network for ThreadNetwork {
    fn version(&self) -> Result<String, KernelError> {
        Ok("threads 1".into())
    }

    fn invite(&self) -> Result<Vec<u8>, KernelError> {
        let mut count = lock(&self.invitations);
        *count += 1;
        Ok(count.to_le_bytes().to_vec())
    }

    fn open(
        &self,
        invitation: &[u8],
        members: u32,
        member: u32,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Box<dyn Channel>, KernelError> {
        let room = lock(&self.rooms).entry(invitation.to_vec()).or_default().clone();
        let mut state = lock(&room.state);
        state.came += 1;
        room.changed.notify_all();
        while state.came < members {
            state = room.wait(state, given_up)?;
        }
        drop(state);
        Ok(Box::new(Seat { room, members, member }))
    }
}

impl Room {
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, Gathering>,
        given_up: &dyn Fn() -> bool,
    ) -> Result<MutexGuard<'a, Gathering>, KernelError> {
        if given_up() {
            return Err(failed("given up while waiting for others"));
        }
        Ok(self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Channel for Seat {
    unsafe fn run(&self, batch: &[Joint], given_up: &dyn Fn() -> bool) -> Result<(), KernelError> {
        let mut state = lock(&self.room.state);
        let turn = state.turn;
        state.batches.insert(self.member, batch.to_vec());
        if state.batches.len() == self.members as usize {
            // The last one who comes does everybody's work.
            let batches: Vec<Vec<Joint>> =
                (0..self.members).filter_map(|member| state.batches.remove(&member)).collect();
            // SAFETY: all members wait, and promise that their views are live memory that nobody else touches.
            state.failure = unsafe { work(&batches) }.err();
            state.turn += 1;
            self.room.changed.notify_all();
        }
        while state.turn == turn {
            state = self.room.wait(state, given_up)?;
        }
        state.failure.clone().map_or(Ok(()), |what| Err(failed(what)))
    }
}

/// All members' batches.
///
/// # Safety
/// Everything that the batches name lives, and nobody else touches it.
unsafe fn work(batches: &[Vec<Joint>]) -> Result<(), String> {
    if batches.iter().any(|batch| batch.len() != batches[0].len()) {
        return Err("batches of different lengths met".into());
    }
    for n in 0..batches[0].len() {
        let all: Vec<Joint> = batches.iter().map(|batch| batch[n]).collect();
        // SAFETY: the caller's promise.
        unsafe { joint(&all) }?;
    }
    Ok(())
}

/// One operation of all members.
///
/// # Safety
/// As for [`work`].
unsafe fn joint(all: &[Joint]) -> Result<(), String> {
    let wrong = || format!("operations that do not fit together met: {all:?}");
    // What each member brings to a sum or a gather, and where the result goes.
    let pairs = |of: fn(&Joint) -> Option<(View, View)>| -> Result<Vec<(View, View)>, String> {
        all.iter().map(of).collect::<Option<_>>().ok_or_else(wrong)
    };
    // SAFETY: the caller's promise, here and below.
    unsafe {
        match all[0] {
            Joint::Send { from, .. } => match all {
                [_, Joint::Receive { to, .. }] => put(*to, &bytes(from), wrong),
                _ => Err(wrong()),
            },
            Joint::Receive { to, .. } => match all {
                [_, Joint::Send { from, .. }] => put(to, &bytes(*from), wrong),
                _ => Err(wrong()),
            },
            Joint::AllReduce { .. } => {
                let views = pairs(|joint| if let Joint::AllReduce { x } = *joint { Some((x, x)) } else { None })?;
                let total = sum(&views, wrong)?;
                views.iter().try_for_each(|&(_, to)| set(to, &total, wrong))
            }
            Joint::ReduceScatter { .. } => {
                let views = pairs(|joint| match *joint {
                    Joint::ReduceScatter { from, to } => Some((from, to)),
                    _ => None,
                })?;
                let total = sum(&views, wrong)?;
                let part = total.len() / all.len();
                if part * all.len() != total.len() {
                    return Err(wrong());
                }
                (0..).zip(&views).try_for_each(|(m, &(_, to)): (usize, _)| set(to, &total[m * part..][..part], wrong))
            }
            Joint::AllGather { .. } => {
                let views = pairs(|joint| match *joint {
                    Joint::AllGather { from, to } => Some((from, to)),
                    _ => None,
                })?;
                let whole: Vec<u8> = views.iter().flat_map(|&(from, _)| bytes(from)).collect();
                views.iter().try_for_each(|&(_, to)| put(to, &whole, wrong))
            }
            Joint::Reduce { root, .. } => {
                let views = pairs(|joint| match *joint {
                    Joint::Reduce { from, to, .. } => Some((from, to)),
                    _ => None,
                })?;
                let total = sum(&views, wrong)?;
                views.get(root as usize).ok_or_else(wrong).and_then(|&(_, to)| set(to, &total, wrong))
            }
            Joint::Broadcast { root, .. } => {
                let views = pairs(|joint| match *joint {
                    Joint::Broadcast { from, to, .. } => Some((from, to)),
                    _ => None,
                })?;
                let whole = views.get(root as usize).map(|&(from, _)| bytes(from)).ok_or_else(wrong)?;
                views.iter().try_for_each(|&(_, to)| put(to, &whole, wrong))
            }
        }
    }
}

/// # Safety
/// As for [`work`].
unsafe fn sum(views: &[(View, View)], wrong: impl Fn() -> String) -> Result<Vec<f64>, String> {
    // SAFETY: the caller's promise.
    let mut total = unsafe { values(views[0].0) };
    for &(from, _) in &views[1..] {
        // SAFETY: the caller's promise.
        let addend = unsafe { values(from) };
        if addend.len() != total.len() {
            return Err(wrong());
        }
        total.iter_mut().zip(addend).for_each(|(total, x)| *total += x);
    }
    Ok(total)
}

/// # Safety
/// As for [`work`].
unsafe fn bytes(view: View) -> Vec<u8> {
    let from = std::ptr::with_exposed_provenance(view.address() as usize);
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(from, view.bytes()) }.to_vec()
}

/// Elements as doubles, which hold every value of every element type.
///
/// # Safety
/// As for [`work`].
unsafe fn values(view: View) -> Vec<f64> {
    // SAFETY: the caller's promise.
    let bytes = unsafe { bytes(view) };
    match view.dtype() {
        DType::F32 => bytes.as_chunks().0.iter().map(|&x| f64::from(f32::from_ne_bytes(x))).collect(),
        DType::F64 => bytes.as_chunks().0.iter().map(|&x| f64::from_ne_bytes(x)).collect(),
        DType::U32 => bytes.as_chunks().0.iter().map(|&x| f64::from(u32::from_ne_bytes(x))).collect(),
        DType::BF16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&x| f64::from(f32::from_bits(u32::from(u16::from_ne_bytes(x)) << 16)))
            .collect(),
    }
}

/// # Safety
/// As for [`work`].
unsafe fn set(view: View, values: &[f64], wrong: impl Fn() -> String) -> Result<(), String> {
    let bytes: Vec<u8> = match view.dtype() {
        DType::F32 => values.iter().flat_map(|&x| (x as f32).to_ne_bytes()).collect(),
        DType::F64 => values.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        DType::U32 => values.iter().flat_map(|&x| (x as u32).to_ne_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&x| narrow(x as f32).to_ne_bytes()).collect(),
    };
    // SAFETY: the caller's promise.
    unsafe { put(view, &bytes, wrong) }
}

/// # Safety
/// As for [`work`].
unsafe fn put(view: View, bytes: &[u8], wrong: impl Fn() -> String) -> Result<(), String> {
    if view.bytes() != bytes.len() {
        return Err(wrong());
    }
    let to = std::ptr::with_exposed_provenance_mut(view.address() as usize);
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(to, bytes.len()) }.copy_from_slice(bytes);
    Ok(())
}

/// bfloat16, rounded to nearest even.
fn narrow(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7fc0;
    }
    let bits = x.to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(x: &mut [f32]) -> View {
        View::at(x.as_mut_ptr().expose_provenance() as u64, x.len(), DType::F32)
    }

    /// What both members of a channel get for what they bring.
    fn both(of: impl Fn(u32, View, View) -> Joint + Sync) -> [Result<Vec<f32>, String>; 2] {
        let network = ThreadNetwork::default();
        let invitation = network.invite().unwrap();
        let member = |member: u32| {
            let channel = network.open(&invitation, 2, member, &|| false).unwrap();
            let (mut x, mut y) = ([1.0 + member as f32, 10.0], [0.0f32; 2]);
            let joint = of(member, view(&mut x), view(&mut y));
            // SAFETY: the arrays live until both have ended.
            let done = unsafe { channel.run(&[joint], &|| false) };
            done.map(|()| [x, y].concat()).map_err(|error| error.to_string())
        };
        std::thread::scope(|scope| {
            let first = scope.spawn(|| member(0));
            let second = member(1);
            [first.join().unwrap(), second]
        })
    }

    #[test]
    fn operations_do_what_their_names_say() {
        let all = both(|_, x, _| Joint::AllReduce { x });
        assert_eq!(all, [Ok(vec![3.0, 20.0, 0.0, 0.0]), Ok(vec![3.0, 20.0, 0.0, 0.0])]);
        let scattered = both(|_, x, y| Joint::ReduceScatter { from: x, to: y.slice(0, 1) });
        assert_eq!(scattered, [Ok(vec![1.0, 10.0, 3.0, 0.0]), Ok(vec![2.0, 10.0, 20.0, 0.0])]);
        let gathered = both(|_, x, y| Joint::AllGather { from: x.slice(0, 1), to: y });
        assert_eq!(gathered, [Ok(vec![1.0, 10.0, 1.0, 2.0]), Ok(vec![2.0, 10.0, 1.0, 2.0])]);
        let sent = both(|member, x, y| match member {
            0 => Joint::Send { from: x, to: 1 },
            _ => Joint::Receive { to: y, from: 0 },
        });
        assert_eq!(sent[1], Ok(vec![2.0, 10.0, 1.0, 10.0]));
        let reduced = both(|_, x, y| Joint::Reduce { from: x, to: y, root: 1 });
        assert_eq!(reduced, [Ok(vec![1.0, 10.0, 0.0, 0.0]), Ok(vec![2.0, 10.0, 3.0, 20.0])]);
        let spread = both(|_, x, y| Joint::Broadcast { from: x, to: y, root: 1 });
        assert_eq!(spread[0], Ok(vec![1.0, 10.0, 2.0, 10.0]));
    }

    #[test]
    fn what_does_not_fit_together_fails_at_both() {
        let odd = both(|member, x, y| match member {
            0 => Joint::AllReduce { x },
            _ => Joint::AllGather { from: x, to: y },
        });
        for end in odd {
            assert!(end.unwrap_err().contains("do not fit together"));
        }
    }

    #[test]
    fn waiting_can_be_given_up() {
        let network = ThreadNetwork::default();
        let error = network.open(&network.invite().unwrap(), 2, 0, &|| true).unwrap_err();
        assert!(error.to_string().contains("given up"), "{error}");
    }
}
