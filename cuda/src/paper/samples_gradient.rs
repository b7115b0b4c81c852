//! The gradients that samples add which are met apart: those of the row-norm residual, which count in the rows' sums or
//! in their values alone, and those that the caller's blocks hide.

use hyperattn_core::Result;

use super::gradient::{Buffers, Pass};
use super::{Paper, THREADS, TILE_STORE, blocks_of, mirror, row_norm, tile_count};
use crate::abi::{BackwardParams, TILE_ROWS};
use crate::backward::launch::{queries, samples_launch};
use crate::launch::args;
use crate::workspace::Pointer;

/// What samples count in (SamplesPart).
const BOTH: u32 = 0;
const SUMS: u32 = 1;
const VALUES: u32 = 2;

/// Samples that count in the same.
struct Samples {
    part: u32,
    positions: Pointer<u32>,
    /// Null where all weigh the same.
    log_weights: Pointer<f32>,
    /// Null where no term has one.
    bounds: Pointer<f32>,
}

impl Paper<'_, '_> {
    /// dk and dv of the uniform samples, where the caller's blocks are met exactly.
    ///
    /// # Safety
    /// As for [`super::run_gradient`], like what follows.
    pub(super) unsafe fn given_samples_gradient(
        &self,
        pass: &Pass<'_>,
        buffers: &Buffers,
        params: &BackwardParams,
    ) -> Result<()> {
        let positions = buffers.samples;
        let (log_weights, bounds) = (Pointer::NULL, Pointer::NULL);
        let samples = Samples { part: BOTH, positions, log_weights, bounds };
        // SAFETY: the caller's contract; the samples are written before they are read.
        unsafe {
            self.samples(pass.heads, [(pass.step, &pass.arguments.common)].into_iter(), positions)?;
            self.keys_of_samples(pass, &self.samples_params(pass, buffers, params, &samples))
        }
    }

    /// dq of a pass with the row-norm residual, and what its samples add to dk and dv.
    pub(super) unsafe fn row_norm_gradient(
        &self,
        pass: &Pass<'_>,
        row_norm: &row_norm::Buffers,
        buffers: &Buffers,
        params: &BackwardParams,
    ) -> Result<()> {
        let &Pass { heads, step, lists, arguments, .. } = pass;
        let common = arguments.common;
        let problem = &self.call.problem;
        let bounds = buffers.bounds.before(heads.start * problem.group * problem.n_q);
        let exact = mirror::PassTiles { sample_size: 0, flags: common.flags | TILE_STORE, ..common };
        let kinds = [
            Samples { part: SUMS, positions: self.buffers.positions, log_weights: Pointer::NULL, bounds },
            Samples {
                part: VALUES,
                positions: row_norm.positions,
                log_weights: row_norm.weights,
                bounds: Pointer::NULL,
            },
        ];
        // SAFETY: the caller's contract; every buffer is written before it is read.
        unsafe {
            self.row_norm_samples(heads, step, lists, common, row_norm)?;
            self.row_norm_residual(heads, step, common, row_norm, bounds)?;
            self.tiles(&[(step, lists, exact)])?;
            queries(self.queue, params)?;
            for samples in &kinds {
                let mut own = self.samples_params(pass, buffers, params, samples);
                if samples.part == SUMS {
                    own.common.flags |= TILE_STORE;
                }
                self.keys_of_samples(pass, &own)?;
                self.queries_of_samples(&own)?;
            }
        }
        Ok(())
    }

    fn samples_params(
        &self,
        pass: &Pass<'_>,
        buffers: &Buffers,
        params: &BackwardParams,
        samples: &Samples,
    ) -> mirror::BackwardSamplesParams {
        let Pass { lists, inverse, arguments, .. } = pass;
        mirror::BackwardSamplesParams {
            backward: *params,
            common: arguments.common,
            blocks: self.exact_blocks(),
            positions: samples.positions,
            log_weights: samples.log_weights,
            bounds: samples.bounds,
            covered: if inverse.covered_lists > 0 { buffers.covered } else { Pointer::NULL },
            key_partials: buffers.key_partials,
            value_partials: buffers.value_partials,
            part: samples.part,
            lists_per_kv_head: lists.lists_per_block as u32,
            covered_words: inverse.covered_words as u32,
            chunks: arguments.chunks,
            chunk_queries: arguments.chunk_queries,
            reserved: 0,
        }
    }

    /// Which samples are met exactly, and the samples' dk and dv, which are added to the sums.
    unsafe fn keys_of_samples(&self, pass: &Pass<'_>, samples: &mirror::BackwardSamplesParams) -> Result<()> {
        let (common, queue) = (&samples.common, self.queue);
        let rectangles = (common.kv_heads * common.pass.count) as usize;
        let launch = samples_launch(self.call.problem.head_dim.max(self.call.problem.value_dim));
        let tiles = (common.sample_size as usize).div_ceil(launch.rows) * samples.chunks as usize;
        let grid = [(rectangles * tiles) as u32, 1, 1];
        let added = mirror::BackwardPaperParams {
            positions: samples.positions,
            adds_to_gradients: 0,
            ..*pass.arguments
        };
        // SAFETY: these are the kernels' parameters; every buffer is written before it is read.
        unsafe {
            if samples.covered.address() != 0 {
                let lists = blocks_of(rectangles * pass.inverse.covered_lists, THREADS / 32);
                queue.launch(c"backward_samples_covered", lists, THREADS as u32, 0, args![*samples])?;
            }
            queue.launch(launch.keys, grid, launch.block, launch.shared_bytes, args![*samples])?;
            self.add_samples(&added, &samples.backward)
        }
    }

    /// What the samples add to dq, after [`Self::keys_of_samples`].
    unsafe fn queries_of_samples(&self, samples: &mirror::BackwardSamplesParams) -> Result<()> {
        let launch = samples_launch(self.call.problem.head_dim.max(self.call.problem.value_dim));
        let grid = [(tile_count(&samples.common) * (TILE_ROWS / launch.rows)) as u32, 1, 1];
        // SAFETY: this is the kernel's parameter; tiles, sums and samples have been enqueued before.
        unsafe { self.queue.launch(launch.queries, grid, launch.block, launch.shared_bytes, args![*samples]) }
    }
}
