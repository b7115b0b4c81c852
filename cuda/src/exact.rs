//! EXACT: every tile of queries meets all keys that it sees, in parts where there are few tiles.

use hyperattn_core::device::Problem;
use hyperattn_core::{Error, ErrorKind, Mask, Result};

use crate::abi::{SEGMENT_LIMITED, Segment, TILE_ROWS, Tile};
use crate::call::Call;
use crate::figures::fill_heads;
use crate::launch::{Queue, args};
use crate::parts::{Parts, parts_of};
use crate::workspace::{Carver, Pointer};

/// Tiles of queries and their segments of keys.
pub(crate) struct Lists {
    /// Tiles, as many for each part of the keys.
    pub(crate) count: u32,
    pub(crate) tiles: Pointer<Tile>,
    pub(crate) segments: Pointer<Segment>,
    parts: u32,
}

impl Lists {
    /// Every tile `parts` times.
    pub(crate) fn carve(call: &Call<'_>, parts: usize, carver: &mut Carver) -> Result<Self> {
        let problem = &call.problem;
        let count = tiles_of_an_item(problem)
            .and_then(|tiles| tiles.checked_mul(problem.batch)?.checked_mul(parts))
            .and_then(|count| u32::try_from(count).ok());
        let Some(count) = count else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format_args!(
                    "batch = {}, heads_q = {} and n_q = {} make more than 2^32 tiles of {TILE_ROWS} queries; split the batch",
                    problem.batch, problem.heads_q, problem.n_q
                ),
            ));
        };
        Ok(Lists {
            count,
            tiles: carver.take(count as usize),
            segments: carver.take(count as usize),
            parts: parts as u32,
        })
    }

    /// Writes them.
    ///
    /// # Safety
    /// The buffers are there.
    pub(crate) unsafe fn write(&self, queue: &Queue<'_>, call: &Call<'_>) -> Result<()> {
        let problem = &call.problem;
        let section_bytes = problem.n_k * (problem.head_dim + problem.value_dim) * call.kv_size();
        // SAFETY: these are the parameters of exact_tiles, which writes `count` tiles and segments.
        unsafe {
            queue.launch(
                c"exact_tiles",
                [self.count.div_ceil(BLOCK), 1, 1],
                BLOCK,
                0,
                args![
                    self.tiles,
                    self.segments,
                    self.count,
                    (problem.batch * problem.heads_kv) as u32,
                    problem.heads_kv as u32,
                    problem.group as u32,
                    problem.n_q as u32,
                    problem.n_k as u32,
                    call.visible(),
                    u32::from(call.limited() == SEGMENT_LIMITED),
                    section(call, section_bytes, queue.device.l2_bytes),
                    self.parts,
                ],
            )
        }
    }
}

/// Threads of the blocks that write lists.
pub(crate) const BLOCK: u32 = 256;

/// Tiles of one batch item.
fn tiles_of_an_item(problem: &Problem) -> Option<usize> {
    problem.heads_q.checked_mul(problem.n_q.div_ceil(TILE_ROWS))
}

/// The lists of a call.
pub(crate) struct Buffers {
    lists: Lists,
    parts: Parts,
    next_tile: Pointer<u32>,
}

/// The call's part of the workspace.
pub(crate) fn carve(call: &Call<'_>, carver: &mut Carver) -> Result<Buffers> {
    let problem = &call.problem;
    let tiles = tiles_of_an_item(problem).unwrap_or(usize::MAX);
    let parts = parts_of(tiles, problem.n_q, most_keys(problem));
    Ok(Buffers {
        lists: Lists::carve(call, parts, carver)?,
        parts: Parts::carve(parts, problem.batch * problem.heads_q * problem.n_q, problem.value_dim, carver)?,
        next_tile: carver.take(1),
    })
}

/// Keys that the last query sees, which sees most.
fn most_keys(problem: &Problem) -> usize {
    problem.n_q.checked_sub(1).map_or(0, |last| problem.visible_keys(last))
}

