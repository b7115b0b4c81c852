//! The kernel of the backward pass, written once over [`Vector`]; each instruction set instantiates it.
//!
//! Five products of matrices, of which the first two give what the others need: logits, the gradients of the weights;
//! then the gradients of the values, of the keys and of the queries.

use core::f32::consts::{LN_2, LOG2_E};
use core::ops::Range;

use super::product::F32;
use super::register_tile::multiply;
use super::vector::Vector;
use super::{GradientStep, HIDDEN_BELOW, KEY_TILE};

/// Rows that go through all five products together: few enough that what one product reads of their weights, or of the
/// gradients of their logits, stays in the first-level cache. Whole register tiles of every table.
const BLOCK_ROWS: usize = 96;

/// Rows of a register tile, at most.
const MOST_TILE_ROWS: usize = 16;

/// Base-2 logarithm of the largest weight: what a row's sum says of a pair in it is at most 0 up to rounding, and what
/// does not fit the sum must not become infinite.
const MOST_EXPONENT: f32 = 127.0;

/// Adds what every row of a [`GradientStep`] and its keys give to the gradients.
///
/// `ROWS` rows and `VECTORS` vectors of columns make one register tile.
///
/// # Safety
/// The instructions of `V` are available, and the slices have the lengths that [`GradientStep`] states for
/// `lanes == V::LANES` and `panel == VECTORS * lanes`.
#[inline(always)]
pub(super) unsafe fn attend_gradient<V: Vector, const ROWS: usize, const VECTORS: usize>(
    step: &mut GradientStep<'_>,
) {
    const { assert!(ROWS <= MOST_TILE_ROWS && BLOCK_ROWS.is_multiple_of(ROWS)) };
    let rows = step.delta.len();
    // Weight 0 keeps a row and a key apart only where both are finite.
    let pair_by_pair = may_hide_pairs(step) && !operands_are_finite::<V>(step);
    let mut first = 0;
    while first < rows {
        // Not less than a register tile behind the last whole block.
        let left = rows - first;
        let count = if left < BLOCK_ROWS + ROWS { left } else { BLOCK_ROWS };
        let block = Block::new(step, first, count);
        // SAFETY: the block's rows are among the step's.
        unsafe {
            if block.most > 0 {
                score::<V, ROWS, VECTORS>(step, &block);
                weigh_rows::<V>(step, &block);
                if pair_by_pair {
                    core::hint::cold_path();
                    add_seen_pairs::<V>(step, &block);
                } else {
                    add_gradients::<V, ROWS, VECTORS>(step, &block);
                }
            }
        }
        first += count;
    }
}

/// Whether a row may not see a key of the step.
fn may_hide_pairs(step: &GradientStep<'_>) -> bool {
    let saw_nothing = |sum: &f32| *sum == f32::NEG_INFINITY;
    step.options.visible.is_some()
        || step.options.mask.is_some()
        || step.log2_sum[..step.delta.len()].iter().any(saw_nothing)
}

/// Whether all that is multiplied by a weight or by the gradient of a logit is.
#[inline(always)]
fn operands_are_finite<V: Vector>(step: &GradientStep<'_>) -> bool {
    let (rows, key_stride) = (step.delta.len(), step.head_dim.next_multiple_of(V::LANES));
    let value_len =
        if step.options.use_values { rows * step.value_dim.next_multiple_of(V::LANES) } else { 0 };
    all_finite(&step.query[..rows * key_stride])
        && all_finite(&step.keys[..step.options.key_count * key_stride])
        && all_finite(&step.output_gradient[..value_len])
}

#[inline(always)]
fn all_finite(numbers: &[f32]) -> bool {
    let mut largest = 0;
    for x in numbers {
        largest = largest.max(x.abs().to_bits());
    }
    largest < f32::INFINITY.to_bits()
}

