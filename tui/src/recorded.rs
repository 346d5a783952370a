//! Timelines that were recorded: a trace in memory or in a file, and the Chrome trace-event files that `paceline run --perfetto`,
//! `paceline predict --perfetto` and `paceline report --perfetto` write.

use crate::lanes::{Lane, Lanes, What, span};
use paceline_sim::program::{OpKind, Pass, Stream};
use paceline_sim::trace::{Origin, TRACE_FORMAT, Trace, WaitReason};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// An event, as far as lanes need it.
struct Piece {
    /// Its number on its rank.
    op: u32,
    compute: bool,
    /// In nanoseconds.
    start: u64,
    /// In nanoseconds.
    end: u64,
    wait: Option<WaitReason>,
    /// What it does, where that is work of the rank.
    what: Option<What>,
    /// What is said of who waits for it.
    awaited: String,
}

/// A rank, as far as lanes need it.
#[derive(Default)]
struct Rank {
    pieces: Vec<Piece>,
    memory: Vec<(f64, f64)>,
    peak_bytes: f64,
}

impl Lanes {
    /// Of a trace.
    pub fn of_trace(trace: &Trace) -> Lanes {
        let ranks = trace.ranks.iter().map(|rank| Rank {
            pieces: rank.events.iter().map(piece).collect(),
            memory: rank.memory.iter().map(|(at, bytes)| (at.seconds(), *bytes as f64)).collect(),
            peak_bytes: rank.peak_bytes as f64,
        });
        of_ranks(ranks.collect(), trace.makespan.seconds(), trace.origin == Origin::Measured)
    }
}

/// Reads a timeline from a file: a trace of `--trace`, or a Chrome trace of `--perfetto`.
///
/// # Errors
/// What is wrong with the file, with what can be read.
pub fn read(path: &Path) -> Result<Lanes, String> {
    let refuse = |what: String| {
        format!(
            "trace {}: {what}; write one with `paceline run plan.json --trace FILE` or `--perfetto FILE`",
            path.display()
        )
    };
    let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| {
        refuse(if error.is_eof() {
            format!("truncated at line {}", error.line())
        } else {
            format!("not JSON: {error}")
        })
    })?;
    if value.get("traceEvents").is_some() {
        return of_chrome(&value).map_err(refuse);
    }
    match value.get("format").and_then(Value::as_str) {
        Some(TRACE_FORMAT) => {
            let trace: Trace = serde_json::from_value(value).map_err(|error| refuse(error.to_string()))?;
            Ok(Lanes::of_trace(&trace))
        }
        format => {
            Err(refuse(format!("format {:?} is neither {TRACE_FORMAT:?} nor traceEvents", format.unwrap_or("none"))))
        }
    }
}

fn of_ranks(ranks: Vec<Rank>, end: f64, measured: bool) -> Lanes {
    let (mut lanes, mut reasons) = (Vec::new(), Vec::new());
    for mut rank in ranks {
        let mut lane = Lane { memory: rank.memory, peak_bytes: rank.peak_bytes, ..Lane::default() };
        let mut why = HashMap::new();
        rank.pieces.sort_by_key(|piece| piece.op);
        let by_op: HashMap<u32, &Piece> = rank.pieces.iter().map(|piece| (piece.op, piece)).collect();
        let mut compute: Vec<&Piece> = rank.pieces.iter().filter(|piece| piece.compute).collect();
        compute.sort_by_key(|piece| (piece.start, piece.op));
        for piece in compute {
            if let Some(reason) = reason(piece, &by_op) {
                why.entry(piece.start).or_insert(reason);
            }
            if let Some(what) = piece.what.filter(|_| piece.end > piece.start) {
                lane.spans.push(span(piece.start as f64 * 1e-9, piece.end as f64 * 1e-9, what));
            }
        }
        lanes.push(lane);
        reasons.push(why);
    }
    Lanes::of_recorded(lanes, end, measured, &reasons)
}

/// Why a piece started later than it could have.
fn reason(piece: &Piece, by_op: &HashMap<u32, &Piece>) -> Option<String> {
    match piece.wait? {
        WaitReason::Device => Some("its device is held by another rank or by communication".into()),
        WaitReason::Peer => Some("its peers have not arrived".into()),
        WaitReason::Op(op) => by_op.get(&op.0).map(|other| other.awaited.clone()),
    }
}

const EARLIER_PASS: &str = "an earlier pass is not done";
const NOT_TAKEN: &str = "its message has not been taken";
const COLLECTIVE: &str = "a collective is under way";
const OPTIMIZER: &str = "the optimizer is not done";

fn on_its_way(microbatch: u32, from: u32) -> String {
    format!("the message of microbatch {microbatch} from r{from} is on its way")
}

fn piece(event: &paceline_sim::trace::Event) -> Piece {
    let (what, awaited) = match &event.kind {
        OpKind::Compute { pass, stage, microbatch, .. } => {
            let what = What::Pass { pass: *pass, stage: stage.index() as u32, microbatch: microbatch.0 };
            (Some(what), EARLIER_PASS.into())
        }
        OpKind::Recv { peer, message, .. } => (None, on_its_way(message.microbatch.0, peer.0)),
        OpKind::Send { .. } => (None, NOT_TAKEN.into()),
        OpKind::Collective { .. } => (Some(What::Communication), COLLECTIVE.into()),
        OpKind::Join => (None, OPTIMIZER.into()),
        OpKind::GradientNorm | OpKind::Optimizer { .. } | OpKind::OptimizerAhead { .. } | OpKind::Validate { .. } => {
            (Some(What::Optimizer), OPTIMIZER.into())
        }
    };
    Piece {
        op: event.op.0,
        compute: event.stream == Stream::COMPUTE,
        start: event.start.0,
        end: event.end.0,
        wait: event.wait,
        what,
        awaited,
    }
}

