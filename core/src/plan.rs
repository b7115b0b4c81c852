//! The plan of a call: which method runs, and which parts of it.

use crate::causal::Decomposition;
use crate::cost::{self, Screening};
use crate::error::Result;
use crate::exact;
use crate::hyper;
use crate::pack::PackedShape;
use crate::params::{BlockMask, Mask, Method, Params, Residual};
use crate::probe::Probes;
use crate::problem::{Layouts, Problem};
use crate::select::Rectangle;
use crate::simd::{KEY_TILE, Kernels};
use crate::tiling::HeadSet;

/// What computes the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Run {
    Exact,
    Paper,
    Refined,
}

/// What one call will do: everything that follows from the options, shapes and kernels alone.
pub(crate) struct Plan {
    pub(crate) problem: Problem,
    pub(crate) parts: Decomposition,
    /// What computes the output.
    pub(crate) run: Run,
    /// What an exact call computes; all queries meet keys that are in it.
    pub(crate) rectangle: Rectangle,
    /// Sub-problems with at most this many keys are exact.
    pub(crate) leaf: usize,
    /// Whether Algorithm 1 runs; otherwise the order in memory is the order.
    pub(crate) sorted: bool,
    /// Whether rows are visited by more than one pass.
    pub(crate) stateful: bool,
    /// Whether the residual is Algorithms 2 and 3.
    pub(crate) row_norm: bool,
    /// Query heads whose state and packed keys are in the workspace together.
    pub(crate) heads_at_once: usize,
    /// Tiles of packed keys of one KV head that tasks share.
    pub(crate) packed_tiles: usize,
    /// Whether values are in them too.
    pub(crate) packs_values: bool,
    /// Rows that are computed exactly besides, to estimate errors.
    pub(crate) probes: Option<Probes>,
    /// The smallest and the largest budget that METHOD_REFINED may give to a head.
    pub(crate) least_budget: usize,
    pub(crate) most_budget: usize,
}

/// Which parts of a problem METHOD_PAPER estimates.
#[derive(Debug, Clone)]
pub struct PaperParts {
    /// The problem's parts.
    pub parts: Decomposition,
    /// Sub-problems with at most this many keys are exact.
    pub leaf: usize,
    /// Whether Algorithm 1 runs; otherwise the order in memory is the order.
    pub sorted: bool,
    /// Whether all sub-problems are exact.
    pub nothing_to_estimate: bool,
}

impl PaperParts {
    /// `masked`: whether the caller chooses the blocks.
    pub fn new(params: &Params, problem: &Problem, masked: bool) -> Self {
        let blocks_are_sorted = !masked && params.block_size > 0;
        // One block holds all keys of such a sub-problem, so dividing it would change nothing.
        let block = if blocks_are_sorted { params.block_size as usize } else { 0 };
        let leaf = params.min_seq_len.max(block).max(1);
        let parts = Decomposition::new(problem, leaf);
        let dense_is_small = parts.dense.as_ref().is_none_or(|dense| dense.keys.len() <= leaf);
        let nothing_to_estimate = dense_is_small && parts.square.is_none_or(|square| square.levels() == 0);
        PaperParts { parts, leaf, sorted: blocks_are_sorted && params.lsh_num_projs > 0, nothing_to_estimate }
    }
}

/// The smallest budget that METHOD_REFINED gives to a head.
pub(crate) fn least_budget(params: &Params) -> usize {
    let budget = params.budget as usize;
    if params.target_error > 0.0 {
        (budget / 4).max(Params::LEAST_BUDGET as usize).min(budget)
    } else {
        budget
    }
}

/// The largest one, where the error is to be within a target.
pub(crate) fn most_budget(params: &Params, problem: &Problem) -> usize {
    let mut budget = params.budget as usize;
    while budget as f64 * 4.0 <= problem.mean_visible_keys() {
        budget *= 2;
    }
    budget
}

impl Run {
    /// What `params.method` is for this problem.
    pub(crate) fn choose(params: &Params, mask: Option<&BlockMask<'_>>, problem: &Problem) -> Self {
        let PaperParts { parts, nothing_to_estimate, .. } = PaperParts::new(params, problem, mask.is_some());
        let budget = params.budget as usize;
        let refining_is_exact = problem.n_k <= params.min_seq_len.max(budget) || problem.n_q == 0;
        let refines = || {
            let probes = (params.target_error > 0.0)
                .then(|| Probes::new(params, problem, budget, least_budget(params)));
            let probe_rows = probes.map_or(0, |probes| probes.rows_of_a_head());
            Screening::CPU.pays(params, problem, probe_rows)
        };
        match params.method {
            Method::Paper if !nothing_to_estimate => Run::Paper,
            Method::Refined if !refining_is_exact => Run::Refined,
            // Estimators know no mask tensor.
            Method::Auto if problem.has_mask_tensor => Run::Exact,
            // The caller's blocks are METHOD_PAPER's.
            Method::Auto if mask.is_some() => {
                let exact = nothing_to_estimate || cost::exact_is_faster(params, mask, problem, &parts);
                if exact { Run::Exact } else { Run::Paper }
            }
            Method::Auto if !refining_is_exact && refines() => Run::Refined,
            _ => Run::Exact,
        }
    }
}

