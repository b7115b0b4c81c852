//! A record of the keys that sampled rows see but do not meet exactly, made while a method runs.

use core::ops::Range;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, ErrorKind, Result, invalid};
use crate::params::Params;
use crate::problem::{Layouts, Problem};

/// Rows of a head that figures about it come from, where there are so many.
pub const DIAGNOSIS_ROWS: usize = 64;

/// Sampled row number `i` of [`DIAGNOSIS_ROWS`]: the middle of each of as many equal stretches.
pub fn diagnosis_row(n_q: usize, i: usize) -> usize {
    if n_q <= DIAGNOSIS_ROWS {
        return i;
    }
    ((2 * i + 1) as u128 * n_q as u128 / (2 * DIAGNOSIS_ROWS) as u128) as usize
}

/// The number of the sampled row `row`, if it is one.
fn number_of(n_q: usize, row: usize) -> Option<usize> {
    // Rounding down may have taken the row into the stretch before its own.
    let stretch = if n_q <= DIAGNOSIS_ROWS {
        row
    } else {
        (row as u128 * DIAGNOSIS_ROWS as u128 / n_q as u128) as usize
    };
    (stretch..=stretch + 1).find(|&i| i < DIAGNOSIS_ROWS.min(n_q) && diagnosis_row(n_q, i) == row)
}

/// The keys that the sampled rows of every head do not meet exactly, though the mask shows them: one bit for each.
/// [`crate::forward_recording`] fills it. Rows are [`diagnosis_row`]'s.
#[derive(Debug)]
pub struct Unmet<'a> {
    /// `[batch * heads_q][min(n_q, DIAGNOSIS_ROWS)][words_of_a_row]`. A row is written by one task at a time.
    words: &'a [AtomicU32],
    heads_q: usize,
    n_q: usize,
    words_of_a_row: usize,
}

impl<'a> Unmet<'a> {
    /// Numbers that a call with these arguments needs: about two for each key of each query head.
    pub fn words_needed(params: &Params, layouts: &Layouts<'_>) -> Result<usize> {
        let problem = Problem::new(params, layouts)?;
        if problem.has_mask_tensor {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format_args!("tensors.mask is given, but figures about heads are made without one"),
            ));
        }
        let of_a_head = problem.n_q.min(DIAGNOSIS_ROWS).checked_mul(problem.n_k.div_ceil(32));
        let heads = problem.batch * problem.heads_q;
        match of_a_head.and_then(|words| words.checked_mul(heads)) {
            Some(words) => Ok(words),
            None => invalid!("a record of the keys of {heads} heads does not fit into an address space"),
        }
    }

    /// An empty record for a call with these arguments in `words`, which are as many as
    /// [`Unmet::words_needed`] answers.
    pub fn new(params: &Params, layouts: &Layouts<'_>, words: &'a [AtomicU32]) -> Result<Self> {
        assert_eq!(words.len(), Self::words_needed(params, layouts)?);
        words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        let problem = Problem::new(params, layouts)?;
        Ok(Unmet {
            words,
            heads_q: problem.heads_q,
            n_q: problem.n_q,
            words_of_a_row: problem.n_k.div_ceil(32),
        })
    }

    fn row(&self, [batch, head]: [usize; 2], number: usize) -> &[AtomicU32] {
        let rows = self.n_q.min(DIAGNOSIS_ROWS);
        let row = (batch * self.heads_q + head) * rows + number;
        &self.words[row * self.words_of_a_row..][..self.words_of_a_row]
    }

    /// Notes that the query `row` of a head does not meet `keys`, if it is a sampled one. Nobody else may note
    /// anything about this row meanwhile.
    pub(crate) fn add(&self, head: [usize; 2], row: usize, keys: impl Iterator<Item = usize>) {
        let Some(number) = number_of(self.n_q, row) else { return };
        let words = self.row(head, number);
        for key in keys {
            let word = &words[key / 32];
            // No other task writes to the row, so nothing is lost between the two.
            word.store(word.load(Ordering::Relaxed) | 1 << (key % 32), Ordering::Relaxed);
        }
    }

    /// Which keys the sampled row with this number does not meet.
    pub(crate) fn keys(&self, head: [usize; 2], number: usize) -> UnmetKeys<'_> {
        UnmetKeys { words: self.row(head, number) }
    }
}

/// The keys that one row does not meet.
#[derive(Clone, Copy)]
pub(crate) struct UnmetKeys<'r> {
    words: &'r [AtomicU32],
}

impl UnmetKeys<'_> {
    pub(crate) fn is_empty(self) -> bool {
        self.words.iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    pub(crate) fn contains(self, key: usize) -> bool {
        self.words[key / 32].load(Ordering::Relaxed) >> (key % 32) & 1 == 1
    }
}

/// The numbers of `range` that are not among `ascending`.
pub(crate) fn without(range: Range<usize>, ascending: &[u32]) -> impl Iterator<Item = usize> {
    let mut next = ascending.iter().map(|&x| x as usize).peekable();
    range.filter(move |&x| next.next_if_eq(&x).is_none())
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn sampled_rows_ascend_and_spread() {
        for n_q in [1, 63, 64, 65, 1000, 1 << 31] {
            let count = DIAGNOSIS_ROWS.min(n_q);
            let rows = (0..count).map(|i| diagnosis_row(n_q, i));
            assert!(rows.clone().zip(rows.clone().skip(1)).all(|(a, b)| a < b), "{n_q}");
            assert!(rows.clone().all(|row| row < n_q));
            assert!(diagnosis_row(n_q, 0) <= n_q / DIAGNOSIS_ROWS);
        }
    }

    #[test]
    fn rows_know_their_numbers() {
        for n_q in (1..300).chain([1000, 4096, 70_001]) {
            let rows: Vec<usize> = (0..DIAGNOSIS_ROWS.min(n_q)).map(|i| diagnosis_row(n_q, i)).collect();
            for row in 0..n_q {
                assert_eq!(
                    number_of(n_q, row),
                    rows.iter().position(|&sampled| sampled == row),
                    "{n_q}, {row}"
                );
            }
        }
        let last = diagnosis_row(1 << 31, 63);
        assert_eq!(number_of(1 << 31, last), Some(63));
    }

    #[test]
    fn what_was_noted_is_found() {
        let words: Vec<AtomicU32> = (0..2 * 64 * 3).map(|_| AtomicU32::new(u32::MAX)).collect();
        let layout = |heads, rows| {
            crate::view::TensorLayout::contiguous(crate::element::DType::F32, [1, heads, rows, 4])
        };
        let layouts = Layouts {
            q: layout(2, 200),
            k: layout(1, 70),
            v: layout(1, 70),
            out: layout(2, 200),
            lse: None,
            block_mask: None,
            error: None,
            keys_per_query: None,
            mask: None,
        };
        let unmet = Unmet::new(&Params::default(), &layouts, &words).unwrap();
        unmet.add([0, 1], diagnosis_row(200, 5), without(29..70, &[31, 33, 69]));
        unmet.add([0, 1], diagnosis_row(200, 5), [0].into_iter());
        // Not a sampled row.
        unmet.add([0, 0], 0, 0..70);
        for (head, number) in [(0, 0), (0, 5), (1, 4), (1, 5), (1, 6)] {
            let noted = (head, number) == (1, 5);
            let keys = unmet.keys([0, head], number);
            assert_eq!(keys.is_empty(), !noted);
            for key in 0..70 {
                let expected = noted && (key == 0 || key >= 29 && ![31, 33, 69].contains(&key));
                assert_eq!(keys.contains(key), expected, "head {head}, row {number}, key {key}");
            }
        }
    }
}
