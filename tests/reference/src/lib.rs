//! Double-precision oracle for attention and the published estimator (HyperAttention, arXiv 2310.05869).
//!
//! Slow, small and written from the formulas alone, so that it can be read against the paper and shares
//! neither code nor mistakes with the library. It draws no random numbers for the estimators: projections,
//! samples and masks are arguments, so a test can pass the ones that the library used.
//! Inputs are the row-major rows of one head; feed it the *rounded* inputs that the library sees.

mod backward;
mod causal;
mod error;
mod estimator;
mod exact;
mod gray;
mod partial;
mod problem;
mod random;
mod sort_lsh;
mod terms;

pub use backward::{Gradients, backward};
pub use causal::masked_rows;
pub use error::{max_abs_lse_difference, relative_frobenius_error};
pub use estimator::{RowNormSamples, blocks_only, row_norm, row_norm_probabilities, uniform};
pub use exact::{Mask, exact, exact_rows};
pub use gray::{gray_ranks, gray_sequence};
pub use partial::{Output, Partial};
pub use problem::Problem;
pub use random::Generator;
pub use sort_lsh::{SortedBlocks, key_block, lsh_code, query_block, sorted_order};
pub use terms::{Row, Term, Terms};
