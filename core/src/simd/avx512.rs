//! The table for x86-64 with AVX-512 F (Skylake-X, Zen 4 and later).

use core::arch::x86_64::*;

use super::entries::kernel_table;
use super::vector::Vector;
use super::x86::x86_operations;

#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(super) __m512);

// SAFETY (every block in this impl): an Avx512 exists only inside the kernels below, which run only
// where the instructions were detected; loads and stores repeat the trait's contract.
impl Vector for Avx512 {
    const LANES: usize = 16;

    x86_operations!(
        Avx512,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps,
        _mm512_max_ps,
        _mm512_min_ps
    );

    #[inline(always)]
    fn iota() -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe {
            _mm512_setr_ps(
                0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
            )
        })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }

    #[inline(always)]
    fn select_less(self, other: Self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a.0, b.0), other.0, self.0) })
    }

    #[inline(always)]
    fn positive_bits(self) -> u32 {
        // SAFETY: see the impl.
        u32::from(unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, _mm512_setzero_ps()) })
    }

    #[inline(always)]
    fn reduce_max(self) -> f32 {
        // SAFETY: see the impl.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[&[u32]], column: usize, to: *mut u32, to_stride: usize, columns: usize) {
        // SAFETY: see the impl; rows and columns are those that the caller vouches for.
        unsafe {
            let row: [__m512; 16] =
                core::array::from_fn(|i| _mm512_loadu_ps(rows.get_unchecked(i).as_ptr().add(column).cast()));
            let (first, second) = (fours(&row[..4]), fours(&row[4..8]));
            let (third, last) = (fours(&row[8..12]), fours(&row[12..]));
            for c in 0..4 {
                let even_upper = _mm512_shuffle_f32x4::<0x88>(first[c], second[c]);
                let odd_upper = _mm512_shuffle_f32x4::<0xdd>(first[c], second[c]);
                let even_lower = _mm512_shuffle_f32x4::<0x88>(third[c], last[c]);
                let odd_lower = _mm512_shuffle_f32x4::<0xdd>(third[c], last[c]);
                let whole = [
                    _mm512_shuffle_f32x4::<0x88>(even_upper, even_lower),
                    _mm512_shuffle_f32x4::<0x88>(odd_upper, odd_lower),
                    _mm512_shuffle_f32x4::<0xdd>(even_upper, even_lower),
                    _mm512_shuffle_f32x4::<0xdd>(odd_upper, odd_lower),
                ];
                for (quarter, &whole) in whole.iter().enumerate() {
                    if 4 * quarter + c < columns {
                        _mm512_storeu_ps(to.add((4 * quarter + c) * to_stride).cast(), whole);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn low_bits_as_exponent(self) -> Self {
        // SAFETY: see the impl.
        Avx512(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(self.0))) })
    }
}

/// Quarter q of result c is column 4 q + c of four rows. A function, because a closure might not be
/// inlined and would then lack the instructions.
#[inline(always)]
fn fours(row: &[__m512]) -> [__m512; 4] {
    // SAFETY: called by the impl above only.
    unsafe {
        let low_a = _mm512_castps_pd(_mm512_unpacklo_ps(row[0], row[1]));
        let low_b = _mm512_castps_pd(_mm512_unpacklo_ps(row[2], row[3]));
        let high_a = _mm512_castps_pd(_mm512_unpackhi_ps(row[0], row[1]));
        let high_b = _mm512_castps_pd(_mm512_unpackhi_ps(row[2], row[3]));
        [
            _mm512_castpd_ps(_mm512_unpacklo_pd(low_a, low_b)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(low_a, low_b)),
            _mm512_castpd_ps(_mm512_unpacklo_pd(high_a, high_b)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(high_a, high_b)),
        ]
    }
}

kernel_table!(Avx512, Avx512, 12, 2, 4, 8, 8, "avx512f");
