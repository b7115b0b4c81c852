//! Products of a few rows and columns, whose sums stay in registers.

use super::product::Product;
use super::vector::Vector;

/// Adds to every cell of a register tile the products of its row's and its column's words: a row's word i is at
/// `rows.0[row * rows.2 + i * rows.1]`, the columns' words i at `columns.0[i * columns.1]` and behind it.
///
/// # Safety
/// The instructions of `P` are available; the first `words` words of `ROWS` rows and of `VECTORS` vectors of columns
/// are readable.
#[inline(always)]
pub(super) unsafe fn multiply<P: Product, const ROWS: usize, const VECTORS: usize>(
    words: usize,
    rows: (*const u32, usize, usize),
    columns: (*const u32, usize),
    tile: &mut [[P::Vector; VECTORS]; ROWS],
) {
    let (row, next, _) = rows;
    let (column, width) = columns;
    // A short loop is predicted to its end: four words at a time.
    // SAFETY: as the caller says.
    unsafe {
        for quarter in 0..words / 4 {
            let (row, column) = (row.add(4 * quarter * next), column.add(4 * quarter * width));
            multiply_word::<P, ROWS, VECTORS>(row, rows.2, column, tile);
            multiply_word::<P, ROWS, VECTORS>(row.add(next), rows.2, column.add(width), tile);
            multiply_word::<P, ROWS, VECTORS>(row.add(2 * next), rows.2, column.add(2 * width), tile);
            multiply_word::<P, ROWS, VECTORS>(row.add(3 * next), rows.2, column.add(3 * width), tile);
        }
        for word in words / 4 * 4..words {
            multiply_word::<P, ROWS, VECTORS>(row.add(word * next), rows.2, column.add(word * width), tile);
        }
    }
}

/// [`multiply`] for one word.
#[inline(always)]
unsafe fn multiply_word<P: Product, const ROWS: usize, const VECTORS: usize>(
    rows: *const u32,
    row_stride: usize,
    columns: *const u32,
    tile: &mut [[P::Vector; VECTORS]; ROWS],
) {
    // SAFETY: as the caller of `multiply` says.
    unsafe {
        let columns: [P::Operand; VECTORS] =
            core::array::from_fn(|v| P::load(columns.add(v * P::Vector::LANES)));
        for (r, row) in tile.iter_mut().enumerate() {
            let x = P::splat(*rows.add(r * row_stride));
            for (cell, &column) in row.iter_mut().zip(&columns) {
                *cell = P::multiply_add(x, column, *cell);
            }
        }
    }
}