/// A Chrome trace, as far as it is one of ours: processes are ranks, thread 0 computes, names say what.
fn of_chrome(document: &Value) -> Result<Lanes, String> {
    let events = document["traceEvents"].as_array().ok_or("traceEvents is no list")?;
    let measured = document["otherData"]["origin"] == "measured";
    let mut ranks: BTreeMap<u64, Rank> = BTreeMap::new();
    let mut end = 0u64;
    let mut passes = 0;
    for event in events {
        let Some(pid) = event["pid"].as_u64() else { continue };
        let nanos = |value: &Value| value.as_f64().filter(|us| *us >= 0.0).map(|us| (us * 1e3).round() as u64);
        match event["ph"].as_str() {
            Some("X") => {
                let (Some(start), Some(length)) = (nanos(&event["ts"]), nanos(&event["dur"])) else {
                    return Err(format!("an event without times: {event}"));
                };
                let rank = ranks.entry(pid).or_default();
                let args = &event["args"];
                let op = args["op"].as_u64().and_then(|op| u32::try_from(op).ok());
                let (what, awaited) = named(event["name"].as_str().unwrap_or_default());
                passes += usize::from(matches!(what, Some(What::Pass { .. })));
                end = end.max(start + length);
                rank.pieces.push(Piece {
                    op: op.unwrap_or(rank.pieces.len() as u32),
                    compute: event["tid"].as_u64() == Some(0),
                    start,
                    end: start + length,
                    wait: wait(args["waited_for"].as_str()),
                    what,
                    awaited,
                });
            }
            Some("C") => {
                if let (Some(at), Some(bytes)) = (nanos(&event["ts"]), event["args"]["bytes"].as_f64()) {
                    let rank = ranks.entry(pid).or_default();
                    rank.memory.push((at as f64 * 1e-9, bytes));
                    rank.peak_bytes = rank.peak_bytes.max(bytes);
                }
            }
            _ => {}
        }
    }
    if passes == 0 {
        return Err("none of its events is a pass of Paceline".into());
    }
    let most = ranks.keys().next_back().copied().unwrap_or(0);
    if most >= 1 << 20 {
        return Err(format!("process {most} is no rank"));
    }
    let ranks = (0..=most).map(|rank| ranks.remove(&rank).unwrap_or_default()).collect();
    Ok(of_ranks(ranks, end as f64 * 1e-9, measured))
}

fn wait(said: Option<&str>) -> Option<WaitReason> {
    match said? {
        "device" => Some(WaitReason::Device),
        "peer" => Some(WaitReason::Peer),
        op => op.strip_prefix("op").and_then(|n| n.parse().ok()).map(|n| WaitReason::Op(paceline_sim::units::OpId(n))),
    }
}

/// What an event of a name is: those of traces, such as `BW m2 s1 u0..3`, and those of reports, such as `forward of microbatch 2
/// on stage 1`.
fn named(name: &str) -> (Option<What>, String) {
    let number = |word: Option<&str>, prefix: char| word?.strip_prefix(prefix)?.parse::<u32>().ok();
    let mut words = name.split_whitespace();
    let first = words.next().unwrap_or_default();
    let pass = match first {
        "F" => Some(Pass::F),
        "B" => Some(Pass::B),
        "W" => Some(Pass::W),
        "BW" => Some(Pass::BW),
        "R" => Some(Pass::R),
        _ => None,
    };
    if let Some(pass) = pass
        && let (Some(microbatch), Some(stage)) = (number(words.next(), 'm'), number(words.next(), 's'))
    {
        return (Some(What::Pass { pass, stage, microbatch }), EARLIER_PASS.into());
    }
    if let Some((what, rest)) = name.split_once(" of microbatch ")
        && let Some((microbatch, stage)) = rest.split_once(" on stage ")
        && let (Ok(microbatch), Ok(stage)) = (microbatch.parse(), stage.parse())
    {
        let passes = [Pass::F, Pass::B, Pass::W, Pass::BW, Pass::R];
        let described = |pass: &Pass| What::Pass { pass: *pass, stage, microbatch }.describe() == name;
        if let Some(pass) = passes.into_iter().find(described) {
            return (Some(What::Pass { pass, stage, microbatch }), EARLIER_PASS.into());
        }
        return (None, format!("{what} is under way"));
    }
    match first {
        "receive" => {
            let words: Vec<&str> = name.split_whitespace().collect();
            let from = number(words.get(3).copied(), 'r');
            match (number(words.get(1).copied(), 'm'), from) {
                (Some(microbatch), Some(from)) => (None, on_its_way(microbatch, from)),
                _ => (None, "a message is on its way".into()),
            }
        }
        "send" => (None, NOT_TAKEN.into()),
        "join" => (None, OPTIMIZER.into()),
        "optimizer" | "validate" | "gradient" => (Some(What::Optimizer), OPTIMIZER.into()),
        _ => (Some(What::Communication), COLLECTIVE.into()),
    }
}
