//! The functions of NCCL, found in its library when several processes need them.
//!
//! cudarc declares their types; its own loader knows no `libnccl.so.2`, which is the only name in NVIDIA's Python packages, so the
//! functions are looked up here. Results are numbers: a newer library may return some that an enumeration of today lacks.

use super::libraries;
use crate::device::KernelError;
use cudarc::nccl::sys;
use libloading::Library;
use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;

type Buffer = *mut c_void;
type Type = sys::ncclDataType_t;
type Communicator = sys::ncclComm_t;
type Stream = sys::cudaStream_t;

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// One field per function, named as in nccl.h.
        pub(super) struct Nccl {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Nccl {
            fn of(library: &'static Library, path: &str) -> Result<Nccl, String> {
                $(
                    // SAFETY: the declarations are those of nccl.h, which are stable since version 2.18.
                    let $field = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol) };
                    let $field = *$field.map_err(|error| {
                        let symbol = String::from_utf8_lossy($symbol);
                        format!("{path} lacks {symbol}: NCCL 2.18 or newer is needed ({error})")
                    })?;
                )*
                Ok(Nccl { $($field),* })
            }
        }
    };
}

functions! {
    version = b"ncclGetVersion": fn(*mut c_int) -> c_int;
    unique_id = b"ncclGetUniqueId": fn(*mut sys::ncclUniqueId) -> c_int;
    init = b"ncclCommInitRankConfig": fn(*mut Communicator, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t) -> c_int;
    abort = b"ncclCommAbort": fn(Communicator) -> c_int;
    state = b"ncclCommGetAsyncError": fn(Communicator, *mut c_int) -> c_int;
    error_text = b"ncclGetErrorString": fn(c_int) -> *const c_char;
    last_error = b"ncclGetLastError": fn(Communicator) -> *const c_char;
    group_start = b"ncclGroupStart": fn() -> c_int;
    group_end = b"ncclGroupEnd": fn() -> c_int;
    send = b"ncclSend": fn(Buffer, usize, Type, c_int, Communicator, Stream) -> c_int;
    receive = b"ncclRecv": fn(Buffer, usize, Type, c_int, Communicator, Stream) -> c_int;
    all_reduce = b"ncclAllReduce": fn(Buffer, Buffer, usize, Type, sys::ncclRedOp_t, Communicator, Stream) -> c_int;
    reduce_scatter = b"ncclReduceScatter": fn(Buffer, Buffer, usize, Type, sys::ncclRedOp_t, Communicator, Stream) -> c_int;
    all_gather = b"ncclAllGather": fn(Buffer, Buffer, usize, Type, Communicator, Stream) -> c_int;
    reduce = b"ncclReduce": fn(Buffer, Buffer, usize, Type, sys::ncclRedOp_t, c_int, Communicator, Stream) -> c_int;
    broadcast = b"ncclBroadcast": fn(Buffer, Buffer, usize, Type, c_int, Communicator, Stream) -> c_int;
}

/// Loads the library, once per process.
///
/// # Errors
/// [`KernelError::Unavailable`] names what is missing and everywhere it was looked for.
pub(super) fn load() -> Result<&'static Nccl, KernelError> {
    static LOADED: OnceLock<Result<Nccl, String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        let path = libraries::find_nccl()?;
        // SAFETY: the library is loaded already; this is another handle of it, which is kept.
        let library = unsafe { Library::new(&path) }.map_err(|error| error.to_string())?;
        Nccl::of(Box::leak(Box::new(library)), &path.display().to_string())
    });
    loaded.as_ref().map_err(|what| KernelError::Unavailable(what.clone()))
}
