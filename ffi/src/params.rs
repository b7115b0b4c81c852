//! hyperattn_params: defaults, and the checks that turn it into the core's options.

use std::mem::size_of;

use hyperattn_core::{Mask, Method, Params, Residual};

use crate::error::{Failure, Result};
use crate::sized;
use crate::types::*;

/// The defaults, with this library's size.
pub(crate) const DEFAULTS: hyperattn_params = hyperattn_params {
    struct_size: size_of::<hyperattn_params>(),
    method: HYPERATTN_METHOD_AUTO,
    mask: HYPERATTN_MASK_NONE,
    scale: 0.0,
    residual: HYPERATTN_RESIDUAL_UNIFORM,
    lsh_num_projs: 7,
    block_size: 256,
    sample_size: 256,
    flags: 0,
    min_seq_len: 4096,
    seed: 0,
    offset: 0,
    approx_d_epsilon: 0.5,
    approx_d_kappa: 1e4,
    budget: 1024,
    num_first_keys: 16,
    band: 128,
    target_error: 0.05,
    head_methods: std::ptr::null(),
};

/// Fills *params with the defaults. struct_size is sizeof(hyperattn_params) as the caller sees it: no
/// more than that is written. Does nothing when params is NULL or struct_size has no room for itself.
///
///     hyperattn_params params;
///     hyperattn_params_init(&params, sizeof params);
///     params.method = HYPERATTN_METHOD_EXACT;
///     params.mask = HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT;
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_params_init(params: *mut hyperattn_params, struct_size: usize) {
    if params.is_null() || struct_size < size_of::<usize>() {
        return;
    }
    let defaults = hyperattn_params { struct_size, ..DEFAULTS };
    let known = struct_size.min(size_of::<hyperattn_params>());
    let to = params.cast::<u8>();
    // SAFETY: the caller has struct_size writable bytes there; defaults has `known` readable ones.
    unsafe {
        std::ptr::copy_nonoverlapping(std::ptr::from_ref(&defaults).cast::<u8>(), to, known);
        std::ptr::write_bytes(to.add(known), 0, struct_size - known);
    }
}

/// The options of a call.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) params: Params,
    /// The caller's methods of the heads, NULL for none.
    pub(crate) head_methods: *const hyperattn_method,
    /// Whether the call may allocate.
    pub(crate) may_allocate: bool,
}

/// Whether `method` is a HYPERATTN_METHOD_*.
pub(crate) fn method(method: hyperattn_method) -> Option<Method> {
    match method {
        HYPERATTN_METHOD_AUTO => Some(Method::Auto),
        HYPERATTN_METHOD_EXACT => Some(Method::Exact),
        HYPERATTN_METHOD_PAPER => Some(Method::Paper),
        HYPERATTN_METHOD_REFINED => Some(Method::Refined),
        _ => None,
    }
}

/// Reads and checks the caller's options.
///
/// # Safety
/// `pointer` is NULL or points to as many readable bytes as its struct_size says.
pub(crate) unsafe fn read(pointer: *const hyperattn_params) -> Result<Options> {
    // SAFETY: the caller's contract.
    let from = unsafe { sized::read(pointer, "params", DEFAULTS) }?;
    let unknown = |name: &str, value: u32, what: &str| {
        Failure::invalid(format_args!("params.{name} = {value} is not a HYPERATTN_{what}_*"))
    };
    let Some(method) = method(from.method) else {
        return Err(unknown("method", from.method, "METHOD"));
    };
    let mask = match from.mask {
        HYPERATTN_MASK_NONE => Mask::None,
        HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT => Mask::CausalBottomRight,
        HYPERATTN_MASK_CAUSAL_TOP_LEFT => Mask::CausalTopLeft,
        other => return Err(unknown("mask", other, "MASK")),
    };
    let residual = match from.residual {
        HYPERATTN_RESIDUAL_UNIFORM => Residual::Uniform,
        HYPERATTN_RESIDUAL_ROW_NORM => Residual::RowNorm,
        HYPERATTN_RESIDUAL_NONE => Residual::None,
        other => return Err(unknown("residual", other, "RESIDUAL")),
    };
    if from.flags & !(HYPERATTN_FLAG_NO_ALLOC | HYPERATTN_FLAG_NONDETERMINISTIC) != 0 {
        return Err(Failure::invalid(format_args!(
            "params.flags = {:#x} has bits that are not a HYPERATTN_FLAG_*",
            from.flags
        )));
    }
    let Ok(min_seq_len) = usize::try_from(from.min_seq_len) else {
        return Err(Failure::invalid(format_args!(
            "params.min_seq_len = {} must be at least 0 and fit the address space",
            from.min_seq_len
        )));
    };
    let params = Params {
        method,
        mask,
        scale: from.scale,
        residual,
        lsh_num_projs: from.lsh_num_projs,
        block_size: from.block_size,
        sample_size: from.sample_size,
        min_seq_len,
        seed: from.seed,
        offset: from.offset,
        approx_d_epsilon: from.approx_d_epsilon,
        approx_d_kappa: from.approx_d_kappa,
        budget: from.budget,
        num_first_keys: from.num_first_keys,
        band: from.band,
        target_error: from.target_error,
        deterministic: from.flags & HYPERATTN_FLAG_NONDETERMINISTIC == 0,
    };
    let may_allocate = from.flags & HYPERATTN_FLAG_NO_ALLOC == 0;
    Ok(Options { params, head_methods: from.head_methods, may_allocate })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_core_s() {
        // SAFETY: the pointer is to a valid struct.
        let Ok(options) = (unsafe { read(&DEFAULTS) }) else { panic!("the defaults are rejected") };
        assert_eq!(options.params, Params::default());
        assert!(options.head_methods.is_null());
        assert!(options.may_allocate);
    }

    #[test]
    fn flags_are_read() {
        for flags in 0..9 {
            // SAFETY: the pointer is to a valid struct.
            match unsafe { read(&hyperattn_params { flags, ..DEFAULTS }) } {
                Ok(options) => {
                    assert!(flags < 4, "{flags} is accepted");
                    assert_eq!(options.may_allocate, flags & HYPERATTN_FLAG_NO_ALLOC == 0);
                    assert_eq!(options.params.deterministic, flags & HYPERATTN_FLAG_NONDETERMINISTIC == 0);
                }
                Err(_) => assert!(flags >= 4, "{flags} is refused"),
            }
        }
    }

    #[test]
    fn methods_have_the_core_s_numbers() {
        for number in 0..100 {
            assert!(method(number).is_none_or(|method| method as u32 == number), "{number}");
        }
    }

    #[test]
    fn init_writes_no_more_than_the_caller_s_size() {
        let mut bytes = [0xaau8; 160];
        for size in [0, 7, 8, 16, size_of::<hyperattn_params>(), 120] {
            bytes.fill(0xaa);
            // SAFETY: at most 120 bytes are written; the struct's alignment is not needed for byte copies.
            unsafe { hyperattn_params_init(bytes.as_mut_ptr().cast(), size) };
            let written = if size < 8 { 0 } else { size };
            assert!(bytes[written..].iter().all(|&byte| byte == 0xaa), "{size}");
            assert!(written == 0 || bytes[..8] == size.to_ne_bytes());
        }
    }
}
