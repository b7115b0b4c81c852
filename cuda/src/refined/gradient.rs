//! The gradients of METHOD_REFINED: the forward's selection again, whose tiles of queries give dq; their inverse, tiles
//! of keys, give dk and dv. Gradients of keys are summed for sets of KV heads whose sums are bounded.

use std::ops::Range;

use hyperattn_core::Result;
use hyperattn_core::device::Problem;

use super::shape::{GROUP_TILES, KEY_BLOCK, REFINED_REST, RefinedParams};
use super::{MOST_GRID_ROWS, carve_for, parts_of_range, passes, prepare, select, take_lists};
use crate::abi::{BackwardParams, KeyTile, Segment, TILE_ROWS};
use crate::backward::launch::{keys, queries};
use crate::call::Call;
use crate::launch::{Argument, Queue, args};
use crate::workspace::{Carver, Pointer};

/// Memory of the sums of a set of KV heads.
const SET_BYTES: usize = 1 << 30;

/// Memory of the partial sums of a turn: enough tiles to keep a large device busy.
const TURN_BYTES: usize = 1 << 30;

// Numbers of kernels/hyperattn/backward_refined_params.cuh, and of the kernels' launches.
const RANGE_KEYS: usize = 32;
const NEAR_THREADS: u32 = 128;
const LISTED_THREADS: u32 = 512;
const ADD_THREADS: u32 = 256;
const COLUMN_THREADS: u32 = 256;
const SPREAD_THREADS: u32 = 128;
const SPREAD_COLUMNS: u32 = 256;
const SPREAD_BLOCKS: u32 = 16;
const FINISH_THREADS: u32 = 256;

/// Mirror of the struct in backward_refined_params.cuh: `first` and `keys`.
type ListedRange = [u32; 2];

/// Mirror of RefinedGradientParams in backward_refined_params.cuh, which says what the fields mean.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RefinedGradientParams {
    key_sums: Pointer<f32>,
    value_sums: Pointer<f32>,
    block_sums: Pointer<f32>,
    not_finite_limits: Pointer<u32>,
    near_tiles: Pointer<KeyTile>,
    near_segments: Pointer<Segment>,
    column_gradients: Pointer<f32>,
    listed_tiles: Pointer<KeyTile>,
    listed_segments: Pointer<Segment>,
    listed_ranges: Pointer<ListedRange>,
    key_partials: Pointer<f32>,
    value_partials: Pointer<f32>,
    first_kv_head: u32,
    kv_heads: u32,
    first_place: u32,
    places: u32,
}

// What backward_refined_params.cuh states too.
const _: () = assert!(size_of::<RefinedGradientParams>() == 112);

// SAFETY: a mirror of the kernels' parameter, see above.
unsafe impl Argument for RefinedGradientParams {}

/// The part of the workspace of a backward call.
pub(crate) struct Buffers {
    selection: super::Buffers,
    params: RefinedGradientParams,
    /// KV heads of a set, and places of a turn, at most.
    kv_heads: usize,
    places: usize,
}

/// Tiles of the listed keys of a place.
fn tiles_of_place(shape: &RefinedParams) -> usize {
    (shape.most_positions as usize).div_ceil(TILE_ROWS)
}

/// Ranges of a KV head's keys.
fn ranges(problem: &Problem) -> usize {
    problem.n_k.div_ceil(RANGE_KEYS)
}

/// Bytes of the tiles, the ranges and the partial sums of a place.
fn bytes_of_place(problem: &Problem, shape: &RefinedParams) -> usize {
    let tiles = tiles_of_place(shape) * size_of::<KeyTile>() + size_of::<Segment>();
    let ranges = ranges(problem) * size_of::<ListedRange>();
    let columns = problem.head_dim + problem.value_dim;
    tiles + ranges + shape.most_positions as usize * columns * size_of::<f32>()
}

/// Bytes of the sums and near tiles of a KV head.
fn bytes_of_kv_head(problem: &Problem) -> usize {
    let rows = problem.n_k + problem.n_k.div_ceil(KEY_BLOCK);
    let tiles = 2 * problem.n_k.div_ceil(TILE_ROWS);
    let sums = rows.saturating_mul((problem.head_dim + problem.value_dim) * size_of::<f32>());
    sums.saturating_add(tiles.saturating_mul(size_of::<KeyTile>() + problem.group * size_of::<Segment>()))
}

