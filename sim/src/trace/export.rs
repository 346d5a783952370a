//! A trace as a Chrome trace-event file, which Perfetto (ui.perfetto.dev) and chrome://tracing open: ranks are processes, streams
//! threads, memory a counter, messages arrows. Format: "Trace Event Format", Google, sections on complete, counter, flow and
//! metadata events; times there are microseconds.

use super::{Event, Origin, Trace, WaitReason};
use crate::compare::op_class;
use crate::program::{OpKind, Stream};
use crate::units::Nanos;
use serde_json::{Value, json};

impl Trace {
    /// The trace as a JSON document.
    pub fn to_chrome(&self) -> Value {
        let mut events = Vec::new();
        for (pid, rank) in self.ranks.iter().enumerate() {
            events.push(metadata("process_name", pid, 0, &format!("r{pid}")));
            let mut streams: Vec<Stream> = rank.events.iter().map(|event| event.stream).collect();
            streams.sort_unstable();
            streams.dedup();
            for stream in streams {
                let name = match stream {
                    Stream::COMPUTE => "compute".to_string(),
                    Stream::COLLECTIVE => "collectives".to_string(),
                    Stream::GATHER => "gathers".to_string(),
                    Stream(edge) => format!("messages {edge}"),
                };
                events.push(metadata("thread_name", pid, usize::from(stream.0), &name));
            }
            for event in &rank.events {
                events.push(complete(event, pid));
                events.extend(arrow(event, pid));
            }
            for &(at, bytes) in &rank.memory {
                events.push(json!({
                    "ph": "C", "name": "memory", "pid": pid, "ts": microseconds(at), "args": { "bytes": bytes },
                }));
            }
        }
        let origin = match self.origin {
            Origin::Predicted => "predicted",
            Origin::Measured => "measured",
        };
        json!({
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": { "origin": origin, "format": self.format },
        })
    }
}

fn microseconds(time: Nanos) -> f64 {
    time.0 as f64 / 1e3
}

fn metadata(what: &str, pid: usize, tid: usize, name: &str) -> Value {
    json!({ "ph": "M", "name": what, "pid": pid, "tid": tid, "args": { "name": name } })
}

fn complete(event: &Event, pid: usize) -> Value {
    let waited = match event.wait {
        None => Value::Null,
        Some(WaitReason::Op(op)) => json!(op.to_string()),
        Some(WaitReason::Device) => json!("device"),
        Some(WaitReason::Peer) => json!("peer"),
    };
    json!({
        "ph": "X",
        "name": name(&event.kind),
        "cat": op_class(&event.kind),
        "pid": pid,
        "tid": event.stream.0,
        "ts": microseconds(event.start),
        "dur": microseconds(event.end - event.start),
        "args": { "op": event.op.0, "ready_us": microseconds(event.ready), "waited_for": waited },
    })
}

/// What is written on the box of an op.
fn name(kind: &OpKind) -> String {
    match *kind {
        OpKind::Compute { pass, stage, microbatch, first, end } if end == first + 1 => {
            format!("{pass} {microbatch} {stage} u{first}")
        }
        OpKind::Compute { pass, stage, microbatch, first, end } => {
            format!("{pass} {microbatch} {stage} u{first}..{end}")
        }
        OpKind::Send { peer, message, .. } => format!("send {} to {peer}", message.microbatch),
        OpKind::Recv { peer, message, .. } => format!("receive {} from {peer}", message.microbatch),
        OpKind::Optimizer { stage, unit } => format!("optimizer {stage} u{unit}"),
        OpKind::OptimizerAhead { stage, unit, .. } => format!("optimizer ahead {stage} u{unit}"),
        OpKind::Validate { stage, unit, .. } => format!("validate {stage} u{unit}"),
        _ => op_class(kind),
    }
}

/// An arrow leaves a send and ends at its receive: both know the message and the two ranks.
fn arrow(event: &Event, pid: usize) -> Option<Value> {
    let (phase, from, to, message, at) = match event.kind {
        OpKind::Send { peer, message, .. } => ("s", pid, peer.index(), message, event.start),
        OpKind::Recv { peer, message, .. } => ("f", peer.index(), pid, message, event.end),
        _ => return None,
    };
    let id = format!("{from}>{to} {:?} {} {}", message.direction, message.stage, message.microbatch);
    Some(json!({
        "ph": phase, "bp": "e", "name": "message", "cat": "message", "id": id,
        "pid": pid, "tid": event.stream.0, "ts": microseconds(at),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{Direction, Message, Pass};
    use crate::trace::{RankTrace, TRACE_FORMAT};
    use crate::units::{BufferId, MicrobatchId, OpId, RankId, StageId};
    use std::collections::BTreeMap;

    fn event(op: u32, stream: u8, kind: OpKind, span: (u64, u64), wait: Option<WaitReason>) -> Event {
        let (start, end) = (Nanos(span.0), Nanos(span.1));
        Event { op: OpId(op), kind, stream: Stream(stream), ready: Nanos(0), start, end, wait }
    }

    #[test]
    fn boxes_arrows_and_memory() {
        let (stage, microbatch) = (StageId(1), MicrobatchId(2));
        let message = Message { direction: Direction::Forward, stage, microbatch };
        let compute = OpKind::Compute { pass: Pass::BW, stage, microbatch, first: 0, end: 3 };
        let (buffer, peer) = (BufferId(0), RankId);
        let rank = |events| RankTrace {
            events,
            memory: vec![(Nanos(0), 64), (Nanos(1500), 128)],
            peak_bytes: 128,
            peak_by_class: BTreeMap::new(),
        };
        let sender = vec![
            event(0, 0, compute, (1500, 4000), Some(WaitReason::Op(OpId(7)))),
            event(1, 3, OpKind::Send { peer: peer(1), message, buffer }, (4000, 4500), None),
        ];
        let receiver = vec![event(0, 2, OpKind::Recv { peer: peer(0), message, buffer }, (4000, 4500), None)];
        let trace = Trace {
            format: TRACE_FORMAT.into(),
            origin: Origin::Predicted,
            makespan: Nanos(4500),
            ranks: vec![rank(sender), rank(receiver)],
        };
        let file = trace.to_chrome();
        let events = file["traceEvents"].as_array().unwrap();
        let of = |phase: &str| events.iter().filter(|event| event["ph"] == phase).collect::<Vec<_>>();
        let boxes = of("X");
        assert_eq!(boxes.len(), 3);
        assert_eq!(boxes[0]["name"], "BW m2 s1 u0..3");
        assert_eq!((boxes[0]["ts"].as_f64(), boxes[0]["dur"].as_f64()), (Some(1.5), Some(2.5)));
        assert_eq!(boxes[0]["args"]["waited_for"], "op7");
        assert_eq!((&boxes[2]["pid"], &boxes[2]["tid"]), (&json!(1), &json!(2)));
        let (out, into) = (of("s"), of("f"));
        assert_eq!((out.len(), into.len()), (1, 1));
        assert_eq!(out[0]["id"], into[0]["id"]);
        let names: Vec<&Value> = of("M").into_iter().map(|event| &event["args"]["name"]).collect();
        assert_eq!(names, ["r0", "compute", "messages 3", "r1", "gathers"]);
        assert_eq!(of("C")[1]["args"]["bytes"], 128);
        assert_eq!(file["otherData"]["origin"], "predicted");
    }
}
