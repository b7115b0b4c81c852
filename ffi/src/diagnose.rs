//! What an estimator does to each head, and what the paper's constants are there.

use std::sync::atomic::AtomicU32;

use hyperattn_core::{Executor, HeadFigures, Method, Params, TensorMut, Tensors, Unmet};

use crate::boundary::guard;
use crate::cpu::{self, Arguments, Workspace};
use crate::error::{Failure, Result};
use crate::executor::{Chosen, kernels};
use crate::params::Options;
use crate::types::*;
use crate::{block_mask, sized, tensor};

/// Runs the method that params asks for into memory of its own and reports about each head: how hard its attention is
/// to estimate, and how well it was estimated. A tool for choosing methods, budgets and layers, not for inference.
///
/// heads is an array of count = batch * heads_q entries, (batch item, head) row by row; the caller sets struct_size
/// in every one, to the same value, and gets the other fields on success. Of tensors only q, k, v, block_mask and mask are
/// looked at: nothing is written to out, lse and error, and a mask is HYPERATTN_STATUS_UNSUPPORTED. flags: 0 or HYPERATTN_DIAGNOSE_TRUE_ERROR.
///
/// Allocates the workspace of hyperattn_forward(), an output in f32 (two with TRUE_ERROR), 8 bytes for each key of each
/// query head, and for every thread some 260 bytes for each key; exec->workspace is not used. With
/// HYPERATTN_FLAG_NO_ALLOC it answers HYPERATTN_STATUS_WORKSPACE_TOO_SMALL.
///
///     hyperattn_diagnosis heads[8];
///     for (int h = 0; h < 8; h += 1)
///         heads[h].struct_size = sizeof heads[h];
///     if (hyperattn_diagnose(&params, &tensors, NULL, HYPERATTN_DIAGNOSE_TRUE_ERROR, heads, 8) == HYPERATTN_STATUS_OK)
///         printf("head 0: mass %g, error %g\n", heads[0].captured_mass, heads[0].true_error);
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_diagnose(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    exec: *const hyperattn_cpu_exec,
    flags: u32,
    heads: *mut hyperattn_diagnosis,
    count: usize,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers are what the header asks for.
        let Arguments { options, from, exec } = unsafe { Arguments::read(params, tensors, exec) }?;
        if flags & !HYPERATTN_DIAGNOSE_TRUE_ERROR != 0 {
            return Err(Failure::invalid(format_args!(
                "flags = {flags:#x} has bits that are not a HYPERATTN_DIAGNOSE_*"
            )));
        }
        let expected = number_of_heads(&from)?;
        if count != expected {
            return Err(Failure::invalid(format_args!(
                "count = {count} but q.shape[0] * q.shape[1] = {expected}"
            )));
        }
        // SAFETY: as above.
        let size = unsafe { entry_size(heads, count) }?;
        if !options.may_allocate {
            return Err(Failure::new(
                HYPERATTN_STATUS_WORKSPACE_TOO_SMALL,
                format_args!("params.flags has HYPERATTN_FLAG_NO_ALLOC, but hyperattn_diagnose allocates"),
            ));
        }
        // SAFETY: as above.
        let chosen = unsafe { Chosen::new(&exec) }?;
        let true_error = flags & HYPERATTN_DIAGNOSE_TRUE_ERROR != 0;
        // SAFETY: as above: the views describe the caller's memory, which is the call's until it returns.
        let found = unsafe { diagnose(&options, &from, &chosen, true_error) }?;
        for (index, diagnosis) in found.iter().enumerate() {
            // SAFETY: the array has count entries of `size` bytes, all of them checked.
            unsafe { sized::write(heads.byte_add(index * size), size, diagnosis) };
        }
        Ok(())
    })
}

/// batch * heads_q, which sizes the caller's array.
fn number_of_heads(from: &hyperattn_tensors) -> Result<usize> {
    let q = tensor::layout("q", &from.q)?;
    // The layout's check has seen to it that the product of all extents does not overflow.
    Ok((q.shape[0] * q.shape[1]) as usize)
}

/// The struct_size that all entries share.
///
/// # Safety
/// `heads` is NULL or an array of `count` entries, each as long as the first one's struct_size says.
unsafe fn entry_size(heads: *mut hyperattn_diagnosis, count: usize) -> Result<usize> {
    // SAFETY: the caller's contract.
    let size = unsafe { sized::size(heads, "heads[0]") }?;
    let mismatch = |sentence: std::fmt::Arguments<'_>| Failure::new(HYPERATTN_STATUS_ABI_MISMATCH, sentence);
    if !size.is_multiple_of(align_of::<hyperattn_diagnosis>()) {
        return Err(mismatch(format_args!("heads[0].struct_size = {size} would misalign heads[1]")));
    }
    for index in 1..count {
        // SAFETY: as above; the entries lie `size` bytes apart.
        let other = unsafe { sized::size(heads.byte_add(index * size), "an entry of heads") }?;
        if other != size {
            return Err(mismatch(format_args!(
                "heads[{index}].struct_size = {other} but heads[0].struct_size = {size}"
            )));
        }
    }
    Ok(size)
}

/// `len` values, or the status that says that there is no memory.
fn filled<T>(len: usize, value: impl FnMut() -> T) -> Result<Vec<T>> {
    let mut memory = Vec::new();
    memory.try_reserve_exact(len).map_err(|_| {
        Failure::new(
            HYPERATTN_STATUS_OUT_OF_MEMORY,
            format_args!("{} bytes could not be allocated", len as u128 * size_of::<T>() as u128),
        )
    })?;
    memory.resize_with(len, value);
    Ok(memory)
}

