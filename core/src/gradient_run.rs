//! What the backward pass gives to a method beside what the forward gives.

use crate::gradient_refined::SplitSums;
use crate::gradient_tile::{GradientCall, GradientSums};

/// What a method that computes gradients instead of outputs is given.
pub(crate) struct GradientRun<'r, 'a> {
    pub(crate) of: &'r GradientCall<'r>,
    pub(crate) sums: &'r GradientSums<'r>,
    /// Sums for METHOD_PAPER's columns.
    pub(crate) columns: &'r mut [f32],
    /// Sums for METHOD_REFINED's tasks.
    pub(crate) split_sums: &'r mut SplitSums<'a>,
}