/// KV heads whose tiles are handed out together, longest first. `bytes` is what all tiles of a head read.
///
/// Under a causal mask tiles differ in length, and blocks that take them longest first finish together. Over all heads at
/// once that would read every head's keys at the same time, and the cache would hold none of them; so it is done over as many
/// heads as it holds.
pub(crate) fn section(call: &Call<'_>, bytes: usize, l2_bytes: usize) -> u32 {
    let problem = &call.problem;
    let heads = (problem.batch * problem.heads_kv).max(1);
    if problem.mask == Mask::None {
        return 1;
    }
    // Half of it: the other half is for what else passes through.
    let most = (l2_bytes / 2 / bytes.max(1)).clamp(1, heads);
    // Equal sections: a last one of few heads would leave blocks without work at the end.
    heads.div_ceil(heads.div_ceil(most)) as u32
}

/// Exact attention of the whole call.
///
/// # Safety
/// The call's tensors and the buffers are there, see [`crate::forward`].
pub(crate) unsafe fn run(queue: &Queue<'_>, call: &Call<'_>, buffers: &Buffers) -> Result<()> {
    let problem = &call.problem;
    // SAFETY: the caller's contract.
    unsafe { buffers.lists.write(queue, call) }?;
    let mut attention = call.attend_params();
    attention.tiles = buffers.lists.tiles;
    attention.tile_count = buffers.lists.count;
    attention.segments = buffers.lists.segments;
    attention.next_tile = buffers.next_tile;
    // SAFETY: the lists were enqueued above; the tensors are the caller's contract.
    unsafe { buffers.parts.attend(queue, call, &attention) }?;
    if let Some(error) = &call.tensors.error {
        // SAFETY: the tensor is the caller's contract.
        unsafe { fill_heads(queue, call, error, 0.0) }?;
    }
    if let Some(keys) = &call.tensors.keys_per_query {
        // SAFETY: as above.
        unsafe { fill_heads(queue, call, keys, problem.mean_visible_keys() as f32) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{DeviceTensor, DeviceTensors};
    use hyperattn_core::{DType, Params, TensorLayout};

    /// The record numbers as exact_tiles computes them: (KV head, query head of the group, tile) of record `index`.
    fn record(
        index: usize,
        heads: usize,
        group: usize,
        tiles: usize,
        section: usize,
    ) -> (usize, usize, usize) {
        let of_section = section * group * tiles;
        let (number, rest) = (index / of_section, index % of_section);
        let here = section.min(heads - number * section) * group;
        let (rank, head) = (rest / here, rest % here);
        (number * section + head / group, head % group, tiles - 1 - rank)
    }

    #[test]
    fn every_tile_of_every_head_has_a_record() {
        for (heads, group, tiles, section) in
            [(1, 1, 5, 1), (7, 1, 3, 3), (8, 4, 6, 3), (5, 2, 1, 5), (3, 3, 4, 2)]
        {
            let mut seen = vec![0; heads * group * tiles];
            for index in 0..seen.len() {
                let (kv, head, tile) = record(index, heads, group, tiles, section);
                seen[(kv * group + head) * tiles + tile] += 1;
            }
            assert!(seen.iter().all(|&times| times == 1), "{heads} {group} {tiles} {section}");
        }
    }

    #[test]
    fn sections_are_equal_and_fit_the_cache() {
        let sections = |mask, heads: i64, n: i64| {
            let params = Params { mask, ..Params::default() };
            let tensor = DeviceTensor {
                address: 0,
                layout: TensorLayout::contiguous(DType::BF16, [1, heads, n, 128]),
            };
            let tensors = DeviceTensors::new(tensor, tensor, tensor, tensor);
            section(&Call::new(&params, &tensors).unwrap(), n as usize * 512, 50 << 20)
        };
        assert_eq!(sections(Mask::None, 32, 16_384), 1);
        // 8 MiB a head: three fit half the cache, and eleven sections of three cover 32 heads.
        assert_eq!(sections(Mask::CausalBottomRight, 32, 16_384), 3);
        assert_eq!(sections(Mask::CausalBottomRight, 4, 16_384), 2);
        assert_eq!(sections(Mask::CausalTopLeft, 32, 131_072), 1);
        assert_eq!(sections(Mask::CausalTopLeft, 32, 128), 32);
    }
}
