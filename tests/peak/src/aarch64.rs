//! Fused multiply-add of 4 lanes, and the bf16 dot product of 4 lanes.
//!
//! Four units with a latency of 4 cycles are the most seen, so 24 chains keep every processor busy;
//! 32 registers hold them beside the operands.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::hint::black_box;

use crate::Kernel;

const CHAINS: usize = 24;

pub(super) fn kernels(isa: &str) -> Vec<Kernel> {
    if !isa.starts_with("neon") {
        return Vec::new();
    }
    let mut kernels = vec![Kernel {
        name: "f32 fma neon",
        flops_per_iteration: (4 * 2 * CHAINS) as f64,
        only_bf16: false,
        // SAFETY: every aarch64 processor that runs std has NEON.
        run: |iterations| unsafe { fma(iterations) },
    }];
    if is_aarch64_feature_detected!("bf16") {
        kernels.push(Kernel {
            name: "bf16 dot product neon",
            // Each of 4 lanes adds two products.
            flops_per_iteration: (4 * 4 * CHAINS) as f64,
            only_bf16: true,
            // SAFETY: the processor has the bf16 instructions, as just asked.
            run: |iterations| unsafe { dot_bf16(iterations) },
        });
    }
    kernels
}

#[target_feature(enable = "neon")]
fn fma(iterations: u64) {
    let (a, b) = black_box((vdupq_n_f32(0.5), vdupq_n_f32(1e-3)));
    let mut chains = black_box([vdupq_n_f32(1.0); CHAINS]);
    for _ in 0..iterations {
        for chain in &mut chains {
            *chain = vfmaq_f32(*chain, a, b);
        }
    }
    black_box(chains);
}

#[target_feature(enable = "neon,bf16")]
fn dot_bf16(iterations: u64) {
    // 0.5 and about 1e-3 as bf16.
    let (a, b) = black_box((vdupq_n_u16(0x3F00), vdupq_n_u16(0x3A83)));
    let mut chains = black_box([vdupq_n_f32(1.0); CHAINS]);
    for _ in 0..iterations {
        for chain in &mut chains {
            // SAFETY: the instruction reads and writes the named registers only; the processor has
            // it by this function's target features.
            unsafe {
                asm!(
                    "bfdot {chain:v}.4s, {a:v}.8h, {b:v}.8h",
                    chain = inout(vreg) *chain,
                    a = in(vreg) a,
                    b = in(vreg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    black_box(chains);
}
