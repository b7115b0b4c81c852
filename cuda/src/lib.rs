//! HyperAttention on CUDA.
//!
//! [`forward`] enqueues attention, and [`backward()`] its gradients, on a stream of the caller's current context. The
//! driver, and NVRTC where it is needed, are loaded when they are first asked for: on a machine without them this crate
//! builds, links and answers [`hyperattn_core::ErrorKind::DeviceUnavailable`].

mod abi;
mod attend;
mod backward;
mod call;
mod cost;
mod divided;
mod driver;
mod exact;
mod figures;
mod forward;
mod gradients;
mod image;
mod kernels;
mod launch;
mod method;
mod paper;
mod parts;
mod refined;
mod states;
mod tensor_map;
mod workspace;

pub use backward::{backward, backward_divided, backward_divided_workspace, backward_workspace};
pub use call::{DeviceBlockMask, DeviceTensor, DeviceTensors};
pub use forward::{forward, forward_divided, forward_divided_workspace, forward_workspace, prepare};
pub use gradients::DeviceGradients;

/// Whether this build has device code that was compiled when it was built. Otherwise NVRTC compiles each kernel when a
/// process first needs it.
pub const COMPILED_AT_BUILD: bool = image::COMPILED_AT_BUILD;
