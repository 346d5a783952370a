//! The CPU device: one core, single-threaded kernels in host memory. Vector instructions are chosen at run time, so a
//! plain x86-64 build uses AVX2 or AVX-512 where the machine has them. Every kernel is deterministic: the same inputs
//! give the same bits on the same machine, whichever thread runs it.

mod activation;
mod attention;
mod embedding;
mod head;
mod matmul;
mod memory;
mod norm;
mod optimizer;
mod pointwise;
mod rotary;
mod staged;
mod vector;

use crate::call::Call;
use crate::device::{Block, DType, Device, KernelError, View};
use crate::network::Network;
use crate::thread_network::ThreadNetwork;
use attention::Saved;
use head::{Head, HeadShape};
use matmul::{Matrix, MatrixMut, multiply};
use memory::{HostBlock, bytes, bytes_mut, read, write};
use rotary::Rotations;
use std::sync::Arc;

/// A device of one core. Calls may run on any thread, also several at once on disjoint memory.
#[derive(Debug, Default)]
pub struct CpuDevice {
    rotations: Rotations,
    network: Option<Arc<ThreadNetwork>>,
}

impl CpuDevice {
    /// A device that uses the best vector instructions of this machine.
    pub fn new() -> CpuDevice {
        CpuDevice::default()
    }

    /// The same, connected with the devices of other threads that share the network.
    pub fn connected(network: Arc<ThreadNetwork>) -> CpuDevice {
        CpuDevice { network: Some(network), ..CpuDevice::default() }
    }
}

impl Device for CpuDevice {
    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>, KernelError> {
        Ok(Box::new(HostBlock::allocate(&self.name(), bytes)?))
    }

    unsafe fn run(&self, call: &Call) -> Result<(), KernelError> {
        call.check()?;
        // SAFETY: `check` has proved that no operand overlaps one that is written; the rest is the caller's promise.
        unsafe { staged::run(&self.name(), call, |call| self.dispatch(call)) }
    }

    fn network(&self) -> Option<&dyn Network> {
        self.network.as_deref().map(|network| network as &dyn Network)
    }

    unsafe fn upload(&self, from: &[u8], to: View) -> Result<(), KernelError> {
        check_transfer("upload", from.len(), to)?;
        // SAFETY: the caller's promise.
        unsafe { bytes_mut(to) }.copy_from_slice(from);
        Ok(())
    }

    unsafe fn download(&self, from: View, to: &mut [u8]) -> Result<(), KernelError> {
        check_transfer("download", to.len(), from)?;
        // SAFETY: the caller's promise.
        to.copy_from_slice(unsafe { bytes(from) });
        Ok(())
    }
}

fn check_transfer(call: &'static str, host: usize, view: View) -> Result<(), KernelError> {
    if host == view.bytes() {
        return Ok(());
    }
    Err(KernelError::Shape { call, what: format!("host has {host} bytes, the view {}", view.bytes()) })
}

