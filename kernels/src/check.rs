//! What a call reads and writes, and whether its operands fit together: the same on every device, before memory is
//! touched.

use crate::call::{AttentionShape, Call, attention_scratch, head_scratch};
use crate::device::{DType, KernelError, View};
use smallvec::{SmallVec, smallvec};

/// What a call does to an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only reads it.
    Read,
    /// Overwrites all of it (of [`Extent::AtLeast`], all that it needs) without reading it first.
    Write,
    /// Reads and writes it: it accumulates, updates, or rotates in place.
    Update,
}

/// How many elements an operand must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Exactly so many.
    Exactly(usize),
    /// So many or more; the rest is not touched.
    AtLeast(usize),
    /// A whole number of rows of `cols`, at least `rows`.
    Rows { cols: usize, rows: usize },
}

/// One operand of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Operand {
    /// Its field in [`Call`].
    pub name: &'static str,
    /// Where it lies.
    pub view: View,
    /// Element type that it must have.
    pub dtype: DType,
    /// Length that it must have.
    pub extent: Extent,
    /// What is done to it.
    pub access: Access,
}

/// The operands of a call, in the order of its fields.
pub type Operands = SmallVec<[Operand; 7]>;

fn operand(name: &'static str, view: View, dtype: DType, extent: Extent, access: Access) -> Operand {
    Operand { name, view, dtype, extent, access }
}

fn floats(name: &'static str, view: View, len: usize, access: Access) -> Operand {
    operand(name, view, DType::F32, Extent::Exactly(len), access)
}

/// The element type of a call's values, which its first one decides.
fn of_values(first: View) -> DType {
    if first.dtype() == DType::BF16 { DType::BF16 } else { DType::F32 }
}

fn indices(name: &'static str, view: View, len: usize) -> Operand {
    operand(name, view, DType::U32, Extent::Exactly(len), Access::Read)
}

/// A product that cannot overflow: views are never that long, so a saturated length is refused like any other.
fn product(dims: &[u32]) -> usize {
    dims.iter().fold(1usize, |all, &dim| all.saturating_mul(dim as usize))
}

fn columns(shape: &AttentionShape) -> usize {
    let heads = shape.heads as usize + 2 * shape.kv_heads as usize;
    heads.saturating_mul(shape.head_dim as usize)
}

fn tokens(shape: &AttentionShape) -> usize {
    product(&[shape.batch, shape.seq])
}

