//! NCCL: channels between GPUs of several processes.
//!
//! Every communicator has a stream of its own and is made non-blocking, so that nothing here waits inside the library: this thread asks
//! again and again whether the work has ended, the library has found a fault, or somebody has given up; then the communicator is
//! aborted, which ends what is queued on all of its GPUs.

use super::driver::{Context, Stream};
use super::nccl_library::{IN_PROGRESS, Nccl, SUCCESS, load};
use crate::device::{DType, KernelError, View};
use crate::network::{Channel, Joint};
use cudarc::driver::{result, sys as driver};
use cudarc::nccl::sys;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Marks a `ncclConfig_t` (`NCCL_CONFIG_INITIALIZER` in nccl.h).
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// The version of nccl.h whose `ncclConfig_t` is used: 2.24.3 as `NCCL_VERSION` writes it.
const CONFIG_VERSION: u32 = 22_403;
/// What is left to the library.
const UNDEFINED: c_int = c_int::MIN;
/// Work that takes less than this is waited for without giving the core away.
const BRIEF: Duration = Duration::from_micros(200);
/// Between looks at work that takes long.
const PAUSE: Duration = Duration::from_micros(50);
const LONG: Duration = Duration::from_millis(5);

/// The version of the library as people write it.
fn spell(version: c_int) -> String {
    // From 2.9 on: 10000 * major + 100 * minor + patch.
    format!("NCCL {}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// The library's version.
pub(super) fn version() -> Result<String, KernelError> {
    let nccl = load()?;
    let mut version = 0;
    // SAFETY: a place that lives.
    match unsafe { (nccl.version)(&mut version) } {
        SUCCESS => Ok(spell(version)),
        code => Err(KernelError::Unavailable(format!("NCCL does not tell its version: {}", nccl.text(code)))),
    }
}

/// The bytes of a new unique id.
pub(super) fn invite(device: &str) -> Result<Vec<u8>, KernelError> {
    let nccl = load()?;
    let mut id = sys::ncclUniqueId { internal: [0; 128] };
    // SAFETY: a place that lives.
    match unsafe { (nccl.unique_id)(&mut id) } {
        SUCCESS => Ok(id.internal.iter().map(|&byte| byte as u8).collect()),
        code => Err(nccl.failed(device, "an invitation", code)),
    }
}

impl Nccl {
    fn text(&self, code: c_int) -> String {
        // SAFETY: the library returns texts that live as long as it; without a communicator, the last error of this thread.
        let (said, last) = unsafe { ((self.error_text)(code), (self.last_error)(std::ptr::null_mut())) };
        let text = |text: *const c_char| {
            // SAFETY: as above.
            let text = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned());
            text.filter(|text| !text.is_empty())
        };
        let said = text(said).unwrap_or_else(|| format!("error {code}"));
        text(last).map_or(said.clone(), |last| format!("{said} ({last})"))
    }

    fn failed(&self, device: &str, doing: &str, code: c_int) -> KernelError {
        let what = format!("NCCL: {doing}: {}; NCCL_DEBUG=INFO makes it say more", self.text(code));
        KernelError::Machine { device: device.to_owned(), what }
    }
}

/// A communicator with its stream.
pub(super) struct Communicator {
    nccl: &'static Nccl,
    communicator: sys::ncclComm_t,
    stream: Stream,
    ended: driver::CUevent,
    device: String,
    context: Arc<Context>,
    /// It was given up: nothing can be done with it any more.
    aborted: AtomicBool,
}

// SAFETY: one thread at a time uses a communicator (a stream of the program has one thread); the handles may be used from any.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Communicator").field("device", &self.device).field("aborted", &self.aborted).finish()
    }
}

