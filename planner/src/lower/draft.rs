//! The program of one rank while it is being made: ops can still be put between others, because they refer to each other
//! by handles and not by places.

use paceline_sim::program::{Buffer, Ids, MemoryClass, Op, OpKind, Precision, Stream, Tensor};
use paceline_sim::units::{BufferId, OpId, RankId};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::LowerError;

/// Names an op of a draft, whatever its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Handle(pub usize);

/// An op of a draft. Peers of messages are numbered as pipeline ranks.
#[derive(Debug, Clone)]
pub(super) struct DraftOp {
    pub stream: Stream,
    pub kind: OpKind,
    pub waits: Vec<Handle>,
    pub uses: Vec<BufferId>,
    pub alloc: Ids<BufferId>,
    pub free: Ids<BufferId>,
    /// The action of the compute order that it belongs to; ops of the step's end come after all actions.
    pub action: usize,
}

impl DraftOp {
    pub fn new(stream: Stream, kind: OpKind, action: usize) -> DraftOp {
        DraftOp { stream, kind, waits: vec![], uses: vec![], alloc: Ids::new(), free: Ids::new(), action }
    }

    pub fn computes(&self) -> bool {
        self.stream == Stream::COMPUTE
    }
}

/// The ops and buffers of a rank.
#[derive(Debug, Clone, Default)]
pub(super) struct Draft {
    /// By handle.
    pub ops: Vec<DraftOp>,
    /// In issue order.
    pub order: Vec<Handle>,
    pub buffers: Vec<Buffer>,
    pub persistent: Vec<BufferId>,
    by_tensor: HashMap<Tensor, BufferId>,
    precision: Precision,
}

impl Draft {
    /// Nothing yet, in these number formats.
    pub fn new(precision: Precision) -> Draft {
        Draft { precision, ..Draft::default() }
    }

    /// Adds an op that has no place yet.
    pub fn add(&mut self, op: DraftOp) -> Handle {
        self.ops.push(op);
        Handle(self.ops.len() - 1)
    }

    /// Adds an op at the end.
    pub fn push(&mut self, op: DraftOp) -> Handle {
        let handle = self.add(op);
        self.order.push(handle);
        handle
    }

    pub fn op(&mut self, handle: Handle) -> &mut DraftOp {
        &mut self.ops[handle.0]
    }

    /// The buffer of a tensor; made when it is new. The workspace of an op is never shared.
    pub fn buffer(&mut self, tensor: Tensor, class: MemoryClass, bytes: u64) -> Result<BufferId, LowerError> {
        if !matches!(tensor, Tensor::Workspace { .. })
            && let Some(&known) = self.by_tensor.get(&tensor)
        {
            let first = self.buffers[known.index()].bytes;
            return if first == bytes { Ok(known) } else { Err(LowerError::Size { tensor, first, second: bytes }) };
        }
        let id = self.another(tensor, class, bytes);
        self.by_tensor.insert(tensor, id);
        Ok(id)
    }

    /// A further buffer of a tensor that lives several times.
    pub fn another(&mut self, tensor: Tensor, class: MemoryClass, bytes: u64) -> BufferId {
        let element = self.precision.element(tensor);
        self.buffers.push(Buffer { class, bytes, tensor, start: 0, element });
        BufferId(self.buffers.len() as u32 - 1)
    }

    /// The same of so many elements.
    pub fn another_of(&mut self, tensor: Tensor, class: MemoryClass, elements: u64) -> BufferId {
        self.another(tensor, class, self.precision.element(tensor).bytes() * elements)
    }

    /// A persistent buffer that holds a range of elements of a unit's array, `copies` times in a row.
    pub fn keep(&mut self, tensor: Tensor, class: MemoryClass, range: &Range<u64>, copies: u64) -> BufferId {
        let id = self.by_tensor.get(&tensor).copied();
        let id = id.unwrap_or_else(|| self.another_of(tensor, class, copies * (range.end - range.start)));
        self.buffers[id.index()].start = range.start;
        self.by_tensor.insert(tensor, id);
        self.persistent.push(id);
        id
    }

    /// The buffer of a tensor, if there is one.
    pub fn find(&self, tensor: Tensor) -> Option<BufferId> {
        self.by_tensor.get(&tensor).copied()
    }

    /// Puts ops before the ops at some places.
    pub fn insert_before(&mut self, mut insertions: BTreeMap<usize, Vec<Handle>>) {
        let old = std::mem::take(&mut self.order);
        for (place, handle) in old.into_iter().enumerate() {
            self.order.append(&mut insertions.remove(&place).unwrap_or_default());
            self.order.push(handle);
        }
        self.order.extend(insertions.into_values().flatten());
    }

    /// Puts ops behind the ops at some places, and behind the sends that follow them.
    pub fn insert_behind(&mut self, insertions: &BTreeMap<usize, Vec<Handle>>) {
        let old = std::mem::take(&mut self.order);
        let mut due: Vec<Handle> = Vec::new();
        for (place, handle) in old.into_iter().enumerate() {
            if !matches!(self.ops[handle.0].kind, OpKind::Send { .. }) {
                self.order.append(&mut due);
            }
            self.order.push(handle);
            due.extend(insertions.get(&place).into_iter().flatten());
        }
        self.order.append(&mut due);
    }

    /// The finished tables; `rank` numbers a pipeline rank of this replica.
    pub fn finish(mut self, rank: impl Fn(u32) -> RankId) -> (Vec<Buffer>, Vec<BufferId>, Vec<Op>) {
        let mut place = vec![OpId(u32::MAX); self.ops.len()];
        for (n, handle) in self.order.iter().enumerate() {
            place[handle.0] = OpId(n as u32);
        }
        let mut drafts: Vec<Option<DraftOp>> = self.ops.into_iter().map(Some).collect();
        let mut ops = Vec::with_capacity(self.order.len());
        for (n, handle) in self.order.iter().enumerate() {
            let Some(mut draft) = drafts[handle.0].take() else { continue };
            match &mut draft.kind {
                OpKind::Send { peer, .. } | OpKind::Recv { peer, .. } => *peer = rank(peer.0),
                _ => {}
            }
            for buffer in &draft.uses {
                if let Tensor::Workspace { op } = &mut self.buffers[buffer.index()].tensor {
                    *op = n as u32;
                }
            }
            let mut waits: Ids<OpId> = draft.waits.iter().map(|wait| place[wait.0]).collect();
            waits.sort_unstable();
            waits.dedup();
            draft.uses.sort_unstable();
            draft.uses.dedup();
            ops.push(Op {
                stream: draft.stream,
                kind: draft.kind,
                waits,
                alloc: draft.alloc,
                uses: draft.uses.into(),
                free: draft.free,
            });
        }
        (self.buffers, self.persistent, ops)
    }
}
