//! The backward pass: the gradient of the estimator that the forward ran, see core's `docs/backward.md`.
//!
//! A thread block owns a tile of queries, and walks the keys that they meet, for dq; another owns a tile of keys, and walks
//! the queries that meet them, for dk and dv. On Hopper one kernel does both for exact rectangles: its tiles of keys add to
//! sums of dq in memory, in turn or, where the caller permits it, in any order. Every other sum has one order.

mod exact;
pub(crate) mod fused;
pub(crate) mod launch;
mod shared_heads;

use std::ffi::c_void;

use hyperattn_core::{DType, Division, Error, ErrorKind, Layout, Params, Result};

use crate::abi::{BackwardParams, RowTerms, View, element_type};
use crate::call::{Call, DeviceTensors};
use crate::divided::Parts;
use crate::driver::{CUstream, driver};
use crate::forward::{check_workspace, measured, with_workspace};
use crate::gradients::DeviceGradients;
use crate::kernels::loaded;
use crate::launch::{Queue, args};
use crate::method::Run;
use crate::workspace::{Carver, Pointer, WORKSPACE_ALIGN};
use crate::{paper, refined};
use shared_heads::SharedHeads;

/// Size and alignment of the workspace that [`backward`] needs for these options and tensors. Needs no device, and no
/// address is looked at. Every error that does not concern the gradients, addresses, contents or the device is reported
/// here too.
pub fn backward_workspace(params: &Params, tensors: &DeviceTensors) -> Result<Layout> {
    backward_divided_workspace(params, &Division::default(), tensors)
}

/// [`backward_workspace`] of [`backward_divided`].
pub fn backward_divided_workspace(
    params: &Params,
    division: &Division<'_>,
    tensors: &DeviceTensors,
) -> Result<Layout> {
    let parts = Parts::new(params, division, &without_figures(tensors))?;
    Ok(Layout { size: most_size(&parts)?, align: WORKSPACE_ALIGN })
}

/// Writes dq, dk and dv, enqueued on `stream` of the calling thread's current context. `tensors` are those of the
/// forward call with the same `params`, `out` and `lse` as it left them; they are only read, and `error` and
/// `keys_per_query` not at all. What [`crate::forward`] says of the workspace, the stream and errors holds here too.
///
/// # Safety
/// As for [`crate::forward`]; what `gradients` describe is memory of the context's device too, the outputs among it
/// writable and used by nobody else.
pub unsafe fn backward(
    params: &Params,
    tensors: &DeviceTensors,
    gradients: &DeviceGradients,
    workspace: Option<(u64, usize)>,
    stream: *mut c_void,
) -> Result<()> {
    // SAFETY: the caller's contract.
    unsafe { backward_divided(params, &Division::default(), tensors, gradients, workspace, stream) }
}

/// [`backward`] of a call that is divided: its parts are enqueued one after the other and use the same workspace.
///
/// # Safety
/// As for [`backward`].
pub unsafe fn backward_divided(
    params: &Params,
    division: &Division<'_>,
    tensors: &DeviceTensors,
    gradients: &DeviceGradients,
    workspace: Option<(u64, usize)>,
    stream: *mut c_void,
) -> Result<()> {
    let parts = Parts::new(params, division, &without_figures(tensors))?;
    gradients.check(tensors)?;
    let need = most_size(&parts)?;
    gradients.check_addresses(tensors)?;
    if let Some((address, size)) = workspace {
        check_workspace(address, size, need)?;
    }
    let driver = driver()?;
    let loaded = loaded(driver)?;
    let stream: CUstream = stream.cast();
    // SAFETY: what is loaded is the current context's; the stream is the caller's contract.
    let queue = unsafe { Queue::new(driver, &loaded, stream) };
    let run_parts = |address: u64| {
        (0..parts.count()).try_for_each(|index| {
            let part = parts.part(index)?;
            let (call, whole) = (part.call()?, gradients.part(part.section()));
            let mut carver = Carver::new(address);
            let shared = SharedHeads::carve(&part, parts.group(), &call.problem, &mut carver);
            let gradients = shared.as_ref().map_or(whole, |shared| shared.gradients_of_part(&whole));
            let buffers = Buffers::carve(&call, &mut carver)?;
            // SAFETY: the caller's contract; the workspace suffices for every part, and the stream is through with
            // the part before.
            unsafe {
                Backward { queue: &queue, call: &call, gradients, buffers: &buffers }.run()?;
                shared.map_or(Ok(()), |shared| shared.add(&queue, &whole))
            }
        })
    };
    // SAFETY: the stream is of the current context (contract).
    unsafe { with_workspace(driver, stream, workspace, need, run_parts) }
}

/// The tensors that a backward call looks at.
fn without_figures(tensors: &DeviceTensors) -> DeviceTensors {
    DeviceTensors { error: None, keys_per_query: None, ..*tensors }
}

