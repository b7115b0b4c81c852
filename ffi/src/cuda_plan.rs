//! A plan of a CUDA call: checked, and its kernels loaded, when it is made.

use hyperattn_core::{Layout, Layouts};
use hyperattn_cuda::DeviceTensors;

use crate::boundary::{check_pointer, guard, required};
use crate::call;
use crate::cpu::read_tensors;
use crate::cuda::{Arguments, device_tensors, enqueue, given_tensors, read_exec};
use crate::error::Result;
use crate::memory::boxed;
use crate::planned::Planned;
use crate::types::*;

/// A forward call on a CUDA device without its data: the twin of hyperattn_plan. It holds no memory of the device.
pub struct hyperattn_cuda_plan {
    planned: Planned,
    workspace: Layout,
}

/// Makes a plan for hyperattn_cuda_plan_run(). What hyperattn_plan_create() says of its arguments holds here, but that
/// METHOD_AUTO goes with a block_mask. The kernels are loaded into the calling thread's current context, so that runs
/// in it only launch them; where the build has none for its device, NVRTC compiles each when it first runs.
///
/// HYPERATTN_STATUS_DEVICE_UNAVAILABLE where there is no driver, device or current context, or no kernels for it.
///
///     hyperattn_cuda_plan *plan;
///     if (hyperattn_cuda_plan_create(&params, &tensors, &plan) != HYPERATTN_STATUS_OK)
///         return hyperattn_last_error();
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_plan_create(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    out: *mut *mut hyperattn_cuda_plan,
) -> hyperattn_status {
    guard(|| {
        check_pointer(out.cast_const(), "out")?;
        // SAFETY: the pointers are what the header asks for.
        let arguments = unsafe {
            Arguments::read(params, tensors, |from| {
                device_tensors(from, |tensor| tensor.dtype != 0, &|_, _| Ok(()))
            })
        }?;
        let plan = hyperattn_cuda_plan::new(arguments)?;
        let plan = Box::into_raw(boxed(plan)?).cast::<hyperattn_cuda_plan>();
        // SAFETY: out is aligned and, not being NULL, writable.
        unsafe { out.write(plan) };
        Ok(())
    })
}

/// Frees a plan that no thread uses any more; runs that are enqueued need it no longer. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_plan_destroy(plan: *mut hyperattn_cuda_plan) {
    if !plan.is_null() {
        // SAFETY: it comes from hyperattn_cuda_plan_create, as a slice of one, and nobody else has it.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(plan, 1)) });
    }
}

/// Size and alignment of the device workspace that hyperattn_cuda_plan_run() needs: what
/// hyperattn_cuda_forward_workspace() answers for the plan's arguments. *out is written on success only.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_plan_workspace(
    plan: *const hyperattn_cuda_plan,
    out: *mut hyperattn_layout,
) -> hyperattn_status {
    guard(|| {
        check_pointer(out.cast_const(), "out")?;
        // SAFETY: the pointer is what the header asks for.
        let Layout { size, align } = unsafe { required(plan, "plan") }?.workspace;
        // SAFETY: out is aligned and, not being NULL, writable.
        unsafe { out.write(hyperattn_layout { size, align }) };
        Ok(())
    })
}

/// hyperattn_cuda_forward() for the plan's arguments and the data of these tensors, with the same bits. With a
/// workspace it can be captured in a graph.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_plan_run(
    plan: *const hyperattn_cuda_plan,
    tensors: *const hyperattn_tensors,
    exec: *const hyperattn_cuda_exec,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers are what the header asks for.
        let (plan, from) = unsafe { (required(plan, "plan")?, read_tensors(tensors)?) };
        // SAFETY: as above.
        let exec = unsafe { read_exec(exec) }?;
        let planned = &plan.planned;
        // SAFETY: as above.
        let (tensors, division) = unsafe {
            let tensors = given_tensors(&from)?;
            let division = call::division(&planned.options, &from, &tensors.q.layout)?;
            (tensors, division)
        };
        planned.check(&layouts(&tensors), division.sequences.as_ref())?;
        // SAFETY: as above: the tensors and the workspace are the call's until the stream has passed it.
        unsafe { enqueue(&planned.options, &planned.division(), &tensors, &exec) }
    })
}

impl hyperattn_cuda_plan {
    fn new(Arguments { options, tensors, division, .. }: Arguments<'_>) -> Result<Self> {
        let workspace = hyperattn_cuda::forward_divided_workspace(&options.params, &division, &tensors)?;
        hyperattn_cuda::prepare()?;
        Ok(hyperattn_cuda_plan { planned: Planned::new(options, &division, layouts(&tensors))?, workspace })
    }
}

/// What the host can see of them.
fn layouts(tensors: &DeviceTensors) -> Layouts<'static> {
    Layouts { block_mask: tensors.block_mask.map(|mask| mask.counts()), ..tensors.layouts() }
}
