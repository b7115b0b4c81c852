//! Attention on the CPU.

use std::alloc;
use std::ptr;

use hyperattn_core::{Division, Executor, Kernels, Layout, Layouts, Params, Tensors};

use crate::boundary::{check_pointer, guard, required};
use crate::error::{Failure, Result};
use crate::executor::{Chosen, kernels};
use crate::types::*;
use crate::{call, params, sized, tensor};

/// Size and alignment of the workspace that hyperattn_forward() needs for the same arguments. The tensors'
/// data are not looked at and may be NULL; *out is written on success only.
///
/// Never quadratic in the sequence. For n_q <= n_k at most the sum of: twice the bytes of k and v of one batch item (packed
/// keys and values, partial results); 24 bytes for every row of every query head and KV head; and for every thread
/// some 320 (head_dim + value dimension) numbers of 4 bytes, and 256 KiB with a mask tensor. METHOD_REFINED needs
/// besides: a twentieth of the bytes of k and v of one batch item, 13 bytes for every key for every thread, and 1 KiB
/// value_dim for every query head.
///
///     hyperattn_layout need;
///     hyperattn_cpu_exec exec = { .struct_size = sizeof exec };
///     if (hyperattn_forward_workspace(&params, &tensors, &exec, &need) == HYPERATTN_STATUS_OK) {
///         exec.workspace.data = aligned_alloc(need.align, need.size);
///         exec.workspace.size = need.size;
///     }
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_forward_workspace(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    exec: *const hyperattn_cpu_exec,
    out: *mut hyperattn_layout,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers are what the header asks for.
        unsafe {
            check_pointer(out.cast_const(), "out")?;
            let arguments = Arguments::read(params, tensors, exec)?;
            let layouts = arguments.layouts()?;
            out.write(arguments.workspace(&layouts, hyperattn_core::forward_divided_workspace)?);
        }
        Ok(())
    })
}

/// out = softmax(scale * q k^T) v under params.mask, exactly or by the estimator that params asks for, and with
/// tensors.mask added to the logits where there is one; and lse, when its data is not NULL.
///
/// Returns when the outputs are complete. Any number of threads may call at the same time with outputs and
/// workspaces of their own. The same arguments give the same bits for every number of threads, with a
/// given or an internal workspace, on every machine with the same hyperattn_cpu_isa(). A batch item's
/// result does not depend on the other items. With a workspace nothing is allocated, except that the library's own
/// threads, once started, take a block of queue memory now and then (none with num_threads = 1 or a pool).
/// The library's threads do not survive fork(): in a child use num_threads = 1 or a pool.
///
/// A NaN stays in the rows that see it; logits of -inf are legal. On an error the outputs are untouched, except
/// when exec.pool returned before its tasks had run (INVALID_ARGUMENT) or for INTERNAL.
///
///     hyperattn_tensors t = { .struct_size = sizeof t };
///     t.q   = hyperattn_tensor_bhsd(q,   HYPERATTN_DTYPE_F32, 1, 8, n, 64);
///     t.k   = hyperattn_tensor_bhsd(k,   HYPERATTN_DTYPE_F32, 1, 2, n, 64);
///     t.v   = hyperattn_tensor_bhsd(v,   HYPERATTN_DTYPE_F32, 1, 2, n, 64);
///     t.out = hyperattn_tensor_bhsd(out, HYPERATTN_DTYPE_F32, 1, 8, n, 64);
///     if (hyperattn_forward(&params, &t, NULL) != HYPERATTN_STATUS_OK)
///         fprintf(stderr, "%s\n", hyperattn_last_error());
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_forward(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    exec: *const hyperattn_cpu_exec,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers are what the header asks for.
        let Arguments { options, from, exec } = unsafe { Arguments::read(params, tensors, exec) }?;
        // SAFETY: as above: the views describe the caller's memory, which is the call's until it returns.
        let (mut tensors, division) = unsafe {
            let tensors = call::tensors(&from)?;
            let division = call::division(&options, &from, tensors.q.layout())?;
            (tensors, division)
        };
        // SAFETY: as above.
        let chosen = unsafe { Chosen::new(&exec) }?;
        run(&options, &division, &mut tensors, chosen.executor(), exec.workspace)
    })
}