/// Bytes of the workspace that suffices for every part.
fn most_size(parts: &Parts<'_>) -> Result<usize> {
    (0..parts.count()).try_fold(0, |most: usize, index| {
        let part = parts.part(index)?;
        let (call, mut carver) = (part.call()?, Carver::measuring());
        SharedHeads::carve(&part, parts.group(), &call.problem, &mut carver);
        Buffers::carve(&call, &mut carver)?;
        Ok(measured(&carver)?.max(most))
    })
}

/// The parts of the workspace.
struct Buffers {
    row_terms: Pointer<RowTerms>,
    next_tile: Pointer<u32>,
    method: MethodBuffers,
}

enum MethodBuffers {
    Exact(exact::Buffers),
    Paper(paper::Buffers),
    Refined(refined::gradient::Buffers),
}

impl Buffers {
    fn carve(call: &Call<'_>, carver: &mut Carver) -> Result<Self> {
        let problem = &call.problem;
        let rows = problem.batch.saturating_mul(problem.heads_q).saturating_mul(problem.n_q);
        Ok(Buffers {
            row_terms: carver.take(rows),
            next_tile: carver.take(1),
            method: match Run::of(call) {
                Run::Exact => MethodBuffers::Exact(exact::Buffers::carve(call, carver)?),
                Run::Paper => MethodBuffers::Paper(paper::carve_gradient(call, carver)?),
                Run::Refined => MethodBuffers::Refined(refined::gradient::carve(call, carver)?),
            },
        })
    }
}

/// A call under way.
struct Backward<'r, 'a> {
    queue: &'r Queue<'a>,
    call: &'r Call<'r>,
    gradients: DeviceGradients,
    buffers: &'r Buffers,
}

impl Backward<'_, '_> {
    /// # Safety
    /// As for [`backward`]; the workspace is there.
    unsafe fn run(&self) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.row_terms() }?;
        match &self.buffers.method {
            // SAFETY: as above.
            MethodBuffers::Exact(buffers) => unsafe { self.exact(buffers) },
            // SAFETY: as above.
            MethodBuffers::Paper(buffers) => unsafe {
                paper::run_gradient(self.queue, self.call, buffers, &self.params())
            },
            // SAFETY: as above.
            MethodBuffers::Refined(buffers) => unsafe {
                refined::gradient::run(self.queue, self.call, buffers, &self.params())
            },
        }
    }

    /// lse and delta of every query.
    ///
    /// # Safety
    /// As for [`Self::run`], like what follows.
    unsafe fn row_terms(&self) -> Result<()> {
        /// Threads of a block, and its rows (BACKWARD_ROWS_THREADS, BACKWARD_ROWS).
        const THREADS: u32 = 256;
        const ROWS: usize = 64;
        let (problem, tensors) = (&self.call.problem, &self.call.tensors);
        let rows = problem.batch * problem.heads_q * problem.n_q;
        let Ok(grid) = i32::try_from(rows.div_ceil(ROWS)) else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format_args!("batch * heads_q * n_q = {rows} is more than a grid holds; split the batch"),
            ));
        };
        let dlse = self.gradients.dlse.map_or(View::NULL, |dlse| dlse.view());
        // SAFETY: these are the kernel's parameters; it reads out, lse and their gradients, and writes the terms.
        unsafe {
            self.queue.launch(
                c"backward_rows",
                [grid as u32, 1, 1],
                THREADS,
                0,
                args![
                    self.params(),
                    tensors.out.view(),
                    element_type(tensors.out.layout.dtype),
                    dlse,
                    self.buffers.row_terms,
                    rows as u64,
                ],
            )
        }
    }

    /// What the kernels need to know of the call; the lists are still missing.
    fn params(&self) -> BackwardParams {
        let gradients = &self.gradients;
        let mut attend = self.call.attend_params();
        attend.out = gradients.dq.view();
        attend.out_type = element_type(gradients.dq.layout.dtype);
        attend.next_tile = self.buffers.next_tile;
        BackwardParams {
            attend,
            dout: gradients.dout.view(),
            dk: gradients.dk.view(),
            dv: gradients.dv.view(),
            row_terms: self.buffers.row_terms,
            key_tiles: Pointer::NULL,
            query_segments: Pointer::NULL,
            hidden: Pointer::NULL,
            key_sums: Pointer::NULL,
            value_sums: Pointer::NULL,
            key_partials: Pointer::NULL,
            value_partials: Pointer::NULL,
            key_stored: Pointer::NULL,
            dout_type: element_type(gradients.dout.layout.dtype),
            dk_type: element_type(gradients.dk.layout.dtype),
            dv_type: element_type(gradients.dv.layout.dtype),
            key_tile_count: 0,
            scale: self.call.problem.scale_log2 * std::f32::consts::LN_2,
            key_sums_type: element_type(DType::F32),
        }
    }
}
