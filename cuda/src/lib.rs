//! HyperAttention on CUDA. This version has no device code: every entry point answers
//! [`ErrorKind::Unsupported`], so that programs written against the whole interface link and run.

use hyperattn_core::{Error, ErrorKind};

/// Whether this build contains the device code.
pub const BUILT: bool = false;

/// What every CUDA entry point answers; `entry` is the name that the caller used.
pub fn not_built(entry: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format_args!("{entry}: this build has no CUDA kernels; hyperattn_forward runs on the CPU"),
    )
}
