//! HyperAttention algorithms and CPU kernels.
//!
//! `no_std`, no allocation, no threads of its own: the caller passes the workspace and an [`Executor`].
//! [`forward`] is the entry point; [`merge`] joins partial results.
#![no_std]
#![doc = include_str!("../docs/algorithms.md")]
#![doc = include_str!("../docs/refined.md")]
#![doc = include_str!("../docs/backward.md")]

mod approx_d;
mod backward;
mod causal;
mod cost;
pub mod device;
mod diagnose;
mod division;
mod element;
mod error;
mod exact;
mod exec;
mod forward;
mod gradient_exact;
mod gradient_hyper;
mod gradient_refined;
mod gradient_run;
mod gradient_tile;
mod gradients;
mod hyper;
mod keys_per_query;
mod known_mask;
mod lsh;
mod mask_tile;
mod math;
mod merge;
mod overlap;
mod pack;
mod paper;
mod params;
mod part;
mod pass;
mod plan;
mod probe;
mod problem;
mod query_tiles;
mod refine;
mod refined;
mod represent;
mod residual;
mod rng;
mod scratch;
mod select;
pub mod simd;
mod sort;
mod states;
mod summarised_keys;
mod summary;
mod tasks;
mod tile;
mod tiling;
mod unmet;
mod view;
mod workspace;

/// The stages of selection one by one, to compare them with other implementations: codes, permutations
/// and samples are the same bits everywhere.
pub mod stages {
    pub use crate::approx_d::{tau_position, tau_rows};
    pub use crate::keys_per_query::keys_per_query;
    pub use crate::lsh::{fill_projections, gray_rank, projection_width};
    pub use crate::residual::{
        Column, accumulate_norms, row_norm_columns, row_norm_stream, uniform_columns, uniform_stream,
    };
    pub use crate::rng::{Purpose, Stream, below, philox, unit};
    pub use crate::sort::{counter_len, needs_spare, sort_by_rank, split};
}

pub use backward::{backward, backward_workspace};
pub use diagnose::{HeadFigures, head_figures, head_figures_workspace};
pub use division::{Division, Sequences};
pub use element::{DType, Element};
pub use error::{Error, ErrorKind, Result};
pub use exec::{Executor, Serial};
pub use forward::{
    forward, forward_divided, forward_divided_workspace, forward_recording, forward_workspace,
};
pub use gradients::{GradientLayouts, Gradients};
pub use half::{bf16, f16};
pub use merge::merge;
pub use params::{BlockMask, Mask, Method, Params, Residual};
pub use problem::{Layouts, MAX_HEAD_DIM, Tensors};
pub use scratch::{Layout, WORKSPACE_ALIGN};
pub use simd::{Isa, Kernels};
pub use tasks::{run_tasks, task_count, task_workspace};
pub use unmet::{DIAGNOSIS_ROWS, Unmet, diagnosis_row};
pub use view::{MAX_SEQUENCE, TensorLayout, TensorMut, TensorRef};
