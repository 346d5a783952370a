//! Events on the GPU's streams: moments that streams and hosts wait for, and times by the GPU's own clock.

use super::driver::Context;
use crate::device::KernelError;
use crate::queue::Moment;
use cudarc::driver::{result, sys};
use libloading::Library;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

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

/// Events by handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Handle(sys::CUevent);

// SAFETY: events may be used from any thread.
unsafe impl Send for Handle {}

/// The events of a context: made when all others are in use, kept until the end.
pub(super) struct Events {
    context: Arc<Context>,
    all: Mutex<Vec<Handle>>,
    idle: Mutex<Vec<Moment>>,
}

impl Events {
    pub fn new(context: &Arc<Context>) -> Events {
        Events { context: context.clone(), all: Mutex::default(), idle: Mutex::default() }
    }

    /// A moment. Where it was used before, whoever follows it before it is set follows what has passed long ago.
    pub fn moment(&self) -> Result<Moment, KernelError> {
        if let Some(moment) = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(moment);
        }
        self.context.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(|error| self.context.failed("creating an event", error))?;
        self.all.lock().unwrap_or_else(PoisonError::into_inner).push(Handle(event));
        Ok(Moment(event.expose_provenance() as u64))
    }

    pub fn release(&self, moments: &[Moment]) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(moments);
    }

    /// Marks the moment at which everything queued so far has ended.
    pub fn set(&self, moment: Moment, stream: sys::CUstream) -> Result<(), KernelError> {
        self.context.enter()?;
        // SAFETY: moments are events of ours, which live as long as this; so does the stream while it is used.
        unsafe { result::event::record(event(moment), stream) }
            .map_err(|error| self.context.failed("recording an event", error))
    }

    /// Lets a stream wait for the moment.
    pub fn follow(&self, moment: Moment, stream: sys::CUstream) -> Result<(), KernelError> {
        self.context.enter()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as above.
        unsafe { result::stream::wait_event(stream, event(moment), flags) }
            .map_err(|error| self.context.failed("waiting for an event", error))
    }

    /// Lets the host wait for the moment.
    pub fn reach(&self, moment: Moment) -> Result<(), KernelError> {
        self.context.enter()?;
        // SAFETY: as above.
        unsafe { result::event::synchronize(event(moment)) }
            .map_err(|error| self.context.failed("work before an event", error))
    }

    /// Seconds between two moments; both have passed.
    pub fn seconds(&self, from: Moment, to: Moment) -> Result<f64, KernelError> {
        self.context.enter()?;
        let mut milliseconds = 0.0f32;
        // SAFETY: as above.
        let code = unsafe { elapsed_function()?(&mut milliseconds, event(from), event(to)) };
        code.result().map_err(|error| self.context.failed("reading an event", error))?;
        Ok(f64::from(milliseconds) * 1e-3)
    }
}

fn event(moment: Moment) -> sys::CUevent {
    std::ptr::with_exposed_provenance_mut(moment.0 as usize)
}

impl Drop for Events {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            for handle in self.all.get_mut().unwrap_or_else(PoisonError::into_inner) {
                // SAFETY: nobody uses it any more. An error could not be told to anybody.
                let _ = unsafe { result::event::destroy(handle.0) };
            }
        }
    }
}
