//! Fused multiply-add of 8 and 16 lanes, and the bf16 dot product of 16 lanes.
//!
//! An instruction takes at most 6 cycles and two begin per cycle, so 12 chains keep every processor
//! of the kind busy; 16 registers hold no more beside the operands, 32 do.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::*;
use std::hint::black_box;

use crate::Kernel;

const CHAINS_AVX2: usize = 12;
const CHAINS_AVX512: usize = 24;

pub(super) fn kernels(isa: &str) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    if isa.starts_with("avx512") && is_x86_feature_detected!("avx512f") {
        kernels.push(Kernel {
            name: "f32 fma avx512",
            flops_per_iteration: (16 * 2 * CHAINS_AVX512) as f64,
            only_bf16: false,
            // SAFETY: the processor has AVX-512 F, as just asked.
            run: |iterations| unsafe { fma_avx512(iterations) },
        });
        if is_x86_feature_detected!("avx512bf16") {
            kernels.push(Kernel {
                name: "bf16 dot product avx512",
                // Each of 16 lanes adds two products.
                flops_per_iteration: (16 * 4 * CHAINS_AVX512) as f64,
                only_bf16: true,
                // SAFETY: the processor has AVX-512 F and BF16, as just asked.
                run: |iterations| unsafe { dot_bf16_avx512(iterations) },
            });
        }
    }
    if isa.starts_with("avx2") && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        kernels.push(Kernel {
            name: "f32 fma avx2",
            flops_per_iteration: (8 * 2 * CHAINS_AVX2) as f64,
            only_bf16: false,
            // SAFETY: the processor has AVX2 and FMA, as just asked.
            run: |iterations| unsafe { fma_avx2(iterations) },
        });
    }
    kernels
}

#[target_feature(enable = "avx2,fma")]
fn fma_avx2(iterations: u64) {
    let (a, b) = black_box((_mm256_set1_ps(0.5), _mm256_set1_ps(1e-3)));
    let mut chains = black_box([_mm256_set1_ps(1.0); CHAINS_AVX2]);
    for _ in 0..iterations {
        for chain in &mut chains {
            *chain = _mm256_fmadd_ps(a, b, *chain);
        }
    }
    black_box(chains);
}

#[target_feature(enable = "avx512f")]
fn fma_avx512(iterations: u64) {
    let (a, b) = black_box((_mm512_set1_ps(0.5), _mm512_set1_ps(1e-3)));
    let mut chains = black_box([_mm512_set1_ps(1.0); CHAINS_AVX512]);
    for _ in 0..iterations {
        for chain in &mut chains {
            *chain = _mm512_fmadd_ps(a, b, *chain);
        }
    }
    black_box(chains);
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_bf16_avx512(iterations: u64) {
    let pairs = |x: f32| _mm512_cvtne2ps_pbh(_mm512_set1_ps(x), _mm512_set1_ps(x));
    let (a, b) = black_box((pairs(0.5), pairs(1e-3)));
    let mut chains = black_box([_mm512_set1_ps(1.0); CHAINS_AVX512]);
    for _ in 0..iterations {
        for chain in &mut chains {
            *chain = _mm512_dpbf16_ps(*chain, a, b);
        }
    }
    black_box(chains);
}
