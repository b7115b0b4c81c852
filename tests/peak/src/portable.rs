//! Multiplication and addition in the vectors that every processor of the target has.

use std::hint::black_box;

use crate::Kernel;

const LANES: usize = 4;
const CHAINS: usize = 12;

pub(super) const KERNEL: Kernel = Kernel {
    name: "f32 multiply and add portable",
    flops_per_iteration: (2 * LANES * CHAINS) as f64,
    only_bf16: false,
    run,
};

fn run(iterations: u64) {
    let (factor, term) = black_box(([0.5f32; LANES], [1.0f32; LANES]));
    let mut chains = black_box([[1.0f32; LANES]; CHAINS]);
    for _ in 0..iterations {
        for chain in &mut chains {
            *chain = std::array::from_fn(|i| chain[i] * factor[i] + term[i]);
        }
    }
    black_box(chains);
}