impl Plan {
    pub(crate) fn new(params: &Params, layouts: &Layouts<'_>, kernels: &Kernels) -> Result<Self> {
        let problem = Problem::new(params, layouts)?;
        let run = Run::choose(params, layouts.block_mask.as_ref(), &problem);
        Ok(Self::of(params, layouts, kernels, problem, run))
    }

    /// The plan of a problem that is checked, for which `run` was chosen.
    pub(crate) fn of(
        params: &Params,
        layouts: &Layouts<'_>,
        kernels: &Kernels,
        problem: Problem,
        run: Run,
    ) -> Self {
        let PaperParts { parts, leaf, sorted, .. } =
            PaperParts::new(params, &problem, layouts.block_mask.is_some());
        let budget = params.budget as usize;
        let least_budget = least_budget(params);
        let target = run == Run::Refined && params.target_error > 0.0;
        let probed = target || (run != Run::Exact && layouts.error.is_some());
        let most_budget = if target { most_budget(params, &problem) } else { budget };
        let divided = parts.square.is_some_and(|square| square.levels() > 0);
        let mut plan = Plan {
            sorted,
            stateful: run == Run::Paper && (divided || parts.dense_precedes_square()),
            row_norm: hyper::effective_residual(params) == Residual::RowNorm,
            heads_at_once: problem.heads_q,
            packed_tiles: 0,
            // Without a band and without exact heads nearly all values are read where they are.
            packs_values: run != Run::Refined || target || params.mask != Mask::None,
            probes: probed.then(|| {
                let exact_keys = if run == Run::Refined { least_budget } else { 0 };
                Probes::new(params, &problem, budget, exact_keys)
            }),
            least_budget,
            most_budget,
            rectangle: Rectangle { queries: 0..problem.n_q, keys: 0..problem.n_k },
            problem,
            parts,
            run,
            leaf,
        };
        let bytes = layouts.k.dtype.size() * (problem.head_dim + problem.value_dim);
        plan.fit_into(2 * problem.heads_kv as u128 * problem.n_k as u128 * bytes as u128, kernels);
        plan
    }

    /// Leaves all but `rectangle` of an exact problem to others.
    pub(crate) fn restrict(&mut self, rectangle: Rectangle) {
        self.rectangle = rectangle;
        self.packed_tiles = self.shared_tiles();
    }

    /// Plans for gradients: sums of all heads are kept anyway, and METHOD_PAPER's passes leave nothing else behind.
    pub(crate) fn sum_gradients(&mut self) {
        self.heads_at_once = self.problem.heads_q;
        self.stateful = false;
        if self.run != Run::Refined {
            self.packed_tiles = 0;
        }
    }

    /// Chooses how many heads are worked on together, and whether keys are packed once for all tasks, so that
    /// state and packed keys take at most `budget` bytes if they can.
    fn fit_into(&mut self, budget: u128, kernels: &Kernels) {
        let problem = &self.problem;
        let packed_tiles = self.shared_tiles();
        if self.run != Run::Paper {
            self.packed_tiles = packed_tiles;
            return;
        }
        let packed = packed_tiles as u128
            * PackedShape::new(kernels, problem).tile_len() as u128
            * size_of::<u32>() as u128;
        let state = if self.stateful {
            problem.n_q as u128 * problem.value_dim as u128 * size_of::<f32>() as u128
        } else {
            0
        };
        let group = problem.group as u128;
        let of_a_group = group * state + packed;
        let (heads, packed_tiles) = if of_a_group <= budget {
            (budget.checked_div(of_a_group).unwrap_or(u128::MAX).saturating_mul(group), packed_tiles)
        } else {
            (budget.checked_div(state).unwrap_or(u128::MAX), 0)
        };
        self.heads_at_once = heads.clamp(1, problem.heads_q as u128) as usize;
        self.packed_tiles = packed_tiles;
    }

    /// Tiles of keys of one KV head that several tasks of an exact pass read.
    fn shared_tiles(&self) -> usize {
        let heads = HeadSet::all(&self.problem);
        match self.run {
            Run::Exact => {
                let Rectangle { queries, keys } = &self.rectangle;
                return exact::packed_tiles(&heads, 1, queries.len(), keys.len());
            }
            Run::Refined => return self.problem.n_k.div_ceil(KEY_TILE),
            Run::Paper => {}
        }
        // The first leaf is the longest.
        let Some(square) = self.parts.square else { return 0 };
        square.leaf_rectangle(0).map_or(0, |leaf| {
            exact::packed_tiles(&heads, 1 << square.levels(), leaf.queries.len(), leaf.keys.len())
        })
    }

    /// The largest number of query heads and of KV heads that are worked on together.
    pub(crate) fn most_heads(&self) -> [usize; 2] {
        let sets = HeadSet::divide(&self.problem, self.heads_at_once);
        // The first set is the largest.
        sets.map(|set| [set.query.len(), set.kv.len()]).next().unwrap_or([0; 2])
    }
}