impl Communicator {
    pub fn open(
        context: &Arc<Context>,
        invitation: &[u8],
        members: u32,
        member: u32,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Communicator, KernelError> {
        let nccl = load()?;
        context.enter()?;
        let device = context.name.clone();
        let Ok(internal) = <[u8; 128]>::try_from(invitation) else {
            let what = format!("NCCL: an invitation of {} bytes instead of 128", invitation.len());
            return Err(KernelError::Machine { device, what });
        };
        let id = sys::ncclUniqueId { internal: internal.map(|byte| byte as c_char) };
        let mut config = sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: UNDEFINED,
            netName: std::ptr::null(),
            splitShare: UNDEFINED,
        };
        let stream = Stream::new(context)?;
        let ended = result::event::create(driver::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(|error| context.failed("creating an event", error))?;
        let mut communicator: sys::ncclComm_t = std::ptr::null_mut();
        // SAFETY: places that live; the context is current.
        let begun = unsafe { (nccl.init)(&mut communicator, members as c_int, id, member as c_int, &mut config) };
        let this = Communicator {
            nccl,
            communicator,
            stream,
            ended,
            device,
            context: context.clone(),
            aborted: AtomicBool::new(communicator.is_null()),
        };
        let doing = format!("connecting as member {member} of {members}");
        this.accepted(begun, &doing)?;
        this.settle(&doing, given_up)?;
        Ok(this)
    }

    /// Waits until the library has done what it was asked for, which for work on the GPU means: queued it.
    fn settle(&self, doing: &str, given_up: &dyn Fn() -> bool) -> Result<(), KernelError> {
        let begin = Instant::now();
        loop {
            if self.has_settled(doing)? {
                return Ok(());
            }
            self.pause(begin, doing, given_up)?;
        }
    }

    /// Whether the library has taken a call: done or under way.
    fn accepted(&self, code: c_int, doing: &str) -> Result<(), KernelError> {
        if matches!(code, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        let error = self.nccl.failed(&self.device, doing, code);
        self.end();
        Err(error)
    }

    fn has_settled(&self, doing: &str) -> Result<bool, KernelError> {
        let mut state = SUCCESS;
        // SAFETY: the communicator lives.
        let asked = unsafe { (self.nccl.state)(self.communicator, &mut state) };
        self.accepted(asked, doing)?;
        self.accepted(state, doing)?;
        Ok(state == SUCCESS)
    }

    fn pause(&self, begin: Instant, doing: &str, given_up: &dyn Fn() -> bool) -> Result<(), KernelError> {
        if given_up() {
            return Err(self.abort(doing, "given up, because another rank is gone"));
        }
        match begin.elapsed() {
            passed if passed < BRIEF => std::hint::spin_loop(),
            passed if passed < LONG => std::thread::yield_now(),
            _ => std::thread::sleep(PAUSE),
        }
        Ok(())
    }

    fn abort(&self, doing: &str, why: &str) -> KernelError {
        self.end();
        KernelError::Machine { device: self.device.clone(), what: format!("NCCL: {doing}: {why}") }
    }

    /// Ends what is queued, on this GPU and on those that wait for it.
    fn end(&self) {
        if !self.aborted.swap(true, Ordering::AcqRel) && self.context.enter().is_ok() {
            // SAFETY: the communicator lives, and is used no more after this.
            let _ = unsafe { (self.nccl.abort)(self.communicator) };
        }
    }

    /// # Safety
    /// As for [`Channel::run`]; between group start and end.
    unsafe fn queue(&self, joint: &Joint) -> c_int {
        let Communicator { nccl, communicator, .. } = *self;
        let stream: sys::cudaStream_t = self.stream.handle.cast();
        let at = |view: View| view.address() as *mut c_void;
        let (sum, kind) = (sys::ncclRedOp_t::ncclSum, |view: View| data_type(view.dtype()));
        // SAFETY: the caller's promise.
        unsafe {
            match *joint {
                Joint::Send { from, to } => {
                    (nccl.send)(at(from), from.len(), kind(from), to as c_int, communicator, stream)
                }
                Joint::Receive { to, from } => {
                    (nccl.receive)(at(to), to.len(), kind(to), from as c_int, communicator, stream)
                }
                Joint::AllReduce { x } => (nccl.all_reduce)(at(x), at(x), x.len(), kind(x), sum, communicator, stream),
                Joint::ReduceScatter { from, to } => {
                    (nccl.reduce_scatter)(at(from), at(to), to.len(), kind(to), sum, communicator, stream)
                }
                Joint::AllGather { from, to } => {
                    (nccl.all_gather)(at(from), at(to), from.len(), kind(to), communicator, stream)
                }
                Joint::Reduce { from, to, root } => {
                    (nccl.reduce)(at(from), at(to), from.len(), kind(to), sum, root as c_int, communicator, stream)
                }
                Joint::Broadcast { from, to, root } => {
                    (nccl.broadcast)(at(from), at(to), to.len(), kind(to), root as c_int, communicator, stream)
                }
            }
        }
    }
}

fn data_type(dtype: DType) -> sys::ncclDataType_t {
    match dtype {
        DType::F32 => sys::ncclDataType_t::ncclFloat32,
        DType::F64 => sys::ncclDataType_t::ncclFloat64,
        DType::U32 => sys::ncclDataType_t::ncclUint32,
        DType::BF16 => sys::ncclDataType_t::ncclBfloat16,
    }
}

impl Channel for Communicator {
    unsafe fn run(&self, batch: &[Joint], given_up: &dyn Fn() -> bool) -> Result<(), KernelError> {
        let doing = batch.first().map_or("nothing", |joint| match joint {
            Joint::Send { .. } => "sending",
            Joint::Receive { .. } => "receiving",
            Joint::AllReduce { .. } => "an all-reduce",
            Joint::ReduceScatter { .. } | Joint::Reduce { .. } => "a reduce-scatter",
            Joint::AllGather { .. } | Joint::Broadcast { .. } => "an all-gather",
        });
        if self.aborted.load(Ordering::Acquire) {
            return Err(self.abort(doing, "its connection was given up before"));
        }
        self.context.enter()?;
        // SAFETY: a group is a matter of this thread.
        self.accepted(unsafe { (self.nccl.group_start)() }, doing)?;
        // SAFETY: the caller's promise.
        let queued = batch.iter().map(|joint| unsafe { self.queue(joint) });
        let refused = queued.filter(|&code| !matches!(code, SUCCESS | IN_PROGRESS)).max();
        // Whatever was queued, the group has to be closed.
        // SAFETY: as above.
        let closed = unsafe { (self.nccl.group_end)() };
        self.accepted(refused.unwrap_or(closed), doing)?;
        self.settle(doing, given_up)?;
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.ended, self.stream.handle) }
            .map_err(|error| self.context.failed(format_args!("NCCL: {doing}"), error))?;
        let begin = Instant::now();
        loop {
            // SAFETY: the event lives.
            match unsafe { result::event::query(self.ended) } {
                Ok(()) => return Ok(()),
                Err(error) if error.0 == driver::CUresult::CUDA_ERROR_NOT_READY => {}
                Err(error) => return Err(self.context.failed(format_args!("NCCL: {doing}"), error)),
            }
            // A fault of the network shows here, not in the event.
            self.has_settled(doing)?;
            self.pause(begin, doing, given_up)?;
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.end();
        if self.context.enter().is_ok() {
            // SAFETY: nothing is queued any more. An error could not be told to anybody.
            let _ = unsafe { result::event::destroy(self.ended) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_spelled_as_the_library_numbers_them() {
        assert_eq!(spell(22_703), "NCCL 2.27.3");
        assert_eq!(spell(CONFIG_VERSION as c_int), "NCCL 2.24.3");
    }

    /// The struct is passed by its size; what the library reads has to be where its header says.
    #[test]
    fn the_configuration_has_the_layout_of_the_header() {
        use std::mem::offset_of;
        assert_eq!(size_of::<sys::ncclConfig_t>(), 48);
        assert_eq!((offset_of!(sys::ncclConfig_t, magic), offset_of!(sys::ncclConfig_t, blocking)), (8, 16));
        assert_eq!((offset_of!(sys::ncclConfig_t, netName), offset_of!(sys::ncclConfig_t, splitShare)), (32, 40));
    }

    /// With the library at hand it tells its version and makes invitations (which needs no GPU in versions that load without one);
    /// without, the error says what is missing.
    #[test]
    fn the_library_is_loaded_or_named() {
        match version() {
            Ok(version) => assert!(version.starts_with("NCCL 2."), "{version}"),
            Err(error) => assert!(error.to_string().contains("libnccl.so"), "{error}"),
        }
    }
}
