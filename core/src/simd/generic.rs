//! The attention kernel, written once over [`Product`] and [`Vector`]; each instruction set instantiates it.

use super::product::Product;
use super::register_tile::multiply;
use super::vector::Vector;
use super::{HIDDEN_BELOW, KEY_TILE, Step, WEIGHING_QUERIES, Weighing};

/// A logit may exceed the number that its row's weights are relative to by this much (base 2) before the
/// row is rescaled: weights stay below 256, far from overflow, and rescaling becomes rare.
const HEADROOM: f32 = 8.0;

/// Base-2 logarithm of the largest weight that [`weigh`] gives: a sum of millions of them times a value is finite.
const MOST_WEIGHT: f32 = 60.0;

/// Attends every row of a [`Step`]: scores, online softmax, product with the values.
///
/// `ROWS` queries and `VECTORS` vectors of keys (or of value columns) make one register tile; the rows of the
/// last group are taken `TAIL` at a time where they are fewer.
///
/// # Safety
/// The instructions of `P` are available, and the slices have the lengths that [`Step`] states for
/// `query_rows == ROWS`, `row_multiple == TAIL`, `lanes == P::Vector::LANES` and `panel == VECTORS * lanes`.
#[inline(always)]
pub(super) unsafe fn attend<P: Product, const ROWS: usize, const VECTORS: usize, const TAIL: usize>(
    step: &mut Step<'_>,
) {
    let every_key_counts = step.options.visible.is_none() && step.options.key_count == KEY_TILE;
    let plain = every_key_counts
        && step.options.cap.is_none()
        && step.options.log_weight.is_none()
        && step.options.mask.is_none();
    // SAFETY: the caller's contract.
    unsafe {
        if plain {
            attend_rows::<P, ROWS, VECTORS, TAIL, true>(step);
        } else {
            attend_rows::<P, ROWS, VECTORS, TAIL, false>(step);
        }
    }
}

/// [`attend`]; in a `PLAIN` step every row sees a whole tile, without weights and caps.
#[inline(always)]
unsafe fn attend_rows<
    P: Product,
    const ROWS: usize,
    const VECTORS: usize,
    const TAIL: usize,
    const PLAIN: bool,
>(
    step: &mut Step<'_>,
) {
    const { assert!(ROWS.is_multiple_of(TAIL)) };
    let words = step.head_dim.div_ceil(P::DEPTH);
    let rows = step.max.len();
    let whole = rows / ROWS * ROWS;
    // SAFETY: the groups' rows and queries lie within the slices (contract).
    unsafe {
        // Weight 0 keeps a hidden value out of a row only where the value is finite.
        let key_by_key = !PLAIN
            && step.options.mask.is_some()
            && step.options.use_values
            && !values_are_finite::<P, VECTORS>(step);
        for first in (0..whole).step_by(ROWS) {
            let query = step.query.as_ptr().add(first * words);
            attend_group::<P, ROWS, VECTORS, PLAIN>(step, first, (query, ROWS), key_by_key);
        }
        if TAIL < ROWS {
            for first in (whole..rows).step_by(TAIL) {
                let query = step.query.as_ptr().add(whole * words + first - whole);
                attend_group::<P, TAIL, VECTORS, PLAIN>(step, first, (query, ROWS), key_by_key);
            }
        }
    }
}

/// Whether the values of all keys of the step are.
#[inline(always)]
unsafe fn values_are_finite<P: Product, const VECTORS: usize>(step: &Step<'_>) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    let lanes = P::Vector::LANES;
    let words = step.options.key_count.div_ceil(P::DEPTH);
    let vectors = step.value_dim / lanes;
    let mut vector = 0;
    let mut finite = true;
    while vector < vectors {
        let width = if vector < vectors / VECTORS * VECTORS { VECTORS } else { 1 };
        let first = vector * lanes * (KEY_TILE / P::DEPTH);
        // SAFETY: as in `add_panel`: a panel's first words are those of the first keys.
        let panel = unsafe { step.values.get_unchecked(first..first + words * width * lanes) };
        for &word in panel {
            finite &= word & EXPONENT != EXPONENT;
            if P::DEPTH > 1 {
                finite &= word << 16 & EXPONENT != EXPONENT;
            }
        }
        vector += width;
    }
    finite
}

