//! What this aarch64 processor can do beyond NEON, asked without std.

/// The bf16 instructions (FEAT_BF16), where the compiler was told so or Linux says so.
pub(super) fn has_bf16() -> bool {
    cfg!(target_feature = "bf16") || system_says_bf16()
}

/// Programs may not read the register, but since 4.11 Linux answers in its place, with what all cores have.
#[cfg(target_os = "linux")]
fn system_says_bf16() -> bool {
    let features: u64;
    // SAFETY: the instruction changes nothing but its result.
    unsafe {
        core::arch::asm!(
            "mrs {}, ID_AA64ISAR1_EL1", out(reg) features, options(pure, nomem, nostack, preserves_flags)
        );
    }
    const BF16_SHIFT: u32 = 44;
    features >> BF16_SHIFT & 0xf != 0
}

/// Elsewhere reading the register may end the program.
#[cfg(not(target_os = "linux"))]
fn system_says_bf16() -> bool {
    false
}
