//! Kernels over rows, written once over [`Vector`]: hashing, packing, widening.

use half::f16;

use super::HASH_ROWS;
use super::vector::Vector;

/// Sign codes of rows: bit j is set when the projection on hyperplane j is positive.
///
/// Every projection is one chain of fused multiply-adds in ascending order of the head dimension,
/// starting from 0, so that codes are the same on every instruction set.
///
/// # Safety
/// The instructions of `V` are available; `width` is a multiple of `V::LANES`, there are as many `rows` as `codes`,
/// and `projections` has `width` numbers for every word of a row.
#[inline(always)]
pub(super) unsafe fn hash<V: Vector>(rows: &[&[u32]], projections: &[f32], width: usize, codes: &mut [u32]) {
    let head_dim = projections.len() / width;
    codes.fill(0);
    for vector in 0..width / V::LANES {
        for (rows, codes) in rows.chunks(HASH_ROWS).zip(codes.chunks_mut(HASH_ROWS)) {
            let mut starts = [rows[0].as_ptr(); HASH_ROWS];
            for (start, row) in starts.iter_mut().zip(rows) {
                *start = row.as_ptr();
            }
            let mut sums = [V::splat(0.0); HASH_ROWS];
            for i in 0..head_dim {
                // SAFETY: i < head_dim, so the indices lie within `projections` and the rows (contract).
                unsafe {
                    let normal = V::load(projections.as_ptr().add(i * width + vector * V::LANES));
                    for (sum, start) in sums.iter_mut().zip(starts) {
                        *sum = V::splat(*start.add(i).cast::<f32>()).fused_mul_add(normal, *sum);
                    }
                }
            }
            for (code, sum) in codes.iter_mut().zip(sums) {
                *code |= sum.positive_bits() << (vector * V::LANES);
            }
        }
    }
}

/// Packs the first `words` words of `V::LANES` rows as columns of a panel.
///
/// # Safety
/// The instructions of `V` are available; there are `V::LANES` rows, each of at least `words` rounded up to
/// `V::LANES`, and `to` has `(words - 1) * panel + V::LANES` words.
#[inline(always)]
pub(super) unsafe fn transpose<V: Vector>(rows: &[&[u32]], words: usize, to: &mut [u32], panel: usize) {
    for first in (0..words).step_by(V::LANES) {
        let columns = V::LANES.min(words - first);
        // SAFETY: first + LANES is within every row, and column first + columns - 1 < words (contract).
        unsafe { V::transpose(rows, first, to.as_mut_ptr().add(first * panel), panel, columns) };
    }
}

/// Lanes of the widest vector.
const MOST_LANES: usize = 16;

/// Words of the squares of lanes that hold a group of rows, at most.
const MOST_TRANSPOSED: usize = 2 * MOST_LANES * MOST_LANES;

/// Packs `ROWS` rows of queries as a group: word i of row r becomes `to[i * ROWS + r]`, times `scale` as an f32 if
/// there is one.
///
/// # Safety
/// The instructions of `V` are available; there are `ROWS` rows, each of at least `words` rounded up to
/// `V::LANES`, and `to` has `words * ROWS + V::LANES` words.
#[inline(always)]
pub(super) unsafe fn pack_queries<V: Vector, const ROWS: usize>(
    rows: &[&[u32]],
    words: usize,
    scale: Option<f32>,
    to: &mut [u32],
) {
    let chunks = ROWS.div_ceil(V::LANES);
    let square = V::LANES * V::LANES;
    const { assert!(ROWS.div_ceil(V::LANES) * V::LANES * V::LANES <= MOST_TRANSPOSED) };
    let mut transposed = [0u32; MOST_TRANSPOSED];
    for first in (0..words).step_by(V::LANES) {
        let columns = V::LANES.min(words - first);
        for chunk in 0..chunks {
            // Lanes beyond the last row repeat it; the next column's first rows overwrite them.
            let mut lanes: [&[u32]; 16] = [&[]; 16];
            for (lane, row) in lanes[..V::LANES].iter_mut().enumerate() {
                *row = rows[(chunk * V::LANES + lane).min(ROWS - 1)];
            }
            // SAFETY: the rows hold the columns (contract), and there is room for every chunk's square.
            unsafe {
                let to = transposed.as_mut_ptr().add(chunk * square);
                V::transpose(&lanes[..V::LANES], first, to, V::LANES, columns);
            }
        }
        for column in 0..columns {
            for chunk in 0..chunks {
                // SAFETY: at most LANES - 1 words beyond column `words - 1` (contract).
                unsafe {
                    let from = transposed.as_ptr().add(chunk * square + column * V::LANES);
                    let mut x = V::load(from.cast());
                    if let Some(scale) = scale {
                        x = x.mul(V::splat(scale));
                    }
                    x.store(to.as_mut_ptr().add((first + column) * ROWS + chunk * V::LANES).cast());
                }
            }
        }
    }
}

