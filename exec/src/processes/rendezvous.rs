//! How processes find each other: all come to rank 0, say what they run, are told where the others are, and connect.
//!
//! Rank 0 listens where MASTER_ADDR and MASTER_PORT say. Everybody tells it a [`Hello`]; when all have come, or when it is clear that
//! they cannot work together, it answers all of them with the same [`Answer`], so that every process ends with the same error. Then each
//! process connects to all of lower rank, and the connections stay ([`Mesh`]).

use super::environment::Place;
use super::error::{Disagreement, ProcessError};
use super::frame::{self, Kind};
use super::mesh::Mesh;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// What all processes have to agree on: what it is, for people, and its value, for example the version of NCCL.
pub type Terms = BTreeMap<String, String>;

/// How long to wait for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Until all processes have come.
    pub meeting: Duration,
    /// Without any sign of life of a peer, until it counts as lost.
    pub silence: Duration,
    /// For a message that a living peer owes.
    pub message: Duration,
}

impl Default for Patience {
    /// Two minutes to come, half a minute of silence, half an hour for a message.
    fn default() -> Patience {
        Patience {
            meeting: Duration::from_secs(120),
            silence: Duration::from_secs(30),
            message: Duration::from_secs(1800),
        }
    }
}

const FORMAT: &str = "paceline.rendezvous/1";
/// Bytes of a hello or an answer.
const MOST_BYTES: u64 = 4 << 20;
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(20);
/// For one word of somebody who has connected.
const WORD: Duration = Duration::from_secs(10);

/// What a process says when it comes.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Hello {
    format: String,
    rank: u32,
    size: u32,
    host: String,
    /// Where it listens to its peers.
    port: u16,
    terms: Terms,
}

/// What rank 0 answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Answer {
    Welcome {
        /// Tells this run's processes from those of another one.
        session: u64,
        /// By rank: address, port and host name. That of rank 0 is the one that all know.
        peers: Vec<(String, u16, String)>,
    },
    Refused(String),
}

/// What a process says to a peer that it connects to.
#[derive(Debug, Serialize, Deserialize)]
struct Introduction {
    session: u64,
    rank: u32,
}

fn system(doing: &'static str) -> impl Fn(io::Error) -> ProcessError {
    move |error| ProcessError::System { doing, why: error.to_string() }
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "this host".into() } else { name.trim().to_owned() }
}

fn say(to: &mut TcpStream, what: &impl Serialize) -> io::Result<()> {
    frame::write(to, Kind::Hello, 0, &serde_json::to_vec(what)?)
}

fn hear<T: for<'a> Deserialize<'a>>(from: &mut TcpStream, until: Instant) -> io::Result<T> {
    from.set_nonblocking(false)?;
    from.set_read_timeout(Some(until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))))?;
    let frame = frame::read(from, MOST_BYTES)?;
    if frame.kind != Kind::Hello {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "another word was expected"));
    }
    Ok(serde_json::from_slice(&frame.bytes)?)
}

/// Meets all other processes; returns when everybody is connected with everybody.
///
/// # Errors
/// See [`ProcessError`]: the same one at every process, where it concerns all.
pub fn meet(place: &Place, terms: &Terms, patience: Patience) -> Result<Mesh, ProcessError> {
    let until = Instant::now() + patience.meeting;
    let own = listen(0).map_err(system("listening to the other processes"))?;
    let port = own.local_addr().map_err(system("listening to the other processes"))?.port();
    let hello =
        Hello { format: FORMAT.into(), rank: place.rank, size: place.size, host: host(), port, terms: terms.clone() };
    let (session, peers) = if place.rank == 0 {
        receive_all(place, hello, patience.meeting, until)?
    } else {
        introduce(place, &hello, patience.meeting, until)?
    };
    let hosts = peers.iter().map(|peer| peer.2.clone()).collect();
    let mut streams: Vec<Option<TcpStream>> = (0..place.size).map(|_| None).collect();
    for (rank, (address, port, host)) in (0..place.rank).zip(&peers) {
        let address = if rank == 0 { &place.address } else { address };
        let lost =
            |error: io::Error| ProcessError::Lost { rank, host: host.clone(), what: format!("connecting: {error}") };
        let mut stream = connect(address, *port, until).map_err(lost)?;
        say(&mut stream, &Introduction { session, rank: place.rank }).map_err(lost)?;
        streams[rank as usize] = Some(stream);
    }
    own.set_nonblocking(true).map_err(system("listening to the other processes"))?;
    while streams.iter().enumerate().any(|(rank, stream)| stream.is_none() && rank != place.rank as usize) {
        let Some(mut stream) = accept(&own, until)? else {
            let absent = |&rank: &u32| rank > place.rank && streams[rank as usize].is_none();
            let missing = (0..place.size).filter(absent).collect();
            return Err(ProcessError::Missing { missing, size: place.size, seconds: patience.meeting.as_secs() });
        };
        // Who is none of ours, or leaves again, does not count.
        let Ok(peer) = hear::<Introduction>(&mut stream, until.min(Instant::now() + WORD)) else { continue };
        if peer.session == session && peer.rank > place.rank && peer.rank < place.size {
            streams[peer.rank as usize] = Some(stream);
        }
    }
    Mesh::new(place.rank, hosts, streams, patience)
}