/// Some rows of a step.
struct Block {
    first: usize,
    rows: usize,
    /// How many leading keys each row sees; 0 where the row has no sum.
    limits: [usize; BLOCK_ROWS + MOST_TILE_ROWS],
    /// The largest of the limits.
    most: usize,
}

impl Block {
    fn new(step: &GradientStep<'_>, first: usize, rows: usize) -> Self {
        let mut limits = [0; BLOCK_ROWS + MOST_TILE_ROWS];
        let mut most = 0;
        for (r, limit) in limits[..rows].iter_mut().enumerate() {
            if step.log2_sum[first + r] != f32::NEG_INFINITY {
                let visible = step.options.visible.map_or(KEY_TILE, |visible| visible[first + r] as usize);
                *limit = step.options.key_count.min(visible);
                most = most.max(*limit);
            }
        }
        Block { first, rows, limits, most }
    }

    /// The rows from the first to the last one that sees `key`.
    fn rows_that_see(&self, key: usize) -> Range<usize> {
        let sees = |limit: &usize| *limit > key;
        let limits = &self.limits[..self.rows];
        let end = limits.iter().rposition(sees).map_or(0, |last| last + 1);
        limits.iter().position(sees).unwrap_or(end)..end
    }

    /// The keys that any of `ROWS` rows from `row` on sees.
    fn keys_seen<const ROWS: usize>(&self, row: usize) -> Range<usize> {
        0..self.limits[row..row + ROWS].iter().fold(0, |most, &limit| most.max(limit))
    }
}

/// A product of matrices: element (row, column) is the sum over terms of `left[term * left_step + row * left_stride]`
/// and `right[term * right_stride + column]`, and belongs at `to[row * to_stride + column]`.
#[derive(Clone, Copy)]
struct MatrixProduct {
    left: *const f32,
    left_step: usize,
    left_stride: usize,
    right: *const f32,
    right_stride: usize,
    to: *mut f32,
    to_stride: usize,
}

impl MatrixProduct {
    /// Computes `rows` rows and `vectors` vectors of columns, and adds them to what is there, or with `REPLACE` puts
    /// them in its place. `terms` says which terms a register tile of some rows, the first of which it is given, has
    /// besides such as are 0.
    ///
    /// # Safety
    /// The instructions of `V` are available; the rows, the vectors and the terms are readable and writable.
    #[inline(always)]
    unsafe fn compute<V: Vector, const ROWS: usize, const VECTORS: usize, const REPLACE: bool>(
        &self,
        rows: usize,
        vectors: usize,
        terms: impl Terms,
    ) {
        let whole = vectors / VECTORS * VECTORS;
        // SAFETY: as the caller says.
        unsafe {
            for vector in (0..whole).step_by(VECTORS) {
                self.compute_columns::<V, ROWS, VECTORS, REPLACE>(rows, vector, &terms);
            }
            for vector in whole..vectors {
                self.compute_columns::<V, ROWS, 1, REPLACE>(rows, vector, &terms);
            }
        }
    }

    /// [`Self::compute`] for `VECTORS` vectors from `vector` on.
    #[inline(always)]
    unsafe fn compute_columns<V: Vector, const ROWS: usize, const VECTORS: usize, const REPLACE: bool>(
        &self,
        rows: usize,
        vector: usize,
        terms: &impl Terms,
    ) {
        let mut done = 0;
        // SAFETY: as the caller says.
        unsafe {
            if rows >= ROWS {
                while done < rows {
                    // The last tile has rows of the one before again where fewer are left.
                    let first = done.min(rows - ROWS);
                    self.compute_tile::<V, ROWS, VECTORS, REPLACE>(first, done - first, vector, terms);
                    done = first + ROWS;
                }
            } else {
                for row in 0..rows {
                    self.compute_tile::<V, 1, VECTORS, REPLACE>(row, 0, vector, terms);
                }
            }
        }
    }

