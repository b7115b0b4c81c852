//! A library with a standard library of its own, that allocates, starts a thread, panics and catches the panic.

use std::ffi::{CStr, c_char};

/// The number of words in `text`; -1 where it is NULL.
///
/// # Safety
/// `text` is NULL or a string that ends with 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn neighbour_count_words(text: *const c_char) -> i64 {
    let count = || {
        assert!(!text.is_null(), "no text");
        // SAFETY: not NULL, so the caller promises that it is a string.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
        std::thread::spawn(move || text.split_whitespace().count() as i64).join()
    };
    match std::panic::catch_unwind(count) {
        Ok(Ok(words)) => words,
        Ok(Err(_)) | Err(_) => -1,
    }
}
