//! All gradients of exact rectangles on Hopper by one kernel, whose tiles of keys add to sums of dq in memory: in a
//! fixed order, or in any where the caller permits it and it is faster.

use std::ffi::CStr;
use std::ops::Range;

use hyperattn_core::device::Problem;
use hyperattn_core::{DType, Mask, Result};

use super::launch::{choose, element};
use crate::abi::{BackwardParams, TILE_ROWS, View};
use crate::attend::{Family, MOST};
use crate::call::Call;
use crate::driver::TensorElement;
use crate::launch::{Argument, Queue, args};
use crate::tensor_map::{self, Shape, TensorMap};
use crate::workspace::{Carver, Pointer};

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
struct Launch {
    block: u32,
    shared_bytes: u32,
    /// Queries of a block.
    queries: u32,
    /// Of f16 and bf16.
    names: [&'static CStr; 2],
}

/// Sizes of head_dim and value_dim that kernels are made for; each serves the smaller ones too.
const DIMS: [usize; 2] = [64, 128];

/// Launches for each of [`DIMS`]. entry.cu states the same numbers.
const LAUNCHES: [Launch; 2] = [
    Launch {
        block: 384,
        shared_bytes: 199_984,
        queries: 128,
        names: [c"backward_fused_f16_64", c"backward_fused_bf16_64"],
    },
    Launch {
        block: 384,
        shared_bytes: 215_344,
        queries: 64,
        names: [c"backward_fused_f16_128", c"backward_fused_bf16_128"],
    },
];

/// Threads of the blocks that write dq (FUSED_QUERIES_THREADS).
const QUERIES_THREADS: u32 = 256;

/// Steps between two tiles of keys that add to the same sums, so that neither waits for the other.
const STEPS_APART: usize = 3;

/// The launch for tensors of a call's sizes.
fn launch(call: &Call<'_>) -> Option<Launch> {
    let dim = call.problem.head_dim.max(call.problem.value_dim);
    DIMS.iter().position(|&most| dim <= most).map(|size| LAUNCHES[size])
}

/// Whether the kernel runs the tensors of a call on a device that has it, as far as types and sizes tell.
pub(crate) fn may_serve(call: &Call<'_>) -> bool {
    let (problem, tensors) = (&call.problem, &call.tensors);
    let dtype = tensors.k.layout.dtype;
    let whole = problem.head_dim.is_multiple_of(8) && problem.value_dim.is_multiple_of(8);
    whole && launch(call).is_some() && dtype != DType::F32 && tensors.q.layout.dtype == dtype
}

/// Whether the kernel is faster when its tiles add to their sums in any order: what their waiting costs against what it
/// costs to clear the sums first.
///
/// Measured on an H100 with head sizes 64 and 128 and 4,096 to 16,384 tokens: under a causal mask any order takes .71
/// to 1.01 of the time, with 32 KV heads still .91 to .97. Without a mask tiles wait at the beginning of the call only:
/// .62 to .87 with 2 KV heads, .82 to about 1 with 8, .92 to 1.04 with 16, and with 32 on average 1.
fn gains_without_turns(problem: &Problem) -> bool {
    /// KV heads of all batch items with which nothing is left of the gain.
    const MANY: usize = 32;
    problem.mask != Mask::None || problem.batch * problem.heads_kv < MANY
}

/// Sums of dq and the turns of their tiles, in the workspace.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sums {
    /// `[query heads][n_q][head_dim]`
    pub(crate) queries: Pointer<f32>,
    /// `[query heads][n_q]`
    pub(crate) turns: Pointer<u32>,
}

impl Sums {
    /// Of all heads of a call that the kernel may serve.
    pub(crate) fn carve(call: &Call<'_>, carver: &mut Carver) -> Self {
        let problem = &call.problem;
        let rows = problem.batch.saturating_mul(problem.heads_q).saturating_mul(problem.n_q);
        let rows = if may_serve(call) { rows } else { 0 };
        Sums { queries: carver.take(rows.saturating_mul(problem.head_dim)), turns: carver.take(rows) }
    }
}

/// What the kernel needs besides [`BackwardParams`], FusedParams of backward_fused_layout.cuh.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct FusedParams {
    sums: TensorMap,
    q: TensorMap,
    dout: TensorMap,
    k: TensorMap,
    v: TensorMap,
    turns: Pointer<u32>,
    first_head: u32,
    stores: u32,
}

// What entry.cu states too.
const _: () = assert!(size_of::<FusedParams>() == 768);

// SAFETY: a mirror of the struct of that name.
unsafe impl Argument for FusedParams {}

/// The kernel for the tensors of a call.
pub(crate) struct Fused {
    launch: Launch,
    params: FusedParams,
    sums: Sums,
    /// Rows of the sums.
    rows: usize,
    /// Whether the sums go on from what is stored there.
    resumes: bool,
}

