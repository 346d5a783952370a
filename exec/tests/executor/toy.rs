//! A model small enough to be differentiated by hand, and programs for it built op by op: what the executor is tested
//! with beside the real model.
//!
//! Stage `s` computes `y = x + x W_s` on rows of width [`WIDTH`]; the first stage looks `x` up in a table by token, the
//! last one has the loss `|y - u(target)|^2 / 2` with a fixed vector `u` for each target.

use crate::heap::floats;
use paceline_exec::{ExecError, Launch, Operands, Parameter, Passes, Start, TiedCopy};
use paceline_kernels::{Call, View};
use paceline_sim::program as sim;
use paceline_sim::program::{
    Arrangement, Buffer, Collective, Coordinates, Direction, Group, MemoryClass, Message, NetworkLevel, Op, OpKind,
    PROGRAM_FORMAT, Pass, Payload, Precision, Program, RankProgram, Stage, Stream, Tensor, Unit, Workload,
};
use paceline_sim::units::{BufferId, DeviceId, GroupId, MicrobatchId, OpId, RankId, StageId};

pub const WIDTH: usize = 6;
pub const VOCAB: usize = 16;
pub const SEQ: usize = 5;
/// Sequences of a microbatch.
pub const SEQUENCES: usize = 2;
const ROWS: usize = SEQ * SEQUENCES;
const FLOAT: u64 = 4;

/// A layout of the toy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    pub data: u32,
    pub pipeline: u32,
    /// Stages in all; rank `r` holds the stages `r, r + pipeline, ..`.
    pub stages: u16,
    /// Per replica.
    pub microbatches: u32,
    pub devices: u32,
    /// All forwards first, or one forward and one backward in turn.
    pub gpipe: bool,
    pub zero1: bool,
}

impl Layout {
    pub const SINGLE: Layout =
        Layout { data: 1, pipeline: 1, stages: 4, microbatches: 8, devices: 1, gpipe: true, zero1: false };
}

/// Elements of a stage's parameters.
pub fn parameters_of(stage: u16) -> usize {
    WIDTH * WIDTH + if stage == 0 { VOCAB * WIDTH } else { 0 }
}

struct RankBuilder {
    buffers: Vec<Buffer>,
    ops: Vec<Op>,
}

impl RankBuilder {
    fn buffer(&mut self, class: MemoryClass, bytes: u64, tensor: Tensor) -> BufferId {
        self.buffers.push(Buffer { class, bytes, tensor, start: 0, element: Precision::Fp32.element(tensor) });
        BufferId(self.buffers.len() as u32 - 1)
    }

    fn find(&self, tensor: Tensor) -> BufferId {
        BufferId(self.buffers.iter().position(|b| b.tensor == tensor).unwrap() as u32)
    }

    fn push(
        &mut self,
        stream: u8,
        kind: OpKind,
        waits: &[OpId],
        alloc: &[BufferId],
        uses: &[BufferId],
        free: &[BufferId],
    ) -> OpId {
        let mut all: Vec<BufferId> = [uses, alloc, free].concat();
        all.sort();
        all.dedup();
        self.ops.push(Op {
            stream: Stream(stream),
            kind,
            waits: waits.into(),
            alloc: alloc.into(),
            uses: all.as_slice().into(),
            free: free.into(),
        });
        OpId(self.ops.len() as u32 - 1)
    }
}

/// The compute order of a pipeline rank: (stage, microbatch, forward).
fn order(layout: &Layout, rank: u32) -> Vec<(u16, u32, bool)> {
    let chunks: Vec<u16> = (rank as u16..layout.stages).step_by(layout.pipeline as usize).collect();
    let m = layout.microbatches;
    let forwards = chunks.iter().flat_map(|&s| (0..m).map(move |n| (s, n, true)));
    let backwards = chunks.iter().rev().flat_map(|&s| (0..m).map(move |n| (s, n, false)));
    if layout.gpipe || chunks.len() > 1 {
        return forwards.chain(backwards).collect();
    }
    let (f, b): (Vec<_>, Vec<_>) = (forwards.collect(), backwards.collect());
    let warm = ((layout.pipeline - rank - 1) as usize).min(f.len());
    let mut out: Vec<_> = f[..warm].to_vec();
    for (n, backward) in b.into_iter().enumerate() {
        out.extend(f.get(warm + n));
        out.push(backward);
    }
    out
}

