//! Merging partial results over disjoint keys against one call over all of them.

use hyperattn_conformance::compare::{F32_TOLERANCE, assert_near};
use hyperattn_conformance::expected::expected;
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::run::{Outcome, Setup};
use hyperattn_core::{Kernels, Method, Params, TensorMut, TensorRef, merge};

const N_Q: usize = 67;
const N_K: usize = 97;

fn merged(kernels: &Kernels, mut into: Outcome, from: &Outcome, shape: &Shape) -> Outcome {
    merge(
        kernels,
        &mut TensorMut::contiguous(&mut into.out, shape.out()).unwrap(),
        &mut TensorMut::contiguous(&mut into.lse, shape.lse()).unwrap(),
        &TensorRef::contiguous(&from.out, shape.out()).unwrap(),
        &TensorRef::contiguous(&from.lse, shape.lse()).unwrap(),
    )
    .unwrap();
    into
}

/// The same inputs with keys `from..to` only.
fn keys(inputs: &Inputs, from: usize, to: usize) -> Inputs {
    let part = |values: &[f32]| values[from * 16..to * 16].to_vec();
    let shape = Shape { n_k: to - from, ..inputs.shape };
    Inputs { shape, dtypes: inputs.dtypes, q: inputs.q.clone(), k: part(&inputs.k), v: part(&inputs.v) }
}

#[test]
fn parts_merge_to_the_whole_in_either_order() {
    for factor in [1.0, 30.0] {
        let mut inputs = Inputs::normal(Shape::single(N_Q, N_K), 1300);
        inputs.q.iter_mut().for_each(|x| *x *= factor);
        let params = Params { method: Method::Exact, ..Params::default() };
        let whole = expected(&params, &inputs, None);
        for_each_table(|kernels| {
            let run = |inputs: &Inputs| Setup::new(kernels, &params, inputs).run();
            for (first, second) in [(1, 2), (40, 41), (96, 97), (0, 30), (50, 50)] {
                let [a, b, c] = [(0, first), (first, second), (second, N_K)]
                    .map(|(from, to)| run(&keys(&inputs, from, to)));
                let left = merged(kernels, merged(kernels, a.clone(), &b, &inputs.shape), &c, &inputs.shape);
                let right = merged(kernels, c, &merged(kernels, b, &a, &inputs.shape), &inputs.shape);
                for result in [left, right] {
                    let tolerance = F32_TOLERANCE * f64::from(factor);
                    assert_near(&result, &whole, &inputs.shape, tolerance, "merged");
                }
            }
        });
    }
}