/// The part of the workspace of a backward call: the forward's, sums of bounded sets of KV heads and of bounded turns
/// of tiles.
pub(crate) fn carve(call: &Call<'_>, carver: &mut Carver) -> Result<Buffers> {
    let problem = &call.problem;
    let all = problem.batch * problem.heads_kv;
    let most = (SET_BYTES / bytes_of_kv_head(problem)).clamp(1, MOST_GRID_ROWS);
    // Equal sets.
    let kv_heads = all.div_ceil(all.div_ceil(most).max(1)).max(1);
    let selection = carve_for(call, kv_heads * problem.group, carver)?;
    let (whole, shape) = (&selection.whole, &selection.whole.shape);
    let places = (TURN_BYTES / bytes_of_place(problem, shape)).clamp(1, whole.pass_groups * GROUP_TILES);

    let (n_k, columns) = (problem.n_k, problem.head_dim + problem.value_dim);
    let near_tiles = 2 * kv_heads * n_k.div_ceil(TILE_ROWS);
    let blocks = if shape.flags & REFINED_REST != 0 { kv_heads * shape.blocks as usize } else { 0 };
    let listed = places.saturating_mul(shape.most_positions as usize);
    let params = RefinedGradientParams {
        key_sums: carver.take(kv_heads.saturating_mul(n_k).saturating_mul(problem.head_dim)),
        value_sums: carver.take(kv_heads.saturating_mul(n_k).saturating_mul(problem.value_dim)),
        block_sums: carver.take(blocks.saturating_mul(columns)),
        not_finite_limits: carver.take(kv_heads),
        near_tiles: carver.take(near_tiles),
        near_segments: carver.take(near_tiles.saturating_mul(problem.group)),
        column_gradients: carver.take(if blocks > 0 {
            whole.chunk_groups * GROUP_TILES * columns
        } else {
            0
        }),
        listed_tiles: carver.take(places * tiles_of_place(shape)),
        listed_segments: carver.take(places),
        listed_ranges: carver.take(places * ranges(problem)),
        key_partials: carver.take(listed.saturating_mul(problem.head_dim)),
        value_partials: carver.take(listed.saturating_mul(problem.value_dim)),
        first_kv_head: 0,
        kv_heads: 0,
        first_place: 0,
        places: 0,
    };
    Ok(Buffers { selection, params, kv_heads, places })
}

/// The gradients of the whole call. `params` has everything but lists and sums.
///
/// # Safety
/// The call's tensors, the gradients and the buffers are there, see [`crate::backward()`].
pub(crate) unsafe fn run(
    queue: &Queue<'_>,
    call: &Call<'_>,
    buffers: &Buffers,
    params: &BackwardParams,
) -> Result<()> {
    let all = call.problem.batch * call.problem.heads_kv;
    // SAFETY: the caller's contract.
    unsafe { prepare(queue, call, &buffers.selection) }?;
    (0..all).step_by(buffers.kv_heads).try_for_each(|first| {
        let kv_heads = first..all.min(first + buffers.kv_heads);
        let mut own = buffers.params;
        own.first_kv_head = kv_heads.start as u32;
        own.kv_heads = kv_heads.len() as u32;
        let set = Set { queue, call, buffers, params, own };
        // SAFETY: the caller's contract.
        unsafe { set.run(&kv_heads) }
    })
}

/// The work on a set of KV heads and their query heads.
struct Set<'r, 'a> {
    queue: &'r Queue<'a>,
    call: &'r Call<'r>,
    buffers: &'r Buffers,
    params: &'r BackwardParams,
    own: RefinedGradientParams,
}

impl Set<'_, '_> {
    /// # Safety
    /// As for [`run`], like what follows.
    unsafe fn run(&self, kv_heads: &Range<usize>) -> Result<()> {
        let Set { queue, call, buffers, own, .. } = self;
        let selection = &buffers.selection.whole;
        let (problem, shape) = (&call.problem, &selection.shape);
        if shape.flags & REFINED_REST != 0 {
            let sums = kv_heads.len() * shape.blocks as usize * (problem.head_dim + problem.value_dim);
            // SAFETY: these are words of the workspace.
            unsafe { queue.zero(own.block_sums.address(), sums) }?;
        }
        // SAFETY: the caller's contract; everything is written before it is read.
        unsafe {
            self.near(shape)?;
            for pass in passes(selection, kv_heads.start * problem.group..kv_heads.end * problem.group) {
                select(queue, call, selection, &pass, &|chunk| self.rest(chunk))?;
                self.listed(&pass)?;
            }
            self.finish(shape)
        }
    }

    /// Stores the sums of near keys, zeros for all others.
    unsafe fn near(&self, shape: &RefinedParams) -> Result<()> {
        let pairs = self.own.kv_heads * self.call.problem.n_k.div_ceil(TILE_ROWS) as u32;
        let mut params = *self.params;
        params.key_tile_count = 2 * pairs;
        params.key_tiles = self.own.near_tiles;
        params.query_segments = self.own.near_segments;
        params.key_partials = self.own.key_sums;
        params.value_partials = self.own.value_sums;
        let grid = [pairs.div_ceil(NEAR_THREADS), 1, 1];
        let arguments = args![*shape, *self.params, self.own];
        // SAFETY: these are the kernel's parameters; the tiles are written before they are read.
        unsafe {
            self.queue.launch(c"backward_refined_near_tiles", grid, NEAR_THREADS, 0, arguments)?;
            keys(self.queue, &params)
        }
    }

