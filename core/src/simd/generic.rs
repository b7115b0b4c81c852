//! The kernels, written once over [`Vector`]; each instruction set instantiates them.

use half::f16;

use super::vector::Vector;
use super::{KEY_TILE, Step};

/// Attends every row of a [`Step`]: scores, online softmax, product with the values.
///
/// `ROWS` queries and `VECTORS` vectors of keys (or of value columns) make one register tile.
///
/// # Safety
/// The instructions of `V` are available, and the slices have the lengths that [`Step`] states for
/// `query_rows == ROWS` and `panel == VECTORS * V::LANES`.
#[inline(always)]
pub(super) unsafe fn attend<V: Vector, const ROWS: usize, const VECTORS: usize>(step: &mut Step<'_>) {
    let groups = step.max.len() / ROWS;
    for group in 0..groups {
        let first = group * ROWS;
        let limits: [usize; ROWS] = core::array::from_fn(|r| match step.visible {
            Some(visible) => (visible[first + r] as usize).min(step.key_count),
            None => step.key_count,
        });
        let most = limits.into_iter().fold(0, usize::max);
        if most == 0 {
            continue;
        }
        let least = limits.into_iter().fold(most, usize::min);
        // SAFETY: the group's rows and all panels lie within the slices (contract).
        unsafe {
            let query = step.query.as_ptr().add(first * step.head_dim);
            score::<V, ROWS, VECTORS>(step, query, most);
            let rescale: [f32; ROWS] = core::array::from_fn(|r| soften::<V>(step, r, first + r, limits[r]));
            if step.use_values {
                weigh::<V, ROWS, VECTORS>(step, first, least, rescale);
                // Rows of a causal tile that see more keys than the others: a key beyond a row's limit
                // must not touch it, not even with weight 0, or its NaN would.
                for (r, &limit) in limits.iter().enumerate() {
                    for key in least..limit {
                        weigh_one::<V, VECTORS>(step, r, first + r, key);
                    }
                }
            }
        }
    }
}

/// Logits of `ROWS` queries against the first `keys` keys (rounded up to a panel) into `step.scores`.
#[inline(always)]
unsafe fn score<V: Vector, const ROWS: usize, const VECTORS: usize>(
    step: &mut Step<'_>,
    query: *const f32,
    keys: usize,
) {
    let panel = VECTORS * V::LANES;
    let scores = step.scores.as_mut_ptr();
    for p in 0..keys.div_ceil(panel) {
        // SAFETY: panel p holds head_dim * panel numbers, the query group head_dim * ROWS, and the
        // scores ROWS * KEY_TILE.
        unsafe {
            let mut key = step.keys.as_ptr().add(p * panel * step.head_dim);
            let mut query = query;
            let mut tile = [[V::splat(0.0); VECTORS]; ROWS];
            for _ in 0..step.head_dim {
                let columns: [V; VECTORS] = core::array::from_fn(|v| V::load(key.add(v * V::LANES)));
                for (r, row) in tile.iter_mut().enumerate() {
                    let x = V::splat(*query.add(r));
                    for (cell, &column) in row.iter_mut().zip(&columns) {
                        *cell = x.mul_add(column, *cell);
                    }
                }
                key = key.add(panel);
                query = query.add(ROWS);
            }
            for (r, row) in tile.iter().enumerate() {
                for (v, cell) in row.iter().enumerate() {
                    cell.store(scores.add(r * KEY_TILE + p * panel + v * V::LANES));
                }
            }
        }
    }
}

