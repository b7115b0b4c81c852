//! What the tests of REFINED share.

use hyperattn_conformance::expected::{oracle_mask, scale};
use hyperattn_conformance::inputs::Inputs;
use hyperattn_core::{Mask, Method, Params};
use hyperattn_reference::{Problem, exact};

/// No target, and the default one.
pub const TARGETS: [f32; 2] = [0.0, 0.05];

/// REFINED for sequences of any length.
pub fn refined(mask: Mask, budget: u32, target_error: f32) -> Params {
    Params { method: Method::Refined, mask, budget, target_error, min_seq_len: 0, ..Params::default() }
}

/// The outputs of exact attention, on many threads.
pub fn oracle(params: &Params, inputs: &Inputs) -> Vec<f64> {
    const ROWS: usize = 256;
    let shape = inputs.shape;
    let run = |head: usize, first: usize| {
        let (batch, head) = (head / shape.heads_q, head % shape.heads_q);
        let kv_head = head / shape.group();
        let rows = first..shape.n_q.min(first + ROWS);
        let queries = &inputs.query_head(batch, head)[rows.start * shape.head_dim..rows.end * shape.head_dim];
        let [q, k, v] = [queries, inputs.key_head(batch, kv_head), inputs.value_head(batch, kv_head)]
            .map(|values| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        let scale = scale(params, shape.head_dim);
        let problem = Problem::new(&q, &k, &v, shape.head_dim, shape.value_dim, scale);
        let mask = oracle_mask(params.mask);
        exact(&problem, |i, j| mask.visible(shape.n_q, shape.n_k, first + i, j)).out
    };
    let run = &run;
    std::thread::scope(|scope| {
        let parts: Vec<_> = (0..shape.batch * shape.heads_q)
            .flat_map(|head| (0..shape.n_q).step_by(ROWS).map(move |first| (head, first)))
            .map(|(head, first)| scope.spawn(move || run(head, first)))
            .collect();
        parts.into_iter().flat_map(|part| part.join().expect("the oracle runs")).collect()
    })
}

/// The largest of errors.
pub fn most(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, f64::max)
}