    /// [`Self::compute_columns`] for `ROWS` rows from `first` on, without the first `skipped` of them.
    #[inline(always)]
    unsafe fn compute_tile<V: Vector, const ROWS: usize, const VECTORS: usize, const REPLACE: bool>(
        &self,
        first: usize,
        skipped: usize,
        vector: usize,
        terms: &impl Terms,
    ) {
        let terms = terms.of_rows::<ROWS>(first);
        // From zero, joined to the running sums at the end, as in the forward pass.
        let mut tile = [[V::splat(0.0); VECTORS]; ROWS];
        // SAFETY: as the caller says.
        unsafe {
            let left = self.left.add(terms.start * self.left_step + first * self.left_stride);
            let right = self.right.add(terms.start * self.right_stride + vector * V::LANES);
            multiply::<F32<V>, ROWS, VECTORS>(
                terms.len(),
                (left.cast(), self.left_step, self.left_stride),
                (right.cast(), self.right_stride),
                &mut tile,
            );
            for (r, row) in tile.iter().enumerate() {
                if r < skipped {
                    continue;
                }
                for (v, &cell) in row.iter().enumerate() {
                    let to = self.to.add((first + r) * self.to_stride + (vector + v) * V::LANES);
                    if REPLACE { cell.store(to) } else { V::load(to).add(cell).store(to) }
                }
            }
        }
    }

    /// Adds to row `row` the terms that `is_seen` names, and looks at no others: the bits of [`Self::compute`] where
    /// the others are 0.
    ///
    /// # Safety
    /// As for [`Self::compute`].
    #[inline(always)]
    unsafe fn add_terms<V: Vector>(
        &self,
        row: usize,
        vectors: usize,
        terms: Range<usize>,
        is_seen: impl Fn(usize) -> bool,
    ) {
        for vector in 0..vectors {
            let mut sum = V::splat(0.0);
            // SAFETY: as the caller says.
            unsafe {
                for term in terms.clone() {
                    if is_seen(term) {
                        let left = V::splat(*self.left.add(term * self.left_step + row * self.left_stride));
                        let right = V::load(self.right.add(term * self.right_stride + vector * V::LANES));
                        sum = left.mul_add(right, sum);
                    }
                }
                let to = self.to.add(row * self.to_stride + vector * V::LANES);
                V::load(to).add(sum).store(to);
            }
        }
    }
}

/// The terms of a product's rows.
trait Terms {
    /// Those of `ROWS` rows from `first` on.
    fn of_rows<const ROWS: usize>(&self, first: usize) -> Range<usize>;
}

/// So many, for every row.
struct Every(usize);

impl Terms for Every {
    #[inline(always)]
    fn of_rows<const ROWS: usize>(&self, _first: usize) -> Range<usize> {
        0..self.0
    }
}

/// Rows are queries, terms the keys that they see.
struct KeysSeen<'a>(&'a Block);

impl Terms for KeysSeen<'_> {
    #[inline(always)]
    fn of_rows<const ROWS: usize>(&self, first: usize) -> Range<usize> {
        self.0.keys_seen::<ROWS>(first)
    }
}

/// Rows are keys, terms the queries that see them.
struct RowsThatSee<'a>(&'a Block);

impl Terms for RowsThatSee<'_> {
    #[inline(always)]
    fn of_rows<const ROWS: usize>(&self, first: usize) -> Range<usize> {
        self.0.rows_that_see(first)
    }
}