/// Turns one row's logits into weights relative to the row's running maximum, updates the maximum
/// and the sum, and returns the factor by which what was accumulated before shrinks.
#[inline(always)]
unsafe fn soften<V: Vector>(step: &mut Step<'_>, row_in_group: usize, row: usize, limit: usize) -> f32 {
    if limit == 0 {
        return 1.0;
    }
    let vectors = limit.div_ceil(V::LANES);
    let cap = V::splat(step.cap.map_or(f32::INFINITY, |cap| cap[row]));
    let lowest = V::splat(f32::NEG_INFINITY);
    let end = V::splat(limit as f32);
    // SAFETY: vectors * LANES <= KEY_TILE numbers of this row of `scores` and of `log_weight`.
    unsafe {
        let scores = step.scores.as_mut_ptr().add(row_in_group * KEY_TILE);
        let mut largest = lowest;
        for i in 0..vectors {
            let mut s = V::load(scores.add(i * V::LANES));
            if step.cap.is_some() {
                s = cap.min(s);
            }
            if let Some(weights) = step.log_weight {
                s = s.add(V::load(weights.as_ptr().add(i * V::LANES)));
            }
            if (i + 1) * V::LANES > limit {
                s = s.select_less(lowest, V::iota().add(V::splat((i * V::LANES) as f32)), end);
            }
            s.store(scores.add(i * V::LANES));
            // A NaN logit leaves the maximum alone: it reaches the sum through its own weight.
            largest = s.max(largest);
        }
        let old = step.max[row];
        let new = old.max(largest.reduce_max());
        // With nothing but -inf so far every weight must be 0, not exp(-inf + inf).
        let origin = if new == f32::NEG_INFINITY { 0.0 } else { new };
        let shift = V::splat(origin);
        let mut sum = V::splat(0.0);
        for i in 0..vectors {
            let weight = V::load(scores.add(i * V::LANES)).sub(shift).exp2();
            weight.store(scores.add(i * V::LANES));
            sum = sum.add(weight);
        }
        let rescale = if old == new { 1.0 } else { exp2_one::<V>(old - origin) };
        step.max[row] = new;
        step.sum[row] *= rescale;
        if step.use_sum {
            step.sum[row] += sum.reduce_add();
        }
        rescale
    }
}

/// 2^x of one number, by the same polynomial as the weights.
#[inline(always)]
fn exp2_one<V: Vector>(x: f32) -> f32 {
    V::splat(x).exp2().reduce_max()
}

/// Rescales what the group has accumulated and adds the first `keys` values, weighted.
#[inline(always)]
unsafe fn weigh<V: Vector, const ROWS: usize, const VECTORS: usize>(
    step: &mut Step<'_>,
    first: usize,
    keys: usize,
    rescale: [f32; ROWS],
) {
    let panel = VECTORS * V::LANES;
    let scores = step.scores.as_ptr();
    for p in 0..step.value_dim / panel {
        // SAFETY: panel p holds KEY_TILE * panel numbers; row r of the group has value_dim
        // accumulated numbers, the scores KEY_TILE per row.
        unsafe {
            let value = step.values.as_ptr().add(p * panel * KEY_TILE);
            let sums = step.accumulated.as_mut_ptr().add(first * step.value_dim + p * panel);
            // From zero, joined to the running sums at the end: a chain as long as the sequence would
            // lose the small weights in the rounding of the sum.
            let mut tile = [[V::splat(0.0); VECTORS]; ROWS];
            for key in 0..keys {
                let columns: [V; VECTORS] =
                    core::array::from_fn(|v| V::load(value.add(key * panel + v * V::LANES)));
                for (r, row) in tile.iter_mut().enumerate() {
                    let weight = V::splat(*scores.add(r * KEY_TILE + key));
                    for (cell, &column) in row.iter_mut().zip(&columns) {
                        *cell = weight.mul_add(column, *cell);
                    }
                }
            }
            for (r, row) in tile.iter().enumerate() {
                let shrink = V::splat(rescale[r]);
                for (v, &cell) in row.iter().enumerate() {
                    let at = sums.add(r * step.value_dim + v * V::LANES);
                    shrink.mul_add(V::load(at), cell).store(at);
                }
            }
        }
    }
}

/// Adds one weighted value to one row.
#[inline(always)]
unsafe fn weigh_one<V: Vector, const VECTORS: usize>(
    step: &mut Step<'_>,
    row_in_group: usize,
    row: usize,
    key: usize,
) {
    let panel = VECTORS * V::LANES;
    for p in 0..step.value_dim / panel {
        // SAFETY: as in `weigh`, for one row and one key.
        unsafe {
            let weight = V::splat(*step.scores.as_ptr().add(row_in_group * KEY_TILE + key));
            let value = step.values.as_ptr().add((p * KEY_TILE + key) * panel);
            let sums = step.accumulated.as_mut_ptr().add(row * step.value_dim + p * panel);
            for v in 0..VECTORS {
                let cell = V::load(sums.add(v * V::LANES));
                weight.mul_add(V::load(value.add(v * V::LANES)), cell).store(sums.add(v * V::LANES));
            }
        }
    }
}

