//! The fitted parameters: few, each with a physical meaning, the same for every source and every model.

use paceline_profiles::Cluster;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

/// What datasheets do not say.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Physics {
    /// Share of the stated tensor-core rate that a large product reaches on Ampere.
    pub matmul_ampere: f64,
    /// The same on Hopper at 700 W, where the power limit lowers the clock.
    pub matmul_hopper: f64,
    /// Rate of Blackwell over what its power limit and Hopper's energy per operation foretell.
    pub blackwell: f64,
    /// Rate of fused attention on long sequences, as a share of what its kernel's benchmark shows.
    pub attention: f64,
    /// Share of the stated memory bandwidth that memory-bound operators reach.
    pub memory: f64,
    /// Time to fill and drain the pipeline of one wave of tiles of a product, in seconds.
    pub fill: f64,
    /// Time of the host to launch one kernel, in seconds.
    pub launch: f64,
    /// Share of the bus bandwidth inside a node, as benchmarks print it for large buffers, that collectives of a run reach.
    pub intra: f64,
    /// Share of the stated network bandwidth that collectives reach.
    pub inter: f64,
    /// Share of overlapped communication that is paid all the same: contention for memory and multiprocessors.
    pub contention: f64,
    /// Growth of an iteration with each doubling of the nodes, as a share: waiting for the slowest.
    pub jitter: f64,
    /// Share of the transient memory (activations, working set, buffers) that the caching allocator holds on top of it.
    pub fragmentation: f64,
    /// Memory outside the allocator: CUDA context, loaded kernels, communicators. In bytes.
    pub context: f64,
}

/// A parameter by name, for lists and fits.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// The least and the greatest value that make sense.
    pub range: (f64, f64),
    /// Reads it.
    pub get: fn(&Physics) -> f64,
    /// Writes it.
    pub set: fn(&mut Physics, f64),
}

macro_rules! parameter {
    ($name:ident, $low:expr, $high:expr, $meaning:expr) => {
        Parameter {
            name: stringify!($name),
            meaning: $meaning,
            range: ($low, $high),
            get: |physics| physics.$name,
            set: |physics, value| physics.$name = value,
        }
    };
}

/// All of them.
pub const PARAMETERS: &[Parameter] = &[
    parameter!(matmul_ampere, 0.4, 0.98, "share of the stated rate that a large product reaches on Ampere"),
    parameter!(matmul_hopper, 0.4, 0.98, "the same on Hopper at 700 W, under its power limit"),
    parameter!(blackwell, 0.6, 1.5, "rate of Blackwell over what its power and Hopper's energy per operation foretell"),
    parameter!(attention, 0.2, 1.2, "rate of fused attention on long sequences over that of its benchmark"),
    parameter!(memory, 0.3, 0.98, "share of the stated memory bandwidth that memory-bound operators reach"),
    parameter!(fill, 1e-7, 2e-5, "seconds to fill and drain the pipeline of one wave of a product's tiles"),
    parameter!(launch, 1e-6, 1e-4, "seconds of the host per kernel launch"),
    parameter!(intra, 0.2, 1.3, "share of the benchmarked bus bandwidth inside a node that collectives reach"),
    parameter!(inter, 0.1, 1.0, "share of the stated bandwidth between nodes that collectives reach"),
    parameter!(contention, 0.0, 1.0, "share of overlapped communication that is paid all the same"),
    parameter!(jitter, 0.0, 0.1, "growth of an iteration with each doubling of the nodes"),
    parameter!(fragmentation, 0.0, 0.5, "share of transient memory that the caching allocator holds on top of it"),
    parameter!(context, 2e8, 6e9, "bytes outside the allocator: CUDA context, loaded kernels, communicators"),
];

impl Default for Physics {
    /// Fitted to the public runs of `docs/accuracy.md`.
    fn default() -> Physics {
        Physics {
            matmul_ampere: 0.814,
            matmul_hopper: 0.684,
            blackwell: 0.958,
            attention: 0.818,
            memory: 0.715,
            fill: 4.58e-6,
            launch: 2.55e-5,
            intra: 0.840,
            inter: 0.858,
            contention: 0.395,
            jitter: 3.15e-3,
            fragmentation: 0.045,
            context: 2.10e9,
        }
    }
}

/// A parameter of a cluster's file that cannot be.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum PhysicsError {
    /// No such parameter.
    #[error("[physics] {name} is not known; known: {known}")]
    Unknown { name: String, known: String },
    /// A value that makes no sense.
    #[error("[physics] {name} = {value}; allowed: {low} to {high}")]
    Value { name: String, value: f64, low: f64, high: f64 },
}

impl Physics {
    /// The shipped parameters, with those that were fitted to a cluster in their place.
    ///
    /// # Errors
    /// When the cluster names a parameter that does not exist, or gives it a value out of its range.
    pub fn of(cluster: &Cluster) -> Result<Physics, PhysicsError> {
        let mut physics = Physics::default();
        for (name, &value) in &cluster.physics {
            let Some(parameter) = PARAMETERS.iter().find(|p| p.name == name) else {
                let known = PARAMETERS.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
                return Err(PhysicsError::Unknown { name: name.clone(), known });
            };
            let (low, high) = parameter.range;
            if !(low..=high).contains(&value) {
                return Err(PhysicsError::Value { name: name.clone(), value, low, high });
            }
            (parameter.set)(&mut physics, value);
        }
        Ok(physics)
    }

    /// All parameters by name, as a cluster's file holds them.
    pub fn by_name(&self) -> BTreeMap<String, f64> {
        PARAMETERS.iter().map(|p| (p.name.to_owned(), (p.get)(self))).collect()
    }

    /// What one would guess before any run: where fits begin, and what holds a parameter of which the runs say little.
    pub const EXPECTED: Physics = Physics {
        matmul_ampere: 0.80,
        matmul_hopper: 0.70,
        blackwell: 1.0,
        attention: 0.90,
        memory: 0.80,
        fill: 3e-6,
        launch: 2e-5,
        intra: 0.85,
        inter: 0.85,
        contention: 0.35,
        jitter: 4e-3,
        fragmentation: 0.05,
        context: 2e9,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_bring_their_own() {
        let mut cluster = paceline_profiles::find_cluster("p5").unwrap().clone();
        assert_eq!(Physics::of(&cluster), Ok(Physics::default()));
        cluster.physics.insert("launch".into(), 3e-5);
        let own = Physics::of(&cluster).unwrap();
        assert_eq!(own, Physics { launch: 3e-5, ..Physics::default() });
        cluster.physics = own.by_name();
        assert_eq!(Physics::of(&cluster), Ok(own));
        cluster.physics.insert("launch".into(), f64::NAN);
        assert!(Physics::of(&cluster).unwrap_err().to_string().contains("launch = NaN"));
        cluster.physics = BTreeMap::from([("lunch".into(), 1.0)]);
        assert!(Physics::of(&cluster).unwrap_err().to_string().contains("launch"));
    }

    #[test]
    fn every_parameter_is_its_own_and_in_its_range() {
        let base = Physics::default();
        for parameter in PARAMETERS {
            let value = (parameter.get)(&base);
            assert!((parameter.range.0..=parameter.range.1).contains(&value), "{} = {value}", parameter.name);
            let mut moved = base;
            (parameter.set)(&mut moved, parameter.range.1 * 2.0);
            let changed: Vec<_> =
                PARAMETERS.iter().filter(|p| (p.get)(&moved) != (p.get)(&base)).map(|p| p.name).collect();
            assert_eq!(changed, [parameter.name]);
        }
        assert!(PARAMETERS.len() <= 13);
    }
}
