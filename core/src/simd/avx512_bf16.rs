//! The table for x86-64 with AVX-512 BF16 (Zen 4, Cooper Lake, Sapphire Rapids and later): that of AVX-512,
//! and products of bf16 pairs.

use core::arch::x86_64::*;

use super::avx512::{self, Avx512};
use super::product::Product;
use super::{Bf16Kernels, Isa, Kernels, Step, Weighing, generic};

/// Pairs of bf16. A product is exact; the two products and the sum are rounded one after the other, and
/// subnormal numbers count as 0.
struct Bf16Pairs;

// SAFETY (every block in this impl): it is used only inside the kernel below, which runs only where the
// instructions were detected; loads and stores repeat the trait's contract.
impl Product for Bf16Pairs {
    type Vector = Avx512;
    type Operand = __m512i;
    const DEPTH: usize = 2;
    const QUERIES_ARE_SCALED: bool = false;

    #[inline(always)]
    unsafe fn load(from: *const u32) -> __m512i {
        // SAFETY: see the impl.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    fn splat(word: u32) -> __m512i {
        // SAFETY: see the impl.
        unsafe { _mm512_set1_epi32(word as i32) }
    }

    #[inline(always)]
    fn multiply_add(a: __m512i, b: __m512i, sum: Avx512) -> Avx512 {
        // SAFETY: see the impl; any bits are bf16 pairs.
        Avx512(unsafe {
            _mm512_dpbf16_ps(
                sum.0,
                core::mem::transmute::<__m512i, __m512bh>(a),
                core::mem::transmute::<__m512i, __m512bh>(b),
            )
        })
    }

    #[inline(always)]
    unsafe fn store_weights<const VECTORS: usize>(weights: [Avx512; VECTORS], to: *mut u32) {
        for (i, weight) in weights.into_iter().enumerate() {
            // SAFETY: see the impl; a vector of weights becomes half a vector of words.
            unsafe {
                let rounded = core::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(weight.0));
                _mm256_storeu_si256(to.add(8 * i).cast(), rounded);
            }
        }
    }

    #[inline(always)]
    fn element(words: __m512i, index: usize) -> Avx512 {
        // SAFETY: see the impl.
        Avx512(unsafe {
            _mm512_castsi512_ps(if index == 0 {
                _mm512_slli_epi32::<16>(words)
            } else {
                _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32))
            })
        })
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn attend_bf16(step: &mut Step<'_>) {
    // SAFETY: the caller's contract is that of the generic kernel; the instructions are enabled here.
    unsafe { generic::attend::<Bf16Pairs, 12, 2, 4>(step) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn weigh_bf16(task: &mut Weighing<'_>) {
    // SAFETY: as above.
    unsafe { generic::weigh::<Bf16Pairs, 8, 2>(task) }
}

const BF16: Bf16Kernels = Bf16Kernels { attend: attend_bf16, weigh: weigh_bf16 };

pub(super) static KERNELS: Kernels = Kernels { isa: Isa::Avx512Bf16, bf16: Some(BF16), ..avx512::TABLE };