/// Listens on all addresses of this host.
fn listen(port: u16) -> io::Result<TcpListener> {
    // One socket for both versions of the protocol, where the host has the newer one.
    TcpListener::bind(("::", port)).or_else(|error| match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => Err(error),
        _ => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
    })
}

/// The next who connects; `None` when the time is up.
fn accept(listener: &TcpListener, until: Instant) -> Result<Option<TcpStream>, ProcessError> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= until {
                    return Ok(None);
                }
                std::thread::sleep(PAUSE);
            }
            // Of one who has left again already.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(system("accepting a process")(error)),
        }
    }
}

/// Connects, trying again until the time is up: who listens may still be on its way.
fn connect(address: &str, port: u16, until: Instant) -> io::Result<TcpStream> {
    let mut last;
    loop {
        let left = until.saturating_duration_since(Instant::now()).min(WORD).max(Duration::from_millis(1));
        match (address, port).to_socket_addrs() {
            Ok(found) => {
                last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
                for one in found {
                    match TcpStream::connect_timeout(&one, left) {
                        Ok(stream) => return Ok(stream),
                        Err(error) => last = error,
                    }
                }
            }
            Err(error) => last = error,
        }
        if Instant::now() + PAUSE >= until {
            return Err(last);
        }
        std::thread::sleep(PAUSE);
    }
}

/// An address as peers may use it: one of the older protocol stays one.
fn plain(address: SocketAddr) -> String {
    match address.ip() {
        IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(ip.to_string(), |ip| ip.to_string()),
        IpAddr::V4(ip) => ip.to_string(),
    }
}

type Welcome = (u64, Vec<(String, u16, String)>);

