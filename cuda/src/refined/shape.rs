//! What the kernels of METHOD_REFINED are told of a call.

use hyperattn_core::device::{RefinedPlan, candidate_blocks};
use hyperattn_core::{DType, Error, ErrorKind, Mask, Residual, Result};

use crate::abi::{Segment, Tile, View, element_type};
use crate::call::{Call, DeviceTensor};
use crate::launch::Argument;
use crate::workspace::Pointer;

// The numbers of kernels/hyperattn/refined_params.cuh.
pub(super) const KEY_BLOCK: usize = 64;
pub(super) const REPRESENTATIVES: usize = 8;
pub(super) const GROUP_TILES: usize = 16;
const WIDTH_UNIT: usize = 32;
const REFINED_CAUSAL: u32 = 1;
pub(super) const REFINED_REST: u32 = 2;
const REFINED_ALIGNED: [u32; 3] = [4, 8, 16];

/// Mirror of RefinedParams in refined_params.cuh, which says what the fields mean.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RefinedParams {
    pub(super) q: View,
    pub(super) k: View,
    pub(super) v: View,
    pub(super) q_type: u32,
    pub(super) kv_type: u32,
    pub(super) operand_type: u32,
    pub(super) width: u32,
    pub(super) batch: u32,
    pub(super) heads_q: u32,
    pub(super) group: u32,
    pub(super) n_q: u32,
    pub(super) n_k: u32,
    pub(super) head_dim: u32,
    pub(super) value_dim: u32,
    pub(super) visible: i32,
    scale_log2: f32,
    pub(super) flags: u32,
    pub(super) num_first_keys: u32,
    pub(super) band: u32,
    pub(super) candidates_per_key: u32,
    pub(super) least_budget: u32,
    pub(super) tile_rows: u32,
    pub(super) earlier_queries: u32,
    pub(super) query_tiles: u32,
    pub(super) blocks: u32,
    pub(super) most_candidates: u32,
    pub(super) most_positions: u32,
    pub(super) tiles_of_head: u32,
    pub(super) groups_of_head: u32,
    pub(super) pass_first: u32,
    pub(super) pass_groups: u32,
    pub(super) chunk_first: u32,
    pub(super) chunk_groups: u32,
    pub(super) tile_list: Pointer<u32>,
    pub(super) budgets: Pointer<u32>,
    pub(super) settled: Pointer<u32>,
    pub(super) probe_rows: Pointer<u32>,
    pub(super) summaries: Pointer<f32>,
    pub(super) key_counts: Pointer<f32>,
    pub(super) mean_keys: Pointer<u8>,
    pub(super) outliers: Pointer<u8>,
    pub(super) representatives: Pointer<u8>,
    pub(super) represented: Pointer<f32>,
    pub(super) totals: Pointer<f32>,
    pub(super) starts: Pointer<f32>,
    pub(super) block_weights: Pointer<f32>,
    pub(super) outlier_weights: Pointer<f32>,
    pub(super) candidates: Pointer<u32>,
    pub(super) candidate_count: Pointer<u32>,
    pub(super) key_weights: Pointer<f32>,
    pub(super) column_sums: Pointer<f32>,
    pub(super) weight_sums: Pointer<f32>,
    pub(super) candidate_bits: Pointer<u32>,
    pub(super) candidate_ranks: Pointer<u32>,
    pub(super) positions: Pointer<u32>,
    pub(super) chosen: Pointer<u32>,
    pub(super) extra_keys: Pointer<u8>,
    pub(super) extra_values: Pointer<u8>,
    pub(super) segments: Pointer<Segment>,
    pub(super) tiles: Pointer<Tile>,
}

impl RefinedParams {
    /// Bounds what a tile looks into and lists for budgets up to this.
    pub(super) fn bound(&mut self, budget: usize) {
        let n_k = self.n_k as usize;
        self.most_candidates = candidate_blocks(n_k, budget).min(self.blocks as usize) as u32;
        // Either the budget holds them all, or the first keys fill it and an eighth of it comes besides.
        let most_first = (self.num_first_keys as usize).min(n_k);
        self.most_positions = budget.max(most_first + budget / 8).min(n_k) as u32;
    }
}

// What refined_params.cuh states too.
const _: () = assert!(size_of::<RefinedParams>() == 432);

// SAFETY: a mirror of the kernels' parameter, see above.
unsafe impl Argument for RefinedParams {}

/// Parts of [`WIDTH_UNIT`] elements of a row that kernels are made for.
pub(super) const PARTS: [usize; 5] = [2, 3, 4, 6, 8];

/// Index of the smallest of [`PARTS`] that holds a row of `head_dim` elements.
pub(super) fn parts_of(head_dim: usize) -> usize {
    PARTS.iter().position(|parts| head_dim <= parts * WIDTH_UNIT).unwrap_or(PARTS.len() - 1)
}

