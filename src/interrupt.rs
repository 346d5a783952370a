//! Ctrl-C: the first asks the work at hand to come to a clean end, the second leaves at once.

use crate::failure::Failure;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

static RAISED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// A flag that becomes true at the first Ctrl-C. Only commands that can stop cleanly ask for it; without it Ctrl-C ends
/// the process as usual.
pub fn flag() -> Result<Arc<AtomicBool>, Failure> {
    if let Some(flag) = RAISED.get() {
        return Ok(flag.clone());
    }
    let flag = RAISED.get_or_init(Arc::default).clone();
    let raised = flag.clone();
    ctrlc::set_handler(move || {
        if raised.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })
    .map_err(|error| Failure::internal(format!("cannot listen for Ctrl-C: {error}")))?;
    Ok(flag)
}
