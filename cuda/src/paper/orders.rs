//! Algorithm 1, second half: one sort of queries and keys for all estimated passes.

use std::ops::Range;

use hyperattn_core::Result;
use hyperattn_core::device::PaperParts;

use super::lists::Step;
use super::{PASS_LEVEL, PASS_ONE, Paper, mirror};
use crate::call::Call;
use crate::launch::args;
use crate::workspace::{Carver, Pointer};

/// Threads of the blocks that sort, rows of a cell and values of a digit (SORT_THREADS, SORT_CELL, SORT_DIGITS).
const SORT_THREADS: u32 = 256;
const SORT_CELL: usize = 4096;
const SORT_DIGITS: usize = 256;
const SORT_DIGIT_BITS: u32 = 8;

/// What is sorted, of one KV head and its query heads.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    /// Rows of a query head and of a KV head.
    rows: [usize; 2],
    group: usize,
    levels: usize,
    /// Orders, one of each estimated pass: those of the levels come first.
    orders: usize,
    /// Digits of a rank.
    digits: u32,
    /// Cells of a leaf, of the square, and of a head.
    leaf_cells: usize,
    square_cells: usize,
    cells: usize,
    /// Query rows and key rows of the rectangle that is no level's, where they are not the square's.
    rest: [Range<usize>; 2],
}

impl Shape {
    /// Of the passes `steps`; none where nothing is sorted.
    pub(super) fn new(call: &Call<'_>, plan: &PaperParts, steps: &[Step]) -> Option<Self> {
        let problem = &call.problem;
        if !plan.sorted || !steps.iter().any(|step| step.estimated) {
            return None;
        }
        let levels = steps.iter().filter(|step| step.kind == PASS_LEVEL).count();
        let one = steps.iter().find(|step| step.kind == PASS_ONE && step.estimated);
        let one = one.and_then(|step| step.one.clone());
        let orders = levels + usize::from(one.is_some());
        let one = one.map_or([0..0, 0..0], |one| [one.queries, one.keys]);
        let square = plan.parts.square;
        // A side of the rectangle is the square's, or has no row of it.
        let starts = square.map(|square| [square.query_start, square.key_start]);
        let mut rest = one.clone();
        for (side, rows) in rest.iter_mut().enumerate() {
            if starts.is_some_and(|starts| starts[side] == rows.start) {
                *rows = 0..0;
            }
        }
        let leaf = square.and_then(|square| square.leaf_rectangle(0)).map_or(0, |leaf| leaf.keys.len());
        let leaf_cells = leaf.div_ceil(SORT_CELL);
        let square_cells = leaf_cells << levels;
        let rest_rows = rest.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        Some(Shape {
            rows: [problem.n_q, problem.n_k],
            group: problem.group,
            levels,
            orders,
            digits: call.params.lsh_num_projs.div_ceil(SORT_DIGIT_BITS),
            leaf_cells,
            square_cells,
            cells: square_cells + rest_rows.div_ceil(SORT_CELL),
            rest,
        })
    }

    /// [ranks, orders, spare orders] of queries and of keys, of so many KV heads.
    fn rows(&self, heads: usize) -> [[usize; 2]; 3] {
        let heads = [heads.saturating_mul(self.group), heads];
        let ranks = [0, 1].map(|side| self.rows[side].saturating_mul(heads[side]));
        let orders = ranks.map(|rows: usize| rows.saturating_mul(self.orders));
        [ranks, orders, if self.digits > 1 { orders } else { [0, 0] }]
    }

    /// [counts, places] of so many KV heads.
    fn counters(&self, heads: usize) -> [usize; 2] {
        let of_an_order = heads.saturating_mul(self.group + 1).saturating_mul(self.cells * SORT_DIGITS);
        let sources = if self.digits > 1 { self.orders } else { 1 };
        [sources, self.orders].map(|orders| of_an_order.saturating_mul(orders))
    }