/// The element type that tensor cores multiply, if they do.
pub(super) fn operand_type(call: &Call<'_>) -> DType {
    call.problem.shared_dtype.unwrap_or(DType::F32)
}

/// Rows that 16 bytes at a time can be read from.
fn aligned(tensor: &DeviceTensor, dim: usize) -> bool {
    let view = tensor.view();
    let strides = [view.batch_stride, view.head_stride, view.row_stride];
    dim.is_multiple_of(8) && view.data.is_multiple_of(16) && strides.iter().all(|stride| stride % 16 == 0)
}

/// As a kernel's number.
pub(super) fn narrow(what: &str, number: Option<usize>) -> Result<u32> {
    // Grids have fewer than 2^31 blocks.
    number.and_then(|number| i32::try_from(number).ok()).map(|number| number as u32).ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format_args!("METHOD_REFINED on CUDA counts 2^31 {what} at most; split the batch"),
        )
    })
}

/// The parameters that follow from the call alone; what is in the workspace is missing.
pub(super) fn shape_params(call: &Call<'_>, plan: &RefinedPlan) -> Result<RefinedParams> {
    let (problem, params, tensors) = (&call.problem, call.params, &call.tensors);
    let heads = problem.batch * problem.heads_q;
    let blocks = problem.n_k.div_ceil(KEY_BLOCK);
    narrow("tiles of queries", heads.checked_mul(plan.query_tiles.next_multiple_of(GROUP_TILES)))?;
    narrow("blocks of keys", heads.checked_mul(blocks))?;
    let causal = problem.mask != Mask::None;
    let rows = [
        aligned(&tensors.q, problem.head_dim),
        aligned(&tensors.k, problem.head_dim),
        aligned(&tensors.v, problem.value_dim),
    ];
    let mut flags = if causal { REFINED_CAUSAL } else { 0 };
    if params.residual != Residual::None {
        flags |= REFINED_REST;
    }
    for (aligned, flag) in rows.into_iter().zip(REFINED_ALIGNED) {
        flags |= if aligned { flag } else { 0 };
    }
    let mut shape = RefinedParams {
        q: tensors.q.view(),
        k: tensors.k.view(),
        v: tensors.v.view(),
        q_type: element_type(tensors.q.layout.dtype),
        kv_type: element_type(tensors.k.layout.dtype),
        operand_type: element_type(operand_type(call)),
        width: (PARTS[parts_of(problem.head_dim)] * WIDTH_UNIT) as u32,
        batch: problem.batch as u32,
        heads_q: problem.heads_q as u32,
        group: problem.group as u32,
        n_q: problem.n_q as u32,
        n_k: problem.n_k as u32,
        head_dim: problem.head_dim as u32,
        value_dim: problem.value_dim as u32,
        visible: if causal { call.visible() } else { problem.n_k as i32 },
        scale_log2: problem.scale_log2,
        flags,
        num_first_keys: params.num_first_keys,
        band: params.band,
        candidates_per_key: plan.candidates_per_key as u32,
        least_budget: plan.least_budget as u32,
        tile_rows: plan.tile_rows as u32,
        earlier_queries: plan.earlier_queries as u32,
        query_tiles: plan.query_tiles as u32,
        blocks: blocks as u32,
        most_candidates: 0,
        most_positions: 0,
        tiles_of_head: plan.query_tiles as u32,
        groups_of_head: plan.query_tiles.div_ceil(GROUP_TILES) as u32,
        pass_first: 0,
        pass_groups: 0,
        chunk_first: 0,
        chunk_groups: 0,
        tile_list: Pointer::NULL,
        budgets: Pointer::NULL,
        settled: Pointer::NULL,
        probe_rows: Pointer::NULL,
        summaries: Pointer::NULL,
        key_counts: Pointer::NULL,
        mean_keys: Pointer::NULL,
        outliers: Pointer::NULL,
        representatives: Pointer::NULL,
        represented: Pointer::NULL,
        totals: Pointer::NULL,
        starts: Pointer::NULL,
        block_weights: Pointer::NULL,
        outlier_weights: Pointer::NULL,
        candidates: Pointer::NULL,
        candidate_count: Pointer::NULL,
        key_weights: Pointer::NULL,
        column_sums: Pointer::NULL,
        weight_sums: Pointer::NULL,
        candidate_bits: Pointer::NULL,
        candidate_ranks: Pointer::NULL,
        positions: Pointer::NULL,
        chosen: Pointer::NULL,
        extra_keys: Pointer::NULL,
        extra_values: Pointer::NULL,
        segments: Pointer::NULL,
        tiles: Pointer::NULL,
    };
    shape.bound(plan.most_budget);
    Ok(shape)
}
