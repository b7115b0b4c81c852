//! What this x86-64 processor can do, asked without std.

use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

/// AVX2, FMA and F16C, and an operating system that saves the wide registers.
pub(super) fn has_avx2() -> bool {
    const FMA: u32 = 1 << 12;
    const AVX: u32 = 1 << 28;
    const F16C: u32 = 1 << 29;
    const LEAF_1: u32 = FMA | AVX | F16C;
    const AVX2: u32 = 1 << 5;
    const XMM_AND_YMM: u64 = 0b110;
    __cpuid(1).ecx & LEAF_1 == LEAF_1 && saves(XMM_AND_YMM) && leaf_7() & AVX2 != 0
}

/// AVX-512 F besides [`has_avx2`], and an operating system that saves masks and all 32 registers.
pub(super) fn has_avx512() -> bool {
    const AVX512F: u32 = 1 << 16;
    const MASKS_AND_ZMM: u64 = 0b1110_0000;
    has_avx2() && saves(MASKS_AND_ZMM) && leaf_7() & AVX512F != 0
}

/// AVX-512 BF16 besides [`has_avx512`].
pub(super) fn has_avx512_bf16() -> bool {
    const AVX512_BF16: u32 = 1 << 5;
    has_avx512() && __cpuid_count(7, 0).eax >= 1 && __cpuid_count(7, 1).eax & AVX512_BF16 != 0
}

/// Whether a product of bf16 pairs costs no more than one of f32 vectors. On Intel's processors it takes
/// as long as four (Sapphire Rapids: 105 GFLOP/s against 210), on AMD's as long as one.
pub(super) fn bf16_products_are_fast() -> bool {
    let vendor = __cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes) != [*b"Genu", *b"ineI", *b"ntel"]
}

/// EBX of leaf 7, 0 where there is no such leaf.
fn leaf_7() -> u32 {
    if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).ebx }
}

/// Whether the operating system saves all of this register state.
fn saves(state: u64) -> bool {
    const XSAVE_BY_OS: u32 = 1 << 27;
    if __cpuid(1).ecx & XSAVE_BY_OS == 0 {
        return false;
    }
    // SAFETY: XSAVE_BY_OS says that XGETBV is enabled.
    let saved = unsafe { _xgetbv(0) };
    saved & state == state
}