/// Joins two partial attention results over disjoint keys; a becomes the result over the union:
/// out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b), lse = ln(e^lse_a + e^lse_b).
///
/// out_a and out_b have one shape and any dtype; lse_a and lse_b are f32 [batch, heads, sequence, 1]. A row
/// with lse -inf is empty, and the other side comes back unchanged. Runs on the calling thread and
/// allocates nothing.
///
///     hyperattn_merge(&out_old, &lse_old, &out_new, &lse_new);
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_merge(
    out_a: *const hyperattn_tensor,
    lse_a: *const hyperattn_tensor,
    out_b: *const hyperattn_tensor,
    lse_b: *const hyperattn_tensor,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers and what they describe are as the header asks.
        unsafe {
            let mut out = tensor::output("out_a", required(out_a, "out_a")?)?;
            let mut lse = tensor::output("lse_a", required(lse_a, "lse_a")?)?;
            let out_b = tensor::input("out_b", required(out_b, "out_b")?)?;
            let lse_b = tensor::input("lse_b", required(lse_b, "lse_b")?)?;
            hyperattn_core::merge(kernels(), &mut out, &mut lse, &out_b, &lse_b)?;
        }
        Ok(())
    })
}

/// The forward pass with `workspace`, or with memory of its own where that is empty.
pub(crate) fn run(
    options: &params::Options,
    division: &Division<'_>,
    tensors: &mut Tensors<'_>,
    executor: &dyn Executor,
    workspace: hyperattn_buffer,
) -> Result<()> {
    let (params, layouts) = (&options.params, tensors.layouts());
    let need = hyperattn_core::forward_divided_workspace(params, division, &layouts, kernels(), executor)?;
    let mut workspace = Workspace::new(workspace, need, options.may_allocate)?;
    let memory = workspace.bytes();
    hyperattn_core::forward_divided(params, division, tensors, kernels(), executor, memory)?;
    Ok(())
}

/// A function of the core that tells a call's workspace.
type Need =
    fn(&Params, &Division<'_>, &Layouts<'_>, &Kernels, &dyn Executor) -> hyperattn_core::Result<Layout>;

/// The structs of a call, read but for the tensors' contents.
pub(crate) struct Arguments {
    pub(crate) options: params::Options,
    pub(crate) from: hyperattn_tensors,
    pub(crate) exec: hyperattn_cpu_exec,
}

impl Arguments {
    /// # Safety
    /// Each pointer is NULL or points to as many readable bytes as its struct_size says.
    pub(crate) unsafe fn read(
        params: *const hyperattn_params,
        tensors: *const hyperattn_tensors,
        exec: *const hyperattn_cpu_exec,
    ) -> Result<Self> {
        // SAFETY: the caller's contract.
        unsafe {
            Ok(Arguments {
                options: params::read(params)?,
                from: read_tensors(tensors)?,
                exec: read_exec(exec)?,
            })
        }
    }

    /// What the tensors describe; their data are not looked at.
    ///
    /// # Safety
    /// The block mask is NULL or valid, for as long as the result is used.
    pub(crate) unsafe fn layouts<'a>(&self) -> Result<Layouts<'a>> {
        // SAFETY: the caller's contract.
        unsafe { call::layouts(&self.from, |tensor| !tensor.data.is_null()) }
    }

    /// The workspace that `need` tells for tensors of these layouts.
    ///
    /// # Safety
    /// What the structs point to, but for the tensors' data, is as the header asks.
    pub(crate) unsafe fn workspace(&self, layouts: &Layouts<'_>, need: Need) -> Result<hyperattn_layout> {
        let Arguments { options, from, exec } = self;
        // SAFETY: the caller's contract.
        let (division, chosen) = unsafe { (call::division(options, from, &layouts.q)?, Chosen::new(exec)?) };
        let Layout { size, align } = need(&options.params, &division, layouts, kernels(), chosen.executor())?;
        Ok(hyperattn_layout { size, align })
    }
}

