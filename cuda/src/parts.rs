//! The keys of few tiles in parts, so that all multiprocessors have work, and the merge of the parts.

use hyperattn_core::{Error, ErrorKind, Result};

use crate::abi::{AttendParams, TILE_ROWS};
use crate::attend::attend;
use crate::call::Call;
use crate::launch::{Queue, args};
use crate::states::States;
use crate::workspace::Carver;

// Numbers of kernels/hyperattn/parts.cuh.
const MOST_PARTS: usize = 132;
const MERGE_THREADS: u32 = 128;
const MERGE_WARPS: usize = 4;
const MERGE_COLUMNS: usize = 128;

/// Multiprocessors that the tiles are to keep busy: an H100's. Counted for every device, so that results and the
/// workspace depend on the shapes alone.
const MULTIPROCESSORS: usize = 132;

/// What a part takes besides its keys, in keys: for itself and for each row, whose state goes through memory.
const KEYS_OF_A_PART: usize = 64;
/// See [`KEYS_OF_A_PART`].
const KEYS_OF_A_ROW: usize = 4;

/// A part has so many times as many keys, so that parts that are not needed, as with many batch items, cost little.
const LEAST_GAIN: usize = 16;

/// Parts that the keys of each of `tiles` tiles are best met in: the tiles of one batch item, each of `rows` queries at
/// most that see up to `keys` keys.
///
/// Other batch items would share the work too, but a result is not to depend on them.
pub(crate) fn parts_of(tiles: usize, rows: usize, keys: usize) -> usize {
    if tiles >= MULTIPROCESSORS {
        return 1;
    }
    let of_a_part = KEYS_OF_A_PART + KEYS_OF_A_ROW * rows.min(TILE_ROWS);
    let time = |parts: usize| (tiles * parts).div_ceil(MULTIPROCESSORS) * (keys.div_ceil(parts) + of_a_part);
    let most = (keys / (LEAST_GAIN * of_a_part)).clamp(1, MOST_PARTS);
    let least = (1..=most).map(time).min().unwrap_or(0);
    // Merging is a launch more.
    if least * 8 > time(1) * 7 {
        return 1;
    }
    // The fewest that take about as little.
    (1..=most).find(|&parts| time(parts) * 32 <= least * 33).unwrap_or(1)
}

/// The parts of all tiles, and the states that their rows have in each.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) count: u32,
    rows: u32,
    states: Option<States>,
}

impl Parts {
    /// `count` parts for `rows` rows of all heads.
    pub(crate) fn carve(count: usize, rows: usize, value_dim: usize, carver: &mut Carver) -> Result<Self> {
        if count == 1 {
            return Ok(Parts { count: 1, rows: 0, states: None });
        }
        let states = rows.saturating_mul(count);
        if u32::try_from(states).is_err() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format_args!(
                    "{rows} rows of all heads, in {count} parts each, are more than 2^32; split the batch"
                ),
            ));
        }
        let states = States::carve(states, value_dim, carver);
        Ok(Parts { count: count as u32, rows: rows as u32, states: Some(states) })
    }

    /// Attention by tiles of these parts, whose outputs are then complete.
    ///
    /// # Safety
    /// As for [`attend`]; `take_part` of parts.cuh has made the tiles, of as many parts and rows.
    pub(crate) unsafe fn attend(
        &self,
        queue: &Queue<'_>,
        call: &Call<'_>,
        attention: &AttendParams,
    ) -> Result<()> {
        let mut attention = *attention;
        if let Some(states) = &self.states {
            states.give(&mut attention);
        }
        // SAFETY: the caller's contract; the states are the workspace's.
        unsafe { attend(queue, call, &attention) }?;
        if self.states.is_none() {
            return Ok(());
        }
        let slices = (attention.value_dim as usize).div_ceil(MERGE_COLUMNS);
        let grid = (self.rows as usize * slices).div_ceil(MERGE_WARPS) as u32;
        // SAFETY: these are the parameters of merge_parts, which writes the outputs that the tiles would have written.
        unsafe {
            queue.launch(
                c"merge_parts",
                [grid, 1, 1],
                MERGE_THREADS,
                0,
                args![attention, self.count, self.rows],
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_tiles_are_divided_and_many_are_not() {
        // One query of each of 32 heads over a long cache.
        assert_eq!(parts_of(32, 1, 65_536), 4);
        assert_eq!(parts_of(4, 1, 65_536), 32);
        assert_eq!(parts_of(1, 1, 1 << 20), 128);
        // Probe rows of 32 heads and of 4.
        assert_eq!(parts_of(64, 256, 65_536), 2);
        assert_eq!(parts_of(8, 256, 131_072), 14);
        // Enough tiles, or few keys.
        for (tiles, rows, keys) in
            [(128, 128, 16_384), (132, 1, 1 << 20), (usize::MAX, 1 << 20, 1 << 20), (1, 1, 1500)]
        {
            assert_eq!(parts_of(tiles, rows, keys), 1, "{tiles} {rows} {keys}");
        }
        for keys in [0, 1] {
            assert_eq!(parts_of(0, 0, keys), 1);
        }
    }

    /// take_part of parts.cuh: the keys of a part.
    fn part(keys: usize, part: usize, parts: usize) -> std::ops::Range<usize> {
        const UNIT: usize = 128;
        let len = keys.div_ceil(parts * UNIT) * UNIT;
        let first = (part * len).min(keys);
        first..first + len.min(keys - first)
    }

    #[test]
    fn parts_are_all_keys_once() {
        for keys in [0, 1, 127, 128, 129, 5000, 65_535, 65_536, 100_001] {
            for parts in [2, 3, 7, 132] {
                let mut next = 0;
                for keys in (0..parts).map(|number| part(keys, number, parts)) {
                    assert_eq!(keys.start, next);
                    next = keys.end;
                }
                assert_eq!(next, keys);
            }
        }
    }

    #[test]
    fn more_rows_than_are_counted_are_an_error() {
        let mut carver = Carver::measuring();
        assert!(Parts::carve(2, 1 << 31, 1, &mut carver).is_err());
        assert_eq!(Parts::carve(1, 1 << 40, 1, &mut carver).unwrap().count, 1);
    }
}