impl CpuDevice {
    /// # Safety
    /// The views are valid, and nothing that is written overlaps another operand or is touched by another thread.
    unsafe fn dispatch(&self, call: &Call) -> Result<(), KernelError> {
        // SAFETY: in all of this, `read` and `write` rely on the caller's promise.
        unsafe {
            match *call {
                Call::MatMul { a, b, c, m, n, k, transpose_a, transpose_b, accumulate } => {
                    let (m, n, k) = (m as usize, n as usize, k as usize);
                    let (a, b) = (read(a), read(b));
                    let a = if transpose_a { Matrix::dense(a, k, m).transposed() } else { Matrix::dense(a, m, k) };
                    let b = if transpose_b { Matrix::dense(b, n, k).transposed() } else { Matrix::dense(b, k, n) };
                    multiply(a, b, MatrixMut::dense(write(c), m, n), accumulate);
                }
                Call::Project { x, weight, bias, base, input, out, m, n, k } => {
                    let (m, n, k) = (m as usize, n as usize, k as usize);
                    let (x, weight) = (Matrix::dense(read(x), m, k), Matrix::dense(read(weight), n, k).transposed());
                    let sum: &mut [f32] = write(input.unwrap_or(out));
                    multiply(x, weight, MatrixMut::dense(sum, m, n), false);
                    if let Some(bias) = bias {
                        pointwise::add_bias(sum, read(bias));
                    }
                    if let Some(base) = base {
                        pointwise::add(read(base), sum);
                    }
                    if input.is_some() {
                        activation::gelu(sum, write(out));
                    }
                }
                Call::ProjectBackGelu { dy, weight, input, d_input, m, n, k } => {
                    let (m, n, k) = (m as usize, n as usize, k as usize);
                    let (dy, weight) = (Matrix::dense(read(dy), m, k), Matrix::dense(read(weight), k, n));
                    let slopes: &mut [f32] = write(d_input);
                    multiply(dy, weight, MatrixMut::dense(slopes, m, n), false);
                    activation::gelu_slope(read(input), slopes);
                }
                Call::AddBias { x, bias, .. } => pointwise::add_bias(write(x), read(bias)),
                Call::BiasGradient { dy, d_bias, .. } => pointwise::bias_gradient(read(dy), write(d_bias)),
                Call::Norm { x, gamma, beta, out, stats, epsilon, .. } => {
                    let beta = beta.map(|beta| read(beta));
                    norm::norm(read(x), read(gamma), beta, write(out), write(stats), epsilon);
                }
                Call::NormBackwardInput { x, gamma, stats, dy, dx, layer_norm, .. } => {
                    norm::norm_backward_input(read(x), read(gamma), read(stats), read(dy), write(dx), layer_norm);
                }
                Call::NormBackwardWeight { x, stats, dy, d_gamma, d_beta, .. } => {
                    let d_beta = d_beta.map(|d_beta| write(d_beta));
                    norm::norm_backward_weight(read(x), read(stats), read(dy), write(d_gamma), d_beta);
                }
                Call::Rotary { qkv, shape, theta, inverse } => {
                    self.rotations.rotate(write(qkv), &shape, theta, inverse);
                }
                Call::Attention { qkv, out, lse, shape } => {
                    attention::attention(read(qkv), write(out), write(lse), &shape);
                }
                Call::AttentionBackward { qkv, out, lse, d_out, d_qkv, scratch, shape } => {
                    let saved = Saved { qkv: read(qkv), out: read(out), lse: read(lse), d_out: read(d_out) };
                    attention::attention_backward(saved, write(d_qkv), write(scratch), &shape);
                }
                Call::SwiGlu { gate_up, out, cols, .. } => {
                    activation::swiglu(read(gate_up), write(out), cols as usize);
                }
                Call::SwiGluBackward { gate_up, d_out, d_gate_up, cols, .. } => {
                    activation::swiglu_backward(read(gate_up), read(d_out), write(d_gate_up), cols as usize);
                }
                Call::Gelu { x, out } => activation::gelu(read(x), write(out)),
                Call::GeluBackward { x, d_out, d_x } => activation::gelu_backward(read(x), read(d_out), write(d_x)),
                Call::Embedding { tokens, table, positions, out, cols, seq, .. } => {
                    let positions = positions.map(|positions| read(positions));
                    embedding::embed(read(tokens), read(table), positions, write(out), cols as usize, seq as usize)?;
                }
                Call::EmbeddingBackward { tokens, d_out, d_table, d_positions, cols, seq, .. } => {
                    let d_positions = d_positions.map(|d_positions| write(d_positions));
                    let (cols, seq) = (cols as usize, seq as usize);
                    embedding::embed_backward(read(tokens), read(d_out), write(d_table), d_positions, cols, seq)?;
                }
                Call::HeadLoss { x, weight, targets, lse, loss, scratch, cols, vocab, chunk, .. } => {
                    let shape = HeadShape { cols: cols as usize, vocab: vocab as usize, chunk: chunk as usize };
                    let head = Head { x: read(x), weight: read(weight), targets: read(targets), shape };
                    write(loss)[0] = head::loss(head, write(lse), write(scratch))?;
                }
                Call::HeadBackward {
                    x,
                    weight,
                    targets,
                    lse,
                    dx,
                    d_weight,
                    scratch,
                    cols,
                    vocab,
                    chunk,
                    scale,
                    ..
                } => {
                    let shape = HeadShape { cols: cols as usize, vocab: vocab as usize, chunk: chunk as usize };
                    let head = Head { x: read(x), weight: read(weight), targets: read(targets), shape };
                    let (dx, d_weight) = (dx.map(|dx| write(dx)), d_weight.map(|d_weight| write(d_weight)));
                    head::backward(head, read(lse), dx, d_weight, write(scratch), scale)?;
                }
                Call::Add { x, into } if x.dtype() == DType::F64 => pointwise::add_f64(read(x), write(into)),
                Call::Add { x, into } => pointwise::add(read(x), write(into)),
                Call::Sum { a, b, out } => pointwise::sum(read(a), read(b), write(out)),
                Call::Copy { from, to } => bytes_mut(to).copy_from_slice(bytes(from)),
                Call::Cast { from, to } => match (from.dtype(), to.dtype()) {
                    (DType::F32, DType::BF16) => pointwise::narrow(read(from), write(to)),
                    (DType::BF16, DType::F32) => pointwise::widen(read(from), write(to)),
                    _ => bytes_mut(to).copy_from_slice(bytes(from)),
                },
                Call::Zero { x } => bytes_mut(x).fill(0),
                Call::SumSquares { x, out } => write::<f64>(out)[0] += optimizer::sum_squares(read(x)),
                Call::AdamW { parameters, gradients, first, second, rounded, norm, decays, with } => {
                    let squared_norm = read::<f64>(norm).first().copied().unwrap_or(0.0);
                    let coefficient = with.clip_coefficient(squared_norm);
                    let (all, slopes) = (write(parameters), write(gradients));
                    let (first, second) = (write(first), write(second));
                    for (run, decay) in decays.runs(all.len()) {
                        let (parameters, gradients) = (&mut all[run.clone()], &mut slopes[run.clone()]);
                        let (first, second) = (&mut first[run.clone()], &mut second[run]);
                        let with = with.decaying(decay);
                        optimizer::update(parameters, gradients, first, second, coefficient, with);
                    }
                    if let Some(rounded) = rounded {
                        // Narrow operands have been widened; what was written is rounded after the call.
                        write::<f32>(rounded).copy_from_slice(all);
                    }
                }
                Call::AdamWAhead { parameters, kept, gradients, first, second, decays, with } => {
                    let (all, kept) = (write(parameters), write(kept));
                    let (gradients, first, second) = (read(gradients), read(first), read(second));
                    for (run, decay) in decays.runs(all.len()) {
                        let (parameters, kept) = (&mut all[run.clone()], &mut kept[run.clone()]);
                        let (gradients, first, second) = (&gradients[run.clone()], &first[run.clone()], &second[run]);
                        optimizer::update_ahead(parameters, kept, gradients, first, second, with.decaying(decay));
                    }
                }
            }
        }
        Ok(())
    }
}
