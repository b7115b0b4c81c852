//! Structs that begin with `struct_size`: read and written across versions of the header.

use std::mem::{MaybeUninit, offset_of, size_of};

use crate::boundary::check_pointer;
use crate::error::{Failure, Result};
use crate::types::*;

/// Nothing sensible is longer than this; a larger struct_size is garbage and is not followed.
const LONGEST: usize = 1 << 16;

/// A struct whose first field is its size.
///
/// # Safety
/// `repr(C)` without padding, every bit pattern is a value, the first field is `struct_size: usize`,
/// and `FIELD_ENDS` are the offsets at which fields end.
pub(crate) unsafe trait Sized_: Copy {
    /// Where a struct from an older header may end.
    const FIELD_ENDS: &'static [usize];
    /// What the messages call it.
    const NAME: &'static str;
}

/// The struct_size of the struct at `pointer`, checked: the size of this or an older version, or a larger
/// one with zeros beyond what is known here.
///
/// # Safety
/// `pointer` is NULL or readable for a `usize` and then for as many bytes as that says.
pub(crate) unsafe fn size<T: Sized_>(pointer: *const T, name: &str) -> Result<usize> {
    check_pointer(pointer, name)?;
    // SAFETY: struct_size is the first field (trait), and readable (contract).
    let size = unsafe { pointer.cast::<usize>().read() };
    let mismatch = |why: std::fmt::Arguments<'_>| {
        Failure::new(
            HYPERATTN_STATUS_ABI_MISMATCH,
            format_args!(
                "{name}.struct_size = {size} {why} (this library's {} has {} bytes)",
                T::NAME,
                size_of::<T>()
            ),
        )
    };
    if size > LONGEST || (size < size_of::<T>() && !T::FIELD_ENDS.contains(&size)) {
        return Err(mismatch(format_args!("is not the size of any version")));
    }
    for at in size_of::<T>()..size {
        // SAFETY: at < size bytes are readable (contract).
        if unsafe { pointer.cast::<u8>().add(at).read() } != 0 {
            return Err(mismatch(format_args!(
                "has a nonzero byte at {at}, in a part that is not known here"
            )));
        }
    }
    Ok(size)
}

/// Reads the struct at `pointer`; fields beyond its struct_size come from `defaults`.
///
/// # Safety
/// As for [`size`].
pub(crate) unsafe fn read<T: Sized_>(pointer: *const T, name: &str, defaults: T) -> Result<T> {
    // SAFETY: the caller's contract.
    let size = unsafe { size(pointer, name) }?;
    let mut value = MaybeUninit::new(defaults);
    // SAFETY: min(size, sizeof) bytes are readable, and T has that many; whole fields of plain data are replaced.
    unsafe {
        std::ptr::copy_nonoverlapping(
            pointer.cast::<u8>(),
            value.as_mut_ptr().cast::<u8>(),
            size.min(size_of::<T>()),
        );
        Ok(value.assume_init())
    }
}

/// Writes the fields of `value` that a struct of `size` bytes has, but for struct_size.
///
/// # Safety
/// `size` bytes are writable at `pointer`, and [`size`] has checked them.
pub(crate) unsafe fn write<T: Sized_>(pointer: *mut T, size: usize, value: &T) {
    let start = size_of::<usize>();
    // SAFETY: min(size, sizeof) bytes are writable, and value has that many readable ones.
    unsafe {
        std::ptr::copy_nonoverlapping(
            std::ptr::from_ref(value).cast::<u8>().add(start),
            pointer.cast::<u8>().add(start),
            size.min(size_of::<T>()) - start,
        );
    }
}

/// Implements [`Sized_`] from the list of a struct's fields after struct_size.
macro_rules! sized {
    ($type:ident { $($field:ident),+ }) => {
        // SAFETY: a repr(C) struct of integers, floats, pointers and such structs; the test below shows
        // that no byte is padding.
        unsafe impl Sized_ for $type {
            const FIELD_ENDS: &'static [usize] = &[
                size_of::<usize>(),
                $(offset_of!($type, $field) + size_of_field(|s: $type| s.$field)),+
            ];
            const NAME: &'static str = stringify!($type);
        }
    };
}

/// The size of what a field accessor gives.
const fn size_of_field<S, F>(_: fn(S) -> F) -> usize {
    size_of::<F>()
}

sized!(hyperattn_params {
    method,
    mask,
    scale,
    residual,
    lsh_num_projs,
    block_size,
    sample_size,
    flags,
    min_seq_len,
    seed,
    offset,
    approx_d_epsilon,
    approx_d_kappa,
    budget,
    num_first_keys,
    band,
    target_error,
    head_methods
});
sized!(hyperattn_block_mask {
    query_block,
    key_block,
    num_query_blocks,
    num_key_blocks,
    row_offsets,
    columns,
    row_offsets_head_stride
});
sized!(hyperattn_tensors {
    q,
    k,
    v,
    out,
    lse,
    block_mask,
    error,
    mask,
    num_sequences,
    cu_seqlens_q,
    cu_seqlens_k
});
sized!(hyperattn_grads { dout, dq, dk, dv, dlse });
sized!(hyperattn_threadpool { ctx, num_threads, parallel_for });
sized!(hyperattn_cpu_exec { workspace, num_threads, reserved, pool });
sized!(hyperattn_cuda_exec { workspace, stream });
sized!(hyperattn_diagnosis { alpha, kappa, captured_mass, estimated_error, true_error, keys_per_query });

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Sized_>() {
        let starts = std::iter::once(0).chain(T::FIELD_ENDS.iter().copied());
        assert!(starts.zip(T::FIELD_ENDS).all(|(start, &end)| start < end), "{}", T::NAME);
        assert_eq!(T::FIELD_ENDS.last(), Some(&size_of::<T>()), "{} ends in padding", T::NAME);
    }

    #[test]
    fn fields_follow_each_other_to_the_end() {
        check::<hyperattn_params>();
        check::<hyperattn_block_mask>();
        check::<hyperattn_tensors>();
        check::<hyperattn_grads>();
        check::<hyperattn_threadpool>();
        check::<hyperattn_cpu_exec>();
        check::<hyperattn_cuda_exec>();
        check::<hyperattn_diagnosis>();
    }

    #[test]
    fn a_longer_struct_with_a_zero_tail_is_read() {
        #[repr(C)]
        struct Later {
            known: hyperattn_params,
            unknown: [u8; 16],
        }
        let mut later = Later { known: crate::params::DEFAULTS, unknown: [0; 16] };
        later.known.struct_size = size_of::<Later>();
        later.known.block_size = 77;
        let read = |later: &Later| {
            // SAFETY: the pointer is to struct_size readable bytes.
            unsafe { super::read(std::ptr::from_ref(later).cast(), "params", crate::params::DEFAULTS) }
        };
        assert_eq!(read(&later).ok().map(|params| params.block_size), Some(77));
        later.unknown[15] = 1;
        assert_eq!(read(&later).err(), Some(Failure(HYPERATTN_STATUS_ABI_MISMATCH)));
    }
}
