//! The place of this process among all, as launchers put it into the environment: torchrun's names, and Slurm's for what srun sets.

use super::error::ProcessError;

/// Who this process is and where all meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Number of this process, below `size`.
    pub rank: u32,
    /// Number of processes.
    pub size: u32,
    /// Number of this process on its host: the GPU that it takes.
    pub local_rank: u32,
    /// Host of rank 0.
    pub address: String,
    /// Port on which rank 0 listens.
    pub port: u16,
}

/// A variable under torchrun's name and Slurm's.
const RANK: (&str, &str) = ("RANK", "SLURM_PROCID");
const WORLD_SIZE: (&str, &str) = ("WORLD_SIZE", "SLURM_NTASKS");
const LOCAL_RANK: (&str, &str) = ("LOCAL_RANK", "SLURM_LOCALID");
const MASTER_ADDR: (&str, &str) = ("MASTER_ADDR", "MASTER_ADDR");
const MASTER_PORT: (&str, &str) = ("MASTER_PORT", "MASTER_PORT");
/// Ours: a port beside the launcher's.
const OWN_PORT: &str = "PACELINE_MASTER_PORT";
/// `True` under torchrun, where the agent itself listens on MASTER_PORT.
const AGENT_LISTENS: &str = "TORCHELASTIC_USE_AGENT_STORE";

impl Place {
    /// Reads the place through `variable`, which looks a name up in the environment; empty values count as unset.
    ///
    /// # Errors
    /// [`ProcessError::Unset`] names everything that is missing, [`ProcessError::Value`] what is there and cannot be.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Place, ProcessError> {
        let look = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let find = |(name, other): (&'static str, &'static str)| {
            look(name).map(|value| (name, value)).or_else(|| look(other).map(|value| (other, value)))
        };
        let all = [RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT];
        let names: Vec<&'static str> =
            all.into_iter().filter(|&name| find(name).is_none()).map(|name| name.0).collect();
        let [Some(rank), Some(size), Some(local_rank), Some((_, address)), Some(port)] = all.map(find) else {
            return Err(ProcessError::Unset { names });
        };
        let port = look(OWN_PORT).map(|value| (OWN_PORT, value)).unwrap_or(port);
        let (rank_name, rank_value) = (rank.0, rank.1.clone());
        let (rank, size, local_rank) = (number(rank)?, number(size)?, number(local_rank)?);
        if size == 0 || rank >= size {
            return Err(ProcessError::Value {
                name: rank_name,
                value: rank_value,
                allowed: format!("of {size} processes (WORLD_SIZE), from 0 to {} is possible", i64::from(size) - 1),
            });
        }
        let own = port.0 == OWN_PORT;
        let stated: u32 = number(port.clone())?;
        let beside = u32::from(!own && look(AGENT_LISTENS).is_some_and(|value| value.eq_ignore_ascii_case("true")));
        let port = u16::try_from(stated + beside).ok().filter(|&port| port > 0).ok_or_else(|| ProcessError::Value {
            name: port.0,
            value: port.1,
            allowed: "a port from 1 to 65535 is needed".into(),
        })?;
        Ok(Place { rank, size, local_rank, address: address.trim().to_owned(), port })
    }
}

fn number((name, value): (&'static str, String)) -> Result<u32, ProcessError> {
    // Bounded, so that what is added to it cannot overflow.
    value.trim().parse().ok().filter(|&number| number <= 1 << 24).ok_or_else(|| ProcessError::Value {
        name,
        value,
        allowed: "a whole number is needed".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TORCHRUN: [(&str, &str); 5] =
        [("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node-0"), ("MASTER_PORT", "29500")];

    fn read(variables: &[(&str, &str)]) -> Result<Place, ProcessError> {
        // Later ones replace earlier ones.
        Place::read(|name| variables.iter().rev().find(|v| v.0 == name).map(|v| v.1.to_owned()))
    }

    fn with(more: &[(&'static str, &'static str)]) -> Result<Place, ProcessError> {
        read(&[&TORCHRUN[..], more].concat())
    }

    #[test]
    fn variables_of_torchrun_and_slurm() {
        let place = Place { rank: 3, size: 8, local_rank: 1, address: "node-0".into(), port: 29500 };
        assert_eq!(read(&TORCHRUN), Ok(place.clone()));
        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_NTASKS", "8"),
            ("SLURM_LOCALID", "1"),
            ("MASTER_ADDR", "node-0"),
            ("MASTER_PORT", "29500"),
        ];
        assert_eq!(read(&slurm), Ok(place.clone()));
        // The agent of torchrun has the port itself; a port of ours goes before everything.
        assert_eq!(with(&[("TORCHELASTIC_USE_AGENT_STORE", "True")]).unwrap().port, 29501);
        let own = [("TORCHELASTIC_USE_AGENT_STORE", "True"), ("PACELINE_MASTER_PORT", "7000")];
        assert_eq!(with(&own).unwrap().port, 7000);
        // Where both speak, torchrun's names count: it may have been started by srun.
        assert_eq!(with(&[("SLURM_PROCID", "0")]), Ok(place));
    }

    #[test]
    fn what_is_unset_is_named() {
        assert_eq!(
            read(&[]).unwrap_err(),
            ProcessError::Unset { names: vec!["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"] }
        );
        let slurm_alone = [("SLURM_PROCID", "3"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "1"), ("MASTER_ADDR", " ")];
        let error = read(&slurm_alone).unwrap_err();
        assert_eq!(error, ProcessError::Unset { names: vec!["MASTER_ADDR", "MASTER_PORT"] });
        let message = error.to_string();
        assert!(message.starts_with("MASTER_ADDR, MASTER_PORT are not set: torchrun sets"), "{message}");
        assert!(message.contains("scontrol show hostnames"), "{message}");
        let one = read(&TORCHRUN[1..]).unwrap_err().to_string();
        assert!(one.starts_with("RANK is not set"), "{one}");
    }

    #[test]
    fn impossible_values_are_refused() {
        for (name, value, said) in [
            ("RANK", "8", "from 0 to 7"),
            ("RANK", "-1", "whole number"),
            ("WORLD_SIZE", "0", "of 0 processes"),
            ("WORLD_SIZE", "many", "WORLD_SIZE = \"many\""),
            ("MASTER_PORT", "70000", "from 1 to 65535"),
            ("MASTER_PORT", "0", "from 1 to 65535"),
            ("LOCAL_RANK", "99999999999", "whole number"),
        ] {
            let error = with(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(said), "{name}={value}: {error}");
        }
    }
}
