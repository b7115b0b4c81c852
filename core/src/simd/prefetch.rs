//! Hints that memory will be read soon.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Asks for the `len` bytes at `address` to be brought into the cache. They are not accessed: any address will do.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8, len: usize) {
    for offset in (0..len).step_by(LINE) {
        prefetch_line(address.wrapping_add(offset));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch_line(address: *const u8) {
    use core::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: the instruction is part of the architecture and does not fault.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn prefetch_line(address: *const u8) {
    // SAFETY: the instruction is part of the architecture and does not fault.
    unsafe {
        core::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly))
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[inline(always)]
fn prefetch_line(_address: *const u8) {}
