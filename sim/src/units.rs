//! Ids and quantities. Ids are newtypes so that a rank is never a stage; engine time is integer nanoseconds so that a
//! replay is exact; bytes are `u64`.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $repr:ty, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $repr);

        impl $name {
            /// The id as an index into the table it numbers.
            #[inline]
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(/// A logical rank: one entry of [`crate::program::Program::ranks`].
    RankId, u32, "r");
id!(/// A physical device (one GPU, one CPU core slot); several ranks may share one.
    DeviceId, u32, "d");
id!(/// A global pipeline stage, `0..p*v`: a contiguous run of layers.
    StageId, u16, "s");
id!(/// A microbatch of one data-parallel replica, `0..m`.
    MicrobatchId, u32, "m");
id!(/// A communication group: one entry of [`crate::program::Program::groups`].
    GroupId, u32, "g");
id!(/// An op of one rank: its place in that rank's issue order.
    OpId, u32, "op");
id!(/// A buffer of one rank.
    BufferId, u32, "b");

/// A time or a span in integer nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nanos(pub u64);

impl Nanos {
    /// Zero.
    pub const ZERO: Nanos = Nanos(0);

    /// From seconds, rounded to the nearest nanosecond; negative and NaN become zero.
    pub fn from_seconds(seconds: f64) -> Nanos {
        Nanos((seconds * 1e9).round().max(0.0) as u64)
    }

    /// As seconds.
    pub fn seconds(self) -> f64 {
        self.0 as f64 * 1e-9
    }
}

impl std::ops::Add for Nanos {
    type Output = Nanos;
    #[inline]
    fn add(self, other: Nanos) -> Nanos {
        Nanos(self.0 + other.0)
    }
}

impl std::ops::AddAssign for Nanos {
    #[inline]
    fn add_assign(&mut self, other: Nanos) {
        self.0 += other.0;
    }
}

impl std::ops::Sub for Nanos {
    type Output = Nanos;
    /// Saturating: a span is never negative.
    #[inline]
    fn sub(self, other: Nanos) -> Nanos {
        Nanos(self.0.saturating_sub(other.0))
    }
}

impl std::iter::Sum for Nanos {
    fn sum<I: Iterator<Item = Nanos>>(iter: I) -> Nanos {
        Nanos(iter.map(|n| n.0).sum())
    }
}

/// Bytes shown in GiB, MiB or KiB (powers of 1024), as memory is shown everywhere.
pub fn show_bytes(bytes: u64) -> String {
    let value = bytes as f64;
    if bytes >= 1 << 30 {
        format!("{:.2} GiB", value / (1u64 << 30) as f64)
    } else if bytes >= 1 << 20 {
        format!("{:.2} MiB", value / (1u64 << 20) as f64)
    } else if bytes >= 1 << 10 {
        format!("{:.2} KiB", value / 1024.0)
    } else {
        format!("{bytes} B")
    }
}

/// Seconds with a fitting unit, three significant digits.
pub fn show_seconds(seconds: f64) -> String {
    let (value, unit) = match seconds.abs() {
        s if s >= 1.0 => (seconds, "s"),
        s if s >= 1e-3 => (seconds * 1e3, "ms"),
        _ => (seconds * 1e6, "us"),
    };
    let digits = if value.abs() >= 100.0 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {unit}")
}

/// A share as a percentage with one digit.
pub fn show_percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_choose_a_unit() {
        assert_eq!(show_seconds(1.5), "1.50 s");
        assert_eq!(show_seconds(0.0123), "12.3 ms");
        assert_eq!(show_seconds(0.000_456), "456 us");
    }
}