/// Rank 0: waits for all, and answers all.
fn receive_all(place: &Place, own: Hello, patience: Duration, until: Instant) -> Result<Welcome, ProcessError> {
    let listener =
        listen(place.port).map_err(|error| ProcessError::Port { port: place.port, why: error.to_string() })?;
    listener.set_nonblocking(true).map_err(system("listening on MASTER_PORT"))?;
    let mut here: Vec<Option<(Hello, TcpStream)>> = (0..place.size).map(|_| None).collect();
    let mut came = Vec::new();
    let verdict = loop {
        if here[1..].iter().all(Option::is_some) {
            break Ok(());
        }
        let Some(mut stream) = accept(&listener, until)? else {
            let missing = (1..place.size).filter(|&rank| here[rank as usize].is_none()).collect();
            break Err(ProcessError::Missing { missing, size: place.size, seconds: patience.as_secs() });
        };
        let Ok(hello) = hear::<Hello>(&mut stream, until.min(Instant::now() + WORD)) else { continue };
        came.extend(stream.try_clone());
        if let Some(error) = disagreement(&own, &hello) {
            break Err(error);
        }
        let twice =
            |first: &str| ProcessError::Twice { rank: hello.rank, first: first.to_owned(), second: hello.host.clone() };
        match here.get(hello.rank as usize) {
            Some(None) if hello.rank > 0 => {}
            Some(Some((first, _))) => break Err(twice(&first.host)),
            _ => break Err(twice(&own.host)),
        }
        let rank = hello.rank as usize;
        here[rank] = Some((hello, stream));
    };
    if let Err(error) = verdict {
        for mut stream in came {
            // Who has left already needs no answer.
            let _ = say(&mut stream, &Answer::Refused(error.to_string()));
        }
        return Err(error);
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let session = crate::data::mix(now.as_nanos() as u64 ^ (u64::from(std::process::id()) << 40));
    let mut peers = vec![(String::new(), own.port, own.host)];
    for (hello, stream) in here.iter().flatten() {
        let address = stream.peer_addr().map_err(system("asking for a peer's address"))?;
        peers.push((plain(address), hello.port, hello.host.clone()));
    }
    for (hello, mut stream) in here.into_iter().flatten() {
        let lost = |error: io::Error| ProcessError::Lost {
            rank: hello.rank,
            host: hello.host.clone(),
            what: format!("it left before the run began: {error}"),
        };
        say(&mut stream, &Answer::Welcome { session, peers: peers.clone() }).map_err(lost)?;
    }
    Ok((session, peers))
}

/// What keeps a process from working with rank 0.
fn disagreement(own: &Hello, other: &Hello) -> Option<ProcessError> {
    let differ = |what: &str, there: String, here: String| {
        let (host, first, what) = (other.host.clone(), own.host.clone(), what.to_owned());
        ProcessError::Disagreement(Box::new(Disagreement { rank: other.rank, host, first, what, there, here }))
    };
    if own.format != other.format {
        return Some(differ("the format of the meeting", other.format.clone(), own.format.clone()));
    }
    if own.size != other.size {
        return Some(differ("WORLD_SIZE", other.size.to_string(), own.size.to_string()));
    }
    let names = own.terms.keys().chain(other.terms.keys().filter(|name| !own.terms.contains_key(*name)));
    let value = |terms: &Terms, name: &String| terms.get(name).cloned().unwrap_or_else(|| "nothing".into());
    names
        .map(|name| (name, value(&other.terms, name), value(&own.terms, name)))
        .find(|(_, there, here)| there != here)
        .map(|(name, there, here)| differ(name, there, here))
}

/// Another rank: says its word to rank 0, and waits for the answer.
fn introduce(place: &Place, hello: &Hello, patience: Duration, until: Instant) -> Result<Welcome, ProcessError> {
    let unreachable = |last: String| ProcessError::Unreachable {
        rank: place.rank,
        address: format!("{}:{}", place.address, place.port),
        seconds: patience.as_secs(),
        last,
    };
    let mut first = connect(&place.address, place.port, until).map_err(|error| unreachable(error.to_string()))?;
    say(&mut first, hello).map_err(|error| unreachable(error.to_string()))?;
    // Rank 0 may have begun to wait later than this process.
    let answer = hear::<Answer>(&mut first, until + patience).map_err(|error| {
        unreachable(match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "it does not answer".into(),
            io::ErrorKind::UnexpectedEof => "it closed the connection".into(),
            _ => error.to_string(),
        })
    })?;
    match answer {
        Answer::Refused(why) => Err(ProcessError::Refused(why)),
        Answer::Welcome { session, peers } if peers.len() == place.size as usize => Ok((session, peers)),
        Answer::Welcome { peers, .. } => {
            Err(unreachable(format!("it leads {} processes, not {}", peers.len(), place.size)))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A port that is free now.
    pub(crate) fn free_port() -> u16 {
        TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
    }

    pub(crate) fn place(rank: u32, size: u32, port: u16) -> Place {
        Place { rank, size, local_rank: rank, address: "127.0.0.1".into(), port }
    }

    fn terms(version: &str) -> Terms {
        Terms::from([("the version of NCCL".into(), version.into()), ("the program".into(), "c0ffee".into())])
    }

    fn patience(meeting: Duration) -> Patience {
        Patience { meeting, silence: Duration::from_secs(5), message: Duration::from_secs(5) }
    }

    const SOON: Duration = Duration::from_secs(20);

    /// What every rank says, `terms_of` giving what each runs.
    fn meet_all(
        places: Vec<Place>,
        meeting: Duration,
        terms_of: impl Fn(u32) -> Terms + Sync,
    ) -> Vec<Result<Mesh, ProcessError>> {
        std::thread::scope(|scope| {
            let terms_of = &terms_of;
            let threads: Vec<_> = places
                .into_iter()
                .map(|place| scope.spawn(move || meet(&place, &terms_of(place.rank), patience(meeting))))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn everybody_is_connected_with_everybody() {
        let port = free_port();
        let all = meet_all((0..4).map(|rank| place(rank, 4, port)).collect(), SOON, |_| terms("2.27"));
        let meshes: Vec<Mesh> = all.into_iter().map(Result::unwrap).collect();
        std::thread::scope(|scope| {
            for (rank, mesh) in (0u32..).zip(&meshes) {
                scope.spawn(move || {
                    for other in (0..4).filter(|&other| other != rank) {
                        mesh.send(other, 9, format!("{rank} to {other}").as_bytes()).unwrap();
                    }
                    for other in (0..4).filter(|&other| other != rank) {
                        assert_eq!(mesh.receive(other, 9).unwrap(), format!("{other} to {rank}").as_bytes());
                    }
                    let all = mesh.all(rank.to_string().into_bytes()).unwrap();
                    assert_eq!(all, ["0", "1", "2", "3"].map(|text| text.as_bytes().to_vec()));
                    mesh.finish().unwrap();
                });
            }
        });
    }

    #[test]
    fn a_single_process_meets_itself() {
        let mesh = meet(&place(0, 1, free_port()), &terms("2.27"), patience(SOON)).unwrap();
        assert_eq!(mesh.all(b"alone".to_vec()).unwrap(), [b"alone".to_vec()]);
        mesh.finish().unwrap();
    }

    #[test]
    fn different_versions_are_refused_at_all_processes_with_one_message() {
        let port = free_port();
        let odd = |rank| terms(if rank == 2 { "2.21.5" } else { "2.27.3" });
        let all = meet_all((0..3).map(|rank| place(rank, 3, port)).collect(), SOON, odd);
        let messages: Vec<String> = all.into_iter().map(|met| met.err().unwrap().to_string()).collect();
        assert!(messages[0].starts_with("rank 2 on "), "{messages:?}");
        assert!(messages[0].contains("disagree on the version of NCCL: 2.21.5 and 2.27.3"), "{messages:?}");
        // Rank 1 hears the same, unless it came after the verdict and found nobody.
        assert_eq!(messages[2], messages[0]);
        assert!(messages[1] == messages[0] || messages[1].contains("cannot reach rank 0"), "{messages:?}");
    }

    #[test]
    fn a_term_that_only_one_has_is_a_disagreement() {
        let port = free_port();
        let more = |rank| {
            let mut terms = terms("2.27");
            terms.extend((rank == 1).then(|| ("the compression".to_owned(), "on".to_owned())));
            terms
        };
        let all = meet_all((0..2).map(|rank| place(rank, 2, port)).collect(), SOON, more);
        let message = all.into_iter().next().unwrap().err().unwrap().to_string();
        assert!(message.contains("the compression: on and nothing"), "{message}");
    }

    #[test]
    fn world_sizes_and_ranks_are_compared() {
        let port = free_port();
        let all = meet_all(vec![place(0, 2, port), place(1, 3, port)], SOON, |_| terms("1"));
        assert!(all.iter().all(|met| met.as_ref().err().unwrap().to_string().contains("WORLD_SIZE: 3 and 2")));
        let port = free_port();
        let mut second = place(0, 3, port);
        second.rank = 1;
        let all = meet_all(vec![place(0, 3, port), place(1, 3, port), second], SOON, |_| terms("1"));
        let message = all[0].as_ref().err().unwrap().to_string();
        assert!(message.starts_with("two processes say that they are rank 1, on "), "{message}");
    }

    #[test]
    fn who_does_not_come_is_named_to_all_who_came() {
        let port = free_port();
        let short = Duration::from_millis(600);
        let all = meet_all(vec![place(0, 4, port), place(2, 4, port)], short, |_| terms("1"));
        for met in all {
            let message = met.err().unwrap().to_string();
            assert!(message.contains("ranks 1, 3 of 4 did not come"), "{message}");
        }
    }

    #[test]
    fn without_rank_0_the_address_and_the_variables_are_named() {
        let port = free_port();
        let met = meet(&place(1, 2, port), &terms("1"), patience(Duration::from_millis(200)));
        let message = met.err().unwrap().to_string();
        assert!(message.contains(&format!("127.0.0.1:{port}")) && message.contains("MASTER_ADDR"), "{message}");
    }

    #[test]
    fn a_busy_port_is_named() {
        let taken = TcpListener::bind(("0.0.0.0", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let message = meet(&place(0, 2, port), &terms("1"), patience(SOON)).err().unwrap().to_string();
        assert!(message.contains(&format!("port {port}")) && message.contains("PACELINE_MASTER_PORT"), "{message}");
    }

    #[test]
    fn strangers_are_not_listened_to() {
        let port = free_port();
        std::thread::scope(|scope| {
            let leader = scope.spawn(move || meet(&place(0, 2, port), &terms("1"), patience(SOON)));
            let until = Instant::now() + SOON;
            let mut stranger = connect("127.0.0.1", port, until).unwrap();
            io::Write::write_all(&mut stranger, b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n").unwrap();
            drop(connect("127.0.0.1", port, until).unwrap());
            let follower = scope.spawn(move || meet(&place(1, 2, port), &terms("1"), patience(SOON)));
            let (leader, follower) = (leader.join().unwrap().unwrap(), follower.join().unwrap().unwrap());
            follower.send(0, 1, b"here").unwrap();
            assert_eq!(leader.receive(1, 1).unwrap(), b"here");
        });
    }

    #[test]
    fn rank_0_may_come_last() {
        let port = free_port();
        std::thread::scope(|scope| {
            let come = move |rank| meet(&place(rank, 2, port), &terms("1"), patience(SOON)).unwrap().finish().unwrap();
            let follower = scope.spawn(move || come(1));
            std::thread::sleep(Duration::from_millis(100));
            come(0);
            follower.join().unwrap();
        });
    }
}