/// [`attend_rows`] for the `ROWS` rows from `first` on, whose words begin at `query.0`, each `query.1` after the
/// one before; `key_by_key` adds only the values of keys that a row sees.
#[inline(always)]
unsafe fn attend_group<P: Product, const ROWS: usize, const VECTORS: usize, const PLAIN: bool>(
    step: &mut Step<'_>,
    first: usize,
    query: (*const u32, usize),
    key_by_key: bool,
) {
    let panel = VECTORS * P::Vector::LANES;
    // SAFETY: the caller's contract.
    unsafe {
        let limits = if PLAIN { Limits::whole() } else { Limits::<ROWS>::new(step, first) };
        for p in 0..limits.most.div_ceil(panel) {
            weigh_keys::<P, ROWS, VECTORS, PLAIN>(step, (first, query), p, &limits);
        }
        if key_by_key {
            core::hint::cold_path();
            add_seen_values::<P, ROWS, VECTORS>(step, first, &limits);
        } else if step.options.use_values && limits.most > 0 {
            add_values::<P, ROWS, VECTORS>(step, first, &limits);
        }
    }
}

/// How many leading keys of the tile the rows of a group see.
struct Limits<const ROWS: usize> {
    each: [usize; ROWS],
    least: usize,
    most: usize,
}

impl<const ROWS: usize> Limits<ROWS> {
    #[inline(always)]
    fn whole() -> Self {
        Limits { each: [KEY_TILE; ROWS], least: KEY_TILE, most: KEY_TILE }
    }

    /// # Safety
    /// The step has rows `first..first + ROWS`.
    #[inline(always)]
    unsafe fn new(step: &Step<'_>, first: usize) -> Self {
        let mut each = [step.options.key_count; ROWS];
        if let Some(visible) = step.options.visible {
            for (r, limit) in each.iter_mut().enumerate() {
                // SAFETY: as the caller says.
                *limit = (*limit).min(unsafe { *visible.get_unchecked(first + r) } as usize);
            }
        }
        let most = each.into_iter().fold(0, usize::max);
        Limits { each, least: each.into_iter().fold(most, usize::min), most }
    }
}

/// Turns panel `p` of the keys into weights of the rows from `first` on, and adds them to the sums.
#[inline(always)]
unsafe fn weigh_keys<P: Product, const ROWS: usize, const VECTORS: usize, const PLAIN: bool>(
    step: &mut Step<'_>,
    (first, query): (usize, (*const u32, usize)),
    p: usize,
    limits: &Limits<ROWS>,
) {
    let lanes = P::Vector::LANES;
    let panel = VECTORS * lanes;
    // With nothing but -inf so far every weight must be 0, not exp(-inf + inf).
    let mut origin = [0.0; ROWS];
    let mut some_are_empty = false;
    for (r, origin) in origin.iter_mut().enumerate() {
        // SAFETY: the group's rows are among the step's.
        let max = unsafe { *step.max.get_unchecked(first + r) };
        let empty = max == f32::NEG_INFINITY;
        some_are_empty |= empty;
        *origin = if empty { 0.0 } else { max };
    }
    let start = origin.map(|origin| origin - step.options.shift);
    let (words, scale, logits) = (step.head_dim.div_ceil(P::DEPTH), step.scale, step.logits.as_mut_ptr());
    // SAFETY: panel p holds words * panel words, the query group words * ROWS, and there is room for ROWS
    // rows of a panel of logits (contract).
    let mut largest = unsafe {
        let keys = step.keys.as_ptr().add(p * panel * words);
        match step.options.mask {
            Some((mask, stride)) if !PLAIN => {
                let mask = (mask.as_ptr().add(first * stride + p * panel), stride);
                score::<P, ROWS, VECTORS, true>((words, scale), query, keys, (&start, mask), logits)
            }
            _ => score::<P, ROWS, VECTORS, false>((words, scale), query, keys, (&start, NO_MASK), logits),
        }
    };
    let limited = limits.least < (p + 1) * panel;
    if !PLAIN && (limited || step.options.cap.is_some() || step.options.log_weight.is_some()) {
        // SAFETY: as above.
        largest = unsafe { bound::<P, ROWS, VECTORS>(step, first, p, (limits, limited), &start) };
    }
    if some_are_empty || largest.sub(P::Vector::splat(HEADROOM)).positive_bits() != 0 {
        core::hint::cold_path();
        // SAFETY: as above.
        unsafe { raise::<P, ROWS, VECTORS>(step, first, p, &origin) };
    }
    for r in 0..ROWS {
        // SAFETY: as above; LANES sums a row, and KEY_TILE / DEPTH words of weights.
        unsafe {
            let logits = step.logits.as_ptr().add(r * panel);
            let mut weights = [P::Vector::splat(0.0); VECTORS];
            let mut total = P::Vector::splat(0.0);
            for (v, weight) in weights.iter_mut().enumerate() {
                *weight = P::Vector::load(logits.add(v * lanes)).exp2();
                total = total.add(*weight);
            }
            let to = step.weights.as_mut_ptr().add((r * KEY_TILE + p * panel) / P::DEPTH);
            P::store_weights(weights, to);
            if step.options.use_sum {
                let sum = step.sum.as_mut_ptr().add((first + r) * lanes);
                P::Vector::load(sum).add(total).store(sum);
            }
        }
    }
}