/// One step of the toy under a layout.
pub fn program(layout: &Layout) -> Program {
    let ranks = layout.data * layout.pipeline;
    let id = |data: u32, pipeline: u32| RankId(data * layout.pipeline + pipeline);
    let groups: Vec<Group> = (0..layout.pipeline)
        .map(|p| ((0..layout.data).map(|d| id(d, p)).collect(), format!("dp of {p}")))
        .chain((0..layout.data).map(|d| ((0..layout.pipeline).map(|p| id(d, p)).collect(), format!("pp of {d}"))))
        .chain([((0..ranks).map(RankId).collect(), "all".to_string())])
        .map(|(ranks, name): (Vec<RankId>, String)| Group {
            name,
            size: ranks.len() as u32,
            ranks,
            level: NetworkLevel::Intra,
            crossing: None,
        })
        .collect();
    let programs = (0..ranks).map(|r| rank_program(layout, r / layout.pipeline, r % layout.pipeline, &groups));
    Program {
        format: PROGRAM_FORMAT.into(),
        workload: Workload::Abstract,
        microbatches: layout.microbatches,
        devices: (0..layout.devices).map(|d| sim::Device { name: format!("cpu:{d}"), node: 0 }).collect(),
        ranks: programs.collect(),
        groups,
        stages: (0..layout.stages).map(|_| Stage { units: vec![Unit { layers: vec![] }] }).collect(),
    }
}

