//! EXACT: every tile of queries meets the keys that it sees, and every tile of keys the queries that see it.

use hyperattn_core::{Error, ErrorKind, Result};

use super::Backward;
use super::fused::{Fused, Sums};
use super::launch::{keys, queries};
use crate::abi::{KeyTile, SEGMENT_LIMITED, Segment, TILE_ROWS};
use crate::call::Call;
use crate::exact::{BLOCK, Lists, section};
use crate::launch::args;
use crate::workspace::{Carver, Pointer};

/// The lists of a call.
pub(super) struct Buffers {
    lists: Lists,
    key_tile_count: u32,
    key_tiles: Pointer<KeyTile>,
    query_segments: Pointer<Segment>,
    sums: Sums,
}

impl Buffers {
    pub(super) fn carve(call: &Call<'_>, carver: &mut Carver) -> Result<Self> {
        let problem = &call.problem;
        let count = (problem.n_k.div_ceil(TILE_ROWS))
            .checked_mul(problem.heads_kv)
            .and_then(|count| count.checked_mul(problem.batch))
            .and_then(|count| u32::try_from(count).ok());
        let Some(key_tile_count) = count else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format_args!(
                    "batch = {}, heads_kv = {} and n_k = {} make more than 2^32 tiles of {TILE_ROWS} keys; split the batch",
                    problem.batch, problem.heads_kv, problem.n_k
                ),
            ));
        };
        Ok(Buffers {
            lists: Lists::carve(call, 1, carver)?,
            key_tile_count,
            key_tiles: carver.take(key_tile_count as usize),
            query_segments: carver.take(key_tile_count as usize),
            sums: Sums::carve(call, carver),
        })
    }
}

impl Backward<'_, '_> {
    /// The gradients of exact attention.
    ///
    /// # Safety
    /// As for [`Self::run`].
    pub(super) unsafe fn exact(&self, buffers: &Buffers) -> Result<()> {
        let (call, queue, problem) = (self.call, self.queue, &self.call.problem);
        let mut params = self.params();
        let heads = 0..problem.batch * problem.heads_q;
        let fused = Fused::new(queue, call, &params, &buffers.sums, heads, false)?;
        let kv_heads = problem.batch * problem.heads_kv;
        let section = match &fused {
            Some(fused) => {
                let multiprocessors = queue.device.multiprocessors;
                params.attend.state_accumulated = buffers.sums.queries;
                let (mask, group) = (problem.mask, problem.group);
                fused.rectangles_together(kv_heads, multiprocessors, mask, group, problem.n_q) as u32
            }
            None => {
                let columns = problem.head_dim + problem.value_dim;
                let bytes = problem.n_q * problem.group * columns * call.tensors.q.layout.dtype.size();
                section(call, bytes, queue.device.l2_bytes)
            }
        };
        params.attend.tile_count = buffers.lists.count;
        params.attend.tiles = buffers.lists.tiles;
        params.attend.segments = buffers.lists.segments;
        params.key_tile_count = buffers.key_tile_count;
        params.key_tiles = buffers.key_tiles;
        params.query_segments = buffers.query_segments;
        // SAFETY: these are the parameters of backward_exact_tiles, which writes as many tiles and segments; the lists
        // are written before they are read.
        unsafe {
            buffers.lists.write(queue, call)?;
            queue.launch(
                c"backward_exact_tiles",
                [buffers.key_tile_count.div_ceil(BLOCK), 1, 1],
                BLOCK,
                0,
                args![
                    buffers.key_tiles,
                    buffers.query_segments,
                    buffers.key_tile_count,
                    kv_heads as u32,
                    problem.heads_kv as u32,
                    problem.group as u32,
                    problem.n_q as u32,
                    problem.n_k as u32,
                    call.visible(),
                    u32::from(call.limited() == SEGMENT_LIMITED),
                    section,
                ],
            )?;
            if let Some(fused) = &fused {
                return fused.run(queue, &params);
            }
            keys(queue, &params)?;
            queries(queue, &params)
        }
    }
}
