//! Algorithm 2 (ApproxD): row sums from exact blocks and a capped uniform sample. Everything is in base-2
//! logs, so that large logits cannot overflow.

use core::ops::Range;

use crate::math::{log2, log2_add};
use crate::params::Params;
use crate::residual::{Column, uniform_columns, uniform_stream};
use crate::rng::{Purpose, Stream, below};
use crate::select::Selection;
use crate::tile::{Call, KeyOrder, Part, Tile};
use crate::tiling::TILE_ROWS;

/// Number of rows whose unmasked sums bound tau: m, or all rows where there are fewer.
pub fn tau_rows(params: &Params, queries: usize) -> usize {
    (params.sample_size as usize).min(queries)
}

/// Position of tau row `i` of one query head (line 1: uniform; all rows where there are at most m).
pub fn tau_position(params: &Params, head: usize, queries: &Range<usize>, i: usize) -> usize {
    if queries.len() <= params.sample_size as usize {
        return queries.start + i;
    }
    let stream = Stream::new(params.seed, params.offset, head, Purpose::TauRow);
    queries.start + below(stream.uniform(queries.start, queries.len(), i), queries.len())
}

/// Computes the base-2 logs of the unmasked row sums <1 - M_j, exp(s K q_j)> of the tau rows
/// `rows` (at most a tile) of query head `head`, into the tile's state.
pub(crate) fn unmasked_row_sums(
    tile: &mut Tile<'_>,
    call: &Call<'_>,
    selection: &Selection<'_>,
    keys: KeyOrder<'_>,
    head: usize,
    row_at: impl Fn(usize) -> usize,
    rows: Range<usize>,
) {
    debug_assert!(rows.len() <= TILE_ROWS);
    let mut blocks = [0u32; TILE_ROWS];
    let numbered = call.problem.first_head + head;
    for i in rows.clone() {
        let position = tau_position(call.params, numbered, &selection.rectangle.queries, i);
        blocks[i - rows.start] = selection.block_of(position) as u32;
        tile.push(head, row_at(position), 0);
    }
    tile.load_queries(keys.batch);
    for run in selection.key_runs() {
        // A cap of -inf takes a row out of the run that it meets exactly.
        for (cap, &block) in tile.memory.cap.iter_mut().zip(&blocks[..rows.len()]) {
            let covered = selection.covers(block as usize, run.start);
            *cap = if covered { f32::NEG_INFINITY } else { f32::INFINITY };
        }
        tile.attend_range(keys, run, true, Part::Sum);
    }
}

/// log2 tau: the largest of the rows' sums. A NaN stays in its own row and is passed over.
pub(crate) fn log2_tau(row_sums: impl Iterator<Item = f32>) -> f32 {
    row_sums.fold(f32::NEG_INFINITY, f32::max)
}

/// Line 4's constant: log2 of eps^2 m / (n ln n), with ln n at least 1.
fn log2_cap_factor(params: &Params, keys: usize) -> f32 {
    let n = keys as f32;
    2.0 * log2(params.approx_d_epsilon) + log2(params.sample_size as f32) - log2(n * libm::logf(n).max(1.0))
}

/// Replaces the tile's sums, which hold the exact blocks, by the base-2 logs of D~ in `tile.memory.cap`:
///
/// C_i = eps^2 m / (n ln n) (e_i + tau / kappa), d_i = n/m sum_j (1 - M) min(exp(s <q_i, k_l_j>), C_i),
/// D~_i = e_i + max(d_i, tau / kappa).
///
/// `log2_tau_of` gives tau of each row's head, `covered` says which positions the rows meet exactly.
pub(crate) fn estimate_row_sums(
    tile: &mut Tile<'_>,
    call: &Call<'_>,
    keys: KeyOrder<'_>,
    positions: Range<usize>,
    log2_tau_of: impl Fn(usize) -> f32,
    covered: impl Fn(&Column) -> bool,
) {
    let floor = |r: usize| log2_tau_of(r) - log2(call.params.approx_d_kappa);
    sum_sample(tile, call, keys, positions, floor, covered);
    for r in 0..tile.rows() {
        tile.memory.cap[r] = tile.log2_sum(r);
    }
    tile.swap_sums();
    for r in 0..tile.rows() {
        let sampled = tile.memory.cap[r];
        let rest = if floor(r) > sampled { floor(r) } else { sampled };
        tile.memory.cap[r] = log2_add(tile.log2_sum(r), rest);
    }
}

/// Sets `tile.memory.cap` to the base-2 logs of C_i, and swaps the sums for those of the capped sample, d_i.
fn sum_sample(
    tile: &mut Tile<'_>,
    call: &Call<'_>,
    keys: KeyOrder<'_>,
    positions: Range<usize>,
    log2_floor: impl Fn(usize) -> f32,
    covered: impl Fn(&Column) -> bool,
) {
    let params = call.params;
    let factor = log2_cap_factor(params, positions.len());
    for r in 0..tile.rows() {
        tile.memory.cap[r] = factor + log2_add(tile.log2_sum(r), log2_floor(r));
    }
    tile.empty_other_sums();
    tile.swap_sums();
    let stream = uniform_stream(params.seed, params.offset, call.problem.first_kv_head + keys.kv_head);
    let columns = uniform_columns(stream, positions, params.sample_size as usize);
    tile.attend_columns(keys, columns.filter(|column| !covered(column)), None, true, Part::Sum);
}

/// Base-2 logits beyond which a term of each row's sampled sum is a constant: C_i, or -inf where tau / kappa takes the
/// place of the whole sum. The tile's sums hold the exact blocks.
pub(crate) fn bound_terms(
    tile: &mut Tile<'_>,
    call: &Call<'_>,
    keys: KeyOrder<'_>,
    positions: Range<usize>,
    log2_tau_of: impl Fn(usize) -> f32,
    covered: impl Fn(&Column) -> bool,
    bounds: &mut [f32],
) {
    let floor = |r: usize| log2_tau_of(r) - log2(call.params.approx_d_kappa);
    sum_sample(tile, call, keys, positions, floor, covered);
    for (r, bound) in bounds.iter_mut().enumerate() {
        *bound = if floor(r) > tile.log2_sum(r) { f32::NEG_INFINITY } else { tile.memory.cap[r] };
    }
}

/// Makes the base-2 logs in `tile.memory.cap` the rows' sums (Algorithm 3, line 4: D~^-1). A row whose
/// estimate is 0 becomes empty.
pub(crate) fn apply_row_sums(tile: &mut Tile<'_>) {
    for r in 0..tile.rows() {
        let log2_sum = tile.memory.cap[r];
        let old = tile.memory.max[r];
        // Values may weigh far more than the sum says: keep the sum a normal number relative to the maximum.
        let new = old.max(log2_sum).min(log2_sum + 100.0);
        if log2_sum == f32::NEG_INFINITY {
            tile.set_sum(r, f32::NEG_INFINITY, 0.0);
            tile.scale_accumulated(r, 0.0);
        } else {
            tile.set_sum(r, new, crate::math::exp2(log2_sum - new));
            // A finite factor: 0 stays 0 where the output is too large for f32.
            tile.scale_accumulated(r, crate::math::exp2((old - new).min(127.0)));
        }
    }
}
