//! The loss on held-out data: forward passes over all stages, outside of the program, with the ranks at rest.
//!
//! The sequences are the same at every evaluation and under every layout, and each microbatch's loss is computed alone,
//! so results can be compared.

use crate::cpu::Job;
use crate::error::ExecError;
use crate::memory::RankMemory;
use crate::numbers::{self, dtype};
use crate::processes::share::put_together;
use crate::processes::{Matter, tag};
use crate::seam::{Launch, Operands};
use crate::state::Holders;
use paceline_kernels::{Block, Call, Device, KernelError, View};
use paceline_sim::program::{OpKind, Pass, Program, Tensor};
use paceline_sim::units::{MicrobatchId, OpId, RankId, StageId};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Mean loss over about `sequences` held-out sequences (whole microbatches, at least one).
pub(crate) fn held_out_loss(holders: &Holders, sequences: u64) -> Result<f64, ExecError> {
    let job = holders.job;
    let chain = stages(job);
    let mut assembled = Vec::new();
    let parameters = parameters(holders, &chain, &mut assembled)?;
    let part = Part::of(job, &chain);
    let there = job.sampler.held_out_sequences();
    let size = u64::from(job.passes.sequences());
    let count = (sequences.min(there) / size).max(1) as usize;
    let sequences = |n: usize| (0..size).map(|k| (n as u64 * size + k) * there / (count as u64 * size)).collect();
    if let Some(mesh) = job.mesh {
        let mut sum = 0.0;
        for n in 0..count {
            sum += microbatch_loss(job, &part, &parameters, sequences(n))?.unwrap_or(0.0);
        }
        // The process with the last stage knows.
        let last = part.owners[chain.len() - 1];
        if mesh.rank() == last {
            let others = (0..mesh.size()).filter(|&rank| rank != last);
            let bytes = (sum / count as f64).to_le_bytes();
            others.into_iter().try_for_each(|rank| mesh.send(rank, tag(Matter::Loss, 0), &bytes))?;
            return Ok(sum / count as f64);
        }
        let bytes = mesh.receive(last, tag(Matter::Loss, 0))?;
        return Ok(bytes.first_chunk().map_or(f64::NAN, |&bytes| f64::from_le_bytes(bytes)));
    }
    let losses = Mutex::new(vec![0.0f64; count]);
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..job.program.devices.len().min(count) {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= count {
                        return;
                    }
                    match microbatch_loss(job, &part, &parameters, sequences(n)) {
                        Ok(loss) => losses.lock().unwrap_or_else(PoisonError::into_inner)[n] = loss.unwrap_or(f64::NAN),
                        Err(error) => {
                            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                            return;
                        }
                    }
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(losses.into_inner().unwrap_or_else(PoisonError::into_inner).iter().sum::<f64>() / count as f64),
    }
}

/// The stages of the first pipeline, from the first to the one with the loss.
fn stages(job: &Job) -> Vec<StageId> {
    let all = || (0..job.program.stages.len() as u16).map(StageId);
    let before_loss = all().take_while(|&stage| !job.passes.has_loss(stage)).count();
    all().take(before_loss + 1).collect()
}

/// Which process runs which stage of the chain: the first rank that holds it.
struct Part<'a> {
    chain: &'a [StageId],
    /// By stage of the chain.
    owners: Vec<u32>,
}

