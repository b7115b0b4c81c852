//! What the queries of a causal square have met before their leaves, in every level at which they are in the second
//! half of an interval and in an estimated past: outputs and lse that the leaves' tiles go on from.

use std::ops::Range;

use hyperattn_core::Result;
use hyperattn_core::device::PaperParts;

use super::lists::Step;
use super::{PASS_LEVEL, PASS_ONE, unsupported};
use crate::abi::AttendParams;
use crate::call::Call;
use crate::workspace::{Carver, Pointer};

/// Rows have multiples of so many columns (PARTIAL_COLUMNS).
const COLUMNS: usize = 32;

/// Bytes of a row of partial outputs.
fn row_bytes(call: &Call<'_>) -> usize {
    call.problem.value_dim.next_multiple_of(COLUMNS) * call.tensors.out.layout.dtype.size()
}

/// Rows of partials of a query head: of a level only the second halves of its intervals have some.
pub(super) fn rows(plan: &PaperParts, steps: &[Step]) -> usize {
    let of_step = |step: &Step| match plan.parts.square {
        Some(square) if step.kind == PASS_LEVEL => square.len / 2,
        Some(square) if step.kind == PASS_ONE && step.stores => square.len,
        _ => 0,
    };
    steps.iter().map(of_step).fold(0, usize::saturating_add)
}

/// Bytes of so many rows.
pub(super) fn bytes(call: &Call<'_>, rows: usize) -> usize {
    rows.saturating_mul(row_bytes(call) + size_of::<f32>())
}

/// The part of the workspace.
#[derive(Debug)]
pub(super) struct Partials {
    rows: usize,
    values: Pointer<u8>,
    lse: Pointer<f32>,
}

impl Partials {
    /// `rows` of each query head of a set.
    pub(super) fn carve(
        call: &Call<'_>,
        rows: usize,
        query_heads: usize,
        carver: &mut Carver,
    ) -> Result<Self> {
        if u32::try_from(rows).is_err() {
            return Err(unsupported(format_args!(
                "n_q = {} makes {rows} partial rows of a head; 2^32 is too much",
                call.problem.n_q
            )));
        }
        let all = rows.saturating_mul(query_heads);
        Ok(Partials { rows, values: carver.take(all.saturating_mul(row_bytes(call))), lse: carver.take(all) })
    }

    /// Tells the attention of `heads` where they are.
    pub(super) fn give(&self, call: &Call<'_>, heads: &Range<usize>, attention: &mut AttendParams) {
        let earlier = heads.start * call.problem.group * self.rows;
        attention.partial_values = self.values.before(earlier * row_bytes(call));
        attention.partial_lse = self.lse.before(earlier);
        attention.partial_rows = self.rows as u32;
    }
}
