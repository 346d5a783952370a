//! Which machine this is.

use paceline_kernels::Device;
use paceline_profiles::Machine;

/// The machine at hand, as profiles name it.
pub fn this_machine(device: &dyn Device) -> Machine {
    Machine {
        device: device.name(),
        host: processor().unwrap_or_else(|| std::env::consts::ARCH.into()),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
    }
}

/// The model name of the first processor, where the system tells.
fn processor() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// The day, UTC, as `2026-11-21`.
pub(super) fn today() -> String {
    time::OffsetDateTime::now_utc().date().to_string()
}

/// What measures.
pub(super) fn versions(device: Option<&dyn Device>) -> String {
    let own = concat!("paceline ", env!("CARGO_PKG_VERSION"));
    match device.map_or(String::new(), Device::details) {
        details if details.is_empty() => own.into(),
        details => format!("{own}; {details}"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_date_is_year_month_day() {
        let parts: Vec<usize> = super::today().split('-').map(str::len).collect();
        assert_eq!(parts, [4, 2, 2]);
    }
}
