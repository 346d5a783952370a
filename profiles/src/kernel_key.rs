//! The names under which kernel times are stored: an operator and the dimensions that its time depends on.

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// Operators with a time of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelOp {
    /// `m, n, k`, neither operand transposed (B of a projection).
    MatmulNn,
    /// `m, n, k`, second operand transposed (F of a projection).
    MatmulNt,
    /// `m, n, k`, first operand transposed (W of a projection, accumulating).
    MatmulTn,
    /// `m, n, k`: F of a projection with a bias.
    ProjectBias,
    /// `m, n, k`: with a bias and the GELU after it, the input of which is kept.
    ProjectBiasGelu,
    /// `m, n, k`: with a bias, added to another matrix (the residual stream).
    ProjectBiasAdd,
    /// `m, n, k`: added to another matrix.
    ProjectAdd,
    /// `m, n, k`: B of a projection with the gradient of the GELU before it.
    ProjectBackGelu,
    /// `rows, cols`.
    AddBias,
    /// `rows, cols`.
    BiasGradient,
    /// `rows, cols`.
    RmsNorm,
    /// `rows, cols`.
    RmsNormBackwardInput,
    /// `rows, cols`.
    RmsNormBackwardWeight,
    /// `rows, cols`.
    LayerNorm,
    /// `rows, cols`.
    LayerNormBackwardInput,
    /// `rows, cols`.
    LayerNormBackwardWeight,
    /// `rows, rotated columns`.
    Rotary,
    /// `batch, seq, heads, kv_heads, head_dim`.
    Attention,
    /// `batch, seq, heads, kv_heads, head_dim`.
    AttentionBackward,
    /// `rows, cols` of the output.
    SwiGlu,
    /// `rows, cols` of the output.
    SwiGluBackward,
    /// `elements`.
    Gelu,
    /// `elements`.
    GeluBackward,
    /// `rows, cols`.
    Embedding,
    /// `rows, cols`.
    EmbeddingBackward,
    /// `rows, cols, vocab, chunk`.
    HeadLoss,
    /// `rows, cols, vocab, chunk`: input gradient only.
    HeadBackwardInput,
    /// `rows, cols, vocab, chunk`: weight gradient only.
    HeadBackwardWeight,
    /// `rows, cols, vocab, chunk`: both.
    HeadBackward,
    /// `elements`.
    Add,
    /// `elements`.
    Sum,
    /// `elements`.
    Copy,
    /// `elements`: between 32 bits and the narrower type of the key.
    Cast,
    /// `elements`.
    Zero,
    /// `elements`.
    SumSquares,
    /// `elements`; of bfloat16 values, with the narrow copy of the weights.
    AdamW,
    /// `elements`.
    AdamWAhead,
}

/// Number formats of a kernel call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DType {
    /// All 32-bit.
    #[default]
    F32,
    /// Values and results bfloat16, sums 32-bit inside.
    Bf16,
    /// Values bfloat16, the result 32-bit: gradients of weights that are kept so.
    Bf16F32,
}

impl DType {
    /// Every one.
    pub const ALL: [DType; 3] = [DType::F32, DType::Bf16, DType::Bf16F32];

    /// Its name in files, the same as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::Bf16F32 => "bf16-f32",
        }
    }

    /// Bytes of a value.
    pub fn bytes(self) -> u64 {
        if self == DType::F32 { 4 } else { 2 }
    }

    /// Whether it is the usual one, which files leave out.
    fn is_usual(&self) -> bool {
        *self == DType::F32
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An operator at a shape.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct KernelKey {
    /// The operator.
    pub op: KernelOp,
    /// Its dimensions, in the order that [`KernelOp`] documents.
    pub dims: SmallVec<[u32; 5]>,
    /// The number formats of its operands.
    #[serde(default, skip_serializing_if = "DType::is_usual")]
    pub dtype: DType,
}

/// Operators that cost alike: a correction learnt for one is the best guess for another of the same family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Matrix products.
    Matmul,
    /// Attention, forward and backward.
    Attention,
    /// Output projection with the loss.
    Head,
    /// Everything whose time is that of moving its operands.
    Memory,
}