/// Logits of `ROWS` queries against a panel of keys, relative to `start`, into `logits`. Returns the largest of every
/// lane; a NaN is passed over.
///
/// A `MASKED` logit has besides what the mask says: its first row's address, and the distance to the next. It comes to
/// the products together with the start, which is as large where the mask is, so that they keep their precision.
#[inline(always)]
unsafe fn score<P: Product, const ROWS: usize, const VECTORS: usize, const MASKED: bool>(
    (words, scale): (usize, f32),
    (query, next): (*const u32, usize),
    keys: *const u32,
    (start, mask): (&[f32; ROWS], (*const f32, usize)),
    logits: *mut f32,
) -> P::Vector {
    let lanes = P::Vector::LANES;
    let mut tile = [[P::Vector::splat(0.0); VECTORS]; ROWS];
    if P::QUERIES_ARE_SCALED {
        for (r, row) in tile.iter_mut().enumerate() {
            for (v, cell) in row.iter_mut().enumerate() {
                // SAFETY: as the caller says.
                *cell = unsafe { addend::<P, MASKED>(start[r], mask, (r, v)) };
            }
        }
    }
    // SAFETY: as the caller says.
    unsafe { multiply::<P, ROWS, VECTORS>(words, (query, next, 1), (keys, VECTORS * lanes), &mut tile) };
    let scale = P::Vector::splat(scale);
    let mut largest = [P::Vector::splat(f32::NEG_INFINITY); VECTORS];
    for (r, row) in tile.iter().enumerate() {
        for (v, &cell) in row.iter().enumerate() {
            // SAFETY: as the caller says.
            unsafe {
                let mut logit = if P::QUERIES_ARE_SCALED {
                    cell
                } else {
                    cell.mul_add(scale, addend::<P, MASKED>(start[r], mask, (r, v)))
                };
                if MASKED {
                    // Whatever the product was: a sum with -inf may be NaN.
                    let mask = P::Vector::load(mask.0.add(r * mask.1 + v * lanes));
                    let lowest = P::Vector::splat(f32::NEG_INFINITY);
                    logit = lowest.select_less(logit, mask, P::Vector::splat(HIDDEN_BELOW));
                }
                largest[v] = logit.max(largest[v]);
                logit.store(logits.add((r * VECTORS + v) * lanes));
            }
        }
    }
    let mut all = largest[0];
    for lanes in largest {
        all = lanes.max(all);
    }
    all
}

/// The mask of a [`score`] without one.
const NO_MASK: (*const f32, usize) = (core::ptr::null(), 0);

/// What [`score`] adds to the products of row `row` and vector `vector` of the keys.
#[inline(always)]
unsafe fn addend<P: Product, const MASKED: bool>(
    start: f32,
    (mask, stride): (*const f32, usize),
    (row, vector): (usize, usize),
) -> P::Vector {
    let start = P::Vector::splat(-start);
    if !MASKED {
        return start;
    }
    // SAFETY: as the caller of `score` says.
    let mask = unsafe { P::Vector::load(mask.add(row * stride + vector * P::Vector::LANES)) };
    mask.mul_add(P::Vector::splat(core::f32::consts::LOG2_E), start)
}