impl Call {
    /// Its name in errors and traces.
    pub fn name(&self) -> &'static str {
        match self {
            Call::MatMul { .. } => "MatMul",
            Call::Project { .. } => "Project",
            Call::ProjectBackGelu { .. } => "ProjectBackGelu",
            Call::AddBias { .. } => "AddBias",
            Call::BiasGradient { .. } => "BiasGradient",
            Call::Norm { .. } => "Norm",
            Call::NormBackwardInput { .. } => "NormBackwardInput",
            Call::NormBackwardWeight { .. } => "NormBackwardWeight",
            Call::Rotary { .. } => "Rotary",
            Call::Attention { .. } => "Attention",
            Call::AttentionBackward { .. } => "AttentionBackward",
            Call::SwiGlu { .. } => "SwiGlu",
            Call::SwiGluBackward { .. } => "SwiGluBackward",
            Call::Gelu { .. } => "Gelu",
            Call::GeluBackward { .. } => "GeluBackward",
            Call::Embedding { .. } => "Embedding",
            Call::EmbeddingBackward { .. } => "EmbeddingBackward",
            Call::HeadLoss { .. } => "HeadLoss",
            Call::HeadBackward { .. } => "HeadBackward",
            Call::Add { .. } => "Add",
            Call::Sum { .. } => "Sum",
            Call::Copy { .. } => "Copy",
            Call::Cast { .. } => "Cast",
            Call::Zero { .. } => "Zero",
            Call::SumSquares { .. } => "SumSquares",
            Call::AdamW { .. } => "AdamW",
            Call::AdamWAhead { .. } => "AdamWAhead",
        }
    }

    /// What it touches, and what each operand must be.
    pub fn operands(&self) -> Operands {
        use Access::{Read, Update, Write};
        use Extent::{AtLeast, Rows};
        let of = |first, name, view, len, access| operand(name, view, of_values(first), Extent::Exactly(len), access);
        // Gradients of weights are as narrow as values, or wider.
        let gradient_type = |first, view: View| if view.dtype() == DType::BF16 { of_values(first) } else { DType::F32 };
        let gradient =
            |first, name, view, len| operand(name, view, gradient_type(first, view), Extent::Exactly(len), Update);
        match *self {
            Call::MatMul { a, b, c, m, n, k, accumulate, .. } => smallvec![
                of(a, "a", a, product(&[m, k]), Read),
                of(a, "b", b, product(&[k, n]), Read),
                operand(
                    "c",
                    c,
                    gradient_type(a, c),
                    Extent::Exactly(product(&[m, n])),
                    if accumulate { Update } else { Write },
                ),
            ],
            Call::Project { x, weight, bias, base, input, out, m, n, k } => {
                let mut all: Operands = smallvec![
                    of(x, "x", x, product(&[m, k]), Read),
                    of(x, "weight", weight, product(&[n, k]), Read),
                    of(x, "out", out, product(&[m, n]), Write),
                ];
                all.extend(bias.map(|bias| of(x, "bias", bias, n as usize, Read)));
                all.extend(base.map(|base| of(x, "base", base, product(&[m, n]), Read)));
                all.extend(input.map(|input| of(x, "input", input, product(&[m, n]), Write)));
                all
            }
            Call::ProjectBackGelu { dy, weight, input, d_input, m, n, k } => smallvec![
                of(dy, "dy", dy, product(&[m, k]), Read),
                of(dy, "weight", weight, product(&[k, n]), Read),
                of(dy, "input", input, product(&[m, n]), Read),
                of(dy, "d_input", d_input, product(&[m, n]), Write),
            ],
            Call::AddBias { x, bias, rows, cols } => smallvec![
                of(x, "x", x, product(&[rows, cols]), Update),
                of(x, "bias", bias, cols as usize, Read), //
            ],
            Call::BiasGradient { dy, d_bias, rows, cols } => {
                smallvec![of(dy, "dy", dy, product(&[rows, cols]), Read), gradient(dy, "d_bias", d_bias, cols as usize),]
            }
            Call::Norm { x, gamma, beta, out, stats, rows, cols, .. } => {
                let mut all: Operands = smallvec![
                    of(x, "x", x, product(&[rows, cols]), Read),
                    of(x, "gamma", gamma, cols as usize, Read),
                    of(x, "out", out, product(&[rows, cols]), Write),
                    floats("stats", stats, product(&[rows, 1 + u32::from(beta.is_some())]), Write),
                ];
                all.extend(beta.map(|beta| of(x, "beta", beta, cols as usize, Read)));
                all
            }
            Call::NormBackwardInput { x, gamma, stats, dy, dx, rows, cols, layer_norm } => smallvec![
                of(x, "x", x, product(&[rows, cols]), Read),
                of(x, "gamma", gamma, cols as usize, Read),
                floats("stats", stats, product(&[rows, 1 + u32::from(layer_norm)]), Read),
                of(x, "dy", dy, product(&[rows, cols]), Read),
                of(x, "dx", dx, product(&[rows, cols]), Update),
            ],
            Call::NormBackwardWeight { x, stats, dy, d_gamma, d_beta, rows, cols } => {
                let mut all: Operands = smallvec![
                    of(x, "x", x, product(&[rows, cols]), Read),
                    floats("stats", stats, product(&[rows, 1 + u32::from(d_beta.is_some())]), Read),
                    of(x, "dy", dy, product(&[rows, cols]), Read),
                    gradient(x, "d_gamma", d_gamma, cols as usize),
                ];
                all.extend(d_beta.map(|d_beta| gradient(x, "d_beta", d_beta, cols as usize)));
                all
            }
            Call::Rotary { qkv, shape, .. } => {
                smallvec![of(qkv, "qkv", qkv, tokens(&shape).saturating_mul(columns(&shape)), Update)]
            }
            Call::Attention { qkv, out, lse, shape } => smallvec![
                of(qkv, "qkv", qkv, tokens(&shape).saturating_mul(columns(&shape)), Read),
                of(qkv, "out", out, product(&[shape.batch, shape.seq, shape.heads, shape.head_dim]), Write),
                floats("lse", lse, product(&[shape.batch, shape.heads, shape.seq]), Write),
            ],
            Call::AttentionBackward { qkv, out, lse, d_out, d_qkv, scratch, shape } => {
                let attended = product(&[shape.batch, shape.seq, shape.heads, shape.head_dim]);
                smallvec![
                    of(qkv, "qkv", qkv, tokens(&shape).saturating_mul(columns(&shape)), Read),
                    of(qkv, "out", out, attended, Read),
                    floats("lse", lse, product(&[shape.batch, shape.heads, shape.seq]), Read),
                    of(qkv, "d_out", d_out, attended, Read),
                    of(qkv, "d_qkv", d_qkv, tokens(&shape).saturating_mul(columns(&shape)), Write),
                    operand("scratch", scratch, DType::F32, AtLeast(attention_scratch(&shape)), Write),
                ]
            }
            Call::SwiGlu { gate_up, out, rows, cols } => smallvec![
                of(gate_up, "gate_up", gate_up, product(&[rows, 2, cols]), Read),
                of(gate_up, "out", out, product(&[rows, cols]), Write),
            ],
            Call::SwiGluBackward { gate_up, d_out, d_gate_up, rows, cols } => smallvec![
                of(gate_up, "gate_up", gate_up, product(&[rows, 2, cols]), Read),
                of(gate_up, "d_out", d_out, product(&[rows, cols]), Read),
                of(gate_up, "d_gate_up", d_gate_up, product(&[rows, 2, cols]), Write),
            ],
            Call::Gelu { x, out } => {
                smallvec![of(x, "x", x, x.len(), Read), of(x, "out", out, x.len(), Write)]
            }
            Call::GeluBackward { x, d_out, d_x } => smallvec![
                of(x, "x", x, x.len(), Read),
                of(x, "d_out", d_out, x.len(), Read),
                of(x, "d_x", d_x, x.len(), Write),
            ],
            Call::Embedding { tokens, table, positions, out, rows, cols, seq } => {
                let table_rows = Rows { cols: cols as usize, rows: 1 };
                let mut all: Operands = smallvec![
                    indices("tokens", tokens, rows as usize),
                    operand("table", table, of_values(table), table_rows, Read),
                    of(table, "out", out, product(&[rows, cols]), Write),
                ];
                let needed = Rows { cols: cols as usize, rows: seq as usize };
                all.extend(positions.map(|view| operand("positions", view, of_values(table), needed, Read)));
                all
            }
            Call::EmbeddingBackward { tokens, d_out, d_table, d_positions, rows, cols, seq } => {
                let table_rows = Rows { cols: cols as usize, rows: 1 };
                let mut all: Operands = smallvec![
                    indices("tokens", tokens, rows as usize),
                    of(d_out, "d_out", d_out, product(&[rows, cols]), Read),
                    operand("d_table", d_table, gradient_type(d_out, d_table), table_rows, Update),
                ];
                let needed = Rows { cols: cols as usize, rows: seq as usize };
                let positions = |view| operand("d_positions", view, gradient_type(d_out, view), needed, Update);
                all.extend(d_positions.map(positions));
                all
            }
            Call::HeadLoss { x, weight, targets, lse, loss, scratch, rows, cols, vocab, chunk } => smallvec![
                of(x, "x", x, product(&[rows, cols]), Read),
                of(x, "weight", weight, product(&[vocab, cols]), Read),
                indices("targets", targets, rows as usize),
                floats("lse", lse, rows as usize, Write),
                operand("loss", loss, DType::F32, AtLeast(1), Write),
                operand(
                    "scratch",
                    scratch,
                    DType::F32,
                    AtLeast(head_scratch([rows, cols, vocab, chunk], false)),
                    Write
                ),
            ],
            Call::HeadBackward { x, weight, targets, lse, dx, d_weight, scratch, rows, cols, vocab, chunk, .. } => {
                let both_of_bf16 = x.dtype() == DType::BF16 && dx.is_some() && d_weight.is_some();
                let needed = head_scratch([rows, cols, vocab, chunk], both_of_bf16);
                let mut all: Operands = smallvec![
                    of(x, "x", x, product(&[rows, cols]), Read),
                    of(x, "weight", weight, product(&[vocab, cols]), Read),
                    indices("targets", targets, rows as usize),
                    floats("lse", lse, rows as usize, Read),
                    operand("scratch", scratch, DType::F32, AtLeast(needed), Write),
                ];
                all.extend(dx.map(|dx| of(x, "dx", dx, product(&[rows, cols]), Write)));
                all.extend(d_weight.map(|d_weight| gradient(x, "d_weight", d_weight, product(&[vocab, cols]))));
                all
            }
            Call::Add { x, into } => {
                let summed = if x.dtype() == DType::F64 { DType::F64 } else { of_values(x) };
                smallvec![
                    operand("x", x, summed, Extent::Exactly(x.len()), Read),
                    operand("into", into, summed, Extent::Exactly(x.len()), Update),
                ]
            }
            Call::Sum { a, b, out } => {
                smallvec![of(a, "a", a, a.len(), Read), of(a, "b", b, a.len(), Read), of(a, "out", out, a.len(), Write),]
            }
            Call::Copy { from, to } => smallvec![
                operand("from", from, from.dtype(), Extent::Exactly(from.len()), Read),
                operand("to", to, from.dtype(), Extent::Exactly(from.len()), Write),
            ],
            Call::Cast { from, to } => smallvec![
                operand("from", from, of_values(from), Extent::Exactly(from.len()), Read),
                operand("to", to, of_values(to), Extent::Exactly(from.len()), Write),
            ],
            Call::Zero { x } => smallvec![operand("x", x, x.dtype(), Extent::Exactly(x.len()), Write)],
            Call::SumSquares { x, out } => smallvec![
                of(x, "x", x, x.len(), Read),
                operand("out", out, DType::F64, AtLeast(1), Update), //
            ],
            Call::AdamW { parameters, gradients, first, second, rounded, norm, with, .. } => {
                let len = parameters.len();
                let norm_len = usize::from(with.clip.is_some());
                let mut all: Operands = smallvec![
                    floats("parameters", parameters, len, Update),
                    of(gradients, "gradients", gradients, len, Update),
                    floats("first", first, len, Update),
                    floats("second", second, len, Update),
                    operand("norm", norm, DType::F64, AtLeast(norm_len), Read),
                ];
                all.extend(rounded.map(|view| operand("rounded", view, DType::BF16, Extent::Exactly(len), Write)));
                all
            }
            Call::AdamWAhead { parameters, kept, gradients, first, second, .. } => {
                let len = parameters.len();
                smallvec![
                    floats("parameters", parameters, len, Update),
                    floats("kept", kept, len, Write),
                    of(gradients, "gradients", gradients, len, Read),
                    floats("first", first, len, Read),
                    floats("second", second, len, Read),
                ]
            }
        }
    }

    /// Views that it reads (those it updates included).
    pub fn reads(&self) -> SmallVec<[View; 7]> {
        self.operands().iter().filter(|operand| operand.access != Access::Write).map(|operand| operand.view).collect()
    }

    /// Views that it writes (those it updates included).
    pub fn writes(&self) -> SmallVec<[View; 7]> {
        self.operands().iter().filter(|operand| operand.access != Access::Read).map(|operand| operand.view).collect()
    }

    /// Whether shapes, element types and lengths fit together and no output overlaps another operand.
    pub fn check(&self) -> Result<(), KernelError> {
        self.check_dimensions()?;
        let operands = self.operands();
        for operand in &operands {
            self.check_operand(operand)?;
        }
        for (n, one) in operands.iter().enumerate() {
            for other in &operands[n + 1..] {
                let written = one.access != Access::Read || other.access != Access::Read;
                if written && one.view.overlaps(&other.view) {
                    return Err(self.refuse(format!(
                        "{} overlaps {}; what a call writes must not share memory with its other operands",
                        other.name, one.name
                    )));
                }
            }
        }
        Ok(())
    }

    fn refuse(&self, what: String) -> KernelError {
        KernelError::Shape { call: self.name(), what }
    }

    fn check_operand(&self, operand: &Operand) -> Result<(), KernelError> {
        let Operand { name, view, dtype, extent, .. } = *operand;
        if view.dtype() != dtype {
            return Err(self.refuse(format!("{name} holds {:?}, must hold {dtype:?}", view.dtype())));
        }
        let len = view.len();
        let (fits, needed) = match extent {
            Extent::Exactly(n) => (len == n, format_args!("exactly {n}").to_string()),
            Extent::AtLeast(n) => (len >= n, format_args!("at least {n}").to_string()),
            Extent::Rows { cols, rows } => (
                len.is_multiple_of(cols) && len / cols >= rows,
                format_args!("at least {rows} rows of {cols}").to_string(),
            ),
        };
        if fits { Ok(()) } else { Err(self.refuse(format!("{name} has {len} elements, needs {needed}"))) }
    }

    /// Every dimension is at least one, and the dimensions fit each other.
    fn check_dimensions(&self) -> Result<(), KernelError> {
        let positive = |dims: &[(&str, u32)]| match dims.iter().find(|(_, dim)| *dim == 0) {
            Some((name, _)) => Err(self.refuse(format!("{name} is 0, must be at least 1"))),
            None => Ok(()),
        };
        match *self {
            Call::Project { base: Some(_), input: Some(_), .. } => {
                Err(self.refuse("it has both a base and an input: nothing is added after a GELU".into()))
            }
            Call::MatMul { m, n, k, .. } | Call::Project { m, n, k, .. } | Call::ProjectBackGelu { m, n, k, .. } => {
                positive(&[("m", m), ("n", n), ("k", k)])
            }
            Call::AddBias { rows, cols, .. }
            | Call::BiasGradient { rows, cols, .. }
            | Call::Norm { rows, cols, .. }
            | Call::NormBackwardInput { rows, cols, .. }
            | Call::NormBackwardWeight { rows, cols, .. }
            | Call::SwiGlu { rows, cols, .. }
            | Call::SwiGluBackward { rows, cols, .. } => positive(&[("rows", rows), ("cols", cols)]),
            Call::Rotary { shape, .. } | Call::Attention { shape, .. } | Call::AttentionBackward { shape, .. } => {
                let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
                positive(&[("batch", batch), ("seq", seq), ("heads", heads), ("kv_heads", kv_heads)])?;
                positive(&[("head_dim", head_dim)])?;
                if !heads.is_multiple_of(kv_heads) {
                    return Err(self.refuse(format!("heads is {heads}, must be a multiple of kv_heads ({kv_heads})")));
                }
                if matches!(self, Call::Rotary { .. }) && !head_dim.is_multiple_of(2) {
                    return Err(self.refuse(format!("head_dim is {head_dim}, must be even to rotate pairs")));
                }
                Ok(())
            }
            Call::Embedding { rows, cols, seq, .. } | Call::EmbeddingBackward { rows, cols, seq, .. } => {
                positive(&[("rows", rows), ("cols", cols), ("seq", seq)])
            }
            Call::HeadLoss { rows, cols, vocab, chunk, .. } | Call::HeadBackward { rows, cols, vocab, chunk, .. } => {
                positive(&[("rows", rows), ("cols", cols), ("vocab", vocab), ("chunk", chunk)])
            }
            Call::Gelu { .. }
            | Call::GeluBackward { .. }
            | Call::Add { .. }
            | Call::Sum { .. }
            | Call::Copy { .. }
            | Call::Cast { .. }
            | Call::Zero { .. }
            | Call::SumSquares { .. } => Ok(()),
            Call::AdamW { with, .. } | Call::AdamWAhead { with, .. } if with.step == 0 => {
                Err(self.refuse("step is 0, must be at least 1: bias correction divides by 1 - beta^step".into()))
            }
            Call::AdamW { parameters, decays, .. } | Call::AdamWAhead { parameters, decays, .. } => {
                let len = parameters.len();
                if len > u32::MAX as usize {
                    return Err(self.refuse(format!("{len} parameters in one call, at most {} are possible", u32::MAX)));
                }
                match decays.borders().last() {
                    Some(&last) if last as usize >= len => Err(self
                        .refuse(format!("a run of decaying parameters begins at {last}, there are {len} parameters"))),
                    _ => Ok(()),
                }
            }
        }
    }
}
