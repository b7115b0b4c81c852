//! Algorithms 2 and 3: what the row-norm residual adds to the exact blocks.

use std::ops::Range;

use super::lists::{Lists, Step};
use super::tile_count;
use super::{Paper, THREADS, TILE_SORTED, TILE_STORE, blocks_of, mirror};
use crate::abi::TILE_ROWS;
use crate::attend::attend;
use crate::call::Call;
use crate::launch::args;
use crate::states::States;
use crate::workspace::{Carver, Pointer};
use hyperattn_core::Result;

/// Threads of the blocks, their rows and the keys they stage (ROW_NORM_THREADS, ROW_NORM_ROWS, ROW_NORM_KEYS).
const ROW_NORM_THREADS: u32 = 128;
const ROW_NORM_ROWS: usize = 16;
const ROW_NORM_KEYS: usize = 32;
/// The bits of a tau of no row.
const NO_TAU: u32 = 0x007F_FFFF;

/// What the residual needs besides.
pub(super) struct Buffers {
    norms: Pointer<f32>,
    prefix: Pointer<f64>,
    /// Of the keys drawn by norm, and their log weights.
    pub(super) positions: Pointer<u32>,
    pub(super) weights: Pointer<f32>,
    tau: Pointer<u32>,
    /// Of the exact blocks.
    exact: States,
}

impl Buffers {
    /// `rows` counts query rows and key rows of a set of heads, `samples` the positions and `rectangles` the rectangles
    /// of all its KV heads.
    pub(super) fn carve(
        call: &Call<'_>,
        rows: [usize; 2],
        samples: usize,
        rectangles: usize,
        carver: &mut Carver,
    ) -> Self {
        Buffers {
            norms: carver.take(rows[1]),
            prefix: carver.take(rows[1]),
            positions: carver.take(samples),
            weights: carver.take(samples),
            tau: carver.take(rectangles.saturating_mul(call.problem.group)),
            exact: States::carve(rows[0], call.problem.value_dim, carver),
        }
    }
}

/// Of queries and keys in shared memory.
fn shared_bytes(head_dim: usize) -> usize {
    4 * (head_dim * ROW_NORM_ROWS + ROW_NORM_KEYS * (head_dim + 1))
}

impl Paper<'_, '_> {
    /// |v|^2 of every key of `heads`.
    ///
    /// # Safety
    /// As for [`super::run`], like what follows.
    pub(super) unsafe fn square_norms(&self, heads: &Range<usize>, buffers: &Buffers) -> Result<()> {
        // No pass in particular: only the heads are looked at.
        let Some((step, lists, _)) = self.buffers.steps.first() else { return Ok(()) };
        let common = self.common(heads, step, lists, mirror::Pass::default());
        let arguments = self.row_norm_params(heads, step, common, buffers);
        let grid = blocks_of(heads.len() * self.call.problem.n_k, THREADS);
        // SAFETY: this is the kernel's parameter; it reads v and writes the norms.
        unsafe { self.queue.launch(c"paper_row_norms", grid, THREADS as u32, 0, args![arguments]) }
    }

