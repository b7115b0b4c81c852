//! What the device path shares with the CPU: the checks of a call. Addresses are numbers here and are not followed.

pub use crate::causal::{Decomposition, Square};
pub use crate::cost::Screening;
pub use crate::division::Divided;
pub use crate::hyper::effective_residual;
pub use crate::part::Section;
pub use crate::plan::PaperParts;
pub use crate::problem::{Place, Problem, check_overlap};
pub use crate::refine::candidate_blocks;
pub use crate::select::Rectangle;
pub use crate::tiling::HeadSet;

use crate::params::Params;
use crate::plan;
use crate::probe::Probes;
use crate::query_tiles::QueryTiles;
use crate::refine;
use crate::tiling::PROBE_ROWS;

/// What METHOD_REFINED does for a call, as far as it does not depend on what the tensors hold.
#[derive(Debug, Clone, Copy)]
pub struct RefinedPlan {
    /// Queries of all but the last tiles of a head.
    pub tile_rows: usize,
    /// Queries before the tile of the latest, all of them where there is none.
    pub earlier_queries: usize,
    /// Tiles of queries of a head.
    pub query_tiles: usize,
    /// Keys are chosen among this many times as many.
    pub candidates_per_key: usize,
    /// The smallest and the largest budget of a head that is not exact.
    pub least_budget: usize,
    /// See `least_budget`.
    pub most_budget: usize,
    /// Rows that are computed exactly besides.
    pub probes: Option<ProbePlan>,
}

impl RefinedPlan {
    /// `estimates` says whether the error is wanted.
    pub fn new(params: &Params, problem: &Problem, estimates: bool) -> Self {
        let (tiles, target) = (QueryTiles::new(problem), params.target_error > 0.0);
        let least_budget = plan::least_budget(params);
        let most_budget = if target { plan::most_budget(params, problem) } else { params.budget as usize };
        RefinedPlan {
            tile_rows: tiles.rows,
            earlier_queries: tiles.earlier,
            query_tiles: tiles.count(),
            candidates_per_key: refine::candidates_per_key(problem.n_k),
            least_budget,
            most_budget,
            probes: (target || estimates).then(|| ProbePlan::new(params, problem, least_budget)),
        }
    }
}

/// The probe rows of a head.
#[derive(Debug, Clone, Copy)]
pub struct ProbePlan {
    /// Tiles of queries before it have none.
    pub first_tile: usize,
    /// Tiles with probe rows.
    pub tiles: usize,
    /// Rows of one tile.
    pub rows_of_a_tile: usize,
    /// All queries over those that probe rows stand for.
    pub whole_over_probed: f64,
}

impl ProbePlan {
    /// Among the queries that see more than `exact_keys` keys: 0 for METHOD_PAPER.
    pub fn new(params: &Params, problem: &Problem, exact_keys: usize) -> Self {
        let probes = Probes::new(params, problem, params.budget as usize, exact_keys);
        ProbePlan {
            first_tile: probes.first_tile,
            tiles: probes.tiles,
            rows_of_a_tile: PROBE_ROWS,
            whole_over_probed: probes.whole_over_probed(),
        }
    }
}
