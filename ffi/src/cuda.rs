//! Attention on CUDA: always exported.

use hyperattn_core::{Division, Layout, Params};
use hyperattn_cuda::{DeviceBlockMask, DeviceTensor, DeviceTensors};

use crate::boundary::{check_pointer, guard};
use crate::cpu::{check_buffer, no_workspace, read_tensors};
use crate::error::{Failure, Result};
use crate::params::{self, Options};
use crate::types::*;
use crate::{block_mask, call, sized, tensor};

/// Size and alignment of the device workspace that hyperattn_cuda_forward() needs for the same arguments. Needs no
/// device. The tensors' data are not looked at and may be NULL; *out is written on success only.
///
///     hyperattn_layout need;
///     hyperattn_cuda_exec exec = { .struct_size = sizeof exec, .stream = stream };
///     if (hyperattn_cuda_forward_workspace(&params, &tensors, &need) == HYPERATTN_STATUS_OK) {
///         cudaMalloc(&exec.workspace.data, need.size);
///         exec.workspace.size = need.size;
///     }
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_forward_workspace(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    out: *mut hyperattn_layout,
) -> hyperattn_status {
    guard(|| {
        check_pointer(out.cast_const(), "out")?;
        // SAFETY: the pointers are what the header asks for, and out is neither NULL nor misaligned.
        unsafe {
            let arguments = Arguments::read(params, tensors, |from| {
                device_tensors(from, |tensor| !tensor.data.is_null(), &|_, _| Ok(()))
            })?;
            out.write(arguments.workspace(hyperattn_cuda::forward_divided_workspace)?);
        }
        Ok(())
    })
}

/// hyperattn_forward() for tensors in device memory, enqueued on exec->stream: it returns before the outputs are
/// complete, and does not wait for the device. params, tensors and exec are read before it returns; what they point to in
/// device memory must stay until the stream has passed the call. Addresses must be multiples of the elements' size.
///
/// With a workspace nothing is allocated on the device, so that a call can be captured in a graph and replayed: with the same
/// addresses, on what they then hold. The first call in a context loads the kernels, and where the build has none for the
/// device, NVRTC compiles each when a process first needs it, which takes seconds: make it outside of what is timed.
///
/// Sequences, and heads with methods of their own, are enqueued one part after the other in the same workspace: many
/// short sequences leave a large device partly idle.
///
/// HYPERATTN_STATUS_DEVICE_UNAVAILABLE where there is no driver, device or current context, or no kernels for it;
/// HYPERATTN_STATUS_CUDA for other errors of the driver. What goes wrong while the kernels run is reported where the
/// stream is waited for, as CUDA does.
///
///     hyperattn_cuda_exec exec = { .struct_size = sizeof exec, .stream = stream };
///     if (hyperattn_cuda_forward(&params, &tensors, &exec) != HYPERATTN_STATUS_OK)
///         fprintf(stderr, "%s\n", hyperattn_last_error());
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_cuda_forward(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    exec: *const hyperattn_cuda_exec,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers are what the header asks for.
        let arguments = unsafe { Arguments::read(params, tensors, |from| given_tensors(from)) }?;
        // SAFETY: as above.
        let exec = unsafe { read_exec(exec) }?;
        let Arguments { options, division, tensors, .. } = &arguments;
        // SAFETY: as above: the tensors and the workspace are the call's until the stream has passed it.
        unsafe { enqueue(options, division, tensors, &exec) }
    })
}

/// A function that tells a call's workspace.
type Need = fn(&Params, &Division<'_>, &DeviceTensors) -> hyperattn_core::Result<Layout>;

/// The structs of a call, but for where it runs.
pub(crate) struct Arguments<'a> {
    pub(crate) options: Options,
    pub(crate) from: hyperattn_tensors,
    pub(crate) tensors: DeviceTensors,
    pub(crate) division: Division<'a>,
}

impl Arguments<'_> {
    /// `to_device` gives the call's tensors.
    ///
    /// # Safety
    /// Each pointer is NULL or points to as many readable bytes as its struct_size says; the arrays in the host's memory
    /// that the structs point to hold what the header says, for as long as the result is used.
    pub(crate) unsafe fn read(
        params: *const hyperattn_params,
        tensors: *const hyperattn_tensors,
        to_device: impl FnOnce(&hyperattn_tensors) -> Result<DeviceTensors>,
    ) -> Result<Self> {
        // SAFETY: the caller's contract.
        unsafe {
            let (options, from) = (params::read(params)?, read_tensors(tensors)?);
            let tensors = to_device(&from)?;
            let division = call::division(&options, &from, &tensors.q.layout)?;
            Ok(Arguments { options, from, tensors, division })
        }
    }

    /// The workspace that `need` tells.
    pub(crate) fn workspace(&self, need: Need) -> Result<hyperattn_layout> {
        let Layout { size, align } = need(&self.options.params, &self.division, &self.tensors)?;
        Ok(hyperattn_layout { size, align })
    }
}