/// Rows hashed at once: enough independent chains to hide the latency of a fused multiply-add.
const HASH_ROWS: usize = 8;

/// Sign codes of rows: bit j is set when the projection on hyperplane j is positive.
///
/// Every projection is one chain of fused multiply-adds in ascending order of the head dimension,
/// starting from 0, so that codes are the same on every instruction set.
///
/// # Safety
/// The instructions of `V` are available; `width` is a multiple of `V::LANES`,
/// `rows.len() == codes.len() * head_dim` and `projections.len() == head_dim * width`.
#[inline(always)]
pub(super) unsafe fn hash<V: Vector>(
    rows: &[f32],
    head_dim: usize,
    projections: &[f32],
    width: usize,
    codes: &mut [u32],
) {
    codes.fill(0);
    for vector in 0..width / V::LANES {
        for (group, codes) in codes.chunks_mut(HASH_ROWS).enumerate() {
            let row = |r: usize| (group * HASH_ROWS + r.min(codes.len() - 1)) * head_dim;
            let starts: [usize; HASH_ROWS] = core::array::from_fn(row);
            let mut sums = [V::splat(0.0); HASH_ROWS];
            for i in 0..head_dim {
                // SAFETY: i < head_dim, so the indices lie within `projections` and `rows` (contract).
                unsafe {
                    let normal = V::load(projections.as_ptr().add(i * width + vector * V::LANES));
                    for (sum, start) in sums.iter_mut().zip(starts) {
                        *sum = V::splat(*rows.as_ptr().add(start + i)).fused_mul_add(normal, *sum);
                    }
                }
            }
            for (code, sum) in codes.iter_mut().zip(sums) {
                *code |= sum.positive_bits() << (vector * V::LANES);
            }
        }
    }
}

/// Packs `V::LANES` rows of `head_dim` numbers, `stride` apart, as columns of a panel.
///
/// # Safety
/// The instructions of `V` are available; `stride` is at least `head_dim` rounded up to `V::LANES`,
/// `rows` holds `V::LANES * stride` numbers, and `to` `(head_dim - 1) * panel + V::LANES`.
#[inline(always)]
pub(super) unsafe fn transpose<V: Vector>(
    rows: &[f32],
    stride: usize,
    head_dim: usize,
    to: &mut [f32],
    panel: usize,
) {
    for first in (0..head_dim).step_by(V::LANES) {
        let columns = V::LANES.min(head_dim - first);
        // SAFETY: first + LANES <= stride, and column first + columns - 1 < head_dim (contract).
        unsafe {
            V::transpose(
                rows.as_ptr().add(first),
                stride,
                to.as_mut_ptr().add(first * panel),
                panel,
                columns,
            );
        }
    }
}

/// Widens binary16 numbers.
///
/// # Safety
/// `2 * to.len()` bytes are readable at `from`.
pub(super) unsafe fn widen_f16(from: *const u8, to: &mut [f32]) {
    for (i, x) in to.iter_mut().enumerate() {
        // SAFETY: i < to.len().
        *x = f16::from_bits(unsafe { from.cast::<u16>().add(i).read_unaligned() }).to_f32();
    }
}

/// Widens bfloat16 numbers: they are the upper halves of binary32 numbers.
///
/// # Safety
/// `2 * to.len()` bytes are readable at `from`.
pub(super) unsafe fn widen_bf16(from: *const u8, to: &mut [f32]) {
    for (i, x) in to.iter_mut().enumerate() {
        // SAFETY: i < to.len().
        *x = f32::from_bits(u32::from(unsafe { from.cast::<u16>().add(i).read_unaligned() }) << 16);
    }
}