impl KernelOp {
    /// Every operator.
    pub const ALL: [KernelOp; 37] = [
        KernelOp::MatmulNn,
        KernelOp::MatmulNt,
        KernelOp::MatmulTn,
        KernelOp::ProjectBias,
        KernelOp::ProjectBiasGelu,
        KernelOp::ProjectBiasAdd,
        KernelOp::ProjectAdd,
        KernelOp::ProjectBackGelu,
        KernelOp::AddBias,
        KernelOp::BiasGradient,
        KernelOp::RmsNorm,
        KernelOp::RmsNormBackwardInput,
        KernelOp::RmsNormBackwardWeight,
        KernelOp::LayerNorm,
        KernelOp::LayerNormBackwardInput,
        KernelOp::LayerNormBackwardWeight,
        KernelOp::Rotary,
        KernelOp::Attention,
        KernelOp::AttentionBackward,
        KernelOp::SwiGlu,
        KernelOp::SwiGluBackward,
        KernelOp::Gelu,
        KernelOp::GeluBackward,
        KernelOp::Embedding,
        KernelOp::EmbeddingBackward,
        KernelOp::HeadLoss,
        KernelOp::HeadBackwardInput,
        KernelOp::HeadBackwardWeight,
        KernelOp::HeadBackward,
        KernelOp::Add,
        KernelOp::Sum,
        KernelOp::Copy,
        KernelOp::Cast,
        KernelOp::Zero,
        KernelOp::SumSquares,
        KernelOp::AdamW,
        KernelOp::AdamWAhead,
    ];

    /// Its name in files, the same as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            KernelOp::MatmulNn => "matmul-nn",
            KernelOp::MatmulNt => "matmul-nt",
            KernelOp::MatmulTn => "matmul-tn",
            KernelOp::ProjectBias => "project-bias",
            KernelOp::ProjectBiasGelu => "project-bias-gelu",
            KernelOp::ProjectBiasAdd => "project-bias-add",
            KernelOp::ProjectAdd => "project-add",
            KernelOp::ProjectBackGelu => "project-back-gelu",
            KernelOp::AddBias => "add-bias",
            KernelOp::BiasGradient => "bias-gradient",
            KernelOp::RmsNorm => "rms-norm",
            KernelOp::RmsNormBackwardInput => "rms-norm-backward-input",
            KernelOp::RmsNormBackwardWeight => "rms-norm-backward-weight",
            KernelOp::LayerNorm => "layer-norm",
            KernelOp::LayerNormBackwardInput => "layer-norm-backward-input",
            KernelOp::LayerNormBackwardWeight => "layer-norm-backward-weight",
            KernelOp::Rotary => "rotary",
            KernelOp::Attention => "attention",
            KernelOp::AttentionBackward => "attention-backward",
            KernelOp::SwiGlu => "swi-glu",
            KernelOp::SwiGluBackward => "swi-glu-backward",
            KernelOp::Gelu => "gelu",
            KernelOp::GeluBackward => "gelu-backward",
            KernelOp::Embedding => "embedding",
            KernelOp::EmbeddingBackward => "embedding-backward",
            KernelOp::HeadLoss => "head-loss",
            KernelOp::HeadBackwardInput => "head-backward-input",
            KernelOp::HeadBackwardWeight => "head-backward-weight",
            KernelOp::HeadBackward => "head-backward",
            KernelOp::Add => "add",
            KernelOp::Sum => "sum",
            KernelOp::Copy => "copy",
            KernelOp::Cast => "cast",
            KernelOp::Zero => "zero",
            KernelOp::SumSquares => "sum-squares",
            KernelOp::AdamW => "adam-w",
            KernelOp::AdamWAhead => "adam-w-ahead",
        }
    }

    /// Names of its dimensions, in the order of [`KernelKey::dims`].
    pub fn dimensions(self) -> &'static [&'static str] {
        match self.family() {
            Family::Matmul => &["m", "n", "k"],
            Family::Attention => &["batch", "seq", "heads", "kv_heads", "head_dim"],
            Family::Head => &["rows", "cols", "vocab", "chunk"],
            Family::Memory => match self {
                KernelOp::Gelu
                | KernelOp::GeluBackward
                | KernelOp::Add
                | KernelOp::Sum
                | KernelOp::Copy
                | KernelOp::Cast
                | KernelOp::Zero
                | KernelOp::SumSquares
                | KernelOp::AdamW
                | KernelOp::AdamWAhead => &["elements"],
                _ => &["rows", "cols"],
            },
        }
    }

    /// What it costs like.
    pub fn family(self) -> Family {
        match self {
            KernelOp::MatmulNn
            | KernelOp::MatmulNt
            | KernelOp::MatmulTn
            | KernelOp::ProjectBias
            | KernelOp::ProjectBiasGelu
            | KernelOp::ProjectBiasAdd
            | KernelOp::ProjectAdd
            | KernelOp::ProjectBackGelu => Family::Matmul,
            KernelOp::Attention | KernelOp::AttentionBackward => Family::Attention,
            KernelOp::HeadLoss
            | KernelOp::HeadBackwardInput
            | KernelOp::HeadBackwardWeight
            | KernelOp::HeadBackward => Family::Head,
            _ => Family::Memory,
        }
    }
}