/// Sums, for each key of a [`Weighing`], the weights that its queries give it, `ROWS` queries at a time.
///
/// # Safety
/// The instructions of `P` are available, and the slices have the lengths that [`Weighing`] states for
/// `lanes == P::Vector::LANES` and `panel == VECTORS * lanes`; there is room for the logits of `ROWS` queries.
#[inline(always)]
pub(super) unsafe fn weigh<P: Product, const ROWS: usize, const VECTORS: usize>(task: &mut Weighing<'_>) {
    const { assert!(WEIGHING_QUERIES.is_multiple_of(ROWS)) };
    let lanes = P::Vector::LANES;
    let panel = VECTORS * lanes;
    let words = task.head_dim.div_ceil(P::DEPTH);
    let most = P::Vector::splat(MOST_WEIGHT);
    for p in 0..task.key_count.div_ceil(panel) {
        let mut totals = [P::Vector::splat(0.0); VECTORS];
        // SAFETY: panel p holds words * panel words, every word of the queries is followed by those of the other
        // queries, and there is room for ROWS rows of a panel of logits and a tile of weights (contract).
        unsafe {
            let keys = task.keys.as_ptr().add(p * panel * words);
            let logits = task.logits.as_mut_ptr();
            for first in (0..WEIGHING_QUERIES).step_by(ROWS) {
                let mut start = [0.0; ROWS];
                start.copy_from_slice(&task.start[first..first + ROWS]);
                let query = (task.query.as_ptr().add(first), WEIGHING_QUERIES);
                let start = (&start, NO_MASK);
                score::<P, ROWS, VECTORS, false>((words, task.scale), query, keys, start, logits);
                for (v, total) in totals.iter_mut().enumerate() {
                    for r in 0..ROWS {
                        let logit = P::Vector::load(logits.add((r * VECTORS + v) * lanes));
                        // A NaN becomes the largest weight: such a key must not be overlooked.
                        *total = total.add(logit.min(most).exp2());
                    }
                }
            }
            for (v, total) in totals.iter().enumerate() {
                total.store(task.weights.as_mut_ptr().add(p * panel + v * lanes));
            }
        }
    }
}

/// Applies caps and weights to the logits, and where rows are `limited` takes out the keys beyond. Returns the largest
/// of every lane.
#[inline(always)]
unsafe fn bound<P: Product, const ROWS: usize, const VECTORS: usize>(
    step: &mut Step<'_>,
    first: usize,
    p: usize,
    (limits, limited): (&Limits<ROWS>, bool),
    start: &[f32; ROWS],
) -> P::Vector {
    let lanes = P::Vector::LANES;
    let panel = VECTORS * lanes;
    let lowest = P::Vector::splat(f32::NEG_INFINITY);
    let mut largest = lowest;
    for (r, (&start, &limit)) in start.iter().zip(&limits.each).enumerate() {
        let end = P::Vector::splat(limit as f32);
        for v in 0..VECTORS {
            let key = p * panel + v * lanes;
            // SAFETY: room for the panel's logits, a cap for each of the group's rows, KEY_TILE weights.
            unsafe {
                let at = step.logits.as_mut_ptr().add(r * panel + v * lanes);
                let mut x = P::Vector::load(at);
                if let Some(cap) = step.options.cap {
                    x = P::Vector::splat(*cap.get_unchecked(first + r) - start).min(x);
                }
                if let Some(weights) = step.options.log_weight {
                    x = x.add(P::Vector::load(weights.as_ptr().add(key)));
                }
                if limited {
                    x = x.select_less(lowest, P::Vector::iota().add(P::Vector::splat(key as f32)), end);
                }
                largest = x.max(largest);
                x.store(at);
            }
        }
    }
    largest
}