/// Packs a row of values as number `slot` of the tile, columns beyond it as zeros.
///
/// # Safety
/// The instructions of `V` are available; `to` has `slots * row.len().next_multiple_of(V::LANES)` words,
/// `slot < slots`.
#[inline(always)]
pub(super) unsafe fn place<V: Vector, const VECTORS: usize>(
    row: &[u32],
    slot: usize,
    slots: usize,
    to: &mut [u32],
) {
    let vectors = row.len().div_ceil(V::LANES);
    let whole = vectors / VECTORS * VECTORS;
    for vector in 0..vectors {
        let width = if vector < whole { VECTORS } else { 1 };
        let at = (vector / width * width * slots + slot * width + vector % width) * V::LANES;
        let from = vector * V::LANES;
        // SAFETY: the vector's place is within the tile (contract), and its words within the row where
        // they are read.
        unsafe {
            let to = to.as_mut_ptr().add(at);
            if from + V::LANES <= row.len() {
                V::load(row.as_ptr().add(from).cast()).store(to.cast());
            } else {
                for i in 0..V::LANES {
                    *to.add(i) = row.get(from + i).copied().unwrap_or(0);
                }
            }
        }
    }
}

/// Adds to `sum` the first `sum.len()` numbers of rows that are `stride` apart, each times its weight. A row without
/// weight is passed over: 0 times an infinity would spoil the sum.
///
/// # Safety
/// The instructions of `V` are available; `rows` has `stride` numbers for every weight, and `sum.len() <= stride`.
#[inline(always)]
pub(super) unsafe fn add_weighted<V: Vector>(rows: &[f32], stride: usize, weights: &[f32], sum: &mut [f32]) {
    const VECTORS: usize = 8;
    let chunk = VECTORS * V::LANES;
    let whole = sum.len() / chunk * chunk;
    for first in (0..whole).step_by(chunk) {
        // SAFETY: first + chunk <= sum.len() <= stride (contract).
        unsafe {
            let to = sum.as_mut_ptr().add(first);
            let mut sums: [V; VECTORS] = core::array::from_fn(|vector| V::load(to.add(vector * V::LANES)));
            for (row, &weight) in weights.iter().enumerate() {
                if weight != 0.0 {
                    let row = rows.as_ptr().add(row * stride + first);
                    for (vector, sum) in sums.iter_mut().enumerate() {
                        *sum = V::load(row.add(vector * V::LANES)).mul_add(V::splat(weight), *sum);
                    }
                }
            }
            for (vector, sum) in sums.iter().enumerate() {
                sum.store(to.add(vector * V::LANES));
            }
        }
    }
    let rest = &mut sum[whole..];
    for (row, &weight) in rows.chunks_exact(stride).zip(weights) {
        if weight != 0.0 {
            rest.iter_mut().zip(&row[whole..]).for_each(|(sum, x)| *sum += weight * x);
        }
    }
}

/// Squared distances of `rows` from `center`.
///
/// # Safety
/// The instructions of `V` are available; `rows` has `center.len()` numbers for every number of `to`.
#[inline(always)]
pub(super) unsafe fn squared_distances<V: Vector>(rows: &[f32], center: &[f32], to: &mut [f32]) {
    let whole = center.len() / V::LANES * V::LANES;
    for (row, to) in rows.chunks_exact(center.len()).zip(to) {
        let mut sums = [0.0; MOST_LANES];
        let mut sum = V::splat(0.0);
        for first in (0..whole).step_by(V::LANES) {
            // SAFETY: first + LANES <= center.len(), which is the row's length.
            unsafe {
                let difference = V::load(row.as_ptr().add(first)).sub(V::load(center.as_ptr().add(first)));
                sum = difference.mul_add(difference, sum);
            }
        }
        // SAFETY: no vector has more lanes.
        unsafe { sum.store(sums.as_mut_ptr()) };
        // In halves: as a chain the additions would wait for one another.
        let mut lanes = V::LANES;
        while lanes > 1 {
            lanes /= 2;
            for lane in 0..lanes {
                sums[lane] += sums[lane + lanes];
            }
        }
        let rest = row[whole..].iter().zip(&center[whole..]);
        *to = sums[0] + rest.map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
    }
}

/// Widens binary16 numbers.
///
/// # Safety
/// The instructions of `V` are available; `2 * to.len()` bytes are readable at `from`.
#[inline(always)]
pub(super) unsafe fn widen_f16<V: Vector>(from: *const u8, to: &mut [f32]) {
    let whole = to.len() / V::LANES * V::LANES;
    for first in (0..whole).step_by(V::LANES) {
        // SAFETY: first + LANES <= to.len() elements are readable at `from` and writable at `to`.
        unsafe { V::load_f16(from.add(2 * first)).store(to.as_mut_ptr().add(first)) };
    }
    for (i, x) in to.iter_mut().enumerate().skip(whole) {
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
