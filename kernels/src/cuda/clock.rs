//! Times on the GPU's own clock: events on its stream.

use super::driver::Context;
use crate::device::KernelError;
use cudarc::driver::{result, sys};
use libloading::Library;
use std::sync::{Arc, OnceLock};

/// `cuEventElapsedTime` as every driver has it; cudarc asks for its successor, which drivers before CUDA 12.8 lack.
type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;

fn elapsed_function() -> Result<Elapsed, KernelError> {
    static FOUND: OnceLock<Result<Elapsed, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // SAFETY: the driver is loaded already; the function has this type since CUDA 2.0.
        unsafe {
            let library = Library::new("libcuda.so.1").map_err(|error| error.to_string())?;
            let function = *library.get::<Elapsed>(b"cuEventElapsedTime").map_err(|error| error.to_string())?;
            std::mem::forget(library);
            Ok(function)
        }
    });
    found.clone().map_err(|what| KernelError::Unavailable(format!("the driver tells no times: {what}")))
}

/// A moment on a stream.
pub(super) struct Event {
    event: sys::CUevent,
    context: Arc<Context>,
}

impl Event {
    pub fn new(context: &Arc<Context>) -> Result<Event, KernelError> {
        context.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(|error| context.failed("creating an event", error))?;
        Ok(Event { event, context: context.clone() })
    }

    /// Marks the moment at which everything queued so far has ended.
    pub fn record(&self, stream: sys::CUstream) -> Result<(), KernelError> {
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.event, stream) }
            .map_err(|error| self.context.failed("recording an event", error))
    }

    /// Lets a stream wait for the moment.
    pub fn hold(&self, stream: sys::CUstream) -> Result<(), KernelError> {
        // SAFETY: event and stream live.
        unsafe { result::stream::wait_event(stream, self.event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
            .map_err(|error| self.context.failed("waiting for an event", error))
    }

    /// Seconds from another moment to this one; both have passed.
    pub fn since(&self, earlier: &Event) -> Result<f64, KernelError> {
        let mut milliseconds = 0.0f32;
        // SAFETY: both events live and were recorded.
        let code = unsafe { elapsed_function()?(&mut milliseconds, earlier.event, self.event) };
        code.result().map_err(|error| self.context.failed("reading an event", error))?;
        Ok(f64::from(milliseconds) * 1e-3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: nobody uses it any more. An error could not be told to anybody.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}
