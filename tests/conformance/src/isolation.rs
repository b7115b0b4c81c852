//! What a row of METHOD_REFINED must not feel: keys and values that it does not see, and what is not finite in those of
//! others. `run` runs a call, on whatever is tested.

use std::ops::Range;

use hyperattn_core::{Mask, Params};

use crate::expected::visible_keys;
use crate::inputs::Inputs;
use crate::run::Outcome;

/// Queries that may share what they meet: no tile is longer.
const MOST_TILE_ROWS: usize = 256;

/// The bits of one row: output and lse.
fn row(outcome: &Outcome, index: usize, dim: usize) -> Vec<u32> {
    let out = &outcome.out[index * dim..][..dim];
    out.iter().chain([&outcome.lse[index]]).map(|x| x.to_bits()).collect()
}

fn has_nan(outcome: &Outcome, index: usize, dim: usize) -> bool {
    outcome.lse[index].is_nan() || outcome.out[index * dim..][..dim].iter().any(|x| x.is_nan())
}

/// Fills keys, values or both at `positions` of every KV head.
fn fill(inputs: &Inputs, positions: Range<usize>, key: Option<f32>, value: Option<f32>) -> Inputs {
    let mut changed = inputs.clone();
    let shape = &inputs.shape;
    for (values, with, dim) in
        [(&mut changed.k, key, shape.head_dim), (&mut changed.v, value, shape.value_dim)]
    {
        let Some(with) = with else { continue };
        for head in values.chunks_mut(shape.n_k * dim) {
            head[positions.start * dim..positions.end * dim].fill(with);
        }
    }
    changed
}

/// Rows that see no key from a position on, nor do those that may share a tile with them, keep their bits, whatever the
/// later keys and values are; and no row gets a NaN that it does not see. One batch item, more than 300 keys, a causal
/// mask; `params` without a target, `with_target` the same with one.
pub fn assert_later_keys_are_not_felt(
    params: &Params,
    with_target: &Params,
    clean: &Inputs,
    run: impl Fn(&Params, &Inputs) -> Outcome,
) {
    let (n_q, n_k, dim) = (clean.shape.n_q, clean.shape.n_k, clean.shape.value_dim);
    let visible = visible_keys(params.mask, &clean.shape);
    let nan = Some(f32::NAN);
    let fills = [(Some(3.0), Some(100.0)), (nan, None), (None, nan)];
    let before = run(params, clean);
    for (position, (key, value)) in
        [130, 300, n_k - 1].into_iter().flat_map(|position| fills.map(|fill| (position, fill)))
    {
        let changed = fill(clean, position..n_k, key, value);
        let (after, targeted) = (run(params, &changed), run(with_target, &changed));
        for index in 0..before.lse.len() {
            let i = index % n_q;
            if visible[(i + MOST_TILE_ROWS).min(n_q - 1)] <= position {
                assert_eq!(row(&before, index, dim), row(&after, index, dim), "row {index}, {params:?}");
            }
            if visible[i] <= position {
                assert!(!has_nan(&after, index, dim), "row {index}, {position}, {params:?}");
                assert!(!has_nan(&targeted, index, dim), "row {index}, {position}, {with_target:?}");
            }
        }
    }
}

/// A query that is not finite may lead those of its tile elsewhere, but not to NaN, and other heads not at all. Two
/// batch items of four query heads, more than 500 queries.
pub fn assert_a_query_spoils_its_own_row_only(
    params: &Params,
    clean: &Inputs,
    run: impl Fn(&Params, &Inputs) -> Outcome,
) {
    let (n_q, dim) = (clean.shape.n_q, clean.shape.value_dim);
    let before = run(params, clean);
    for (with, spoiled_row) in [(f32::NAN, 77), (f32::NAN, n_q - 1), (f32::INFINITY, 500)] {
        // Row of batch item 1, query head 2.
        let head = 6 * n_q..7 * n_q;
        let spoiled = head.start + spoiled_row;
        let mut dirty = clean.clone();
        dirty.q[spoiled * clean.shape.head_dim..][..clean.shape.head_dim].fill(with);
        let after = run(params, &dirty);
        assert!(has_nan(&after, spoiled, dim), "{params:?}");
        for index in (0..before.lse.len()).filter(|&index| index != spoiled) {
            if head.contains(&index) {
                assert!(!has_nan(&after, index, dim), "row {index}, {params:?}");
            } else {
                assert_eq!(row(&before, index, dim), row(&after, index, dim), "row {index}, {params:?}");
            }
        }
    }
}

/// A key or value of KV head 1 of batch item 0 reaches no query head but 2 and 3, and there no row that does not see
/// it. With a target the heads whose probe rows meet it are exact. As many queries as keys, more than 400; four query
/// heads on two KV heads; no mask, or a causal one.
pub fn assert_a_key_or_value_stays_with_the_rows_that_see_it(
    params: &Params,
    clean: &Inputs,
    run: impl Fn(&Params, &Inputs) -> Outcome,
) {
    let (n, head_dim, dim) = (clean.shape.n_k, clean.shape.head_dim, clean.shape.value_dim);
    let spoils = [(true, f32::NAN), (false, f32::NAN), (true, f32::INFINITY)];
    let before = run(params, clean);
    for (position, (is_key, with)) in
        [3, 400, n - 1].into_iter().flat_map(|position| spoils.map(|spoil| (position, spoil)))
    {
        let mut dirty = clean.clone();
        let (values, dim_of_values) = if is_key { (&mut dirty.k, head_dim) } else { (&mut dirty.v, dim) };
        values[(n + position) * dim_of_values..][..dim_of_values].fill(with);
        let after = run(params, &dirty);
        for index in 0..before.lse.len() {
            let sees = params.mask == Mask::None || index % n >= position;
            if !(2 * n..4 * n).contains(&index) {
                assert_eq!(row(&before, index, dim), row(&after, index, dim), "row {index}, {params:?}");
            } else if !sees {
                assert!(!has_nan(&after, index, dim), "row {index}, {position}, {params:?}");
            }
        }
    }
}