impl fmt::Display for KernelOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KernelOp {
    type Err = KeyError;

    fn from_str(name: &str) -> Result<KernelOp, KeyError> {
        KernelOp::ALL.into_iter().find(|op| op.name() == name).ok_or_else(|| KeyError::Op { name: name.into() })
    }
}

/// Why a text names no kernel.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyError {
    /// No such operator.
    #[error("no operator is called `{name}`; they are {}", KernelOp::ALL.map(KernelOp::name).join(", "))]
    Op { name: String },
    /// Its dimensions are others.
    #[error("`{shape}` is no shape of {op}: expected {expected} with whole numbers from 1 to 4294967295")]
    Shape { op: KernelOp, shape: String, expected: String },
}

impl KernelKey {
    /// A key from its parts, of 32-bit operands.
    ///
    /// # Errors
    /// When the number of dimensions is not the operator's, or one is zero.
    pub fn new(op: KernelOp, dims: &[u32]) -> Result<KernelKey, KeyError> {
        let key = KernelKey { op, dims: SmallVec::from_slice(dims), dtype: DType::F32 };
        if dims.len() == op.dimensions().len() && dims.iter().all(|&d| d > 0) {
            Ok(key)
        } else {
            Err(shape_error(op, &key.shape()))
        }
    }

    /// The same call on operands of another type.
    pub fn with(self, dtype: DType) -> KernelKey {
        KernelKey { dtype, ..self }
    }

    /// The kernels that do the same one after the other, of a product with something fused into it; nothing for other kernels.
    pub fn parts(&self) -> SmallVec<[KernelKey; 3]> {
        let after: &[KernelOp] = match self.op {
            KernelOp::ProjectBias => &[KernelOp::AddBias],
            KernelOp::ProjectBiasGelu => &[KernelOp::AddBias, KernelOp::Gelu],
            KernelOp::ProjectBiasAdd => &[KernelOp::AddBias, KernelOp::Add],
            KernelOp::ProjectAdd => &[KernelOp::Add],
            KernelOp::ProjectBackGelu => &[KernelOp::GeluBackward],
            _ => return SmallVec::new(),
        };
        let &[m, n, _] = &self.dims[..] else { return SmallVec::new() };
        let back = self.op == KernelOp::ProjectBackGelu;
        let product = KernelKey { op: if back { KernelOp::MatmulNn } else { KernelOp::MatmulNt }, ..self.clone() };
        let of = |&op: &KernelOp| {
            let rows = op.dimensions().len() == 2;
            let dims = if rows { SmallVec::from_slice(&[m, n]) } else { SmallVec::from_slice(&[m.saturating_mul(n)]) };
            KernelKey { op, dims, dtype: self.dtype }
        };
        std::iter::once(product).chain(after.iter().map(of)).collect()
    }

    /// Its dimensions by name, for example `m=512;n=768;k=256`.
    pub fn shape(&self) -> String {
        let names = self.op.dimensions().iter().copied().chain(std::iter::repeat("?"));
        let parts: Vec<String> = names.zip(&self.dims).map(|(name, value)| format!("{name}={value}")).collect();
        parts.join(";")
    }

