//! The thread's last failure: a status for the program, a sentence for people.

use std::cell::RefCell;
use std::ffi::{CStr, c_char};
use std::fmt::{self, Write};

use hyperattn_core as core_api;

use crate::types::*;

/// A failed call. Its sentence is already where `hyperattn_last_error` finds it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure(pub(crate) hyperattn_status);

pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// A sentence with its terminating 0. Longer ones are cut.
struct Sentence {
    bytes: [u8; 256],
    length: usize,
}

impl Write for Sentence {
    fn write_str(&mut self, piece: &str) -> fmt::Result {
        let mut end = piece.len().min(self.bytes.len() - 1 - self.length);
        while !piece.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes[self.length..self.length + end].copy_from_slice(&piece.as_bytes()[..end]);
        self.length += end;
        if end < piece.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

thread_local! {
    static LAST: RefCell<Sentence> = const { RefCell::new(Sentence { bytes: [0; 256], length: 0 }) };
}

impl Failure {
    /// Records `sentence` as this thread's last failure. Does not allocate.
    pub(crate) fn new(status: hyperattn_status, sentence: fmt::Arguments<'_>) -> Self {
        LAST.with_borrow_mut(|last| {
            last.length = 0;
            // The only failure is a full buffer, and then the cut sentence is what we want.
            let _ = last.write_fmt(sentence);
            last.bytes[last.length] = 0;
        });
        Failure(status)
    }

    pub(crate) fn invalid(sentence: fmt::Arguments<'_>) -> Self {
        Self::new(HYPERATTN_STATUS_INVALID_ARGUMENT, sentence)
    }
}

impl From<core_api::Error> for Failure {
    fn from(error: core_api::Error) -> Self {
        let status = match error.kind() {
            core_api::ErrorKind::InvalidArgument | core_api::ErrorKind::Executor => {
                HYPERATTN_STATUS_INVALID_ARGUMENT
            }
            core_api::ErrorKind::Unsupported => HYPERATTN_STATUS_UNSUPPORTED,
            core_api::ErrorKind::WorkspaceTooSmall => HYPERATTN_STATUS_WORKSPACE_TOO_SMALL,
            core_api::ErrorKind::DeviceUnavailable => HYPERATTN_STATUS_DEVICE_UNAVAILABLE,
            core_api::ErrorKind::OutOfMemory => HYPERATTN_STATUS_OUT_OF_MEMORY,
            core_api::ErrorKind::Device => HYPERATTN_STATUS_CUDA,
            _ => HYPERATTN_STATUS_INTERNAL,
        };
        Failure::new(status, format_args!("{error}"))
    }
}

/// The sentence of this thread's last call that failed: it names the argument and the values. Never
/// NULL; empty when no call of this thread has failed. A call that succeeds leaves it alone. Valid
/// until the thread's next failing call or its end.
#[unsafe(no_mangle)]
pub extern "C" fn hyperattn_last_error() -> *const c_char {
    // While the thread ends its locals may be gone already.
    LAST.try_with(|last| last.borrow().bytes.as_ptr().cast()).unwrap_or(CStr::as_ptr(c""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last() -> String {
        // SAFETY: the pointer is to this thread's terminated sentence.
        unsafe { CStr::from_ptr(hyperattn_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn the_sentence_stays_until_the_next_failure_of_this_thread() {
        assert_eq!(last(), "");
        assert_eq!(Failure::invalid(format_args!("q.dtype = {}", 9)), Failure(1));
        assert_eq!(last(), "q.dtype = 9");
        std::thread::spawn(|| assert_eq!(last(), "")).join().unwrap();
        Failure::invalid(format_args!("{}", "ä".repeat(400)));
        assert!(last().len() <= 255 && last().chars().all(|c| c == 'ä'));
    }
}
