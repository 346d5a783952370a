//! What decides, beside the shapes, what kernels find in the caches during a run. A block that has just been computed again
//! finds its activations there; the same block of a run that kept them does not. Times inside runs are told apart by it.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The circumstances of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Context {
    /// What is computed again.
    pub recomputed: Recomputed,
    /// Ranks take turns on a device, and push each other out of its caches.
    pub shared: bool,
}

/// What a run computes again instead of keeping it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recomputed {
    /// Nothing.
    Nothing,
    /// Cheap, large intermediates.
    Some,
    /// Whole blocks.
    Blocks,
}

/// The circumstances under which a time is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conditions {
    /// How many devices work: they share caches and memory bandwidth.
    pub busy: u32,
    /// Of the run; `None` where any run is as good as another.
    pub context: Option<Context>,
}

impl From<u32> for Conditions {
    fn from(busy: u32) -> Conditions {
        Conditions { busy, context: None }
    }
}

impl Context {
    /// Every context.
    pub fn all() -> impl Iterator<Item = Context> {
        [Recomputed::Nothing, Recomputed::Some, Recomputed::Blocks]
            .into_iter()
            .flat_map(|recomputed| [false, true].map(|shared| Context { recomputed, shared }))
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.recomputed {
            Recomputed::Nothing => "recompute=none",
            Recomputed::Some => "recompute=selective",
            Recomputed::Blocks => "recompute=full",
        })?;
        f.write_str(if self.shared { ";shared" } else { "" })
    }
}

impl FromStr for Context {
    type Err = String;

    fn from_str(text: &str) -> Result<Context, String> {
        let names = || Context::all().map(|context| context.to_string()).collect::<Vec<_>>().join(", ");
        Context::all().find(|context| context.to_string() == text).ok_or_else(|| format!("allowed: {}", names()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back() {
        assert_eq!(Context::all().count(), 6);
        for context in Context::all() {
            assert_eq!(context.to_string().parse(), Ok(context));
        }
        assert!("recompute=never".parse::<Context>().unwrap_err().contains("recompute=full;shared"));
    }
}