/// Raises the maximum of every row whose logits leave the headroom, or that had none, and rescales what
/// is relative to it: the logits, this tile's earlier weights, the sum and the product.
#[inline(always)]
unsafe fn raise<P: Product, const ROWS: usize, const VECTORS: usize>(
    step: &mut Step<'_>,
    first: usize,
    p: usize,
    origin: &[f32; ROWS],
) {
    let lanes = P::Vector::LANES;
    for (r, &origin) in origin.iter().enumerate() {
        // SAFETY: the group's rows are among the step's; LANES sums and value_dim accumulated numbers a row,
        // a panel of logits, and the words of the panels before p.
        unsafe {
            let logits = step.logits.as_mut_ptr().add(r * VECTORS * lanes);
            let mut largest = P::Vector::splat(f32::NEG_INFINITY);
            for v in 0..VECTORS {
                largest = P::Vector::load(logits.add(v * lanes)).max(largest);
            }
            let largest = largest.reduce_max();
            let max = step.max.get_unchecked_mut(first + r);
            let empty = *max == f32::NEG_INFINITY;
            if largest == f32::NEG_INFINITY || (largest <= HEADROOM && !empty) {
                continue;
            }
            let new = origin + largest;
            let shift = new - origin;
            *max = new;
            for v in 0..VECTORS {
                P::Vector::load(logits.add(v * lanes))
                    .sub(P::Vector::splat(shift))
                    .store(logits.add(v * lanes));
            }
            if empty {
                continue;
            }
            let factor = P::Vector::splat(-shift).exp2();
            let sum = step.sum.as_mut_ptr().add((first + r) * lanes);
            P::Vector::load(sum).mul(factor).store(sum);
            let weights = step.weights.as_mut_ptr().add(r * KEY_TILE / P::DEPTH);
            for word in 0..p * VECTORS * lanes / P::DEPTH {
                *weights.add(word) = P::scale_word(*weights.add(word), factor.reduce_max());
            }
            if step.options.use_values {
                let accumulated = step.accumulated.as_mut_ptr().add((first + r) * step.value_dim);
                for column in (0..step.value_dim).step_by(lanes) {
                    P::Vector::load(accumulated.add(column)).mul(factor).store(accumulated.add(column));
                }
            }
        }
    }
}

/// Adds the weighted values to what the rows from `first` on have accumulated.
#[inline(always)]
unsafe fn add_values<P: Product, const ROWS: usize, const VECTORS: usize>(
    step: &mut Step<'_>,
    first: usize,
    limits: &Limits<ROWS>,
) {
    let vectors = step.value_dim / P::Vector::LANES;
    for panel in 0..vectors / VECTORS {
        // SAFETY: the panel's vectors are among those of the values and of the rows.
        unsafe { add_panel::<P, ROWS, VECTORS>(step, first, panel * VECTORS, limits) };
    }
    for vector in vectors / VECTORS * VECTORS..vectors {
        // SAFETY: as above.
        unsafe { add_panel::<P, ROWS, 1>(step, first, vector, limits) };
    }
}

/// [`add_values`] where values are not finite: those of the keys that a row sees, as the step's mask and the limits
/// say, and no others.
#[inline(always)]
unsafe fn add_seen_values<P: Product, const ROWS: usize, const VECTORS: usize>(
    step: &mut Step<'_>,
    first: usize,
    limits: &Limits<ROWS>,
) {
    let Some((mask, stride)) = step.options.mask else { return };
    let vectors = step.value_dim / P::Vector::LANES;
    for (r, &limit) in limits.each.iter().enumerate() {
        // SAFETY: KEY_TILE elements for each row.
        let mask = unsafe { mask.get_unchecked((first + r) * stride..(first + r) * stride + limit) };
        let mut next = 0;
        while next < limit {
            let hidden = |x: &f32| *x < HIDDEN_BELOW;
            let start = next + mask[next..].iter().take_while(|x| hidden(x)).count();
            next = start + mask[start..].iter().take_while(|x| !hidden(x)).count();
            for vector in 0..vectors {
                let width = if vector < vectors / VECTORS * VECTORS { VECTORS } else { 1 };
                // SAFETY: as in `add_values`.
                unsafe { add_to_row::<P>(step, (r, first + r), start..next, vector, width) };
            }
        }
    }
}

