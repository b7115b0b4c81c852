//! What the conformance tests share: inputs, the call of the core, what the oracle expects of it, and the
//! comparison. The tests run every kernel table of the machine.

pub mod additive_mask;
pub mod backward;
pub mod compare;
pub mod executors;
pub mod expected;
pub mod expected_gradients;
pub mod gradient_step;
pub mod inputs;
pub mod isolation;
pub mod packing;
pub mod patterns;
pub mod random_mask;
pub mod random_problem;
pub mod real_data;
pub mod run;
pub mod statistics;
pub mod storage;

use hyperattn_core::simd::Packing;
use hyperattn_core::{DType, Kernels};

/// Calls `check` with every table that this machine can run, and prints which.
pub fn for_each_table(mut check: impl FnMut(&'static Kernels)) {
    for kernels in Kernels::available() {
        println!("table {}", kernels.isa().name());
        check(kernels);
    }
}

/// Runs `check` for every table that this machine can run and every packing it has a kernel for.
pub fn for_each_packing(mut check: impl FnMut(&'static Kernels, Packing)) {
    for_each_table(|kernels| {
        let mut packings = vec![Packing::F32, kernels.packing(DType::BF16)];
        packings.dedup();
        for packing in packings {
            println!("{packing:?}");
            check(kernels, packing);
        }
    });
}
