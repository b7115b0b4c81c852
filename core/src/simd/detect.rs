//! What this processor can do, asked without std.

/// AVX2, FMA and F16C, and an operating system that saves the wide registers.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_avx2() -> bool {
    use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    const FMA: u32 = 1 << 12;
    const XSAVE_BY_OS: u32 = 1 << 27;
    const AVX: u32 = 1 << 28;
    const F16C: u32 = 1 << 29;
    const LEAF_1: u32 = FMA | XSAVE_BY_OS | AVX | F16C;
    const AVX2: u32 = 1 << 5;
    const XMM_AND_YMM_STATE: u64 = 0b110;

    if __cpuid(0).eax < 7 || __cpuid(1).ecx & LEAF_1 != LEAF_1 {
        return false;
    }
    // SAFETY: XSAVE_BY_OS says that XGETBV is enabled.
    let state = unsafe { _xgetbv(0) };
    state & XMM_AND_YMM_STATE == XMM_AND_YMM_STATE && __cpuid_count(7, 0).ebx & AVX2 != 0
}