    /// Adds the gradients of a chunk's extra columns to those of the means of blocks.
    unsafe fn rest(&self, chunk: &RefinedParams) -> Result<()> {
        if chunk.flags & REFINED_REST == 0 {
            return Ok(());
        }
        let places = [chunk.chunk_groups * GROUP_TILES as u32, 1, 1];
        let slices = (chunk.head_dim + chunk.value_dim).div_ceil(SPREAD_COLUMNS);
        let of_kv_head = chunk.group * chunk.groups_of_head;
        let kv_heads = parts_of_range(chunk.chunk_first, chunk.chunk_groups, of_kv_head);
        let blocks = [chunk.blocks.div_ceil(SPREAD_BLOCKS), kv_heads, slices];
        let arguments = args![*chunk, *self.params, self.own];
        // SAFETY: these are the kernels' parameters, of this workspace and call.
        unsafe {
            self.queue.launch(c"backward_refined_columns", places, COLUMN_THREADS, 0, arguments)?;
            self.queue.launch(c"backward_refined_spread", blocks, SPREAD_THREADS, 0, args![*chunk, self.own])
        }
    }

    /// dq of a pass, and the sums of its listed keys, turn by turn.
    unsafe fn listed(&self, pass: &RefinedParams) -> Result<()> {
        let queue = self.queue;
        let mut params = *self.params;
        take_lists(&mut params.attend, pass);
        // SAFETY: the caller's contract; the lists are those of the selection.
        unsafe { queries(queue, &params) }?;
        params.key_tiles = self.own.listed_tiles;
        params.query_segments = self.own.listed_segments;
        params.key_partials = self.own.key_partials;
        params.value_partials = self.own.value_partials;
        let keys_of_block = ADD_THREADS / 32;
        let places_of_kv_head = pass.group * pass.groups_of_head * GROUP_TILES as u32;
        let all = pass.pass_groups * GROUP_TILES as u32;
        for first in (0..all).step_by(self.buffers.places) {
            let mut own = self.own;
            own.first_place = first;
            own.places = (all - first).min(self.buffers.places as u32);
            params.key_tile_count = own.places * tiles_of_place(pass) as u32;
            let first_of_all = pass.pass_first * GROUP_TILES as u32 + first;
            let kv_heads = parts_of_range(first_of_all, own.places, places_of_kv_head);
            let grid = [pass.n_k.div_ceil(keys_of_block), kv_heads, 2];
            let arguments = args![*pass, own];
            // SAFETY: these are the kernels' parameters; the lists and partial sums are written before they are read.
            unsafe {
                let places = [own.places, 1, 1];
                queue.launch(c"backward_refined_listed_tiles", places, LISTED_THREADS, 0, arguments)?;
                keys(queue, &params)?;
                queue.launch(c"backward_refined_add_listed", grid, ADD_THREADS, 0, arguments)?;
            }
        }
        Ok(())
    }

    /// Writes dk and dv.
    unsafe fn finish(&self, shape: &RefinedParams) -> Result<()> {
        let (queue, own) = (self.queue, self.own);
        let grid = [shape.n_k.div_ceil(FINISH_THREADS / 32), own.kv_heads, 1];
        // SAFETY: these are the kernels' parameters; all sums are complete.
        unsafe {
            let kv_heads = [own.kv_heads, 1, 1];
            queue.launch(c"backward_refined_not_finite", kv_heads, FINISH_THREADS, 0, args![*shape, own])?;
            queue.launch(
                c"backward_refined_finish",
                grid,
                FINISH_THREADS,
                0,
                args![*shape, *self.params, own],
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The device code states the same numbers.
    #[test]
    fn numbers_are_those_of_the_device_code() {
        let params = include_str!("../../kernels/hyperattn/backward_refined_params.cuh");
        let tiles = include_str!("../../kernels/hyperattn/backward_refined_tiles.cuh");
        let rest = include_str!("../../kernels/hyperattn/backward_refined_rest.cuh");
        let finish = include_str!("../../kernels/hyperattn/backward_refined_finish.cuh");
        for (source, name, number) in [
            (params, "RANGE_KEYS", RANGE_KEYS as u32),
            (tiles, "NEAR_THREADS", NEAR_THREADS),
            (tiles, "LISTED_THREADS", LISTED_THREADS),
            (tiles, "ADD_THREADS", ADD_THREADS),
            (rest, "COLUMN_THREADS", COLUMN_THREADS),
            (rest, "SPREAD_THREADS", SPREAD_THREADS),
            (rest, "SPREAD_COLUMNS_OF_THREAD", SPREAD_COLUMNS / SPREAD_THREADS),
            (rest, "SPREAD_BLOCKS", SPREAD_BLOCKS),
            (finish, "FINISH_THREADS", FINISH_THREADS),
        ] {
            let line = format!("constexpr u32 {name} = {number};");
            assert!(source.contains(&line), "{line}");
        }
    }
}
