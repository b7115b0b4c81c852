//! The table for aarch64 with BF16 (Neoverse V1 and N2, Apple M2 and later): that of NEON, and products of bf16
//! pairs. Rust has no stable intrinsics for these instructions.

use core::arch::aarch64::*;
use core::arch::asm;

use super::neon::{self, Neon};
use super::product::Product;
use super::{Bf16Kernels, Isa, Kernels, Step, Weighing, generic};

/// Pairs of bf16. The products and the sums are rounded to odd, and subnormal numbers count as 0.
struct Bf16Pairs;

// SAFETY (every block in this impl): it is used only inside the kernel below, which runs only where the
// instructions were detected; loads and stores repeat the trait's contract.
impl Product for Bf16Pairs {
    type Vector = Neon;
    type Operand = uint32x4_t;
    const DEPTH: usize = 2;
    const QUERIES_ARE_SCALED: bool = false;

    #[inline(always)]
    unsafe fn load(from: *const u32) -> uint32x4_t {
        // SAFETY: see the impl.
        unsafe { vld1q_u32(from) }
    }

    #[inline(always)]
    fn splat(word: u32) -> uint32x4_t {
        // SAFETY: see the impl.
        unsafe { vdupq_n_u32(word) }
    }

    #[inline(always)]
    fn multiply_add(a: uint32x4_t, b: uint32x4_t, sum: Neon) -> Neon {
        let mut sum = sum.0;
        // SAFETY: see the impl; any bits are bf16 pairs.
        unsafe {
            asm!(
                "bfdot {sum:v}.4s, {b:v}.8h, {a:v}.8h",
                sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        Neon(sum)
    }

    #[inline(always)]
    unsafe fn store_weights<const VECTORS: usize>(weights: [Neon; VECTORS], to: *mut u32) {
        for (i, weight) in weights.into_iter().enumerate() {
            let rounded: uint16x4_t;
            // SAFETY: see the impl; a vector of weights becomes half a vector of words.
            unsafe {
                asm!(
                    "bfcvtn {rounded:v}.4h, {weight:v}.4s",
                    rounded = lateout(vreg) rounded, weight = in(vreg) weight.0,
                    options(pure, nomem, nostack, preserves_flags)
                );
                vst1_u16(to.add(2 * i).cast(), rounded);
            }
        }
    }

    #[inline(always)]
    fn element(words: uint32x4_t, index: usize) -> Neon {
        // SAFETY: see the impl.
        Neon(unsafe {
            vreinterpretq_f32_u32(if index == 0 {
                vshlq_n_u32::<16>(words)
            } else {
                vandq_u32(words, vdupq_n_u32(0xffff_0000))
            })
        })
    }
}

#[target_feature(enable = "bf16")]
unsafe fn attend_bf16(step: &mut Step<'_>) {
    // SAFETY: the caller's contract is that of the generic kernel; the instructions are enabled here.
    unsafe { generic::attend::<Bf16Pairs, 6, 4, 3>(step) }
}

#[target_feature(enable = "bf16")]
unsafe fn weigh_bf16(task: &mut Weighing<'_>) {
    // SAFETY: as above.
    unsafe { generic::weigh::<Bf16Pairs, 4, 4>(task) }
}

const BF16: Bf16Kernels = Bf16Kernels { attend: attend_bf16, weigh: weigh_bf16 };

pub(super) static KERNELS: Kernels = Kernels { isa: Isa::NeonBf16, bf16: Some(BF16), ..neon::TABLE };
