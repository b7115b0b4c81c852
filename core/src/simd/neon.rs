//! The table for aarch64, where NEON with its fused multiply-add and binary16 conversion is part of the target.

use core::arch::aarch64::*;

use super::entries::kernel_table;
use super::vector::Vector;

#[derive(Clone, Copy)]
pub(crate) struct Neon(pub(super) float32x4_t);

// SAFETY (every block in this impl): this file is compiled only for targets that have NEON; loads and stores
// repeat the trait's contract.
impl Vector for Neon {
    const LANES: usize = 4;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see the impl.
        Neon(unsafe { vdupq_n_f32(x) })
    }

    #[inline(always)]
    fn iota() -> Self {
        // SAFETY: see the impl; four numbers are there.
        Neon(unsafe { vld1q_f32([0.0, 1.0, 2.0, 3.0].as_ptr()) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see the impl.
        Neon(unsafe { vld1q_f32(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see the impl.
        unsafe { vst1q_f32(to, self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Neon(unsafe { vaddq_f32(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Neon(unsafe { vsubq_f32(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Neon(unsafe { vmulq_f32(self.0, other.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: see the impl.
        Neon(unsafe { vfmaq_f32(term.0, self.0, factor.0) })
    }

    #[inline(always)]
    fn fused_mul_add(self, factor: Self, term: Self) -> Self {
        self.mul_add(factor, term)
    }

    // FMAX would answer with a NaN from either side, FMAXNM with the number beside it.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.select_less(other, other, self)
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.select_less(other, self, other)
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: see the impl.
        Neon(unsafe { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from.cast()))) })
    }

    #[inline(always)]
    fn select_less(self, other: Self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        Neon(unsafe { vbslq_f32(vcltq_f32(a.0, b.0), self.0, other.0) })
    }

    #[inline(always)]
    fn positive_bits(self) -> u32 {
        // SAFETY: see the impl; four numbers are there.
        unsafe { vaddvq_u32(vandq_u32(vcgtzq_f32(self.0), vld1q_u32([1, 2, 4, 8].as_ptr()))) }
    }

    #[inline(always)]
    fn reduce_max(self) -> f32 {
        // SAFETY: see the impl.
        unsafe { vmaxvq_f32(self.0) }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[&[u32]], column: usize, to: *mut u32, to_stride: usize, columns: usize) {
        // SAFETY: see the impl; rows and columns are those that the caller vouches for.
        unsafe {
            let row: [float32x4_t; 4] =
                core::array::from_fn(|i| vld1q_f32(rows[i].as_ptr().add(column).cast()));
            // Pairs of rows, interleaved: columns 0 and 2, columns 1 and 3.
            let (upper_even, upper_odd) = (vtrn1q_f32(row[0], row[1]), vtrn2q_f32(row[0], row[1]));
            let (lower_even, lower_odd) = (vtrn1q_f32(row[2], row[3]), vtrn2q_f32(row[2], row[3]));
            let whole = [
                left_halves(upper_even, lower_even),
                left_halves(upper_odd, lower_odd),
                right_halves(upper_even, lower_even),
                right_halves(upper_odd, lower_odd),
            ];
            for (c, &whole) in whole.iter().enumerate().take(columns) {
                vst1q_f32(to.add(c * to_stride).cast(), whole);
            }
        }
    }

    #[inline(always)]
    fn low_bits_as_exponent(self) -> Self {
        // SAFETY: see the impl.
        Neon(unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(self.0))) })
    }
}

/// The first two lanes of both.
#[inline(always)]
fn left_halves(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: called by the impl above only.
    unsafe { vcombine_f32(vget_low_f32(a), vget_low_f32(b)) }
}

/// The last two lanes of both.
#[inline(always)]
fn right_halves(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: called by the impl above only.
    unsafe { vcombine_f32(vget_high_f32(a), vget_high_f32(b)) }
}

kernel_table!(Neon, Neon, 6, 4, 3, 4, 6);
