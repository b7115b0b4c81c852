//! What the elements of a mask tensor say, read from their bits: for most masks that is all there is to compute.

use core::ops::BitOrAssign;

use half::{bf16, f16};

use crate::element::DType;

/// An element below this, -2^127, hides its key as -inf does: times log2 e it might be beyond what f32 holds.
pub(crate) const HIDDEN_BELOW: f32 = f32::from_bits(0xff00_0000);

/// What all elements of a part of a mask say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MaskSurvey {
    /// They are 0.
    pub(crate) all_zero: bool,
    /// They hide their keys.
    pub(crate) all_hidden: bool,
}

impl MaskSurvey {
    pub(crate) const OF_NOTHING: Self = MaskSurvey { all_zero: true, all_hidden: true };
}

/// An element type of masks.
trait MaskElement {
    type Bits: Copy + Default + PartialEq + BitOrAssign;

    /// Other than 0 where the element is.
    fn magnitude(bits: Self::Bits) -> Self::Bits;

    /// Other than 0 where the element does not hide its key: those do that are -inf or negative numbers below
    /// [`HIDDEN_BELOW`], which come right before it in the order of the bits.
    fn shown(bits: Self::Bits) -> Self::Bits;
}

impl MaskElement for f32 {
    type Bits = u32;

    #[inline(always)]
    fn magnitude(bits: u32) -> u32 {
        bits & 0x7fff_ffff
    }

    #[inline(always)]
    fn shown(bits: u32) -> u32 {
        bits.wrapping_sub(0xff00_0001).saturating_sub(0x007f_ffff)
    }
}

impl MaskElement for bf16 {
    type Bits = u16;

    #[inline(always)]
    fn magnitude(bits: u16) -> u16 {
        bits & 0x7fff
    }

    #[inline(always)]
    fn shown(bits: u16) -> u16 {
        bits.wrapping_sub(0xff01).saturating_sub(0x7f)
    }
}

impl MaskElement for f16 {
    type Bits = u16;

    #[inline(always)]
    fn magnitude(bits: u16) -> u16 {
        bits & 0x7fff
    }

    #[inline(always)]
    fn shown(bits: u16) -> u16 {
        bits ^ 0xfc00
    }
}

/// What all elements of `rows.0` rows say, which are `rows.1` bytes apart and have `count` elements each.
///
/// # Safety
/// They are readable.
#[inline(always)]
pub(super) unsafe fn survey(dtype: DType, from: *const u8, rows: (usize, isize), count: usize) -> MaskSurvey {
    // SAFETY: the caller's contract.
    unsafe {
        match dtype {
            DType::F32 => survey_of::<f32>(from, rows, count),
            DType::F16 => survey_of::<f16>(from, rows, count),
            DType::BF16 => survey_of::<bf16>(from, rows, count),
        }
    }
}

/// Elements that are looked at together: the compiler makes vectors of them.
const CHUNK: usize = 32;

/// Rows after which a survey that can find nothing more ends.
const ROWS_AT_ONCE: usize = 16;

#[inline(always)]
unsafe fn survey_of<T: MaskElement>(
    from: *const u8,
    (rows, stride): (usize, isize),
    count: usize,
) -> MaskSurvey {
    let nothing = T::Bits::default();
    let (mut magnitudes, mut shown) = ([nothing; CHUNK], [nothing; CHUNK]);
    let whole = count / CHUNK * CHUNK;
    let mut found = MaskSurvey::OF_NOTHING;
    for first in (0..rows).step_by(ROWS_AT_ONCE) {
        for row in first..rows.min(first + ROWS_AT_ONCE) {
            // SAFETY: the rows and their elements are readable (contract); alignment is not needed.
            unsafe {
                let row = from.offset(row as isize * stride).cast::<T::Bits>();
                for first in (0..whole).step_by(CHUNK) {
                    let chunk = row.add(first).cast::<[T::Bits; CHUNK]>().read_unaligned();
                    for i in 0..CHUNK {
                        magnitudes[i] |= T::magnitude(chunk[i]);
                        shown[i] |= T::shown(chunk[i]);
                    }
                }
                for i in whole..count {
                    let bits = row.add(i).read_unaligned();
                    magnitudes[i % CHUNK] |= T::magnitude(bits);
                    shown[i % CHUNK] |= T::shown(bits);
                }
            }
        }
        let none = |bits: &[T::Bits; CHUNK]| {
            let mut all = nothing;
            bits.iter().for_each(|&bits| all |= bits);
            all == nothing
        };
        found = MaskSurvey { all_zero: none(&magnitudes), all_hidden: none(&shown) };
        if !found.all_zero && !found.all_hidden {
            break;
        }
    }
    found
}

