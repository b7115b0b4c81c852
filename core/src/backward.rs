//! The backward pass: the gradient of the estimator that the forward ran, see `docs/backward.md`.

use crate::division::Division;
use crate::error::{Error, ErrorKind, Result};
use crate::exec::Executor;
use crate::gradients::Gradients;
use crate::params::Params;
use crate::problem::{Layouts, Tensors};
use crate::scratch::Layout;
use crate::simd::Kernels;

/// Size and alignment of the workspace that [`backward`] needs for these options, layouts, division, kernels and number of
/// lanes. Every error that does not concern the gradients, addresses or contents is reported here too.
pub fn backward_workspace(
    params: &Params,
    division: &Division<'_>,
    layouts: &Layouts<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
) -> Result<Layout> {
    let _ = (params, division, layouts, kernels, executor);
    Err(Error::new(ErrorKind::Unsupported, format_args!("backward is not there yet")))
}

/// Writes dq, dk and dv. `tensors` are those of the forward call with the same `params` and `division`, `out` and `lse` as
/// it left them; they are only read, and `error` and `keys_per_query` not at all.
pub fn backward(
    params: &Params,
    division: &Division<'_>,
    tensors: &Tensors<'_>,
    gradients: &mut Gradients<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
) -> Result<()> {
    let _ = (params, division, tensors, gradients, kernels, executor, workspace);
    Err(Error::new(ErrorKind::Unsupported, format_args!("backward is not there yet")))
}
