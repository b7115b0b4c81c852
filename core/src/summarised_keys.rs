//! What METHOD_REFINED keeps of the keys of a batch item.

use crate::exact::PackedKeys;
use crate::plan::Plan;
use crate::refine::HeadKeys;
use crate::summary;
use crate::tile::Call;

/// Packed and summarised keys of one batch item.
pub(crate) struct SummarisedKeys<'r> {
    pub(crate) plan: &'r Plan,
    pub(crate) batch: usize,
    pub(crate) packed: PackedKeys<'r>,
    pub(crate) summaries: &'r [f32],
    pub(crate) packed_summaries: &'r [u32],
}

impl SummarisedKeys<'_> {
    pub(crate) fn of_head(&self, call: &Call<'_>, kv_head: usize) -> HeadKeys<'_> {
        let problem = &self.plan.problem;
        let summaries_len = summary::summaries_len(problem);
        let packed_len = summary::packed_len(problem, call.shape.keys_len());
        HeadKeys {
            batch: self.batch,
            kv_head,
            packed: self.packed.tiles(kv_head, 0),
            values: self.packed.values,
            summaries: &self.summaries[kv_head * summaries_len..][..summaries_len],
            packed_summaries: &self.packed_summaries[kv_head * packed_len..][..packed_len],
        }
    }
}
