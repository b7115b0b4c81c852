//! The boundary that no panic crosses.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Failure, Result};
use crate::types::*;

/// Runs the body of an entry point and turns what happens into a status. A panic is a bug of this library and
/// becomes HYPERATTN_STATUS_INTERNAL.
pub(crate) fn guard(body: impl FnOnce() -> Result<()>) -> hyperattn_status {
    // Nothing that a panic could leave half-changed outlives the call but the caller's buffers.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => HYPERATTN_STATUS_OK,
        Ok(Err(Failure(status))) => status,
        Err(panic) => {
            let Failure(status) =
                Failure::new(HYPERATTN_STATUS_INTERNAL, format_args!("internal error: {}", text(&*panic)));
            status
        }
    }
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&str>().copied();
    literal.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic")
}

/// The reference behind a required pointer argument.
///
/// # Safety
/// `pointer` is NULL or valid for reads for `'a`.
pub(crate) unsafe fn required<'a, T>(pointer: *const T, name: &str) -> Result<&'a T> {
    check_pointer(pointer, name)?;
    // SAFETY: not NULL and aligned; the rest is the caller's contract.
    Ok(unsafe { &*pointer })
}

/// A pointer argument is not NULL and aligned for its type.
pub(crate) fn check_pointer<T>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(Failure::invalid(format_args!("{name} is NULL")));
    }
    if !pointer.is_aligned() {
        return Err(Failure::invalid(format_args!("{name} = {pointer:p} is misaligned")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_and_a_sentence() {
        assert_eq!(guard(|| panic!("block {} is lost", 3)), HYPERATTN_STATUS_INTERNAL);
        // SAFETY: the pointer is to this thread's terminated sentence.
        let sentence = unsafe { std::ffi::CStr::from_ptr(crate::error::hyperattn_last_error()) };
        assert_eq!(sentence.to_str().unwrap(), "internal error: block 3 is lost");
    }

    #[test]
    fn statuses_pass() {
        assert_eq!(guard(|| Ok(())), HYPERATTN_STATUS_OK);
        assert_eq!(guard(|| Err(Failure(HYPERATTN_STATUS_CUDA))), HYPERATTN_STATUS_CUDA);
    }
}
