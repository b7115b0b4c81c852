//! METHOD_REFINED: summaries of the keys, the error of each head at its budget, then all tiles of queries.

use crate::error::Result;
use crate::exact;
use crate::exec::{Executor, for_each_chunk, for_each_item};
use crate::gradient_run::GradientRun;
use crate::pass::Pass;
use crate::plan::Plan;
use crate::probe::{self, Norms, Probed, Probes};
use crate::query_tiles::QueryTiles;
use crate::refine::{self, Choice, EXACT, HeadKeys, RefineScratch};
use crate::scratch::{Carver, Lanes};
use crate::select::Rectangle;
use crate::summarised_keys::SummarisedKeys;
use crate::summary;
use crate::tile::{Call, Tile};
use crate::tiling::{HeadSet, PROBE_ROWS};
use crate::workspace::Shared;
use crate::{gradient_exact, gradient_refined};

/// A call under way.
pub(crate) struct Refined<'r, 'a> {
    pub(crate) plan: &'r Plan,
    pub(crate) call: &'r Call<'r>,
    pub(crate) executor: &'r dyn Executor,
    pub(crate) lanes: &'r mut Lanes<'a>,
    pub(crate) shared: &'r mut Shared<'a>,
    /// What is wanted instead of outputs, if it is gradients.
    pub(crate) gradient: Option<GradientRun<'r, 'a>>,
}

impl Refined<'_, '_> {
    pub(crate) fn run(&mut self) -> Result<()> {
        (0..self.plan.problem.batch).try_for_each(|batch| self.run_batch(batch))
    }

    pub(crate) fn run_batch(&mut self, batch: usize) -> Result<()> {
        let Refined { plan, call, executor, lanes, shared, gradient } = self;
        let (problem, executor) = (&plan.problem, *executor);
        let whole = Rectangle { queries: 0..problem.n_q, keys: 0..problem.n_k };
        let pass = Pass { rectangle: &|_| Some(whole.clone()), count: 1, states: None, last: true };
        let kv_heads = 0..problem.heads_kv;
        let packed = (&mut *shared.packed, plan.packs_values);
        let packed = exact::pack(call, executor, lanes, (batch, kv_heads.clone()), &pass, packed)?;
        let (summaries, packed_summaries) = (&mut *shared.summaries, &mut *shared.packed_summaries);
        summary::summarise(call, executor, lanes, batch, summaries)?;
        summary::pack(call, executor, lanes, kv_heads, summaries, packed_summaries)?;
        let keys = SummarisedKeys { plan, batch, packed, summaries, packed_summaries };

        let budgets = &mut *shared.budgets;
        budgets.fill(call.params.budget);
        if let Some(probes) = &plan.probes {
            probe::draw(call, executor, lanes, batch, probes, &mut shared.probed)?;
            probe::attend(call, executor, lanes, (batch, Some(&keys.packed)), probes, &mut shared.probed)?;
            if call.params.target_error > 0.0 {
                let probed = (probes, &shared.probed, &mut *shared.probe_estimate);
                let budgets = (&mut *budgets, &mut *shared.settled);
                settle_budgets(call, executor, lanes, &keys, probed, budgets)?;
            }
        }
        if let Some(GradientRun { of, sums, split_sums, .. }) = gradient {
            for heads in exact_heads(problem.group, budgets) {
                gradient_exact::run_pass(of, executor, lanes, (batch, &heads), &pass, sums)?;
            }
            return gradient_refined::attend(of, executor, lanes, &keys, budgets, (sums, split_sums));
        }
        for heads in exact_heads(problem.group, budgets) {
            exact::attend(call, executor, lanes, batch..batch + 1, &heads, &pass, Some(&keys.packed))?;
        }
        attend(call, executor, lanes, &keys, budgets)?;
        if let Some(to) = &call.tensors.keys_per_query {
            for (head, &budget) in budgets.iter().enumerate() {
                let budget = if budget == EXACT { problem.n_k } else { budget as usize };
                let keys = refine::keys_per_query(call.params, problem, budget);
                // SAFETY: this tensor is written here only, by one thread.
                unsafe { to.write_row(batch, head, 0, &[keys as f32]) };
            }
        }
        let exact = |head: usize| budgets[head] == EXACT;
        probe::write_errors(call, batch, plan.probes.as_ref(), &shared.probed, exact);
        Ok(())
    }
}

/// The heads whose budget is [`EXACT`], in runs.
fn exact_heads(group: usize, budgets: &[u32]) -> impl Iterator<Item = HeadSet> {
    let mut next = 0;
    core::iter::from_fn(move || {
        let start = next + budgets[next..].iter().position(|&budget| budget == EXACT)?;
        let run = HeadSet::run(group, budgets.len(), start, |head| budgets[head] == EXACT);
        next = run.query.end;
        Some(run)
    })
}

