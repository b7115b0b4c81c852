//! What this build is.

use std::ffi::c_char;

use crate::executor::kernels;
use crate::types::*;

/// The header's version: compare with hyperattn_version() to see whether library and header belong together.
pub const HYPERATTN_VERSION_MAJOR: u32 = 0;
/// See HYPERATTN_VERSION_MAJOR.
pub const HYPERATTN_VERSION_MINOR: u32 = 1;
/// See HYPERATTN_VERSION_MAJOR.
pub const HYPERATTN_VERSION_PATCH: u32 = 0;
/// Changes when a program has to be compiled anew. Appended fields and functions do not change it.
pub const HYPERATTN_ABI_VERSION: u32 = 1;

/// The library's version: major << 24 | minor << 16 | patch << 8.
#[unsafe(no_mangle)]
pub extern "C" fn hyperattn_version() -> u32 {
    HYPERATTN_VERSION_MAJOR << 24 | HYPERATTN_VERSION_MINOR << 16 | HYPERATTN_VERSION_PATCH << 8
}

/// The library's HYPERATTN_ABI_VERSION.
///
///     if (hyperattn_abi_version() != HYPERATTN_ABI_VERSION)
///         return "the header belongs to another hyperattn";
#[unsafe(no_mangle)]
pub extern "C" fn hyperattn_abi_version() -> u32 {
    HYPERATTN_ABI_VERSION
}

/// The library's version as text, "major.minor.patch". Static.
#[unsafe(no_mangle)]
pub extern "C" fn hyperattn_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The instruction set of the kernels that this process uses: "avx512_bf16", "avx512", "avx2", "neon_bf16",
/// "neon" or "scalar". Static.
///
/// The environment variable HYPERATTN_MAX_ISA, read once, holds it down to one of these names; other
/// values of it are ignored.
#[unsafe(no_mangle)]
pub extern "C" fn hyperattn_cpu_isa() -> *const c_char {
    let name = match kernels().isa() {
        hyperattn_core::Isa::Scalar => c"scalar",
        hyperattn_core::Isa::Neon => c"neon",
        hyperattn_core::Isa::NeonBf16 => c"neon_bf16",
        hyperattn_core::Isa::Avx2 => c"avx2",
        hyperattn_core::Isa::Avx512 => c"avx512",
        hyperattn_core::Isa::Avx512Bf16 => c"avx512_bf16",
        _ => c"unknown",
    };
    name.as_ptr()
}

/// Whether this build has a feature (HYPERATTN_FEATURE_*). False for numbers it does not know.
#[unsafe(no_mangle)]
pub extern "C" fn hyperattn_has_feature(feature: hyperattn_feature) -> bool {
    match feature {
        HYPERATTN_FEATURE_CUDA | HYPERATTN_FEATURE_THREADS => true,
        HYPERATTN_FEATURE_CUDA_AOT => hyperattn_cuda::COMPILED_AT_BUILD,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macros_functions_and_package_agree() {
        let macros = [HYPERATTN_VERSION_MAJOR, HYPERATTN_VERSION_MINOR, HYPERATTN_VERSION_PATCH];
        let text = macros.map(|part| part.to_string()).join(".");
        assert_eq!(text, env!("CARGO_PKG_VERSION"));
        assert_eq!(hyperattn_version().to_be_bytes()[..3], macros.map(|part| part as u8));
        // SAFETY: the string is static and terminated.
        let string = unsafe { std::ffi::CStr::from_ptr(hyperattn_version_string()) };
        assert_eq!(string.to_str().unwrap(), text);
    }

    #[test]
    fn the_isa_is_named_as_the_core_names_it() {
        // SAFETY: the string is static and terminated.
        let name = unsafe { std::ffi::CStr::from_ptr(hyperattn_cpu_isa()) };
        assert_eq!(name.to_str().unwrap(), kernels().isa().name());
    }
}