    /// Of so many KV heads.
    pub(super) fn bytes(&self, heads: usize) -> usize {
        let rows = self.rows(heads).into_iter().flatten();
        rows.chain(self.counters(heads)).fold(0, usize::saturating_add).saturating_mul(size_of::<u32>())
    }
}

/// The part of the workspace. Everything is of queries and of keys.
#[derive(Debug)]
pub(super) struct Orders {
    shape: Shape,
    pub(super) ranks: [Pointer<u32>; 2],
    orders: [Pointer<u32>; 2],
    spares: [Pointer<u32>; 2],
    counts: Pointer<u32>,
    places: Pointer<u32>,
}

impl Orders {
    /// Of `heads` KV heads.
    pub(super) fn carve(shape: Shape, heads: usize, carver: &mut Carver) -> Self {
        let [ranks, orders, spares] = shape.rows(heads);
        let [counts, places] = shape.counters(heads);
        Orders {
            ranks: ranks.map(|len| carver.take(len)),
            orders: orders.map(|len| carver.take(len)),
            spares: spares.map(|len| carver.take(len)),
            counts: carver.take(counts),
            places: carver.take(places),
            shape,
        }
    }

    /// Number of a pass's orders.
    pub(super) fn number(&self, step: &Step) -> usize {
        if step.kind == PASS_LEVEL { step.level as usize } else { self.shape.levels }
    }

    /// The orders number `number` of a set of KV heads.
    pub(super) fn of(&self, number: usize, heads: usize) -> [Pointer<u32>; 2] {
        let heads = [heads * self.shape.group, heads];
        [0, 1].map(|side| self.orders[side].after(number * heads[side] * self.shape.rows[side]))
    }
}

impl Paper<'_, '_> {
    /// Sorts all rows of `heads`, whose ranks are there.
    ///
    /// # Safety
    /// As for [`super::run`].
    pub(super) unsafe fn sort(&self, heads: &Range<usize>, orders: &Orders) -> Result<()> {
        let shape = &orders.shape;
        let side = |side: usize, heads: usize| mirror::SortSide {
            ranks: orders.ranks[side],
            from: Pointer::NULL,
            to: Pointer::NULL,
            rows: shape.rows[side] as u32,
            heads: heads as u32,
            rest_start: shape.rest[side].start as u32,
            rest_end: shape.rest[side].end as u32,
        };
        let mut arguments = mirror::SortParams {
            square: self.square(),
            query: side(0, heads.len() * shape.group),
            key: side(1, heads.len()),
            counts: orders.counts,
            places: orders.places,
            levels: shape.levels as u32,
            orders: shape.orders as u32,
            leaf_cells: shape.leaf_cells as u32,
            square_cells: shape.square_cells as u32,
            cells: shape.cells as u32,
            shift: 0,
        };
        let all_heads = arguments.query.heads + arguments.key.heads;
        let intervals = (1 << shape.levels) - 1 + (shape.orders - shape.levels) as u32;
        for digit in 0..shape.digits {
            // The last one writes the orders.
            let to = if (shape.digits - 1 - digit).is_multiple_of(2) { orders.orders } else { orders.spares };
            (arguments.query.to, arguments.key.to) = (to[0], to[1]);
            arguments.shift = digit * SORT_DIGIT_BITS;
            let sources = if digit == 0 { 1 } else { arguments.orders };
            let of_cells = [sources * all_heads * arguments.cells, 1, 1];
            let of_intervals = [all_heads * intervals, 1, 1];
            // SAFETY: this is the kernels' parameter; they read the ranks, and read and write orders and counters.
            unsafe {
                self.queue.launch(c"paper_sort_count", of_cells, SORT_THREADS, 0, args![arguments])?;
                self.queue.launch(c"paper_sort_scan", of_intervals, SORT_THREADS, 0, args![arguments])?;
                self.queue.launch(c"paper_sort_scatter", of_cells, SORT_THREADS, 0, args![arguments])?;
            }
            (arguments.query.from, arguments.key.from) = (to[0], to[1]);
        }
        Ok(())
    }
}