/// # Safety
/// `pointer` is NULL or points to as many readable bytes as its struct_size says.
pub(crate) unsafe fn read_tensors(pointer: *const hyperattn_tensors) -> Result<hyperattn_tensors> {
    let defaults = hyperattn_tensors {
        struct_size: 0,
        q: tensor::EMPTY,
        k: tensor::EMPTY,
        v: tensor::EMPTY,
        out: tensor::EMPTY,
        lse: tensor::EMPTY,
        block_mask: ptr::null(),
        error: tensor::EMPTY,
        mask: tensor::EMPTY,
        num_sequences: 0,
        cu_seqlens_q: ptr::null(),
        cu_seqlens_k: ptr::null(),
    };
    // SAFETY: the caller's contract.
    unsafe { sized::read(pointer, "tensors", defaults) }
}

/// # Safety
/// As for [`read_tensors`].
pub(crate) unsafe fn read_exec(pointer: *const hyperattn_cpu_exec) -> Result<hyperattn_cpu_exec> {
    let defaults = hyperattn_cpu_exec {
        struct_size: size_of::<hyperattn_cpu_exec>(),
        workspace: hyperattn_buffer { data: ptr::null_mut(), size: 0 },
        num_threads: 0,
        reserved: 0,
        pool: ptr::null(),
    };
    if pointer.is_null() {
        return Ok(defaults);
    }
    // SAFETY: the caller's contract.
    let exec = unsafe { sized::read(pointer, "exec", defaults) }?;
    if exec.reserved != 0 {
        return Err(Failure::invalid(format_args!("exec.reserved = {} must be 0", exec.reserved)));
    }
    check_buffer("exec.workspace", &exec.workspace)?;
    Ok(exec)
}

/// A lent workspace is somewhere.
pub(crate) fn check_buffer(name: &str, workspace: &hyperattn_buffer) -> Result<()> {
    if workspace.data.is_null() && workspace.size != 0 {
        return Err(Failure::invalid(format_args!(
            "{name}.data is NULL but {name}.size = {}",
            workspace.size
        )));
    }
    Ok(())
}

/// What a call answers that may not allocate and has no workspace.
pub(crate) fn no_workspace(need: usize) -> Failure {
    Failure::new(
        HYPERATTN_STATUS_WORKSPACE_TOO_SMALL,
        format_args!(
            "params.flags has HYPERATTN_FLAG_NO_ALLOC but the workspace is empty; {need} bytes are needed"
        ),
    )
}

/// The caller's scratch memory, or our own for the length of a call.
pub(crate) struct Workspace {
    data: *mut u8,
    size: usize,
    owned: Option<alloc::Layout>,
}

impl Workspace {
    pub(crate) fn new(given: hyperattn_buffer, need: Layout, may_allocate: bool) -> Result<Self> {
        if !given.data.is_null() {
            return Ok(Workspace { data: given.data.cast(), size: given.size, owned: None });
        }
        if !may_allocate {
            return Err(no_workspace(need.size));
        }
        let no_memory = || {
            Failure::new(
                HYPERATTN_STATUS_OUT_OF_MEMORY,
                format_args!("{} bytes of scratch memory could not be allocated", need.size),
            )
        };
        let layout = alloc::Layout::from_size_align(need.size.max(1), need.align).map_err(|_| no_memory())?;
        // SAFETY: the size is not 0.
        let data = unsafe { alloc::alloc(layout) };
        if data.is_null() {
            return Err(no_memory());
        }
        Ok(Workspace { data, size: need.size, owned: Some(layout) })
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `size` bytes are ours for the length of the call: allocated above, or lent by the caller.
        // The core writes every byte of it before reading it.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.size) }
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if let Some(layout) = self.owned {
            // SAFETY: allocated with this layout.
            unsafe { alloc::dealloc(self.data, layout) }
        }
    }
}