impl<'a> Part<'a> {
    fn of(job: &Job, chain: &'a [StageId]) -> Part<'a> {
        let holder = |stage: &StageId| job.program.ranks.iter().position(|rank| rank.stages.contains(stage));
        Part { chain, owners: chain.iter().map(|stage| holder(stage).unwrap_or(0) as u32).collect() }
    }
}

/// The parameters of these stages, each from the first rank that holds them; those that no rank has whole are put together
/// from their parts in `assembled`.
fn parameters(
    holders: &Holders,
    chain: &[StageId],
    assembled: &mut Vec<Box<dyn Block>>,
) -> Result<HashMap<Tensor, View>, ExecError> {
    let mut found = HashMap::new();
    for r in holders.hosted() {
        let (hands, rank) = (holders.lock(r), &holders.job.program.ranks[r]);
        for buffer in &rank.persistent {
            let tensor = rank.buffers[buffer.index()].tensor;
            if let Tensor::Parameters { stage, .. } | Tensor::Frozen { stage, .. } = tensor
                && chain.contains(&stage)
                && let Some(view) = hands.persistent(tensor)
            {
                found.entry(tensor).or_insert(view);
            }
        }
    }
    for (tensor, values) in whole(holders, chain)? {
        if found.contains_key(&tensor) {
            continue;
        }
        let dtype = dtype(holders.job.program.workload.precision().element(tensor));
        let block = holders.job.device.allocate(dtype.bytes() * values.len()).map_err(refused)?;
        let view = block.view(0, values.len(), dtype);
        let bytes = numbers::bytes(&values, dtype);
        // SAFETY: the block was just allocated; no other view of it exists.
        unsafe { holders.job.device.upload(&bytes, view) }.map_err(refused)?;
        found.insert(tensor, view);
        assembled.push(block);
    }
    Ok(found)
}

/// The weights that no rank keeps whole, put together in the process that runs their stage.
fn whole(holders: &Holders, chain: &[StageId]) -> Result<BTreeMap<Tensor, Vec<f32>>, ExecError> {
    let mut own = holders.assemble(chain)?;
    let Some(mesh) = holders.job.mesh else { return Ok(own) };
    let part = Part::of(holders.job, chain);
    let mut mine = BTreeMap::new();
    for (&stage, &owner) in chain.iter().zip(&part.owners) {
        let units = 0..holders.job.program.stages[stage.index()].units.len() as u16;
        let tensors: Vec<Tensor> =
            units.flat_map(|unit| [Tensor::Parameters { stage, unit }, Tensor::Frozen { stage, unit }]).collect();
        let take = |tensor| own.remove(tensor).map(|values| (format!("{tensor:?}"), values));
        let mut arrays: BTreeMap<String, Vec<f32>> = tensors.iter().filter_map(take).collect();
        put_together(mesh, owner, &mut arrays)?;
        if mesh.rank() == owner {
            let found = |&tensor: &Tensor| Some((tensor, arrays.remove(&format!("{tensor:?}"))?));
            mine.extend(tensors.iter().filter_map(found));
        }
    }
    Ok(mine)
}

const MICROBATCH: MicrobatchId = MicrobatchId(0);

/// The loss of a microbatch, where this process runs the last stage of the chain. Of several processes each runs its stages, and the
/// hidden state goes from one to the next.
fn microbatch_loss(
    job: &Job,
    part: &Part,
    parameters: &HashMap<Tensor, View>,
    sequences: Vec<u64>,
) -> Result<Option<f64>, ExecError> {
    let chain = part.chain;
    let kinds: Vec<OpKind> = chain.iter().map(|&stage| forward(job.program, stage)).collect();
    let operands: Vec<_> = kinds.iter().map(|kind| job.passes.operands(kind)).collect();
    let mut memory = RankMemory::new(job.device, operands.iter().map(Vec::len).sum(), false);
    let mut buffer = 0;
    // The living buffers that belong to the stage at work, and the view that goes on to the next.
    let mut hidden: Option<(usize, View)> = None;
    let mut loss = None;
    for (place, (kind, operands)) in kinds.iter().zip(operands).enumerate() {
        if !job.hosts(part.owners[place] as usize) {
            continue;
        }
        let mut views = parameters.clone();
        let mut own = Vec::new();
        let mut output = None;
        for (tensor, class, bytes) in operands {
            if views.contains_key(&tensor) {
                continue;
            }
            if let (Tensor::StageInput { .. }, Some((_, view))) = (tensor, hidden) {
                views.insert(tensor, view);
                continue;
            }
            memory.allocate(buffer, class, bytes, job.device).map_err(refused)?;
            let dtype = dtype(job.program.workload.precision().element(tensor));
            let Some(block) = memory.block(buffer) else { continue };
            let view = block.view(0, block.bytes() / dtype.bytes(), dtype);
            match tensor {
                Tensor::StageInput { .. } => receive(job, part.owners[place - 1], view)?,
                Tensor::Tokens { .. } => load(job, &sequences, view, false)?,
                Tensor::Targets { .. } => load(job, &sequences, view, true)?,
                Tensor::StageOutput { .. } => output = Some((buffer, view)),
                _ => {}
            }
            if let Tensor::Workspace { .. } = tensor {
                views.insert(Tensor::Workspace { op: 0 }, view);
            } else {
                views.insert(tensor, view);
            }
            own.push(buffer);
            buffer += 1;
        }
        job.passes.run(kind, &Plain(job.device), &Found(&views))?;
        if let Some(&losses) = views.get(&Tensor::Losses) {
            let mut bytes = vec![0; losses.bytes()];
            // SAFETY: the pass that wrote it has ended.
            unsafe { job.device.download(losses, &mut bytes) }.map_err(refused)?;
            loss = bytes.first_chunk().map(|&b| f64::from(f32::from_ne_bytes(b)));
        }
        if let Some((previous, _)) = hidden.take() {
            memory.free(previous);
        }
        own.into_iter().filter(|&b| output.is_none_or(|(kept, _)| kept != b)).for_each(|b| memory.free(b));
        hidden = output;
        if let (Some((sent, view)), Some(&next)) = (output, part.owners.get(place + 1))
            && !job.hosts(next as usize)
        {
            send(job, next, view)?;
            memory.free(sent);
            hidden = None;
        }
    }
    Ok(loss)
}

/// Sends a hidden state to another process.
fn send(job: &Job, to: u32, view: View) -> Result<(), ExecError> {
    let mut bytes = vec![0; view.bytes()];
    // SAFETY: the pass that wrote it has ended.
    unsafe { job.device.download(view, &mut bytes) }.map_err(refused)?;
    job.mesh.map_or(Ok(()), |mesh| Ok(mesh.send(to, tag(Matter::Hidden, 0), &bytes)?))
}

/// Receives a hidden state from another process.
fn receive(job: &Job, from: u32, view: View) -> Result<(), ExecError> {
    let Some(mesh) = job.mesh else { return Ok(()) };
    let bytes = mesh.receive(from, tag(Matter::Hidden, 0))?;
    // SAFETY: the buffer was allocated just now.
    unsafe { job.device.upload(&bytes, view) }.map_err(refused)
}

fn forward(program: &Program, stage: StageId) -> OpKind {
    let end = program.stages[stage.index()].units.len() as u16;
    OpKind::Compute { pass: Pass::F, stage, microbatch: MICROBATCH, first: 0, end }
}

fn load(job: &Job, sequences: &[u64], view: View, targets: bool) -> Result<(), ExecError> {
    let seq = job.passes.seq() as usize;
    let (mut tokens, mut following) = (vec![0; seq * sequences.len()], vec![0; seq * sequences.len()]);
    for (&index, (x, y)) in sequences.iter().zip(tokens.chunks_mut(seq).zip(following.chunks_mut(seq))) {
        job.sampler.held_out(index, x, y)?;
    }
    let wanted = if targets { following } else { tokens };
    let bytes: Vec<u8> = wanted.iter().flat_map(|token| token.to_ne_bytes()).collect();
    // SAFETY: the buffer was allocated just now.
    unsafe { job.device.upload(&bytes, view) }.map_err(refused)
}

/// Evaluation belongs to no op of the program; errors name the first.
fn refused(source: KernelError) -> ExecError {
    ExecError::Kernel { rank: RankId(0), op: OpId(0), source }
}

struct Plain<'a>(&'a dyn Device);

impl Launch for Plain<'_> {
    fn launch(&self, call: Call) -> Result<(), ExecError> {
        // SAFETY: the views are this thread's own, or parameters, which a forward pass only reads.
        unsafe { self.0.run(&call) }.map_err(refused)
    }
}

struct Found<'a>(&'a HashMap<Tensor, View>);

impl Found<'_> {
    fn get(&self, tensor: Tensor) -> Option<View> {
        let name = if let Tensor::Workspace { .. } = tensor { Tensor::Workspace { op: 0 } } else { tensor };
        self.0.get(&name).copied()
    }
}

impl Operands for Found<'_> {
    fn view(&self, tensor: Tensor) -> Result<View, ExecError> {
        self.get(tensor).ok_or(ExecError::Undeclared { rank: RankId(0), op: OpId(0), tensor })
    }

    fn has(&self, tensor: Tensor) -> bool {
        self.get(tensor).is_some()
    }
}
