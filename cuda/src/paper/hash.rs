//! Algorithm 1, first half: hyperplanes, and the ranks of rows.

use std::ops::Range;

use hyperattn_core::{Params, Result};

use super::orders::Orders;
use super::{Paper, THREADS, blocks_of, mirror};
use crate::abi::element_type;
use crate::call::{Call, DeviceTensor};
use crate::launch::args;

/// Hyperplanes are stored in groups of this many (HYPERPLANE_GROUP).
const HYPERPLANE_GROUP: usize = 8;
/// Threads of the blocks that hash, and the rows they hash (HASH_THREADS, HASH_TILE_ROWS * HASH_TILES).
const HASH_THREADS: u32 = 128;
const HASH_ROWS: usize = 256 * 8;
/// Bytes of the rows that are staged in shared memory (2 * HASH_STAGE).
const HASH_STAGES: usize = 2 * 256 * 128;

/// Columns of a stored projection matrix.
pub(super) fn projection_width(params: &Params) -> usize {
    (params.lsh_num_projs as usize).next_multiple_of(HYPERPLANE_GROUP)
}

/// Rows of a stored projection matrix.
pub(super) fn projection_rows(call: &Call<'_>) -> usize {
    call.problem.head_dim.next_multiple_of(8)
}

impl Paper<'_, '_> {
    /// The hyperplanes of every KV head of a batch item.
    ///
    /// # Safety
    /// As for [`super::run`].
    pub(super) unsafe fn draw_projections(&self) -> Result<()> {
        let (params, problem) = (self.call.params, &self.call.problem);
        let width = projection_width(params);
        let arguments = mirror::ProjectionParams {
            seed: params.seed,
            offset: params.offset,
            projections: self.buffers.projections,
            heads_kv: problem.heads_kv as u32,
            head_dim: problem.head_dim as u32,
            num_projs: params.lsh_num_projs,
            width: width as u32,
            first_stream_head: problem.first_kv_head as u32,
            reserved: 0,
        };
        let grid = blocks_of(problem.heads_kv * projection_rows(self.call) * width, THREADS);
        // SAFETY: this is the kernel's parameter, and it writes the projections only.
        unsafe { self.queue.launch(c"paper_projections", grid, THREADS as u32, 0, args![arguments]) }
    }

    /// The ranks of all rows of `heads`.
    ///
    /// # Safety
    /// As for [`super::run`].
    pub(super) unsafe fn hash(&self, heads: &Range<usize>, orders: &Orders) -> Result<()> {
        let (params, problem, tensors) = (self.call.params, &self.call.problem, &self.call.tensors);
        let group = problem.group;
        let side = |tensor: &DeviceTensor, ranks, count: usize, group: usize, per_projection: usize| {
            let rows = tensor.view();
            let bytes = problem.head_dim * tensor.layout.dtype.size();
            let strides = rows.batch_stride | rows.head_stride | rows.row_stride;
            let common = rows.data | strides as u64 | bytes as u64;
            mirror::HashSide {
                rows,
                ranks,
                element: element_type(tensor.layout.dtype),
                heads: (problem.heads_kv * group) as u32,
                heads_per_projection: per_projection as u32,
                first_head: (heads.start * group) as u32,
                set_heads: (heads.len() * group) as u32,
                count: count as u32,
                unit: 1 << common.trailing_zeros().min(4),
                blocks: count.div_ceil(HASH_ROWS) as u32,
            }
        };
        let arguments = mirror::HashParams {
            query: side(&tensors.q, orders.ranks[0], problem.n_q, group, group),
            key: side(&tensors.k, orders.ranks[1], problem.n_k, 1, 1),
            projections: self.buffers.projections,
            head_dim: problem.head_dim as u32,
            reserved: 0,
        };
        let width = projection_width(params);
        let name = match width / HYPERPLANE_GROUP {
            1 => c"paper_hash_8",
            2 => c"paper_hash_16",
            _ => c"paper_hash_24",
        };
        let blocks = |side: &mirror::HashSide| side.set_heads * side.blocks;
        let grid = [blocks(&arguments.query) + blocks(&arguments.key), 1, 1];
        let shared = projection_rows(self.call) * width * size_of::<f32>() + HASH_STAGES;
        // SAFETY: this is the kernel's parameter; it reads q, k and the projections and writes the ranks.
        unsafe { self.queue.launch(name, grid, HASH_THREADS, shared as u32, args![arguments]) }
    }
}