/// How many of `count` elements are 0 before the first that is not, where all from there on hide their key.
///
/// # Safety
/// They are readable.
pub(crate) unsafe fn leading_zeros(dtype: DType, from: *const u8, count: usize) -> Option<usize> {
    // SAFETY: the caller's contract.
    unsafe {
        match dtype {
            DType::F32 => leading_zeros_of::<f32>(from, count),
            DType::F16 => leading_zeros_of::<f16>(from, count),
            DType::BF16 => leading_zeros_of::<bf16>(from, count),
        }
    }
}

unsafe fn leading_zeros_of<T: MaskElement>(from: *const u8, count: usize) -> Option<usize> {
    let nothing = T::Bits::default();
    // SAFETY: i < count, see the contract.
    let at = |i: usize| unsafe { from.cast::<T::Bits>().add(i).read_unaligned() };
    let zeros = (0..count).position(|i| T::magnitude(at(i)) != nothing).unwrap_or(count);
    (zeros..count).all(|i| T::shown(at(i)) == nothing).then_some(zeros)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element of 16 bits, and f32 of the same leading bits and around the limits, against the numbers they are.
    #[test]
    fn bits_say_what_the_numbers_say() {
        fn agrees<T: MaskElement>(bits: T::Bits, x: f32) {
            let nothing = T::Bits::default();
            assert_eq!(T::magnitude(bits) == nothing, x == 0.0, "{x}");
            assert_eq!(T::shown(bits) == nothing, x < HIDDEN_BELOW, "{x}");
        }
        for bits in 0..=u16::MAX {
            agrees::<f16>(bits, f16::from_bits(bits).to_f32());
            agrees::<bf16>(bits, bf16::from_bits(bits).to_f32());
            for low in [0, 1, 2, 0x7fff, 0xfffe, 0xffff] {
                let bits = u32::from(bits) << 16 | low;
                agrees::<f32>(bits, f32::from_bits(bits));
            }
        }
    }

    #[test]
    fn one_element_spoils_a_survey() {
        let mut mask = [0f32; 40 * 70];
        let survey = |mask: &[f32], rows: usize, count: usize| {
            // SAFETY: rows of 70 elements.
            unsafe { survey(DType::F32, mask.as_ptr().cast(), (rows, 70 * 4), count) }
        };
        for (rows, count) in [(40, 70), (40, 64), (1, 1), (17, 33), (3, 31)] {
            for (fill, other) in
                [(0.0, f32::NAN), (0.0, 1e-45), (f32::NEG_INFINITY, f32::NAN), (f32::MIN, -1e38)]
            {
                mask.fill(fill);
                let all = MaskSurvey { all_zero: fill == 0.0, all_hidden: fill != 0.0 };
                assert_eq!(survey(&mask, rows, count), all);
                for at in [0, count - 1, (rows - 1) * 70, (rows - 1) * 70 + count - 1] {
                    mask[at] = other;
                    let found = survey(&mask, rows, count);
                    assert_eq!(
                        found,
                        MaskSurvey { all_zero: false, all_hidden: false },
                        "{rows} {count} {at}"
                    );
                    mask[at] = fill;
                }
                // What is not looked at does not count.
                for at in (count..70).chain(rows * 70..40 * 70) {
                    mask[at] = other;
                }
                assert_eq!(survey(&mask, rows, count), all);
            }
        }
    }

    #[test]
    fn zeros_lead_where_only_hidden_keys_follow() {
        const HIDDEN: f32 = f32::NEG_INFINITY;
        let cases: [(&[f32], Option<usize>); 8] = [
            (&[], Some(0)),
            (&[0.0, -0.0], Some(2)),
            (&[0.0, HIDDEN, f32::MIN], Some(1)),
            (&[HIDDEN], Some(0)),
            (&[HIDDEN, 0.0], None),
            (&[1.0], None),
            (&[0.0, f32::NAN], None),
            (&[0.0, HIDDEN, f32::NAN], None),
        ];
        for (mask, expected) in cases {
            // SAFETY: the slice's elements.
            assert_eq!(unsafe { leading_zeros(DType::F32, mask.as_ptr().cast(), mask.len()) }, expected);
        }
    }
}