/// # Safety
/// What q, k, v, block_mask and mask describe is readable and not written meanwhile.
unsafe fn diagnose(
    options: &Options,
    from: &hyperattn_tensors,
    chosen: &Chosen,
    true_error: bool,
) -> Result<Vec<hyperattn_diagnosis>> {
    // SAFETY: the caller's contract.
    let q = unsafe { tensor::input("q", &from.q) }?;
    // SAFETY: as above.
    let k = unsafe { tensor::input("k", &from.k) }?;
    // SAFETY: as above.
    let v = unsafe { tensor::input("v", &from.v) }?;
    // SAFETY: the caller's contract.
    let mask = unsafe { block_mask::read(from.block_mask, q.layout(), k.layout()) }?;
    let [batch, heads_q, n_q, _] = q.layout().shape;
    let value_dim = v.layout().shape[3];
    let heads = (batch * heads_q) as usize;
    let (out_shape, head_shape) = ([batch, heads_q, n_q, value_dim], [batch, heads_q, 1, 1]);
    let out_len = out_shape.iter().try_fold(1, |len: usize, &extent| len.checked_mul(extent as usize));
    let Some(out_len) = out_len else {
        return Err(Failure::invalid(format_args!("an output of shape {out_shape:?} overflows")));
    };
    let mut out = filled(out_len, || 0f32)?;
    let mut errors = filled(heads, || f32::NAN)?;
    let mut keys = filled(heads, || f32::NAN)?;
    let mut tensors = Tensors {
        q,
        k,
        v,
        out: TensorMut::contiguous(&mut out, out_shape)?,
        lse: None,
        block_mask: mask,
        error: Some(TensorMut::contiguous(&mut errors, head_shape)?),
        keys_per_query: Some(TensorMut::contiguous(&mut keys, head_shape)?),
        // SAFETY: the caller's contract.
        mask: unsafe { tensor::mask(&from.mask) }?,
    };
    let figures = run(options, &mut tensors, chosen.executor(), true_error)?;
    let mut exact = filled(if true_error { out_len } else { 0 }, || 0f32)?;
    if true_error {
        let options = Options { params: Params { method: Method::Exact, ..options.params }, ..*options };
        let mut tensors = Tensors {
            out: TensorMut::contiguous(&mut exact, out_shape)?,
            block_mask: None,
            error: None,
            keys_per_query: None,
            ..tensors
        };
        cpu::run(&options, &mut tensors, chosen.executor(), OWN_WORKSPACE)?;
    }
    let of_head = out_len / heads;
    let mut found = filled(heads, || NOTHING)?;
    for (head, diagnosis) in found.iter_mut().enumerate() {
        let place = head * of_head..(head + 1) * of_head;
        let HeadFigures { alpha, kappa, captured_mass } = figures[head];
        *diagnosis = hyperattn_diagnosis {
            struct_size: size_of::<hyperattn_diagnosis>(),
            alpha,
            kappa,
            captured_mass,
            estimated_error: errors[head].into(),
            true_error: if true_error {
                relative_error(&out[place.clone()], &exact[place])
            } else {
                f64::NAN
            },
            keys_per_query: keys[head].into(),
        };
    }
    Ok(found)
}

/// Runs the method, in memory of its own, and looks at what it left out.
fn run(
    options: &Options,
    tensors: &mut Tensors<'_>,
    executor: &dyn Executor,
    every_row: bool,
) -> Result<Vec<HeadFigures>> {
    let (params, layouts) = (&options.params, &tensors.layouts());
    let words = filled(Unmet::words_needed(params, layouts)?, || AtomicU32::new(0))?;
    let unmet = Unmet::new(params, layouts, &words)?;
    {
        let need = hyperattn_core::forward_workspace(params, layouts, kernels(), executor)?;
        let mut workspace = Workspace::new(OWN_WORKSPACE, need, true)?;
        let memory = workspace.bytes();
        hyperattn_core::forward_recording(params, tensors, kernels(), executor, memory, &unmet)?;
    }
    let heads = layouts.q.shape[0] * layouts.q.shape[1];
    let unknown = HeadFigures { alpha: f64::NAN, kappa: f64::NAN, captured_mass: f64::NAN };
    let mut figures = filled(heads as usize, || unknown)?;
    let need = hyperattn_core::head_figures_workspace(params, layouts, executor)?;
    let mut workspace = Workspace::new(OWN_WORKSPACE, need, true)?;
    let (memory, source) = (workspace.bytes(), (every_row, &unmet));
    hyperattn_core::head_figures(params, tensors, source, kernels(), executor, memory, &mut figures)?;
    Ok(figures)
}

/// No workspace of the caller.
const OWN_WORKSPACE: hyperattn_buffer = hyperattn_buffer { data: std::ptr::null_mut(), size: 0 };

/// An entry before anything is known.
const NOTHING: hyperattn_diagnosis = hyperattn_diagnosis {
    struct_size: size_of::<hyperattn_diagnosis>(),
    alpha: f64::NAN,
    kappa: f64::NAN,
    captured_mass: f64::NAN,
    estimated_error: f64::NAN,
    true_error: f64::NAN,
    keys_per_query: f64::NAN,
};

/// Frobenius norm of the difference over that of `exact`; 0 where there is no difference.
fn relative_error(out: &[f32], exact: &[f32]) -> f64 {
    let (mut difference, mut whole) = (0.0, 0.0);
    for (&out, &exact) in out.iter().zip(exact) {
        let (out, exact) = (f64::from(out), f64::from(exact));
        difference += (out - exact) * (out - exact);
        whole += exact * exact;
    }
    if difference == 0.0 { 0.0 } else { (difference / whole).sqrt() }
}
