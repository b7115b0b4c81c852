//! The passes of a call, and how long their lists are.

use hyperattn_core::Residual;
use hyperattn_core::device::{self, PaperParts, effective_residual};

use super::{PASS_LEAVES, PASS_LEVEL, PASS_ONE, sample_size};
use crate::abi::{Segment, TILE_ROWS, Tile};
use crate::call::Call;

/// One pass over disjoint query rows, before it is divided into launches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) kind: u32,
    pub(super) level: u32,
    /// Rectangles to ask for.
    pub(super) count: usize,
    /// The rectangle of PASS_ONE, or whose keys the queries of all leaves meet.
    pub(super) one: Option<device::Rectangle>,
    pub(super) estimated: bool,
    /// Whether passes over the same rows follow.
    pub(super) stores: bool,
    /// Partials that a tile may go on from.
    pub(super) merges: usize,
    /// The longest of its rectangles.
    pub(super) queries: usize,
    pub(super) keys: usize,
}

impl Step {
    fn one(rectangle: &device::Rectangle, estimated: bool, stores: bool) -> Self {
        let (queries, keys) = (rectangle.queries.len(), rectangle.keys.len());
        let one = Some(rectangle.clone());
        Step { kind: PASS_ONE, level: 0, count: 1, one, estimated, stores, merges: 0, queries, keys }
    }

    /// All passes of the gradients, in order.
    pub(super) fn all(plan: &PaperParts) -> Vec<Self> {
        let parts = &plan.parts;
        let mut steps = Vec::new();
        if let Some(blind) = &parts.blind {
            steps.push(Step::one(blind, false, false));
        }
        if let Some(dense) = &parts.dense {
            steps.push(Step::one(dense, dense.keys.len() > plan.leaf, parts.dense_precedes_square()));
        }
        let Some(square) = parts.square else { return steps };
        let levels = square.levels();
        let mut push = |kind, level, longest: Option<device::Rectangle>| {
            // The first one is the longest.
            let Some(longest) = longest else { return };
            let (queries, keys) = (longest.queries.len(), longest.keys.len());
            let inner = kind == PASS_LEVEL;
            let count = 1usize << level;
            steps.push(Step {
                kind,
                level,
                count,
                one: None,
                estimated: inner,
                stores: inner,
                merges: 0,
                queries,
                keys,
            });
        };
        for level in 0..levels {
            push(PASS_LEVEL, level, square.rectangle(level, 0));
        }
        push(PASS_LEAVES, levels, square.leaf_rectangle(0));
        steps
    }

    /// All passes of the forward: a past that is exact is the leaves' too, and with `partials` they go on from what the
    /// passes before have left.
    pub(super) fn forward(plan: &PaperParts, partials: bool) -> Vec<Self> {
        let mut steps = Step::all(plan);
        let exact_past =
            steps.iter().position(|step| step.kind == PASS_ONE && step.stores && !step.estimated);
        if let Some(past) = exact_past.map(|index| steps.remove(index)) {
            steps
                .iter_mut()
                .filter(|step| step.kind == PASS_LEAVES)
                .for_each(|step| step.one = past.one.clone());
        }
        let merges = steps.iter().filter(|step| step.stores).count();
        if partials {
            steps.iter_mut().filter(|step| step.kind == PASS_LEAVES).for_each(|step| step.merges = merges);
        }
        steps
    }
}

/// The caller's blocks that an interval meets at most, which may begin and end within one.
pub(super) fn blocks_met(length: usize, block: usize) -> usize {
    (length - 1).div_ceil(block) + 1
}

/// What the lists of one rectangle of a pass take, for one KV head and its query heads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Lists {
    /// Query blocks, and tiles of each for one query head.
    pub(super) blocks: usize,
    pub(super) tiles_per_block: usize,
    /// Lists of segments of a block, and segments in one.
    pub(super) lists_per_block: usize,
    pub(super) segments_per_block: usize,
    /// Sampled positions.
    pub(super) positions: usize,
}

impl Lists {
    pub(super) fn new(call: &Call<'_>, step: &Step) -> Self {
        let (params, group, samples) = (call.params, call.problem.group, sample_size(call.params));
        let row_norm = effective_residual(params) == Residual::RowNorm;
        let (queries, keys) = (step.queries.max(1), step.keys.max(1));
        let plain = Lists {
            blocks: queries.div_ceil(TILE_ROWS),
            tiles_per_block: 1,
            lists_per_block: 1,
            segments_per_block: 2 + step.merges,
            ..Lists::default()
        };
        if !step.estimated {
            return plain;
        }
        if let Some(mask) = &call.tensors.block_mask {
            let key_blocks = blocks_met(keys, mask.key_block).min(mask.num_key_blocks);
            let blocks = blocks_met(queries, mask.query_block).min(mask.num_query_blocks);
            let lists_per_block = if mask.head_stride == 0 { 1 } else { group };
            return Lists {
                blocks,
                tiles_per_block: mask.query_block.min(queries).div_ceil(TILE_ROWS),
                lists_per_block,
                // Neighbouring key blocks are one segment.
                segments_per_block: key_blocks.div_ceil(2) + 1,
                // The row-norm residual's samples are no segments.
                positions: if row_norm {
                    samples
                } else {
                    blocks.saturating_mul(lists_per_block).saturating_mul(samples)
                },
            };
        }
        let block_size = params.block_size as usize;
        if block_size == 0 {
            return Lists { positions: samples, ..plain };
        }
        // A level's rectangles have no more queries than keys, and differ a little.
        let most_queries = if step.kind == PASS_LEVEL {
            block_size
        } else {
            (block_size as u128 * queries as u128).div_ceil(keys as u128) as usize
        };
        Lists {
            blocks: keys.div_ceil(block_size),
            tiles_per_block: most_queries.min(queries).div_ceil(TILE_ROWS),
            positions: samples,
            ..plain
        }
    }

    /// [tiles, segments, positions] of one rectangle.
    pub(super) fn lens(&self, group: usize) -> [usize; 3] {
        let tiles = self.blocks.saturating_mul(group).saturating_mul(self.tiles_per_block);
        let lists = self.blocks.saturating_mul(self.lists_per_block);
        [tiles, lists.saturating_mul(self.segments_per_block), self.positions]
    }

    pub(super) fn bytes(&self, group: usize) -> usize {
        // Positions twice, and weights, for the row-norm residual; positions and rows for others.
        let sizes = [size_of::<Tile>(), size_of::<Segment>(), 3 * size_of::<u32>()];
        let bytes = self.lens(group).into_iter().zip(sizes).map(|(len, size)| len.saturating_mul(size));
        bytes.fold(0, usize::saturating_add)
    }
}