fn rank_program(layout: &Layout, data: u32, pipeline: u32, groups: &[Group]) -> RankProgram {
    let mut b = RankBuilder { buffers: vec![], ops: vec![] };
    let stages: Vec<StageId> =
        (pipeline as u16..layout.stages).step_by(layout.pipeline as usize).map(StageId).collect();
    let last = StageId(layout.stages - 1);
    let peer = |stage: StageId| RankId(data * layout.pipeline + u32::from(stage.0) % layout.pipeline);
    let here = RankId(data * layout.pipeline + pipeline);
    let hidden = (ROWS * WIDTH) as u64 * FLOAT;
    let ids = ROWS as u64 * 4;
    let (sharded, parts) = (layout.zero1 && layout.data > 1, layout.data as usize);
    let mut persistent = vec![];
    for &stage in &stages {
        let len = parameters_of(stage.0);
        let own = if sharded {
            len.div_ceil(parts).min(len.saturating_sub(data as usize * len.div_ceil(parts)))
        } else {
            len
        };
        persistent.push(b.buffer(MemoryClass::Parameter, len as u64 * FLOAT, Tensor::Parameters { stage, unit: 0 }));
        persistent.push(b.buffer(MemoryClass::Gradient, len as u64 * FLOAT, Tensor::Gradients { stage, unit: 0 }));
        persistent.push(b.buffer(
            MemoryClass::OptimizerState,
            2 * own as u64 * FLOAT,
            Tensor::Moments { stage, unit: 0 },
        ));
        if let Some(moments) = b.buffers.last_mut().filter(|_| sharded) {
            moments.start = (data as usize * len.div_ceil(parts)).min(len) as u64;
        }
    }
    let losses = stages.contains(&last).then(|| {
        let bytes = u64::from(layout.microbatches) * FLOAT;
        b.buffer(MemoryClass::Activation, bytes, Tensor::Losses)
    });
    let mut losses_alive = false;
    let mut sends: Vec<OpId> = vec![];
    let mut leftovers: Vec<BufferId> = vec![];
    let mut forward_sends = std::collections::HashMap::new();
    for (stage, n, forward) in order(layout, pipeline) {
        let (stage, microbatch) = (StageId(stage), MicrobatchId(n));
        let compute = |pass| OpKind::Compute { pass, stage, microbatch, first: 0, end: 1 };
        let message = |direction, stage| Message { direction, stage, microbatch };
        let (before, after) = (StageId(stage.0.wrapping_sub(1)), StageId(stage.0 + 1));
        let parameters = b.find(Tensor::Parameters { stage, unit: 0 });
        if forward {
            let (mut alloc, mut uses, mut waits) = (vec![], vec![parameters], vec![]);
            if stage.0 == 0 {
                alloc.push(b.buffer(MemoryClass::Activation, ids, Tensor::Tokens { microbatch }));
            } else if peer(before) == here {
                uses.push(b.find(Tensor::StageInput { stage, microbatch }));
            } else {
                let input = b.buffer(MemoryClass::ReceivedActivation, hidden, Tensor::StageInput { stage, microbatch });
                let kind =
                    OpKind::Recv { peer: peer(before), message: message(Direction::Forward, stage), buffer: input };
                waits.push(b.push(2, kind, &[], &[input], &[input], &[]));
                uses.push(input);
            }
            if stage == last {
                alloc.push(b.buffer(MemoryClass::Activation, ids, Tensor::Targets { microbatch }));
                alloc.push(b.buffer(MemoryClass::Activation, hidden, Tensor::StageOutput { stage, microbatch }));
                let losses = losses.unwrap();
                if !std::mem::replace(&mut losses_alive, true) {
                    alloc.push(losses);
                } else {
                    uses.push(losses);
                }
            } else {
                // On one rank, what leaves a stage is the input of the next.
                let tensor = if peer(after) == here {
                    Tensor::StageInput { stage: after, microbatch }
                } else {
                    Tensor::StageOutput { stage, microbatch }
                };
                alloc.push(b.buffer(MemoryClass::Activation, hidden, tensor));
            }
            b.push(0, compute(Pass::F), &waits, &alloc, &uses, &[]);
            if stage != last && peer(after) != here {
                let buffer = b.find(Tensor::StageOutput { stage, microbatch });
                let kind = OpKind::Send { peer: peer(after), message: message(Direction::Forward, after), buffer };
                forward_sends.insert((stage, n), b.push(3, kind, &[], &[], &[buffer], &[]));
            }
        } else {
            let (mut alloc, mut free, mut waits) = (vec![], vec![], vec![]);
            let uses = vec![parameters, b.find(Tensor::Gradients { stage, unit: 0 })];
            if stage == last {
                free.push(b.find(Tensor::Targets { microbatch }));
                free.push(b.find(Tensor::StageOutput { stage, microbatch }));
            } else {
                let tensor = Tensor::OutputGradient { stage, microbatch };
                if peer(after) == here {
                    free.push(b.find(tensor));
                } else {
                    let buffer = b.buffer(MemoryClass::ReceivedActivation, hidden, tensor);
                    let message = message(Direction::Backward, stage);
                    waits.push(b.push(
                        4,
                        OpKind::Recv { peer: peer(after), message, buffer },
                        &[],
                        &[buffer],
                        &[buffer],
                        &[],
                    ));
                    free.push(buffer);
                    waits.push(forward_sends[&(stage, n)]);
                    free.push(b.find(Tensor::StageOutput { stage, microbatch }));
                }
            }
            if stage.0 == 0 {
                free.push(b.find(Tensor::Tokens { microbatch }));
            } else {
                free.push(b.find(Tensor::StageInput { stage, microbatch }));
                let tensor = if peer(before) == here {
                    Tensor::OutputGradient { stage: before, microbatch }
                } else {
                    Tensor::InputGradient { stage, microbatch }
                };
                alloc.push(b.buffer(MemoryClass::Activation, hidden, tensor));
            }
            b.push(0, compute(Pass::BW), &waits, &alloc, &uses, &free);
            if stage.0 > 0 && peer(before) != here {
                let buffer = b.find(Tensor::InputGradient { stage, microbatch });
                let message = message(Direction::Backward, before);
                sends.push(b.push(5, OpKind::Send { peer: peer(before), message, buffer }, &[], &[], &[buffer], &[]));
                leftovers.push(buffer);
            }
        }
    }
    step_end(layout, data, pipeline, groups, &stages, &mut b, sends, leftovers, losses);
    RankProgram {
        device: DeviceId(here.0 % layout.devices),
        coordinates: Coordinates { data, pipeline, group: 0 },
        stages,
        buffers: b.buffers,
        persistent,
        ops: b.ops,
    }
}