/// [`add_values`] for the `WIDTH` vectors of columns from `vector` on.
#[inline(always)]
unsafe fn add_panel<P: Product, const ROWS: usize, const WIDTH: usize>(
    step: &mut Step<'_>,
    first: usize,
    vector: usize,
    limits: &Limits<ROWS>,
) {
    let lanes = P::Vector::LANES;
    let row_words = KEY_TILE / P::DEPTH;
    let words = limits.least / P::DEPTH;
    // SAFETY: a panel holds KEY_TILE / DEPTH * WIDTH * LANES words and follows the vectors before it; the
    // weights have KEY_TILE / DEPTH words a row.
    unsafe {
        let value = step.values.as_ptr().add(vector * lanes * row_words);
        let weights = step.weights.as_ptr();
        let sums = step.accumulated.as_mut_ptr().add(first * step.value_dim + vector * lanes);
        // From zero, joined to the running sums at the end: a chain as long as the sequence would lose
        // the small weights in the rounding of the sum.
        let mut tile = [[P::Vector::splat(0.0); WIDTH]; ROWS];
        multiply::<P, ROWS, WIDTH>(words, (weights, 1, row_words), (value, WIDTH * lanes), &mut tile);
        if words * P::DEPTH < limits.most {
            // A copy: which rows go on is not known here, so that it cannot stay in registers.
            let mut longer = tile;
            for (r, row) in longer.iter_mut().enumerate() {
                multiply_rest::<P, WIDTH>(weights.add(r * row_words), value, (words, limits.each[r]), row);
            }
            tile = longer;
        }
        for (r, row) in tile.iter().enumerate() {
            // Not even a 0 is added to a row that sees none of these keys: -0 would become 0.
            if limits.each[r] == 0 {
                continue;
            }
            for (v, &cell) in row.iter().enumerate() {
                let at = sums.add(r * step.value_dim + v * lanes);
                P::Vector::load(at).add(cell).store(at);
            }
        }
    }
}

/// Goes on with one row of [`add_panel`] from the word `next` on up to `limit` keys, in the same order: a row's sum
/// does not depend on how far the rows beside it see. A key beyond the limit must not touch the row, not even with
/// weight 0, or its NaN would.
#[inline(always)]
unsafe fn multiply_rest<P: Product, const WIDTH: usize>(
    weights: *const u32,
    values: *const u32,
    (next, limit): (usize, usize),
    row: &mut [P::Vector; WIDTH],
) {
    let lanes = P::Vector::LANES;
    let whole = limit / P::DEPTH;
    // SAFETY: as in `add_panel`, for one row and the words of the keys.
    unsafe {
        for word in next..whole {
            let weight = P::splat(*weights.add(word));
            for (v, sum) in row.iter_mut().enumerate() {
                *sum = P::multiply_add(weight, P::load(values.add((word * WIDTH + v) * lanes)), *sum);
            }
        }
        for key in whole * P::DEPTH..limit {
            let (word, element) = (key / P::DEPTH, key % P::DEPTH);
            let weight = P::Vector::splat(P::element_of(*weights.add(word), element));
            for (v, sum) in row.iter_mut().enumerate() {
                let value = P::element(P::load(values.add((word * WIDTH + v) * lanes)), element);
                *sum = weight.mul_add(value, *sum);
            }
        }
    }
}

/// Adds the weighted values of `keys`, one vector of columns of them, to one row, given as its number in the
/// group and in the step; the vector belongs to a panel of `width` vectors.
#[inline(always)]
unsafe fn add_to_row<P: Product>(
    step: &mut Step<'_>,
    (row_in_group, row): (usize, usize),
    keys: core::ops::Range<usize>,
    vector: usize,
    width: usize,
) {
    let lanes = P::Vector::LANES;
    let row_words = KEY_TILE / P::DEPTH;
    let (panel, within) = (vector / width * width, vector % width);
    // SAFETY: as in `add_panel`, for one row and the words of the keys.
    unsafe {
        let weights = step.weights.as_ptr().add(row_in_group * row_words);
        let values = step.values.as_ptr().add((panel * row_words + within) * lanes);
        let at = step.accumulated.as_mut_ptr().add(row * step.value_dim + vector * lanes);
        let mut sum = P::Vector::load(at);
        for key in keys {
            let (word, element) = (key / P::DEPTH, key % P::DEPTH);
            let weight = P::Vector::splat(P::element_of(*weights.add(word), element));
            let value = P::element(P::load(values.add(word * width * lanes)), element);
            sum = weight.mul_add(value, sum);
        }
        sum.store(at);
    }
}