/// The products of a block's queries and keys, in place of the weights, and those of the gradients of its outputs and
/// the values, in place of the gradients of the logits, where a row sees one of a panel's keys.
#[inline(always)]
unsafe fn score<V: Vector, const ROWS: usize, const VECTORS: usize>(
    step: &mut GradientStep<'_>,
    block: &Block,
) {
    let panel = VECTORS * V::LANES;
    let logits = (step.query, step.key_panels, step.head_dim, step.weights.as_mut_ptr());
    let values = (step.output_gradient, step.value_panels, step.value_dim, step.logit_gradients.as_mut_ptr());
    let both = [logits, values];
    let used = if step.options.use_values { 2 } else { 1 };
    for p in 0..block.most.div_ceil(panel) {
        let rows = block.rows_that_see(p * panel);
        for &(left, right, width, to) in &both[..used] {
            let left_stride = width.next_multiple_of(V::LANES);
            // SAFETY: the rows are the block's, and panel p is not beyond the last key.
            unsafe {
                let product = MatrixProduct {
                    left: left.as_ptr().add((block.first + rows.start) * left_stride),
                    left_step: 1,
                    left_stride,
                    right: right.as_ptr().cast::<f32>().add(p * panel * width),
                    right_stride: panel,
                    to: to.add((block.first + rows.start) * KEY_TILE + p * panel),
                    to_stride: KEY_TILE,
                };
                product.compute::<V, ROWS, VECTORS, true>(rows.len(), VECTORS, Every(width));
            }
        }
    }
}

/// Turns what [`score`] has left into the weights and the gradients of the logits: 0 where a row does not see a key.
#[inline(always)]
unsafe fn weigh_rows<V: Vector>(step: &mut GradientStep<'_>, block: &Block) {
    let zero = V::splat(0.0);
    let factor = V::splat(step.scale_log2 * LN_2);
    for r in 0..block.rows {
        let (row, limit) = (block.first + r, block.limits[r]);
        let start = V::splat(step.options.shift - step.log2_sum[row]);
        let delta = V::splat(if step.options.use_sum { step.delta[row] } else { 0.0 });
        for key in (0..KEY_TILE).step_by(V::LANES) {
            // SAFETY: KEY_TILE numbers a row, of the mask too, and for the keys.
            unsafe {
                let weights = step.weights.as_mut_ptr().add(row * KEY_TILE + key);
                let gradients = step.logit_gradients.as_mut_ptr().add(row * KEY_TILE + key);
                if key >= limit {
                    zero.store(weights);
                    zero.store(gradients);
                    continue;
                }
                let product = V::load(weights);
                let scale = V::splat(step.scale_log2);
                let mask = step.options.mask.map(|(mask, stride)| mask.as_ptr().add(row * stride + key));
                // The mask and the sum may be as large: together first.
                let mut addend = start;
                if let Some(mask) = mask {
                    addend = V::load(mask).mul_add(V::splat(LOG2_E), addend);
                }
                if let Some(log_weight) = step.options.log_weight {
                    addend = V::load(log_weight.as_ptr().add(key)).add(addend);
                }
                let exponent = product.mul_add(scale, addend);
                // In this order a NaN stays one.
                let mut weight = V::splat(MOST_EXPONENT).min(exponent).exp2();
                let mut gradient = zero.sub(delta);
                if step.options.use_values {
                    gradient = V::load(gradients).sub(delta);
                }
                gradient = weight.mul(factor).mul(gradient);
                if let Some(mask) = mask {
                    let (mask, lowest) = (V::load(mask), V::splat(HIDDEN_BELOW));
                    weight = zero.select_less(weight, mask, lowest);
                    gradient = zero.select_less(gradient, mask, lowest);
                }
                if let Some(cap) = step.options.cap {
                    let cap = V::splat(cap[row]);
                    let mut logit = product.mul(scale);
                    if let Some(mask) = mask {
                        logit = V::load(mask).mul_add(V::splat(LOG2_E), logit);
                    }
                    weight = zero.select_less(weight, cap, logit);
                    gradient = zero.select_less(gradient, cap, logit);
                }
                if key + V::LANES > limit {
                    let end = V::splat((limit - key) as f32);
                    weight = weight.select_less(zero, V::iota(), end);
                    gradient = gradient.select_less(zero, V::iota(), end);
                }
                weight.store(weights);
                gradient.store(gradients);
            }
        }
    }
}

