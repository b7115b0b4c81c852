//! Statuses as text.

use std::ffi::c_char;

use crate::types::*;

/// A short name for a status, for logs. Static, never NULL, whatever the number.
#[unsafe(no_mangle)]
pub extern "C" fn hyperattn_status_string(status: hyperattn_status) -> *const c_char {
    let text = match status {
        HYPERATTN_STATUS_OK => c"ok",
        HYPERATTN_STATUS_INVALID_ARGUMENT => c"invalid argument",
        HYPERATTN_STATUS_UNSUPPORTED => c"unsupported",
        HYPERATTN_STATUS_DEVICE_UNAVAILABLE => c"device unavailable",
        HYPERATTN_STATUS_OUT_OF_MEMORY => c"out of memory",
        HYPERATTN_STATUS_WORKSPACE_TOO_SMALL => c"workspace too small",
        HYPERATTN_STATUS_CUDA => c"CUDA error",
        HYPERATTN_STATUS_ABI_MISMATCH => c"ABI mismatch",
        HYPERATTN_STATUS_INTERNAL => c"internal error",
        _ => c"unknown status",
    };
    text.as_ptr()
}