#[allow(clippy::too_many_arguments)]
fn step_end(
    layout: &Layout,
    data: u32,
    pipeline: u32,
    groups: &[Group],
    stages: &[StageId],
    b: &mut RankBuilder,
    sends: Vec<OpId>,
    leftovers: Vec<BufferId>,
    losses: Option<BufferId>,
) {
    let (of_data, of_pipeline) = (GroupId(pipeline), GroupId(layout.pipeline + data));
    let everyone = GroupId(groups.len() as u32 - 1);
    let collective = |collective, group, payload, buffer, bytes| OpKind::Collective {
        collective,
        group,
        payload,
        buffer,
        bytes,
        arrangement: Arrangement::default(),
    };
    let gradients: Vec<BufferId> = stages.iter().map(|&stage| b.find(Tensor::Gradients { stage, unit: 0 })).collect();
    let bytes = |b: &RankBuilder, id: BufferId| b.buffers[id.index()].bytes;
    let mut reduced = vec![];
    if layout.data > 1 {
        let kind = if layout.zero1 { Collective::ReduceScatter } else { Collective::AllReduce };
        for (&stage, &buffer) in stages.iter().zip(&gradients) {
            let payload = Payload::Gradients { stage, unit: 0 };
            let size = bytes(b, buffer);
            reduced.push(b.push(1, collective(kind, of_data, payload, buffer, size), &[], &[], &[buffer], &[]));
        }
    }
    let norm = b.buffer(MemoryClass::CommScratch, 8, Tensor::GradientNorm);
    b.push(0, OpKind::GradientNorm, &reduced, &[norm], &gradients, &[]);
    let group = if layout.zero1 { everyone } else { of_pipeline };
    let summed =
        b.push(1, collective(Collective::AllReduce, group, Payload::GradientNorm, norm, 8), &[], &[], &[norm], &[]);
    let mut ends = sends;
    for &stage in stages {
        let tensors = [
            Tensor::Parameters { stage, unit: 0 },
            Tensor::Gradients { stage, unit: 0 },
            Tensor::Moments { stage, unit: 0 },
        ];
        let mut uses = tensors.map(|tensor| b.find(tensor)).to_vec();
        let parameters = uses[0];
        uses.push(norm);
        b.push(0, OpKind::Optimizer { stage, unit: 0 }, &[summed], &[], &uses, &[]);
        if layout.zero1 && layout.data > 1 {
            let payload = Payload::Parameters { stage, unit: 0 };
            let size = bytes(b, parameters);
            ends.push(b.push(
                1,
                collective(Collective::AllGather, of_data, payload, parameters, size),
                &[],
                &[],
                &[parameters],
                &[],
            ));
        }
    }
    let free: Vec<BufferId> = leftovers.into_iter().chain([norm]).chain(losses).collect();
    b.push(0, OpKind::Join, &ends, &[], &[], &free);
}

/// The passes of the toy.
pub struct Toy {
    pub stages: u16,
    /// One over the tokens of the global batch.
    pub scale: f32,
    /// Fails in this pass, to see the run end.
    pub fail: Option<(Pass, StageId, MicrobatchId, Failure)>,
}