/// Attends for every head whose budget is not [`EXACT`].
fn attend(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    keys: &SummarisedKeys<'_>,
    budgets: &[u32],
) -> Result<()> {
    let problem = &call.problem;
    let query_tiles = QueryTiles::new(problem);
    let tiles = query_tiles.count();
    for_each_item(executor, lanes, tiles * problem.heads_q, &|scratch, item| {
        // Neighbouring tasks share keys; later rows see more of them under a causal mask: these come first.
        let (head, index) = (item / tiles, tiles - 1 - item % tiles);
        if budgets[head] == EXACT {
            return;
        }
        let queries = query_tiles.queries(index);
        let mut carver = Carver::new(scratch);
        let mut tile = Tile::carve(call, &mut carver);
        let mut scratch = RefineScratch::carve(problem, keys.plan.most_budget, &mut carver);
        let of_head = keys.of_head(call, head / problem.group);
        let budget = budgets[head] as usize;
        let choice = refine::choose(call, &of_head, (head, &queries), budget, &mut tile, &mut scratch);
        if let Some(unmet) = call.unmet {
            queries.clone().for_each(|row| unmet.add([keys.batch, head], row, choice.left_out()));
        }
        attend_rows(call, &mut tile, &of_head, head, queries, &choice);
        // SAFETY: every task has its own rows.
        unsafe { tile.finish(keys.batch) };
    })
}

/// Lets `rows` of a head attend to what was chosen.
fn attend_rows(
    call: &Call<'_>,
    tile: &mut Tile<'_>,
    keys: &HeadKeys<'_>,
    head: usize,
    rows: impl Iterator<Item = usize>,
    choice: &Choice<'_>,
) {
    rows.for_each(|row| tile.push(head, row, call.problem.visible_keys(row)));
    tile.load_queries(keys.batch);
    choice.attend(tile, call, keys);
}

/// Raises the budget of every head until the error of its probe rows is within the target, or the head is exact.
fn settle_budgets(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    keys: &SummarisedKeys<'_>,
    (probes, probed, estimate): (&Probes, &Probed<'_>, &mut [f32]),
    (budgets, settled): (&mut [u32], &mut [u32]),
) -> Result<()> {
    settled.fill(0);
    budgets.fill(keys.plan.least_budget as u32);
    while settled.contains(&0) {
        estimate_probes(
            call,
            executor,
            lanes,
            keys,
            (probes, probed.rows, &mut *estimate),
            (budgets, settled),
        )?;
        for (head, (budget, settled)) in budgets.iter_mut().zip(settled.iter_mut()).enumerate() {
            if *settled != 0 {
                continue;
            }
            let mut norms = Norms::new(probes);
            for group in probes.rows_of(head, &call.problem) {
                let len = PROBE_ROWS * call.problem.value_dim;
                let estimates = estimate[group * len..][..len].chunks(call.problem.value_dim);
                norms.add_group(estimates, probed, group);
            }
            // A budget below the caller's must be beyond doubt.
            let target = call.params.target_error * if *budget < call.params.budget { 0.5 } else { 1.0 };
            // No error seen falls faster than the budget grows.
            let within_reach = norms.relative_error() * (*budget as f32)
                <= call.params.target_error * keys.plan.most_budget as f32;
            if norms.upper_relative_error() <= target {
                *settled = 1;
            } else if within_reach && *budget as usize * 2 <= keys.plan.most_budget {
                *budget *= 2;
            } else {
                (*budget, *settled) = (EXACT, 1);
            }
        }
    }
    Ok(())
}

/// Outputs of the probe rows of the heads that are not settled at their budgets, in the order of
/// [`Probes::rows_of`].
fn estimate_probes(
    call: &Call<'_>,
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    keys: &SummarisedKeys<'_>,
    (probes, rows, estimate): (&Probes, &[u32], &mut [f32]),
    (budgets, settled): (&[u32], &[u32]),
) -> Result<()> {
    let problem = &call.problem;
    for_each_chunk(executor, lanes, estimate, PROBE_ROWS * problem.value_dim, &|scratch, item, to| {
        let (kv_head, index, head) = probes.place(item, problem);
        if settled[head] != 0 {
            return;
        }
        let queries = probes.queries(head, index);
        let rows = rows[item * PROBE_ROWS..][..PROBE_ROWS].iter().map(|&row| row as usize);
        let mut carver = Carver::new(scratch);
        let mut tile = Tile::carve(call, &mut carver);
        let mut scratch = RefineScratch::carve(problem, keys.plan.most_budget, &mut carver);
        let of_head = keys.of_head(call, kv_head);
        let budget = budgets[head] as usize;
        let choice = refine::choose(call, &of_head, (head, &queries), budget, &mut tile, &mut scratch);
        attend_rows(call, &mut tile, &of_head, head, rows, &choice);
        tile.finish_into(to);
    })
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn exact_heads_are_all_found_once() {
        for group in [1, 2, 4] {
            for bits in 0..1u32 << 8 {
                let budgets: Vec<u32> =
                    (0..8).map(|head| if bits >> head & 1 == 1 { EXACT } else { 64 }).collect();
                let sets: Vec<HeadSet> = exact_heads(group, &budgets).collect();
                let heads: Vec<usize> = sets.iter().flat_map(|set| set.query.clone()).collect();
                let expected: Vec<usize> = (0..8).filter(|&head| budgets[head] == EXACT).collect();
                assert_eq!(heads, expected);
                for set in sets {
                    assert!(set.kv.len() * group == set.query.len() || set.kv.len() == 1, "{set:?}");
                    assert_eq!(set.kv.start, set.query.start / group);
                    assert_eq!(set.kv.end, (set.query.end - 1) / group + 1);
                }
            }
        }
    }
}
