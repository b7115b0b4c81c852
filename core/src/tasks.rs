//! A call as tasks that need nothing from one another, for callers that run them on threads of their own.

use core::ops::Range;

use crate::division::{Divided, Division, Part};
use crate::error::{Result, invalid};
use crate::exec::Serial;
use crate::forward::execute;
use crate::params::Params;
use crate::part::Section;
use crate::plan::{Plan, Run};
use crate::problem::{Layouts, Tensors};
use crate::scratch::{Layout, WORKSPACE_ALIGN};
use crate::select::Rectangle;
use crate::simd::Kernels;
use crate::tiling::{HeadSet, HeadTiling};
use crate::workspace::{Sizes, check_workspace};

impl<'a> Part<'a> {
    /// How the queries of exact heads are spread over tasks, and the chunks that those of a head are cut into.
    fn exact_tiling(&self) -> (HeadTiling, usize) {
        let problem = &self.plan.problem;
        let tiling = HeadTiling::new(&HeadSet::all(problem), true);
        // Without queries there are still the numbers that each head has.
        let chunks = tiling.chunks(problem.n_q).max(1);
        (tiling, chunks)
    }

    fn task_count(&self) -> usize {
        let problem = &self.plan.problem;
        match self.plan.run {
            Run::Exact => {
                let (tiling, chunks) = self.exact_tiling();
                problem.batch * problem.heads_kv * tiling.parts * chunks
            }
            Run::Paper | Run::Refined => problem.batch * problem.heads_q,
        }
    }

    /// Task `index` as a part of this part: a query head, or where it is exact a tile of queries of the heads that
    /// share their keys.
    fn task(&self, index: usize, kernels: &Kernels) -> Part<'a> {
        let problem = &self.plan.problem;
        let (batch, heads, rectangle) = match self.plan.run {
            Run::Exact => {
                let (tiling, chunks) = self.exact_tiling();
                let (group, chunk) = (index / chunks, in_pairs(index % chunks, chunks));
                let (kv_head, part) = (group / tiling.parts, group % tiling.parts);
                let (batch, kv_head) = (kv_head / problem.heads_kv, kv_head % problem.heads_kv);
                let heads = HeadSet { query: tiling.heads_of(kv_head, part), kv: kv_head..kv_head + 1 };
                let queries = HeadTiling::chunk_of(&(0..problem.n_q), chunk, chunks);
                let keys = 0..queries.clone().next_back().map_or(0, |last| problem.visible_keys(last));
                (batch, heads, Some(Rectangle { queries, keys }))
            }
            Run::Paper | Run::Refined => {
                let (batch, head) = (index / problem.heads_q, index % problem.heads_q);
                let kv_head = head / problem.group;
                (batch, HeadSet { query: head..head + 1, kv: kv_head..kv_head + 1 }, None)
            }
        };
        // What is written once for each head is written by the task that has its first queries.
        let first = rectangle.as_ref().is_none_or(|rectangle| rectangle.queries.start == 0);
        let section = Section {
            batches: batch..batch + 1,
            heads,
            queries: 0..problem.n_q,
            keys: 0..problem.n_k,
            of_heads: first.then_some(batch..batch + 1),
            masked: true,
        };
        let layouts = self.layouts.part(&section);
        let mut plan = Plan::of(&self.params, &layouts, kernels, problem.part(&section), self.plan.run);
        if let Some(rectangle) = rectangle {
            plan.restrict(rectangle);
        }
        Part { section, params: self.params, layouts, plan }
    }

    /// Bytes that a task needs.
    fn task_size(&self, kernels: &Kernels) -> Result<usize> {
        // The first has as many heads and queries as any.
        Ok(Sizes::new(&self.task(0, kernels).plan, &self.params, kernels, 1)?.total)
    }
}

/// Number `place` of 0, count - 1, 1, count - 2, ...: under a causal mask neighbours together cost as much as other
/// neighbours.
fn in_pairs(place: usize, count: usize) -> usize {
    if place.is_multiple_of(2) { place / 2 } else { count - 1 - place / 2 }
}

/// The number of all tasks, and the bytes that the largest needs.
fn measure(divided: &Divided<'_>, kernels: &Kernels) -> Result<(usize, usize)> {
    (0..divided.count()).try_fold((0, 0), |(count, most), index| {
        let part = divided.part(index, kernels);
        Ok((count + part.task_count(), part.task_size(kernels)?.max(most)))
    })
}

/// How many tasks [`run_tasks`] divides a call into.
///
/// A task is a query head of one batch item or sequence, computed by itself: its keys are hashed or summarised for it
/// alone. Where the head is exact it is a tile of its queries, with those of the other heads of its KV head. Tasks of
/// one head cost alike in pairs, from an even number on, also under a causal mask.
pub fn task_count(
    params: &Params,
    division: &Division<'_>,
    layouts: &Layouts<'_>,
    kernels: &Kernels,
) -> Result<usize> {
    Ok(measure(&Divided::new(params, division, layouts)?, kernels)?.0)
}

/// Size and alignment of the workspace of a thread that runs tasks one after the other.
pub fn task_workspace(
    params: &Params,
    division: &Division<'_>,
    layouts: &Layouts<'_>,
    kernels: &Kernels,
) -> Result<Layout> {
    let (_, size) = measure(&Divided::new(params, division, layouts)?, kernels)?;
    Ok(Layout { size, align: WORKSPACE_ALIGN })
}

/// Runs `tasks` of the call on this thread, one after the other. All tasks together, in any order and on any threads,
/// write the same bits as [`crate::forward_divided`]. On an error nothing has been written.
///
/// # Safety
/// While this runs nobody reads or writes the rows of these tasks, so that no other thread runs one of them.
pub unsafe fn run_tasks(
    params: &Params,
    division: &Division<'_>,
    tensors: &Tensors<'_>,
    kernels: &Kernels,
    tasks: Range<usize>,
    workspace: &mut [u8],
) -> Result<()> {
    let divided = Divided::new(params, division, &tensors.layouts())?;
    tensors.check_overlap()?;
    let (count, size) = measure(&divided, kernels)?;
    if tasks.start > tasks.end || tasks.end > count {
        invalid!(
            "tasks begin = {} to end = {} are not among the {count} of the call",
            tasks.start,
            tasks.end
        );
    }
    check_workspace(workspace, size)?;
    let mut first = 0;
    for index in 0..divided.count() {
        let part = divided.part(index, kernels);
        let of_part = first..first + part.task_count();
        first = of_part.end;
        // SAFETY: rows are written by the tasks alone.
        let tensors = unsafe { tensors.part(&part.section) };
        for index in tasks.start.max(of_part.start)..tasks.end.min(of_part.end) {
            let task = part.task(index - of_part.start, kernels);
            // SAFETY: each task has rows of its own, and nobody else uses them (contract).
            let tensors = unsafe { tensors.part(&task.section) };
            execute(&task.plan, &task.params, &tensors, kernels, &Serial, workspace, None)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn pairs_visit_every_chunk_and_cost_alike() {
        for count in 1..20 {
            let mut order: Vec<usize> = (0..count).map(|place| in_pairs(place, count)).collect();
            assert!(order.chunks_exact(2).all(|pair| pair[0] + pair[1] == count - 1), "{order:?}");
            order.sort_unstable();
            assert!(order.into_iter().eq(0..count));
        }
    }
}