    /// One pass whose residual this is.
    pub(super) unsafe fn row_norm_pass(
        &self,
        heads: &Range<usize>,
        step: &Step,
        lists: &Lists,
        common: mirror::PassTiles,
        buffers: &Buffers,
    ) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe {
            self.row_norm_samples(heads, step, lists, common, buffers)?;
            self.row_norm_residual(heads, step, common, buffers, Pointer::NULL)
        }
    }

    /// Both samples of a pass, tau, and what the exact blocks leave.
    pub(super) unsafe fn row_norm_samples(
        &self,
        heads: &Range<usize>,
        step: &Step,
        lists: &Lists,
        common: mirror::PassTiles,
        buffers: &Buffers,
    ) -> Result<()> {
        let problem = &self.call.problem;
        let (samples, count) = (common.sample_size as usize, common.pass.count as usize);
        let rectangles = heads.len() * count;
        let arguments = self.row_norm_params(heads, step, common, buffers);
        let exact = mirror::PassTiles {
            sample_size: 0,
            flags: common.flags & TILE_SORTED | TILE_STORE,
            later_flags: 0,
            ..common
        };
        let taus = rectangles * problem.group;
        let tau_grid = [(taus * samples.div_ceil(ROW_NORM_ROWS)) as u32, 1, 1];
        let sample_grid = blocks_of(rectangles * samples, THREADS);
        let (queue, shared) = (self.queue, shared_bytes(problem.head_dim));
        // SAFETY: these are the kernels' parameters; every buffer is written before it is read.
        unsafe {
            self.samples(heads, [(step, &common)].into_iter(), self.buffers.positions)?;
            queue.launch(c"paper_norm_prefix", [rectangles as u32, 1, 1], 32, 0, args![arguments])?;
            queue.launch(c"paper_norm_samples", sample_grid, THREADS as u32, 0, args![arguments])?;
            queue.fill(buffers.tau.address(), NO_TAU, taus)?;
            queue.launch(c"paper_tau", tau_grid, ROW_NORM_THREADS, shared as u32, args![arguments])?;
            self.tiles(&[(step, lists, exact)])?;
            attend(queue, self.call, &self.attention(heads, Some((step, &exact)), &buffers.exact))
        }
    }

    /// The rows' estimates after [`Self::row_norm_samples`], or where `bounds` is not null only the bounds of their terms
    /// there, for rows counted from the set's first.
    pub(super) unsafe fn row_norm_residual(
        &self,
        heads: &Range<usize>,
        step: &Step,
        common: mirror::PassTiles,
        buffers: &Buffers,
        bounds: Pointer<f32>,
    ) -> Result<()> {
        let problem = &self.call.problem;
        let mut arguments = self.row_norm_params(heads, step, common, buffers);
        arguments.bounds = bounds;
        let grid = [(tile_count(&common) * (TILE_ROWS / ROW_NORM_ROWS)) as u32, 1, 1];
        let shared = shared_bytes(problem.head_dim) + 4 * ROW_NORM_KEYS * problem.value_dim;
        // SAFETY: this is the kernel's parameter; what it reads has been enqueued before.
        unsafe {
            self.queue.launch(
                c"paper_row_norm_residual",
                grid,
                ROW_NORM_THREADS,
                shared as u32,
                args![arguments],
            )
        }
    }

    fn row_norm_params(
        &self,
        heads: &Range<usize>,
        step: &Step,
        common: mirror::PassTiles,
        buffers: &Buffers,
    ) -> mirror::RowNormParams {
        let (params, problem) = (self.call.params, &self.call.problem);
        let exact = buffers.exact.before(heads.start * problem.group * problem.n_q, problem.value_dim);
        // eps^2 m / (n ln n), with ln n at least 1.
        let log2_cap = |keys: usize| {
            let n = keys.max(1) as f32;
            2.0 * params.approx_d_epsilon.log2() + (params.sample_size as f32).log2()
                - (n * n.ln().max(1.0)).log2()
        };
        mirror::RowNormParams {
            common,
            attend: self.attention(heads, Some((step, &common)), &self.buffers.states),
            seed: params.seed,
            offset: params.offset,
            exact_max: exact.max,
            exact_sum: exact.sum,
            exact_accumulated: exact.accumulated,
            norms: buffers.norms,
            prefix: buffers.prefix,
            positions: self.buffers.positions,
            norm_positions: buffers.positions,
            norm_weights: buffers.weights,
            tau: buffers.tau,
            blocks: self.exact_blocks(),
            bounds: Pointer::NULL,
            sample_size: params.sample_size,
            log2_kappa: params.approx_d_kappa.log2(),
            log2_cap: log2_cap(step.keys),
            log2_cap_less: log2_cap(step.keys.saturating_sub(1)),
            first_stream_head: problem.first_head as u32,
            first_stream_kv_head: problem.first_kv_head as u32,
        }
    }
}