    /// The key of an operator on 32-bit operands with the dimensions of [`KernelKey::shape`], in that order.
    ///
    /// # Errors
    /// When a name is missing, unknown or out of place, or a value is not a whole number from 1 on.
    pub fn from_shape(op: KernelOp, shape: &str) -> Result<KernelKey, KeyError> {
        let names = op.dimensions();
        let mut dims = SmallVec::new();
        for part in shape.split(';') {
            let value = names.get(dims.len()).and_then(|name| part.strip_prefix(name)?.strip_prefix('='));
            let Some(value) = value.and_then(|v| v.parse::<u32>().ok()).filter(|&v| v > 0) else {
                return Err(shape_error(op, shape));
            };
            dims.push(value);
        }
        if dims.len() == names.len() {
            Ok(KernelKey { op, dims, dtype: DType::F32 })
        } else {
            Err(shape_error(op, shape))
        }
    }
}

fn shape_error(op: KernelOp, shape: &str) -> KeyError {
    let expected = op.dimensions().iter().map(|name| format!("{name}=N")).collect::<Vec<_>>().join(";");
    KeyError::Shape { op, shape: shape.into(), expected }
}

impl fmt::Display for KernelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.op, self.shape())?;
        if self.dtype == DType::F32 { Ok(()) } else { write!(f, " {}", self.dtype) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_json_and_lead_back() {
        for op in KernelOp::ALL {
            assert_eq!(serde_json::to_value(op).unwrap(), op.name());
            assert_eq!(op.name().parse(), Ok(op));
        }
    }

    #[test]
    fn number_formats_show_where_they_are_not_the_usual() {
        for dtype in DType::ALL {
            assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.name());
        }
        let key = KernelKey::new(KernelOp::Add, &[8]).unwrap();
        assert_eq!(serde_json::to_string(&key).unwrap(), r#"{"op":"add","dims":[8]}"#);
        let narrow = key.with(DType::Bf16);
        assert_eq!(narrow.to_string(), "add elements=8 bf16");
        assert_eq!(serde_json::from_str::<KernelKey>(&serde_json::to_string(&narrow).unwrap()).unwrap(), narrow);
    }

    #[test]
    fn what_is_fused_has_parts() {
        let key = |op, dims: &[u32]| KernelKey::new(op, dims).unwrap().with(DType::Bf16);
        let parts = |op| key(op, &[2, 3, 5]).parts().to_vec();
        let (product, bias) = (key(KernelOp::MatmulNt, &[2, 3, 5]), key(KernelOp::AddBias, &[2, 3]));
        assert_eq!(parts(KernelOp::ProjectBiasAdd), [product.clone(), bias.clone(), key(KernelOp::Add, &[6])]);
        assert_eq!(parts(KernelOp::ProjectBiasGelu), [product, bias, key(KernelOp::Gelu, &[6])]);
        let back = [key(KernelOp::MatmulNn, &[2, 3, 5]), key(KernelOp::GeluBackward, &[6])];
        assert_eq!(parts(KernelOp::ProjectBackGelu), back);
        let whole = KernelOp::ALL.into_iter().filter(|op| key(*op, &vec![2; op.dimensions().len()]).parts().is_empty());
        assert_eq!(whole.count(), KernelOp::ALL.len() - 5);
    }

    #[test]
    fn shapes_lead_back() {
        let key = KernelKey::new(KernelOp::MatmulNt, &[512, 768, 256]).unwrap();
        assert_eq!(key.to_string(), "matmul-nt m=512;n=768;k=256");
        assert_eq!(KernelKey::from_shape(key.op, &key.shape()), Ok(key));
    }

    #[test]
    fn wrong_shapes_say_what_is_right() {
        for shape in
            ["", "m=1;n=2", "m=1;n=2;k=3;l=4", "n=1;m=2;k=3", "m=1;n=0;k=3", "m=1;n=-2;k=3", "m=1;n=2;k=4294967296"]
        {
            let error = KernelKey::from_shape(KernelOp::MatmulNn, shape).unwrap_err().to_string();
            assert!(error.contains("m=N;n=N;k=N"), "{shape}: {error}");
        }
        assert!(KernelKey::new(KernelOp::Add, &[1, 2]).is_err());
        assert!("matmul".parse::<KernelOp>().unwrap_err().to_string().contains("matmul-nn"));
    }
}