/// Ways to fail.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Failure {
    Error,
    Panic,
    /// Touches the gradients of a stage in its forward.
    Undeclared,
}

impl Toy {
    pub fn new(layout: &Layout) -> Toy {
        let tokens = layout.data as usize * layout.microbatches as usize * ROWS;
        Toy { stages: layout.stages, scale: 1.0 / tokens as f32, fail: None }
    }
}

/// The vector that a target stands for.
pub fn target_vector(target: u32) -> [f32; WIDTH] {
    std::array::from_fn(|c| ((target as usize * 7 + c * 3) % 11) as f32 / 11.0 - 0.5)
}

/// # Safety
/// As for [`floats`].
unsafe fn words<'a>(view: View) -> &'a [u32] {
    unsafe { std::slice::from_raw_parts(view.address() as *const u32, view.len()) }
}

impl Passes for Toy {
    fn run(&self, kind: &OpKind, launch: &dyn Launch, operands: &dyn Operands) -> Result<(), ExecError> {
        let &OpKind::Compute { pass, stage, microbatch, .. } = kind else { unreachable!() };
        match self.fail.filter(|&(p, s, m, _)| (p, s, m) == (pass, stage, microbatch)).map(|f| f.3) {
            Some(Failure::Error) => return Err(ExecError::Program("the toy was told to fail".into())),
            Some(Failure::Panic) => panic!("the toy was told to panic"),
            Some(Failure::Undeclared) => {
                operands.view(Tensor::Gradients { stage, unit: 0 })?;
            }
            None => {}
        }
        let (first, last) = (stage.0 == 0, stage.0 == self.stages - 1);
        let parameters = operands.view(Tensor::Parameters { stage, unit: 0 })?;
        let weight = parameters.len() - WIDTH * WIDTH;
        // SAFETY: the executor gives living buffers and keeps others from them.
        unsafe {
            let w = &floats(parameters)[weight..];
            let mut looked_up = vec![0.0; ROWS * WIDTH];
            let x: &[f32] = if first {
                let table = &floats(parameters)[..weight];
                let tokens = words(operands.view(Tensor::Tokens { microbatch })?);
                for (row, &token) in looked_up.chunks_mut(WIDTH).zip(tokens) {
                    row.copy_from_slice(&table[token as usize * WIDTH..][..WIDTH]);
                }
                &looked_up
            } else {
                floats(operands.view(Tensor::StageInput { stage, microbatch })?)
            };
            let out = Tensor::StageOutput { stage, microbatch };
            if pass == Pass::F {
                let next = Tensor::StageInput { stage: StageId(stage.0 + 1), microbatch };
                let y = floats(operands.view(if operands.has(out) { out } else { next })?);
                for (x, y) in x.chunks(WIDTH).zip(y.chunks_mut(WIDTH)) {
                    for c in 0..WIDTH {
                        y[c] = x[c] + (0..WIDTH).map(|k| x[k] * w[k * WIDTH + c]).sum::<f32>();
                    }
                }
                if last {
                    let targets = words(operands.view(Tensor::Targets { microbatch })?);
                    let losses = y.chunks(WIDTH).zip(targets).map(|(y, &target)| {
                        y.iter().zip(target_vector(target)).map(|(y, u)| (y - u) * (y - u) / 2.0).sum::<f32>()
                    });
                    floats(operands.view(Tensor::Losses)?)[microbatch.index()] = losses.sum::<f32>() / ROWS as f32;
                }
                return Ok(());
            }
            let mut dy = vec![0.0; ROWS * WIDTH];
            if last {
                let y = floats(operands.view(out)?);
                let targets = words(operands.view(Tensor::Targets { microbatch })?);
                for ((dy, y), &target) in dy.chunks_mut(WIDTH).zip(y.chunks(WIDTH)).zip(targets) {
                    let u = target_vector(target);
                    (0..WIDTH).for_each(|c| dy[c] = (y[c] - u[c]) * self.scale);
                }
            } else {
                dy.copy_from_slice(floats(operands.view(Tensor::OutputGradient { stage, microbatch })?));
            }
            let gradients = floats(operands.view(Tensor::Gradients { stage, unit: 0 })?);
            let (d_table, d_w) = gradients.split_at_mut(weight);
            let mut dx = dy.clone();
            for ((x, dy), dx) in x.chunks(WIDTH).zip(dy.chunks(WIDTH)).zip(dx.chunks_mut(WIDTH)) {
                for k in 0..WIDTH {
                    for c in 0..WIDTH {
                        d_w[k * WIDTH + c] += x[k] * dy[c];
                        dx[k] += dy[c] * w[k * WIDTH + c];
                    }
                }
            }
            if first {
                let tokens = words(operands.view(Tensor::Tokens { microbatch })?);
                for (dx, &token) in dx.chunks(WIDTH).zip(tokens) {
                    let row = &mut d_table[token as usize * WIDTH..][..WIDTH];
                    row.iter_mut().zip(dx).for_each(|(r, d)| *r += d);
                }
            } else {
                let (own, next) = (
                    Tensor::InputGradient { stage, microbatch },
                    Tensor::OutputGradient { stage: StageId(stage.0 - 1), microbatch },
                );
                let view = operands.view(if operands.has(own) { own } else { next })?;
                launch.launch(Call::Zero { x: view })?;
                floats(view).copy_from_slice(&dx);
            }
        }
        Ok(())
    }