/// Enqueues a call.
///
/// # Safety
/// As for [`hyperattn_cuda::forward`].
pub(crate) unsafe fn enqueue(
    options: &Options,
    division: &Division<'_>,
    tensors: &DeviceTensors,
    exec: &hyperattn_cuda_exec,
) -> Result<()> {
    let params = &options.params;
    let need = || hyperattn_cuda::forward_divided_workspace(params, division, tensors);
    let workspace = workspace_of(exec, options, need)?;
    // SAFETY: the caller's contract.
    unsafe { hyperattn_cuda::forward_divided(params, division, tensors, workspace, exec.stream.cast()) }?;
    Ok(())
}

/// The caller's workspace, or none where the call may allocate what it `need`s.
pub(crate) fn workspace_of(
    exec: &hyperattn_cuda_exec,
    options: &Options,
    need: impl FnOnce() -> hyperattn_core::Result<Layout>,
) -> Result<Option<(u64, usize)>> {
    let hyperattn_buffer { data, size } = exec.workspace;
    if !data.is_null() {
        return Ok(Some((data as u64, size)));
    }
    if options.may_allocate { Ok(None) } else { Err(no_workspace(need()?.size)) }
}

/// The address and layout of a tensor with elements.
pub(crate) fn check_data(name: &str, from: &hyperattn_tensor) -> Result<()> {
    tensor::check_data(name, from, &tensor::layout(name, from)?)
}

/// A tensor; its data are not looked at.
pub(crate) fn device_tensor(name: &str, from: &hyperattn_tensor) -> Result<DeviceTensor> {
    Ok(DeviceTensor { address: from.data as u64, layout: tensor::layout(name, from)? })
}

/// The tensors of a call that looks at their data.
///
/// # Safety
/// As for [`device_tensors`].
pub(crate) unsafe fn given_tensors(from: &hyperattn_tensors) -> Result<DeviceTensors> {
    // SAFETY: the caller's contract.
    unsafe { device_tensors(from, |tensor| !tensor.data.is_null(), &check_data) }
}

/// The tensors of a call, each of them passed to `check` too; `wanted` says which of the optional ones there are.
///
/// # Safety
/// The block mask is NULL or points to as many readable bytes as its struct_size says.
pub(crate) unsafe fn device_tensors(
    from: &hyperattn_tensors,
    wanted: impl Fn(&hyperattn_tensor) -> bool,
    check: &dyn Fn(&str, &hyperattn_tensor) -> Result<()>,
) -> Result<DeviceTensors> {
    let required = |name: &str, from: &hyperattn_tensor| -> Result<DeviceTensor> {
        let tensor = device_tensor(name, from)?;
        check(name, from)?;
        Ok(tensor)
    };
    let optional =
        |name: &str, from: &hyperattn_tensor| wanted(from).then(|| required(name, from)).transpose();
    if wanted(&from.mask) {
        return Err(Failure::new(
            HYPERATTN_STATUS_UNSUPPORTED,
            format_args!("tensors.mask is given, but attention on CUDA takes none"),
        ));
    }
    let (q, k) = (required("q", &from.q)?, required("k", &from.k)?);
    Ok(DeviceTensors {
        q,
        k,
        v: required("v", &from.v)?,
        out: required("out", &from.out)?,
        lse: optional("lse", &from.lse)?,
        // SAFETY: the caller's contract.
        block_mask: unsafe { block_mask::read_counts(from.block_mask, &q.layout, &k.layout) }?.map(
            |(mask, from)| DeviceBlockMask {
                query_block: mask.query_block,
                key_block: mask.key_block,
                num_query_blocks: mask.num_query_blocks,
                num_key_blocks: mask.num_key_blocks,
                row_offsets: from.row_offsets as u64,
                columns: from.columns as u64,
                head_stride: mask.head_stride,
            },
        ),
        error: optional("error", &from.error)?,
        keys_per_query: None,
    })
}

/// # Safety
/// `pointer` is NULL or points to as many readable bytes as its struct_size says.
pub(crate) unsafe fn read_exec(pointer: *const hyperattn_cuda_exec) -> Result<hyperattn_cuda_exec> {
    let defaults = hyperattn_cuda_exec {
        struct_size: size_of::<hyperattn_cuda_exec>(),
        workspace: hyperattn_buffer { data: std::ptr::null_mut(), size: 0 },
        stream: std::ptr::null_mut(),
    };
    if pointer.is_null() {
        return Ok(defaults);
    }
    // SAFETY: the caller's contract.
    let exec = unsafe { sized::read(pointer, "exec", defaults) }?;
    check_buffer("exec.workspace", &exec.workspace)?;
    Ok(exec)
}
