//! The portable table: plain Rust over eight lanes, which any compiler turns into its baseline vectors.

use half::f16;

use super::entries::kernel_table;
use super::vector::Vector;

#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Portable(core::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Vector for Portable {
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Portable([x; 8])
    }

    #[inline(always)]
    fn iota() -> Self {
        Portable(core::array::from_fn(|i| i as f32))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller has eight readable numbers there.
        Portable(unsafe { from.cast::<[f32; 8]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller has eight writable numbers there.
        unsafe { to.cast::<[f32; 8]>().write(self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        self.mul(factor).add(term)
    }

    #[inline(always)]
    fn fused_mul_add(self, factor: Self, term: Self) -> Self {
        Portable(core::array::from_fn(|i| libm::fmaf(self.0[i], factor.0[i], term.0[i])))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: the caller has eight readable numbers there.
        let bits = unsafe { from.cast::<[u16; 8]>().read_unaligned() };
        Portable(bits.map(|bits| f16::from_bits(bits).to_f32()))
    }

    #[inline(always)]
    fn select_less(self, other: Self, a: Self, b: Self) -> Self {
        Portable(core::array::from_fn(|i| if a.0[i] < b.0[i] { self.0[i] } else { other.0[i] }))
    }

    #[inline(always)]
    fn positive_bits(self) -> u32 {
        (0..8).fold(0, |bits, i| bits | u32::from(self.0[i] > 0.0) << i)
    }

    #[inline(always)]
    fn reduce_max(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[&[u32]], column: usize, to: *mut u32, to_stride: usize, columns: usize) {
        for (r, row) in rows.iter().enumerate() {
            for c in 0..columns {
                // SAFETY: c < columns and r < LANES, within what the caller vouches for.
                unsafe { *to.add(c * to_stride + r) = row[column + c] };
            }
        }
    }

    #[inline(always)]
    fn low_bits_as_exponent(self) -> Self {
        Portable(self.0.map(|x| f32::from_bits(x.to_bits() << 23)))
    }
}

kernel_table!(Scalar, Portable, 4, 1, 4, 4, 4);
