//! The lists of passes: uniform samples and tiles.

use std::ffi::CStr;
use std::ops::Range;

use hyperattn_core::Result;

use super::lists::{Lists, Step};
use super::{Paper, PassWork, SEGMENT_SORTED, THREADS, blocks_of, mirror, tile_count};
use crate::call::DeviceBlockMask;
use crate::launch::{Argument, args};
use crate::workspace::Pointer;

/// A block of a mask; one that is longer than any sequence is as good.
pub(super) fn block_length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

impl Paper<'_, '_> {
    /// The uniform samples and the tiles of several passes.
    ///
    /// # Safety
    /// As for [`super::run`], like all that follow.
    pub(super) unsafe fn select(&self, heads: &Range<usize>, passes: &[PassWork<'_>]) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe {
            if self.call.tensors.block_mask.is_none() {
                let estimated = passes.iter().filter(|(step, ..)| step.estimated);
                self.samples(
                    heads,
                    estimated.map(|(step, _, common)| (*step, common)),
                    self.buffers.positions,
                )?;
            }
            self.tiles(passes)
        }
    }

    /// Launches a kernel for passes, each with its parameters and items for threads.
    pub(super) unsafe fn launch_passes<T: Copy>(
        &self,
        name: &'static CStr,
        passes: &[(T, usize)],
    ) -> Result<()>
    where
        mirror::Passes<T>: Argument,
    {
        for passes in passes.chunks(mirror::PASSES_AT_ONCE) {
            let (mut end, mut end_block) = (0, [0; mirror::PASSES_AT_ONCE]);
            for (number, to) in end_block.iter_mut().enumerate() {
                end += passes.get(number).map_or(0, |&(_, items)| items.div_ceil(THREADS) as u32);
                *to = end;
            }
            let of = |number: usize| passes[number.min(passes.len() - 1)].0;
            let arguments = mirror::Passes { passes: std::array::from_fn(of), end_block };
            // SAFETY: this is the kernel's parameter; what it touches is the caller's contract.
            unsafe { self.queue.launch(name, [end, 1, 1], THREADS as u32, 0, args![arguments]) }?;
        }
        Ok(())
    }

    /// Which keys the queries of estimated rectangles meet exactly.
    pub(super) fn exact_blocks(&self) -> mirror::ExactBlocks {
        let mask = self.call.tensors.block_mask;
        mirror::ExactBlocks {
            row_offsets: mask.map_or(0, |mask| mask.row_offsets),
            columns: mask.map_or(0, |mask| mask.columns),
            head_stride: mask.map_or(0, |mask| mask.head_stride as u64),
            query_block: mask.map_or(0, |mask| block_length(mask.query_block)),
            key_block: mask.map_or(0, |mask| block_length(mask.key_block)),
            block_size: self.call.params.block_size,
            sorted: if self.buffers.plan.sorted { SEGMENT_SORTED } else { 0 },
        }
    }

    /// The uniform samples of every rectangle of passes, to their place among `positions`.
    pub(super) unsafe fn samples<'p>(
        &self,
        heads: &Range<usize>,
        passes: impl Iterator<Item = (&'p Step, &'p mirror::PassTiles)>,
        positions: Pointer<u32>,
    ) -> Result<()> {
        let (params, problem) = (self.call.params, &self.call.problem);
        let of_pass = |(step, common): (&Step, &mirror::PassTiles)| {
            let first = common.first_position as usize;
            let arguments = mirror::SampleParams {
                pass: common.pass,
                seed: params.seed,
                offset: params.offset,
                positions: positions.after(first),
                heads_kv: problem.heads_kv as u32,
                first_head: heads.start as u32,
                set_heads: heads.len() as u32,
                sample_size: common.sample_size,
                key_order: self.orders(heads, step)[1],
                listed_rows: self.buffers.listed_rows.map_or(Pointer::NULL, |rows| rows.after(first)),
                n_k: problem.n_k as u32,
                first_stream_head: problem.first_kv_head as u32,
            };
            (arguments, common.sample_size as usize * heads.len() * common.pass.count as usize)
        };
        let passes: Vec<_> = passes.map(of_pass).collect();
        // SAFETY: these are the kernel's parameters, and it writes the positions and their rows only.
        unsafe { self.launch_passes(c"paper_samples", &passes) }
    }

    /// The tiles of passes.
    pub(super) unsafe fn tiles(&self, passes: &[PassWork<'_>]) -> Result<()> {
        let mut plain = Vec::new();
        for &(step, lists, common) in passes {
            if let (true, Some(mask)) = (step.estimated, &self.call.tensors.block_mask) {
                // SAFETY: the caller's contract.
                unsafe { self.block_mask_tiles(lists, common, mask) }?;
                continue;
            }
            let arguments = mirror::PaperTileParams {
                common,
                exact: u32::from(!step.estimated),
                limited: self.call.limited(),
                visible: self.call.visible(),
                block_size: self.call.params.block_size,
                sorted: if step.estimated && self.buffers.plan.sorted { SEGMENT_SORTED } else { 0 },
                segments_per_block: lists.segments_per_block as u32,
            };
            plain.push((arguments, tile_count(&common)));
        }
        // SAFETY: these are the kernel's parameters, and it writes tiles and segments only.
        unsafe { self.launch_passes(c"paper_tiles", &plain) }
    }

    /// Tiles of the caller's blocks.
    pub(super) unsafe fn block_mask_tiles(
        &self,
        lists: &Lists,
        common: mirror::PassTiles,
        mask: &DeviceBlockMask,
    ) -> Result<()> {
        let (params, problem) = (self.call.params, &self.call.problem);
        let arguments = mirror::BlockMaskTileParams {
            common,
            seed: params.seed,
            offset: params.offset,
            row_offsets: mask.row_offsets,
            columns: mask.columns,
            head_stride: mask.head_stride as u64,
            positions: self.buffers.positions,
            heads_kv: problem.heads_kv as u32,
            per_head: u32::from(mask.head_stride != 0),
            query_block: block_length(mask.query_block),
            key_block: block_length(mask.key_block),
            segments_per_block: lists.segments_per_block as u32,
            first_stream_head: problem.first_kv_head as u32,
        };
        let warps = (common.kv_heads * common.pass.count) as usize * lists.blocks * lists.lists_per_block;
        let grid = blocks_of(warps, THREADS / 32);
        // SAFETY: this is the kernel's parameter; it reads the mask's arrays and writes tiles, segments and positions.
        unsafe { self.queue.launch(c"paper_block_mask_tiles", grid, THREADS as u32, 0, args![arguments]) }
    }
}
