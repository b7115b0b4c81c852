//! The functions of the C library that compiled Rust calls of its own accord.

use core::ffi::c_int;

/// # Safety
/// As in C: `len` bytes are readable at `from` and writable at `to`, and the two do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    let mut i = 0;
    while i < len {
        // SAFETY: i < len.
        unsafe { *to.add(i) = *from.add(i) };
        i += 1;
    }
    to
}

/// # Safety
/// As in C: `len` bytes are readable at `from` and writable at `to`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize) < from as usize {
        // SAFETY: the same contract; ascending order reads every byte before it is overwritten.
        return unsafe { memcpy(to, from, len) };
    }
    let mut i = len;
    while i > 0 {
        i -= 1;
        // SAFETY: i < len; descending order reads every byte before it is overwritten.
        unsafe { *to.add(i) = *from.add(i) };
    }
    to
}

/// # Safety
/// As in C: `len` bytes are writable at `to`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: c_int, len: usize) -> *mut u8 {
    let mut i = 0;
    while i < len {
        // SAFETY: i < len.
        unsafe { *to.add(i) = byte as u8 };
        i += 1;
    }
    to
}

/// # Safety
/// As in C: `len` bytes are readable at `a` and at `b`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> c_int {
    let mut i = 0;
    while i < len {
        // SAFETY: i < len.
        let (x, y) = unsafe { (*a.add(i), *b.add(i)) };
        if x != y {
            return c_int::from(x) - c_int::from(y);
        }
        i += 1;
    }
    0
}

/// # Safety
/// As [`memcmp`].
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> c_int {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, len) }
}
