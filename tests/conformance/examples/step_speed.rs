//! Speed of a step of the backward pass beside one of the forward pass, in every table of this machine: the same 256
//! query rows and [`KEY_TILE`] keys, in f32.

use std::hint::black_box;
use std::time::Instant;

use hyperattn_core::Kernels;
use hyperattn_core::simd::{GradientStep, KEY_TILE, Packing, Step, StepOptions};

const ROWS: usize = 256;

/// The fastest of so many runs counts.
const RUNS: usize = 400;

/// Floating-point operations that a pair costs for each of its dimensions: two products forward, five backward.
const FORWARD: f64 = 4.0;
const BACKWARD: f64 = 10.0;

/// Not constant, and the same for every table.
fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 2654435761 % 1000) as f32 / 1000.0 - 0.5).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

/// Seconds of the fastest run.
fn fastest(mut run: impl FnMut()) -> f64 {
    let seconds = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..RUNS).map(seconds).fold(f64::INFINITY, f64::min)
}

fn forward(kernels: &Kernels, dim: usize) -> f64 {
    let rows = ROWS.next_multiple_of(kernels.row_multiple());
    let query = bits(&numbers(rows.next_multiple_of(kernels.query_rows()) * dim));
    let keys = bits(&numbers(KEY_TILE * dim));
    let mut max = vec![f32::NEG_INFINITY; rows];
    let mut sum = vec![0.0; rows * kernels.lanes()];
    let mut accumulated = vec![0.0; rows * dim];
    let mut logits = vec![0.0; kernels.query_rows() * kernels.panel()];
    let mut weights = vec![0; kernels.query_rows() * KEY_TILE];
    let seconds = fastest(|| {
        kernels.attend(&mut Step {
            packing: Packing::F32,
            head_dim: dim,
            value_dim: dim,
            scale: 1.0,
            query: black_box(&query),
            keys: &keys,
            values: &keys,
            options: StepOptions::PLAIN,
            max: &mut max,
            sum: &mut sum,
            accumulated: &mut accumulated,
            logits: &mut logits,
            weights: &mut weights,
        });
    });
    FORWARD * (rows * KEY_TILE * dim) as f64 / seconds
}

fn backward(kernels: &Kernels, dim: usize, limited: bool) -> f64 {
    let (rows, keys) = (numbers(ROWS * dim), numbers(KEY_TILE * dim));
    let panels = bits(&keys);
    let visible = [KEY_TILE as u32; ROWS];
    let (log2_sum, delta) = (numbers(ROWS), numbers(ROWS));
    let mut query_gradient = vec![0.0; ROWS * dim];
    let mut key_gradient = vec![0.0; KEY_TILE * dim];
    let mut value_gradient = vec![0.0; KEY_TILE * dim];
    let mut weights = vec![0.0; ROWS * KEY_TILE];
    let mut logit_gradients = vec![0.0; ROWS * KEY_TILE];
    let seconds = fastest(|| {
        kernels.attend_gradient(&mut GradientStep {
            head_dim: dim,
            value_dim: dim,
            scale_log2: 0.1,
            query: black_box(&rows),
            output_gradient: &rows,
            keys: &keys,
            key_panels: &panels,
            value_panels: &panels,
            options: StepOptions { visible: limited.then_some(&visible), ..StepOptions::PLAIN },
            log2_sum: &log2_sum,
            delta: &delta,
            query_gradient: &mut query_gradient,
            key_gradient: &mut key_gradient,
            value_gradient: &mut value_gradient,
            weights: &mut weights,
            logit_gradients: &mut logit_gradients,
        });
    });
    BACKWARD * (ROWS * KEY_TILE * dim) as f64 / seconds
}

fn main() {
    println!("GFLOP/s of one thread; the last column where rows may not see all keys, but do");
    println!("{:12} {:>4} {:>9} {:>9} {:>9}", "table", "dim", "forward", "backward", "limited");
    for kernels in Kernels::available() {
        for dim in [64, 80, 128] {
            let speeds = [forward(kernels, dim), backward(kernels, dim, false), backward(kernels, dim, true)];
            let [forward, backward, limited] = speeds.map(|speed| speed / 1e9);
            println!("{:12} {dim:4} {forward:9.1} {backward:9.1} {limited:9.1}", kernels.isa().name());
        }
    }
}
