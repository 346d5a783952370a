//! The connections between processes: messages by sender and tag, signs of life, and one clear error when a peer is gone.
//!
//! A thread per peer reads what comes and lays it down by tag; so a write never waits for the reader to be ready, and nothing has to be
//! ordered between pairs of processes. Another thread sends signs of life. A peer that closes its connection without a farewell, or is
//! silent for too long, is lost; whoever waits is told so, and so are the other processes.

use super::error::ProcessError;
use super::frame::{self, Kind};
use super::rendezvous::Patience;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The tag of [`Mesh::all`].
const ALL: u64 = u64::MAX;

/// This process among all: see the module.
#[derive(Debug)]
pub struct Mesh {
    rank: u32,
    shared: Arc<Shared>,
    patience: Patience,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// By rank; that of this process is never used.
    peers: Vec<Peer>,
    inbox: Mutex<Inbox>,
    changed: Condvar,
    /// The threads shall end.
    over: AtomicBool,
}

#[derive(Debug)]
struct Peer {
    host: String,
    line: Option<Mutex<TcpStream>>,
}

#[derive(Debug, Default)]
struct Inbox {
    frames: HashMap<(u32, u64), VecDeque<Vec<u8>>>,
    /// Peers that have said farewell.
    gone: Vec<u32>,
    failure: Option<ProcessError>,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        // The inbox is valid after every statement, so a panic elsewhere does not spoil it.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first failure counts.
    fn fail(&self, error: ProcessError) {
        self.inbox().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    fn lost(&self, rank: u32, what: impl Into<String>) -> ProcessError {
        ProcessError::Lost { rank, host: self.peers[rank as usize].host.clone(), what: what.into() }
    }

    /// A peer's thread: lays down what comes until the connection ends.
    fn read(&self, rank: u32, mut from: TcpStream, silence: Duration) {
        loop {
            match frame::read(&mut from, u64::MAX) {
                Ok(frame) => match frame.kind {
                    Kind::Data => {
                        self.inbox().frames.entry((rank, frame.tag)).or_default().push_back(frame.bytes);
                        self.changed.notify_all();
                    }
                    Kind::Alive | Kind::Hello => {}
                    Kind::GiveUp => {
                        let host = self.peers[rank as usize].host.clone();
                        let message = String::from_utf8_lossy(&frame.bytes).into_owned();
                        return self.fail(ProcessError::GaveUp { rank, host, message });
                    }
                    Kind::Bye => {
                        self.inbox().gone.push(rank);
                        return self.changed.notify_all();
                    }
                },
                Err(_) if self.over.load(Ordering::Acquire) => return,
                Err(error) => {
                    let what = match error.kind() {
                        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                            "its connection closed without a farewell".to_owned()
                        }
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                            format!("no sign of life for {} s", silence.as_secs_f64())
                        }
                        _ => error.to_string(),
                    };
                    return self.fail(self.lost(rank, what));
                }
            }
        }
    }

    /// Sends signs of life until the end.
    fn live(&self, every: Duration) {
        let mut inbox = self.inbox();
        while !self.over.load(Ordering::Acquire) {
            drop(inbox);
            for line in self.peers.iter().filter_map(|peer| peer.line.as_ref()) {
                // Who holds the line is writing, which is a sign of life, too. An error is the reader's to tell.
                if let Ok(mut line) = line.try_lock() {
                    let _ = frame::write(&mut *line, Kind::Alive, 0, &[]);
                }
            }
            inbox = self.inbox();
            if !self.over.load(Ordering::Acquire) {
                inbox = self.changed.wait_timeout(inbox, every).unwrap_or_else(PoisonError::into_inner).0;
                // Messages wake it, too: it goes on sleeping until it is time.
                let next = Instant::now() + every;
                while !self.over.load(Ordering::Acquire) && Instant::now() < next {
                    let left = next.saturating_duration_since(Instant::now());
                    inbox = self.changed.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    /// Writes to all peers, whatever becomes of it.
    fn tell_all(&self, kind: Kind, bytes: &[u8]) {
        for line in self.peers.iter().filter_map(|peer| peer.line.as_ref()) {
            let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = frame::write(&mut *line, kind, 0, bytes);
        }
    }
}

impl Mesh {
    /// Takes over connections, by rank; `hosts` are the names of all ranks' hosts.
    pub(super) fn new(
        rank: u32,
        hosts: Vec<String>,
        streams: Vec<Option<TcpStream>>,
        patience: Patience,
    ) -> Result<Mesh, ProcessError> {
        let system = |error: io::Error| ProcessError::System {
            doing: "preparing a connection to another process",
            why: error.to_string(),
        };
        let mut readers = Vec::new();
        let mut peers = Vec::new();
        for (peer, (host, stream)) in (0u32..).zip(hosts.into_iter().zip(streams)) {
            let line = match stream {
                None => None,
                Some(stream) => {
                    stream.set_nodelay(true).map_err(system)?;
                    stream.set_nonblocking(false).map_err(system)?;
                    stream.set_read_timeout(Some(patience.silence)).map_err(system)?;
                    stream.set_write_timeout(Some(patience.silence)).map_err(system)?;
                    readers.push((peer, stream.try_clone().map_err(system)?));
                    Some(Mutex::new(stream))
                }
            };
            peers.push(Peer { host, line });
        }
        let shared = Arc::new(Shared {
            peers,
            inbox: Mutex::new(Inbox::default()),
            changed: Condvar::new(),
            over: AtomicBool::new(false),
        });
        let mut mesh = Mesh { rank, shared, patience, threads: Vec::new() };
        for (peer, stream) in readers {
            let shared = mesh.shared.clone();
            mesh.spawn(format!("from {peer}"), move || shared.read(peer, stream, patience.silence))?;
        }
        if mesh.shared.peers.len() > 1 {
            let shared = mesh.shared.clone();
            mesh.spawn("signs of life".into(), move || shared.live(patience.silence / 6))?;
        }
        Ok(mesh)
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> Result<(), ProcessError> {
        let thread = std::thread::Builder::new().name(name).spawn(body).map_err(|error| ProcessError::System {
            doing: "starting a thread for a connection",
            why: error.to_string(),
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Number of this process.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Number of processes.
    pub fn size(&self) -> u32 {
        self.shared.peers.len() as u32
    }

    /// Sends bytes to another process; they may be changed when it returns.
    ///
    /// # Errors
    /// When a peer is lost.
    pub fn send(&self, to: u32, tag: u64, bytes: &[u8]) -> Result<(), ProcessError> {
        self.check()?;
        let Some(line) = &self.shared.peers[to as usize].line else {
            return Err(self.shared.lost(to, "a process has no connection to itself"));
        };
        let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
        frame::write(&mut *line, Kind::Data, tag, bytes).map_err(|error| {
            let error = self.shared.lost(to, format!("sending to it: {error}"));
            self.shared.fail(error);
            // The first failure is the cause.
            self.failure().unwrap_or_else(|| ProcessError::Ended("sending failed".into()))
        })
    }

    /// The next bytes that a process sent under a tag.
    ///
    /// # Errors
    /// When any peer is lost or gives up, or this one takes too long.
    pub fn receive(&self, from: u32, tag: u64) -> Result<Vec<u8>, ProcessError> {
        let until = Instant::now() + self.patience.message;
        let mut inbox = self.shared.inbox();
        loop {
            if let Some(bytes) = inbox.frames.get_mut(&(from, tag)).and_then(VecDeque::pop_front) {
                return Ok(bytes);
            }
            if let Some(error) = &inbox.failure {
                return Err(error.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            let what = if inbox.gone.contains(&from) {
                "it ended its run while others wait for it".to_owned()
            } else if left.is_zero() {
                format!("it lives, but a message of it is missing for {} s", self.patience.message.as_secs_f64())
            } else {
                inbox = self.shared.changed.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            };
            drop(inbox);
            let error = self.shared.lost(from, what);
            self.shared.fail(error.clone());
            return Err(error);
        }
    }

    /// Gives everybody's bytes to everybody, by rank. All processes do this in the same order, one thread each.
    ///
    /// # Errors
    /// As for [`Mesh::receive`].
    pub fn all(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>, ProcessError> {
        let others = || (0..self.size()).filter(|&rank| rank != self.rank);
        others().try_for_each(|rank| self.send(rank, ALL, &own))?;
        let mut all = Vec::with_capacity(self.size() as usize);
        for rank in 0..self.size() {
            all.push(if rank == self.rank { own.clone() } else { self.receive(rank, ALL)? });
        }
        Ok(all)
    }

    /// What has gone wrong, if anything has.
    pub fn failure(&self) -> Option<ProcessError> {
        self.shared.inbox().failure.clone()
    }

    fn check(&self) -> Result<(), ProcessError> {
        self.failure().map_or(Ok(()), Err)
    }

    /// Ends this process's part with an error: threads of its own that wait stop waiting, and all others are told.
    pub fn give_up(&self, message: &str) {
        if !self.shared.over.swap(true, Ordering::AcqRel) {
            self.shared.fail(ProcessError::Ended(message.to_owned()));
            self.shared.tell_all(Kind::GiveUp, message.as_bytes());
        }
    }

    /// Waits until all have come here, and says farewell.
    ///
    /// # Errors
    /// When a peer is lost.
    pub fn finish(&self) -> Result<(), ProcessError> {
        self.all(Vec::new())?;
        if !self.shared.over.swap(true, Ordering::AcqRel) {
            self.shared.tell_all(Kind::Bye, &[]);
        }
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        // Without a farewell the others would learn of it by the closed connection only.
        self.give_up("it ended before the others");
        self.shared.changed.notify_all();
        for line in self.shared.peers.iter().filter_map(|peer| peer.line.as_ref()) {
            let line = line.lock().unwrap_or_else(PoisonError::into_inner);
            // What was written still goes out; the reader of this side ends at once.
            let _ = line.shutdown(Shutdown::Write);
            let _ = line.shutdown(Shutdown::Read);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::rendezvous::tests::{free_port, place};
    use super::super::rendezvous::{Terms, meet};
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// Processes that have met.
    pub(crate) fn meshes(size: u32, silence: Duration, message: Duration) -> Vec<Mesh> {
        let port = free_port();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..size)
                .map(|rank| {
                    let patience = Patience { meeting: SOON, silence, message };
                    scope.spawn(move || meet(&place(rank, size, port), &Terms::new(), patience).unwrap())
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn messages_wait_for_their_receiver_by_tag_and_in_order() {
        let meshes = meshes(2, SOON, SOON);
        // More than the connection holds, before anybody receives.
        let large = vec![7u8; 32 << 20];
        meshes[0].send(1, 2, &large).unwrap();
        meshes[0].send(1, 1, b"first").unwrap();
        meshes[0].send(1, 1, b"second").unwrap();
        assert_eq!(meshes[1].receive(0, 1).unwrap(), b"first");
        assert_eq!(meshes[1].receive(0, 1).unwrap(), b"second");
        assert_eq!(meshes[1].receive(0, 2).unwrap(), large);
    }

    #[test]
    fn a_peer_that_gives_up_is_named_with_its_reason_everywhere() {
        let meshes = meshes(3, SOON, SOON);
        let messages: Vec<String> = std::thread::scope(|scope| {
            let waiting: Vec<_> =
                meshes[..2].iter().map(|mesh| scope.spawn(|| mesh.receive(2, 5).unwrap_err().to_string())).collect();
            std::thread::sleep(Duration::from_millis(50));
            meshes[2].give_up("the loss is NaN");
            waiting.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for message in messages {
            assert!(message.starts_with("rank 2 on ") && message.ends_with("gave up: the loss is NaN"), "{message}");
        }
        // Its own threads stop waiting, too.
        assert_eq!(meshes[2].receive(0, 5).unwrap_err(), ProcessError::Ended("the loss is NaN".into()));
        assert!(meshes[0].send(1, 1, b"x").unwrap_err().to_string().contains("gave up"));
    }

    #[test]
    fn a_connection_that_closes_without_farewell_is_a_lost_peer() {
        let meshes = meshes(2, SOON, SOON);
        // As the system does when a process is killed.
        let line = meshes[1].shared.peers[0].line.as_ref().unwrap();
        line.lock().unwrap().shutdown(Shutdown::Both).unwrap();
        let message = meshes[0].receive(1, 5).unwrap_err().to_string();
        assert!(message.starts_with("rank 1 on ") && message.contains("without a farewell"), "{message}");
        assert!(message.contains("last checkpoint"), "{message}");
    }

    #[test]
    fn a_silent_peer_is_lost_and_a_living_one_that_owes_a_message_too() {
        let two = meshes(2, Duration::from_millis(300), SOON);
        // Its signs of life stop, its connection stays.
        two[1].shared.over.store(true, Ordering::Release);
        two[1].shared.changed.notify_all();
        let message = two[0].receive(1, 5).unwrap_err().to_string();
        assert!(message.contains("no sign of life for 0.3 s"), "{message}");

        let two = meshes(2, Duration::from_millis(300), Duration::from_millis(900));
        let begin = Instant::now();
        let message = two[0].receive(1, 5).unwrap_err().to_string();
        assert!(message.contains("it lives, but a message of it is missing"), "{message}");
        assert!(begin.elapsed() >= Duration::from_millis(900), "signs of life kept it waiting");
    }

    #[test]
    fn after_a_farewell_nobody_is_lost() {
        let meshes = meshes(2, SOON, SOON);
        std::thread::scope(|scope| {
            meshes.iter().for_each(|mesh| {
                scope.spawn(|| mesh.finish().unwrap());
            });
        });
        let [first, second] = <[Mesh; 2]>::try_from(meshes).unwrap();
        drop(second);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(first.failure(), None);
        assert!(first.receive(1, 5).unwrap_err().to_string().contains("ended its run while others wait"));
    }
}