/// The products that give a block's gradients: those of the values, of the keys, and of the queries.
///
/// # Safety
/// The block's rows are among the step's.
#[inline(always)]
unsafe fn gradient_products<V: Vector>(
    step: &mut GradientStep<'_>,
    block: &Block,
) -> [(MatrixProduct, usize); 3] {
    let key_stride = step.head_dim.next_multiple_of(V::LANES);
    let value_stride = step.value_dim.next_multiple_of(V::LANES);
    // SAFETY: as the caller says; without values there are no gradients of outputs, and their address is not used.
    unsafe {
        let weights = step.weights.as_ptr().add(block.first * KEY_TILE);
        let logit_gradients = step.logit_gradients.as_ptr().add(block.first * KEY_TILE);
        let values = MatrixProduct {
            left: weights,
            left_step: KEY_TILE,
            left_stride: 1,
            right: step.output_gradient.as_ptr().wrapping_add(block.first * value_stride),
            right_stride: value_stride,
            to: step.value_gradient.as_mut_ptr(),
            to_stride: value_stride,
        };
        let keys = MatrixProduct {
            left: logit_gradients,
            left_step: KEY_TILE,
            left_stride: 1,
            right: step.query.as_ptr().add(block.first * key_stride),
            right_stride: key_stride,
            to: step.key_gradient.as_mut_ptr(),
            to_stride: key_stride,
        };
        let queries = MatrixProduct {
            left: logit_gradients,
            left_step: 1,
            left_stride: KEY_TILE,
            right: step.keys.as_ptr(),
            right_stride: key_stride,
            to: step.query_gradient.as_mut_ptr().add(block.first * key_stride),
            to_stride: key_stride,
        };
        [(values, value_stride / V::LANES), (keys, key_stride / V::LANES), (queries, key_stride / V::LANES)]
    }
}

/// Adds what a block gives to the gradients.
#[inline(always)]
unsafe fn add_gradients<V: Vector, const ROWS: usize, const VECTORS: usize>(
    step: &mut GradientStep<'_>,
    block: &Block,
) {
    // One after the other and not in a loop: the strides of each are constants of its code.
    // SAFETY: the block's rows are among the step's, and its limits are not beyond the last key.
    unsafe {
        let [values, keys, queries] = gradient_products::<V>(step, block);
        if step.options.use_values {
            let (product, vectors) = values;
            product.compute::<V, ROWS, VECTORS, false>(block.most, vectors, RowsThatSee(block));
        }
        let (product, vectors) = keys;
        product.compute::<V, ROWS, VECTORS, false>(block.most, vectors, RowsThatSee(block));
        let (product, vectors) = queries;
        product.compute::<V, ROWS, VECTORS, false>(block.rows, vectors, KeysSeen(block));
    }
}

/// [`add_gradients`] where operands are not finite: for each row the keys that it sees, and no others.
#[inline(always)]
unsafe fn add_seen_pairs<V: Vector>(step: &mut GradientStep<'_>, block: &Block) {
    let skipped = if step.options.use_values { 0 } else { 1 };
    let mask = step.options.mask;
    let is_seen = |row: usize, key: usize| {
        let hidden =
            |(mask, stride): (&[f32], usize)| mask[(block.first + row) * stride + key] < HIDDEN_BELOW;
        key < block.limits[row] && !mask.is_some_and(hidden)
    };
    // SAFETY: as in `add_gradients`.
    unsafe {
        let [values, keys, (queries, vectors)] = gradient_products::<V>(step, block);
        for &(product, vectors) in &[values, keys][skipped..] {
            for key in 0..block.most {
                product.add_terms::<V>(key, vectors, 0..block.rows, |row| is_seen(row, key));
            }
        }
        for row in 0..block.rows {
            queries.add_terms::<V>(row, vectors, 0..block.most, |key| is_seen(row, key));
        }
    }
}
