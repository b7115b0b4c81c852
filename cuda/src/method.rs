//! What computes the output of a call.

use hyperattn_core::Method;

use crate::call::Call;
use crate::{cost, paper};

/// What computes the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Run {
    Exact,
    Paper,
    Refined,
}

impl Run {
    /// The method that does this without a choice.
    pub(crate) fn method(self) -> Method {
        match self {
            Run::Exact => Method::Exact,
            Run::Paper => Method::Paper,
            Run::Refined => Method::Refined,
        }
    }

    pub(crate) fn of(call: &Call<'_>) -> Self {
        let (params, problem) = (call.params, &call.problem);
        let refining_is_exact =
            problem.n_k <= params.min_seq_len.max(params.budget as usize) || problem.n_q == 0;
        match params.method {
            Method::Paper if paper::estimates(call) => Run::Paper,
            Method::Refined if !refining_is_exact => Run::Refined,
            // The caller's blocks are METHOD_PAPER's.
            Method::Auto if call.tensors.block_mask.is_some() => {
                if paper::estimates(call) {
                    Run::Paper
                } else {
                    Run::Exact
                }
            }
            Method::Auto if !refining_is_exact && cost::refining_pays(call) => Run::Refined,
            _ => Run::Exact,
        }
    }
}