    fn parameters(&self, stage: StageId, _: u16) -> Vec<Parameter> {
        let table = if stage.0 == 0 { VOCAB * WIDTH } else { 0 };
        let start = Start::Normal { deviation: 0.3 };
        let mut all = vec![Parameter {
            name: format!("linear.{}.weight", stage.0),
            shape: vec![WIDTH, WIDTH],
            range: table..table + WIDTH * WIDTH,
            start,
            decay: true,
        }];
        if table > 0 {
            all.insert(
                0,
                Parameter { name: "table".into(), shape: vec![VOCAB, WIDTH], range: 0..table, start, decay: true },
            );
        }
        all
    }

    fn frozen(&self, _: StageId, _: u16) -> Vec<Parameter> {
        Vec::new()
    }

    fn tied_copy(&self, _: StageId, _: u16) -> Option<TiedCopy> {
        None
    }

    fn operands(&self, kind: &OpKind) -> Vec<(Tensor, MemoryClass, u64)> {
        let &OpKind::Compute { pass: Pass::F, stage, microbatch, .. } = kind else { unreachable!() };
        let hidden = (ROWS * WIDTH) as u64 * FLOAT;
        let mut all = vec![
            (Tensor::Parameters { stage, unit: 0 }, MemoryClass::Parameter, parameters_of(stage.0) as u64 * FLOAT),
            (Tensor::StageOutput { stage, microbatch }, MemoryClass::Activation, hidden),
        ];
        if stage.0 == 0 {
            all.push((Tensor::Tokens { microbatch }, MemoryClass::Activation, ROWS as u64 * 4));
        } else {
            all.push((Tensor::StageInput { stage, microbatch }, MemoryClass::Activation, hidden));
        }
        if self.has_loss(stage) {
            all.push((Tensor::Targets { microbatch }, MemoryClass::Activation, ROWS as u64 * 4));
            all.push((Tensor::Losses, MemoryClass::Activation, FLOAT));
        }
        all
    }

    fn has_loss(&self, stage: StageId) -> bool {
        stage.0 == self.stages - 1
    }

    fn sequences(&self) -> u32 {
        SEQUENCES as u32
    }

    fn seq(&self) -> u32 {
        SEQ as u32
    }

    fn vocab(&self) -> u32 {
        VOCAB as u32
    }

    fn digest(&self) -> String {
        format!("toy of {} stages", self.stages)
    }
}
