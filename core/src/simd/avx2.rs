//! The table for x86-64 with AVX2, FMA and F16C (Haswell, Zen and later).

use core::arch::x86_64::*;

use super::entries::kernel_table;
use super::vector::Vector;
use super::x86::x86_operations;

#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256);

// SAFETY (every block in this impl): an Avx2 exists only inside the kernels below, which run only
// where the instructions were detected; loads and stores repeat the trait's contract.
impl Vector for Avx2 {
    const LANES: usize = 8;

    x86_operations!(
        Avx2,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_fmadd_ps,
        _mm256_max_ps,
        _mm256_min_ps
    );

    #[inline(always)]
    fn iota() -> Self {
        // SAFETY: see the impl.
        Avx2(unsafe { _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: see the impl.
        Avx2(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
    }

    #[inline(always)]
    fn select_less(self, other: Self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        Avx2(unsafe { _mm256_blendv_ps(other.0, self.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)) })
    }

    #[inline(always)]
    fn positive_bits(self) -> u32 {
        // SAFETY: see the impl.
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(self.0, _mm256_setzero_ps())) as u32 }
    }

    #[inline(always)]
    fn reduce_max(self) -> f32 {
        // SAFETY: see the impl.
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[&[u32]], column: usize, to: *mut u32, to_stride: usize, columns: usize) {
        // SAFETY: see the impl; rows and columns are those that the caller vouches for.
        unsafe {
            let row: [__m256; 8] =
                core::array::from_fn(|i| _mm256_loadu_ps(rows.get_unchecked(i).as_ptr().add(column).cast()));
            let (upper, lower) = (fours(&row[..4]), fours(&row[4..]));
            for c in 0..4 {
                let whole = [
                    _mm256_permute2f128_ps::<0x20>(upper[c], lower[c]),
                    _mm256_permute2f128_ps::<0x31>(upper[c], lower[c]),
                ];
                for (half, &whole) in whole.iter().enumerate() {
                    if 4 * half + c < columns {
                        _mm256_storeu_ps(to.add((4 * half + c) * to_stride).cast(), whole);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn low_bits_as_exponent(self) -> Self {
        // SAFETY: see the impl.
        Avx2(unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(self.0))) })
    }
}

/// Half h of result c is column 4 h + c of four rows. A function, because a closure might not be inlined
/// and would then lack the instructions.
#[inline(always)]
fn fours(row: &[__m256]) -> [__m256; 4] {
    // SAFETY: called by the impl above only.
    unsafe {
        let (low_a, low_b) = (_mm256_unpacklo_ps(row[0], row[1]), _mm256_unpacklo_ps(row[2], row[3]));
        let (high_a, high_b) = (_mm256_unpackhi_ps(row[0], row[1]), _mm256_unpackhi_ps(row[2], row[3]));
        [
            _mm256_shuffle_ps::<0x44>(low_a, low_b),
            _mm256_shuffle_ps::<0xee>(low_a, low_b),
            _mm256_shuffle_ps::<0x44>(high_a, high_b),
            _mm256_shuffle_ps::<0xee>(high_a, high_b),
        ]
    }
}

kernel_table!(Avx2, Avx2, 6, 2, 6, 4, 6, "avx2,fma,f16c");
