//! The error estimate of any method: rows of each head that are computed exactly, and the distance of the output from them.

use hyperattn_core::device::{ProbePlan, RefinedPlan};
use hyperattn_core::{DType, Result};

use super::shape::{RefinedParams, shape_params};
use super::{NORM_THREADS, REPRESENT_THREADS};
use crate::abi::{Segment, TILE_ROWS, Tile, View, element_type};
use crate::attend::attend;
use crate::call::Call;
use crate::launch::{Argument, Queue, args};
use crate::workspace::{Carver, Pointer};

/// Mirror of ProbeParams in probe.cuh, which says what the fields mean.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct ProbeParams {
    pub(super) seed: u64,
    pub(super) offset: u64,
    pub(super) whole_over_probed: f64,
    pub(super) first_tile: u32,
    pub(super) tiles: u32,
    pub(super) target_error: f32,
    pub(super) callers_budget: u32,
    pub(super) most_budget: u32,
    pub(super) out_type: u32,
    pub(super) out: View,
    pub(super) error: View,
    pub(super) tile_list: Pointer<u32>,
    pub(super) rows: Pointer<u32>,
    pub(super) weights: Pointer<f32>,
    pub(super) exact: Pointer<f32>,
    pub(super) estimate: Pointer<f32>,
    pub(super) budgets: Pointer<u32>,
    pub(super) settled: Pointer<u32>,
    pub(super) probe_records: Pointer<Tile>,
    pub(super) probe_segments: Pointer<Segment>,
    pub(super) records_of_head: u32,
    pub(super) first_stream_head: u32,
}

// What probe.cuh states too.
const _: () = assert!(size_of::<ProbeParams>() == 192);

// SAFETY: a mirror of the kernels' parameter, see above.
unsafe impl Argument for ProbeParams {}

/// The error estimate of any method: probe rows, and their exact outputs.
pub(crate) struct Probing {
    shape: RefinedParams,
    pub(super) params: ProbeParams,
    pub(super) heads: usize,
    next_tile: Pointer<u32>,
}

impl Probing {
    /// The probe rows of `probes` among the query tiles of `plan`.
    pub(crate) fn carve(
        call: &Call<'_>,
        plan: &RefinedPlan,
        probes: &ProbePlan,
        carver: &mut Carver,
    ) -> Result<Self> {
        let shape = shape_params(call, plan)?;
        let heads = call.problem.batch * call.problem.heads_q;
        let rows = probes.tiles * probes.rows_of_a_tile;
        let records = rows.div_ceil(TILE_ROWS);
        let outputs = heads.saturating_mul(rows).saturating_mul(call.problem.value_dim);
        let params = ProbeParams {
            seed: call.params.seed,
            offset: call.params.offset,
            whole_over_probed: probes.whole_over_probed,
            first_tile: probes.first_tile as u32,
            tiles: probes.tiles as u32,
            target_error: call.params.target_error,
            callers_budget: call.params.budget,
            most_budget: plan.most_budget as u32,
            out_type: element_type(call.tensors.out.layout.dtype),
            out: call.tensors.out.view(),
            error: call.tensors.error.map_or(View::NULL, |error| error.view()),
            tile_list: carver.take(heads * probes.tiles),
            rows: carver.take(heads * rows),
            weights: carver.take(heads * rows),
            exact: carver.take(outputs),
            estimate: Pointer::NULL,
            budgets: Pointer::NULL,
            settled: Pointer::NULL,
            probe_records: carver.take(heads * records),
            probe_segments: carver.take(heads * records),
            records_of_head: records as u32,
            first_stream_head: call.problem.first_head as u32,
        };
        Ok(Probing { shape, params, heads, next_tile: carver.take(1) })
    }

    /// Probe rows of a head.
    pub(super) fn rows_of_head(&self) -> usize {
        self.params.tiles as usize * 4
    }

    /// A view of outputs of all probe rows.
    fn outputs(&self, outputs: Pointer<f32>) -> View {
        let row = self.shape.value_dim as i64 * size_of::<f32>() as i64;
        let head = row * self.rows_of_head() as i64;
        View {
            data: outputs.address(),
            batch_stride: head * i64::from(self.shape.heads_q),
            head_stride: head,
            row_stride: row,
        }
    }

    /// Lets listed rows attend, `tiles` of them written before, with outputs one after the other.
    ///
    /// # Safety
    /// As for [`attend`].
    pub(super) unsafe fn attend(
        &self,
        queue: &Queue<'_>,
        call: &Call<'_>,
        outputs: Pointer<f32>,
        lists: (Pointer<Tile>, Pointer<Segment>, u32),
        of_pass: Option<&RefinedParams>,
    ) -> Result<()> {
        let mut attention = call.attend_params();
        attention.out = self.outputs(outputs);
        attention.out_type = element_type(DType::F32);
        attention.lse = View::NULL;
        // The list of rows has so many for each head.
        attention.n_q = self.rows_of_head() as u32;
        attention.query_order = self.params.rows;
        (attention.tiles, attention.segments, attention.tile_count) = lists;
        attention.next_tile = self.next_tile;
        if let Some(pass) = of_pass {
            attention.positions = pass.positions;
            attention.extra_keys = pass.extra_keys;
            attention.extra_values = pass.extra_values;
        }
        // SAFETY: the caller's contract.
        unsafe { attend(queue, call, &attention) }
    }

    /// Draws the rows and computes them exactly.
    ///
    /// # Safety
    /// The call's tensors and the workspace are there, see [`crate::forward`].
    pub(crate) unsafe fn draw(&self, queue: &Queue<'_>, call: &Call<'_>) -> Result<()> {
        let (heads, tiles) = (self.heads as u32, self.params.tiles);
        // SAFETY: these are the kernels' parameters, of this workspace and call.
        unsafe {
            queue.launch(
                c"draw_probes",
                [heads * tiles, 1, 1],
                REPRESENT_THREADS,
                0,
                args![self.shape, self.params],
            )?;
            queue.launch(c"probe_tiles", [heads, 1, 1], 32, 0, args![self.shape, self.params])?;
            let count = heads * self.params.records_of_head;
            let lists = (self.params.probe_records, self.params.probe_segments, count);
            self.attend(queue, call, self.params.exact, lists, None)
        }
    }

    /// Writes the error tensor, if there is one; the output is complete.
    ///
    /// # Safety
    /// As for [`Self::draw`].
    pub(crate) unsafe fn write_errors(&self, queue: &Queue<'_>) -> Result<()> {
        if self.params.error.data == 0 {
            return Ok(());
        }
        let grid = [self.heads as u32, 1, 1];
        // SAFETY: as for `draw`.
        unsafe { queue.launch(c"probe_errors", grid, NORM_THREADS, 0, args![self.shape, self.params]) }
    }
}