impl Fused {
    /// Where the kernel can run these tensors on this device. `heads` are the query heads, counted through the batch,
    /// that `sums` has; with `resumes` the sums go on from what is stored there.
    pub(crate) fn new(
        queue: &Queue<'_>,
        call: &Call<'_>,
        params: &BackwardParams,
        sums: &Sums,
        heads: Range<usize>,
        resumes: bool,
    ) -> Result<Option<Self>> {
        let (attend, problem) = (&params.attend, &call.problem);
        let fastest = choose(queue.device, params).min(*MOST) == Family::Wgmma;
        let Some(launch) = launch(call).filter(|launch| launch.shared_bytes <= queue.device.shared_bytes)
        else {
            return Ok(None);
        };
        if !fastest || !may_serve(call) {
            return Ok(None);
        }
        let type_ =
            if call.tensors.k.layout.dtype == DType::F16 { TensorElement::F16 } else { TensorElement::Bf16 };
        let map = |view: &View, heads: usize, rows: usize, dim: usize, box_rows: u32| {
            let shape = Shape { batch: problem.batch, heads, rows, dim };
            tensor_map::encode(queue.driver(), type_, view, &shape, box_rows)
        };
        let row_stride = problem.head_dim * size_of::<f32>();
        let view = View {
            data: sums.queries.address(),
            batch_stride: 0,
            head_stride: (problem.n_q * row_stride) as i64,
            row_stride: row_stride as i64,
        };
        let shape = Shape { batch: 1, heads: heads.len(), rows: problem.n_q, dim: problem.head_dim };
        let key_rows = TILE_ROWS as u32;
        let in_turn = call.params.deterministic || !gains_without_turns(problem);
        let own = FusedParams {
            sums: tensor_map::encode(queue.driver(), TensorElement::F32, &view, &shape, launch.queries)?,
            q: map(&attend.q, problem.heads_q, problem.n_q, problem.head_dim, launch.queries)?,
            dout: map(&params.dout, problem.heads_q, problem.n_q, problem.value_dim, launch.queries)?,
            k: map(&attend.k, problem.heads_kv, problem.n_k, problem.head_dim, key_rows)?,
            v: map(&attend.v, problem.heads_kv, problem.n_k, problem.value_dim, key_rows)?,
            turns: if in_turn { sums.turns } else { Pointer::NULL },
            first_head: heads.start as u32,
            stores: u32::from(in_turn && !resumes),
        };
        let maps = [&own.sums, &own.q, &own.dout, &own.k, &own.v];
        if maps.into_iter().any(TensorMap::is_none) {
            return Ok(None);
        }
        let rows = heads.len() * problem.n_q;
        Ok(Some(Fused { launch, params: own, sums: *sums, rows, resumes }))
    }

    /// Whether tiles add to their sums in a fixed order.
    fn in_turn(&self) -> bool {
        self.params.turns.address() != 0
    }

    /// Of `rectangles`, of as many queries under `mask` and of all query heads of a KV head, those whose tiles are to
    /// be handed out together: tile t of each before tile t + 1 of any. The blocks that take tiles of a rectangle are
    /// then as far apart as they have to be.
    pub(crate) fn rectangles_together(
        &self,
        rectangles: usize,
        multiprocessors: u32,
        mask: Mask,
        group: usize,
        queries: usize,
    ) -> usize {
        let blocks = queries.div_ceil(self.launch.queries as usize) * group;
        let mean = if mask == Mask::None { blocks } else { blocks / 2 };
        let most = (STEPS_APART * multiprocessors as usize).div_ceil(mean.max(1));
        // Equal shares: a last one of few rectangles would have its tiles wait.
        rectangles.div_ceil(rectangles.div_ceil(most).max(1))
    }

    /// dk and dv of the tiles of keys, and dq of the tiles of queries.
    ///
    /// # Safety
    /// What `params` points to is there, for as many tiles as it says; gradients and sums of their rows are this launch's
    /// to write; `state_accumulated` of row and head are the sums; `next_tile` is one word of the workspace.
    pub(crate) unsafe fn run(&self, queue: &Queue<'_>, params: &BackwardParams) -> Result<()> {
        let Launch { block, shared_bytes, names, .. } = self.launch;
        // SAFETY: next_tile, turns and sums are the workspace's, and the parameters are (BackwardParams, FusedParams)
        // and BackwardParams; the rest is the caller's contract.
        unsafe {
            queue.zero(params.attend.next_tile.address(), 1)?;
            if self.in_turn() {
                queue.zero(self.sums.turns.address(), self.rows)?;
            } else if !self.resumes {
                // Which tile comes first is not known.
                let words = self.rows * params.attend.head_dim as usize;
                queue.zero(self.sums.queries.address(), words)?;
            }
            let arguments = args![*params, self.params];
            queue.launch_persistent(
                names[element(params)],
                params.key_tile_count,
                block,
                shared_bytes,
                arguments,
            )?;
            let grid = [params.attend.tile_count, 1, 1];
            queue.launch(c"backward_fused_queries", grid, QUERIES_THREADS, 0, args![*params])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The compiler of the device code checks the numbers in entry.cu; this checks that they are the ones here.
    #[test]
    fn launches_are_those_that_the_device_code_states() {
        let entry = include_str!("../../kernels/entry.cu");
        for (dim, launch) in DIMS.iter().zip(&LAUNCHES) {
            for what in [
                format!("THREADS == {}", launch.block),
                format!("Shape<{dim}>::SHARED_BYTES == {}", launch.shared_bytes),
                format!("Shape<{dim}>::QUERIES == {}", launch.queries),
            ] {
                let line = format!("static_assert(hyperattn::backward_fused::{what}, \"backward_fused\");");
                assert!(entry.contains(&line), "{line}");
            }
        }
    }
}
