//! A call that is checked and divided once and then run many times, on the library's threads or task by task on the
//! caller's.

use hyperattn_core::{BlockMask, Division, Layout, Layouts, Method, Sequences, TensorLayout, Tensors};

use crate::boundary::{check_pointer, guard, required};
use crate::cpu::{Workspace, check_buffer, read_exec, read_tensors};
use crate::error::{Failure, Result};
use crate::executor::{Chosen, kernels};
use crate::memory::{boxed, copied};
use crate::params::{self, Options};
use crate::types::*;
use crate::{call, cpu};

/// A forward call without its data: made once for params and the shapes of tensors, then run many times. It never
/// changes, so that any number of threads may use it at the same time, and it holds no memory but a copy of its
/// arguments.
pub struct hyperattn_plan {
    options: Options,
    head_methods: Option<Vec<Method>>,
    sequences: Option<OwnedSequences>,
    block_mask: Option<OwnedMask>,
    /// Of the plan's tensors; strides are those that it was made with.
    layouts: Layouts<'static>,
    tasks: usize,
    task_workspace: Layout,
}

struct OwnedSequences {
    cu_seqlens_q: Vec<i32>,
    cu_seqlens_k: Vec<i32>,
}

struct OwnedMask {
    /// Without its arrays.
    counts: BlockMask<'static>,
    row_offsets: Vec<i64>,
    columns: Vec<i32>,
}

/// Makes a plan for hyperattn_plan_run() and hyperattn_plan_run_tasks(). *out is written on success only; free it with
/// hyperattn_plan_destroy().
///
/// params and what it points to are copied. Of the tensors their dtypes and shapes, num_sequences with both cu_seqlens,
/// and block_mask belong to the plan; their data are not looked at and may be NULL, and so may change their strides from
/// run to run. lse and error can be asked for in a run when their dtype is not 0 here.
///
/// A run's tensors must have the plan's dtypes and shapes, sequences and numbers of blocks, else it answers
/// HYPERATTN_STATUS_INVALID_ARGUMENT; it may leave out lse and error. The arrays of a block_mask may hold other blocks in
/// every run; with one the methods must be PAPER, since what AUTO takes depends on the blocks.
///
/// HYPERATTN_FLAG_NO_ALLOC concerns the runs: the plan itself takes some memory, here only.
///
///     hyperattn_plan *plan;
///     if (hyperattn_plan_create(&params, &tensors, &plan) != HYPERATTN_STATUS_OK)
///         return hyperattn_last_error();
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_plan_create(
    params: *const hyperattn_params,
    tensors: *const hyperattn_tensors,
    out: *mut *mut hyperattn_plan,
) -> hyperattn_status {
    guard(|| {
        check_pointer(out.cast_const(), "out")?;
        // SAFETY: the pointers are what the header asks for.
        let (options, from) = unsafe { (params::read(params)?, read_tensors(tensors)?) };
        // SAFETY: as above.
        let plan = unsafe { hyperattn_plan::new(options, &from) }?;
        let plan = Box::into_raw(boxed(plan)?).cast::<hyperattn_plan>();
        // SAFETY: out is aligned and, not being NULL, writable.
        unsafe { out.write(plan) };
        Ok(())
    })
}

/// Frees a plan that no thread uses any more. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_plan_destroy(plan: *mut hyperattn_plan) {
    if !plan.is_null() {
        // SAFETY: it comes from hyperattn_plan_create, as a slice of one, and nobody else has it.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(plan, 1)) });
    }
}

/// Size and alignment of the workspace that hyperattn_plan_run() needs with this exec: what
/// hyperattn_forward_workspace() answers for the plan's arguments. *out is written on success only.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_plan_workspace(
    plan: *const hyperattn_plan,
    exec: *const hyperattn_cpu_exec,
    out: *mut hyperattn_layout,
) -> hyperattn_status {
    guard(|| {
        check_pointer(out.cast_const(), "out")?;
        // SAFETY: the pointers are what the header asks for.
        let (plan, exec) = unsafe { (required(plan, "plan")?, read_exec(exec)?) };
        // SAFETY: as above.
        let chosen = unsafe { Chosen::new(&exec) }?;
        let (params, division, layouts) = (&plan.options.params, plan.division(), plan.layouts());
        let executor = chosen.executor();
        let Layout { size, align } =
            hyperattn_core::forward_divided_workspace(params, &division, &layouts, kernels(), executor)?;
        // SAFETY: out is aligned and, not being NULL, writable.
        unsafe { out.write(hyperattn_layout { size, align }) };
        Ok(())
    })
}

/// hyperattn_forward() for the plan's arguments and the data of these tensors, with the same bits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_plan_run(
    plan: *const hyperattn_plan,
    tensors: *const hyperattn_tensors,
    exec: *const hyperattn_cpu_exec,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers are what the header asks for.
        let (plan, from, exec) =
            unsafe { (required(plan, "plan")?, read_tensors(tensors)?, read_exec(exec)?) };
        // SAFETY: as above.
        let mut tensors = unsafe { plan.tensors(&from) }?;
        // SAFETY: as above.
        let chosen = unsafe { Chosen::new(&exec) }?;
        cpu::run(&plan.options, &plan.division(), &mut tensors, chosen.executor(), exec.workspace)
    })
}

/// How many tasks the plan's work is divided into, at least 1 (0 for NULL). The number does not depend on the threads.
///
/// A task is one query head of one batch item or sequence, which hashes or summarises its keys for itself; where the head
/// is exact it is a tile of up to 256 queries, those of the other heads of its KV head included. In the order of their
/// numbers the tasks of a head cost alike two by two, also under a causal mask, so that equal ranges of tasks are equal
/// shares. Where methods or lengths of sequences differ, let threads fetch tasks from a counter instead.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_plan_task_count(plan: *const hyperattn_plan) -> usize {
    // SAFETY: the pointer is what the header asks for.
    unsafe { plan.as_ref() }.map_or(0, |plan| plan.tasks)
}

/// Size and alignment of the workspace of one thread for hyperattn_plan_run_tasks(), whatever its tasks. Each thread needs
/// one of its own. *out is written on success only.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_plan_task_workspace(
    plan: *const hyperattn_plan,
    out: *mut hyperattn_layout,
) -> hyperattn_status {
    guard(|| {
        check_pointer(out.cast_const(), "out")?;
        // SAFETY: the pointer is what the header asks for.
        let Layout { size, align } = unsafe { required(plan, "plan") }?.task_workspace;
        // SAFETY: out is aligned and, not being NULL, writable.
        unsafe { out.write(hyperattn_layout { size, align }) };
        Ok(())
    })
}

/// Runs the tasks from number begin up to, but not including, end on the calling thread, one after the other. Tasks need
/// nothing from one another: run each once, in any order, on any threads, with the same tensors, and the outputs are
/// complete when all have returned, with the bits of hyperattn_plan_run(). Each writes rows of its own and nothing else;
/// until then no output may be used for anything.
///
/// With a workspace of hyperattn_plan_task_workspace() nothing is allocated; { NULL, 0 } lets the call allocate. Every
/// call checks all its arguments before it writes: on an error this call has written nothing. begin = end runs nothing.
///
///     /* On thread ith of nth, all of which run this with the same plan and tensors. */
///     size_t tasks = hyperattn_plan_task_count(plan);
///     hyperattn_status status = hyperattn_plan_run_tasks(plan, &tensors, tasks * ith / nth, tasks * (ith + 1) / nth,
///                                                        workspace_of_thread[ith]);
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_plan_run_tasks(
    plan: *const hyperattn_plan,
    tensors: *const hyperattn_tensors,
    begin: usize,
    end: usize,
    workspace: hyperattn_buffer,
) -> hyperattn_status {
    guard(|| {
        // SAFETY: the pointers are what the header asks for.
        let (plan, from) = unsafe { (required(plan, "plan")?, read_tensors(tensors)?) };
        check_buffer("workspace", &workspace)?;
        if begin > end || end > plan.tasks {
            return Err(Failure::invalid(format_args!(
                "begin = {begin} and end = {end} are no range of the plan's {} tasks",
                plan.tasks
            )));
        }
        // SAFETY: as above.
        let tensors = unsafe { plan.tensors(&from) }?;
        let mut workspace = Workspace::new(workspace, plan.task_workspace, plan.options.may_allocate)?;
        let (params, memory) = (&plan.options.params, workspace.bytes());
        // SAFETY: the caller runs each task once at a time and leaves its rows alone meanwhile.
        unsafe {
            hyperattn_core::run_tasks(params, &plan.division(), &tensors, kernels(), begin..end, memory)
        }?;
        Ok(())
    })
}

impl hyperattn_plan {
    /// # Safety
    /// What `options` and `from` point to, but for the tensors' data, is readable.
    unsafe fn new(options: Options, from: &hyperattn_tensors) -> Result<Self> {
        // SAFETY: the caller's contract.
        let (layouts, division) = unsafe {
            let layouts = call::layouts(from, |tensor| tensor.dtype != 0)?;
            (layouts, call::division(&options, from, &layouts.q)?)
        };
        let params = &options.params;
        if layouts.block_mask.is_some() {
            let mut methods = division.head_methods.unwrap_or(std::slice::from_ref(&params.method)).iter();
            if methods.any(|&method| method == Method::Auto) {
                return Err(Failure::invalid(format_args!(
                    "block_mask is given to a plan with METHOD_AUTO, whose choice depends on the blocks; ask for PAPER"
                )));
            }
        }
        let tasks = hyperattn_core::task_count(params, &division, &layouts, kernels())?;
        let task_workspace = hyperattn_core::task_workspace(params, &division, &layouts, kernels())?;
        let head_methods = division.head_methods.map(copied).transpose()?;
        let own = |sequences: Sequences<'_>| -> Result<OwnedSequences> {
            Ok(OwnedSequences {
                cu_seqlens_q: copied(sequences.cu_seqlens_q)?,
                cu_seqlens_k: copied(sequences.cu_seqlens_k)?,
            })
        };
        let sequences = division.sequences.map(own).transpose()?;
        let own = |mask: BlockMask<'_>| -> Result<OwnedMask> {
            Ok(OwnedMask {
                counts: BlockMask { row_offsets: &[], columns: &[], ..mask },
                row_offsets: copied(mask.row_offsets)?,
                columns: copied(mask.columns)?,
            })
        };
        let block_mask = layouts.block_mask.map(own).transpose()?;
        let layouts = Layouts { block_mask: None, ..layouts };
        // The plan has a copy.
        let options = Options { head_methods: std::ptr::null(), ..options };
        Ok(hyperattn_plan { options, head_methods, sequences, block_mask, layouts, tasks, task_workspace })
    }

    fn division(&self) -> Division<'_> {
        Division {
            sequences: self.sequences.as_ref().map(|owned| Sequences {
                cu_seqlens_q: &owned.cu_seqlens_q,
                cu_seqlens_k: &owned.cu_seqlens_k,
            }),
            head_methods: self.head_methods.as_deref(),
        }
    }

    /// What the plan was made for.
    fn layouts(&self) -> Layouts<'_> {
        let mask = self.block_mask.as_ref().map(|owned| BlockMask {
            row_offsets: &owned.row_offsets,
            columns: &owned.columns,
            ..owned.counts
        });
        Layouts { block_mask: mask, ..self.layouts }
    }

    /// The tensors of a run.
    ///
    /// # Safety
    /// As for [`call::tensors`].
    unsafe fn tensors<'a>(&self, from: &hyperattn_tensors) -> Result<Tensors<'a>> {
        // SAFETY: the caller's contract.
        let tensors = unsafe { call::tensors(from) }?;
        let (planned, given) = (&self.layouts, tensors.layouts());
        for (name, planned, given) in [
            ("q", &planned.q, &given.q),
            ("k", &planned.k, &given.k),
            ("v", &planned.v, &given.v),
            ("out", &planned.out, &given.out),
        ] {
            check_shape(name, planned, given)?;
        }
        for (name, planned, given) in
            [("lse", &planned.lse, &given.lse), ("error", &planned.error, &given.error)]
        {
            match (planned, given) {
                (Some(planned), Some(given)) => check_shape(name, planned, given)?,
                (None, Some(given)) => {
                    return Err(Failure::invalid(format_args!(
                        "{name} of shape {:?} is given, but the plan was made with {name}.dtype = 0",
                        given.shape
                    )));
                }
                (_, None) => {}
            }
        }
        self.check_block_mask(given.block_mask.as_ref())?;
        // SAFETY: the caller's contract.
        let division = unsafe { call::division(&self.options, from, &given.q) }?;
        self.check_sequences(division.sequences.as_ref())?;
        Ok(tensors)
    }

    fn check_block_mask(&self, given: Option<&BlockMask<'_>>) -> Result<()> {
        let numbers = |mask: Option<&BlockMask<'_>>| {
            mask.map_or([0; 5], |mask| {
                [
                    mask.query_block,
                    mask.key_block,
                    mask.num_query_blocks,
                    mask.num_key_blocks,
                    mask.head_stride,
                ]
            })
        };
        let names =
            ["query_block", "key_block", "num_query_blocks", "num_key_blocks", "row_offsets_head_stride"];
        let planned = numbers(self.block_mask.as_ref().map(|owned| &owned.counts));
        for ((name, planned), given) in names.into_iter().zip(planned).zip(numbers(given)) {
            if planned != given {
                return Err(Failure::invalid(format_args!(
                    "block_mask.{name} = {given} but the plan was made for {planned} (0: no block_mask)"
                )));
            }
        }
        Ok(())
    }

    fn check_sequences(&self, given: Option<&Sequences<'_>>) -> Result<()> {
        let planned = self.division().sequences;
        let count = |sequences: Option<&Sequences<'_>>| sequences.map_or(0, Sequences::count);
        let (planned_count, given_count) = (count(planned.as_ref()), count(given));
        if planned_count != given_count {
            return Err(Failure::invalid(format_args!(
                "num_sequences = {given_count} but the plan was made for {planned_count}"
            )));
        }
        let (Some(planned), Some(given)) = (planned, given) else { return Ok(()) };
        for (name, planned, given) in [
            ("cu_seqlens_q", planned.cu_seqlens_q, given.cu_seqlens_q),
            ("cu_seqlens_k", planned.cu_seqlens_k, given.cu_seqlens_k),
        ] {
            if let Some(at) = planned.iter().zip(given).position(|(planned, given)| planned != given) {
                return Err(Failure::invalid(format_args!(
                    "{name}[{at}] = {} but the plan was made for {}",
                    given[at], planned[at]
                )));
            }
        }
        Ok(())
    }
}

/// A run's tensor has the plan's element type and extents.
fn check_shape(name: &str, planned: &TensorLayout, given: &TensorLayout) -> Result<()> {
    if planned.dtype != given.dtype {
        return Err(Failure::invalid(format_args!(
            "{name}.dtype = {:?} but the plan was made for {:?}",
            given.dtype, planned.dtype
        )));
    }
    if let Some(dim) = (0..4).find(|&dim| planned.shape[dim] != given.shape[dim]) {
        return Err(Failure::invalid(format_args!(
            "{name}.shape[{dim}] = {} but the plan was made for {}",
            given.shape[dim], planned.shape[dim]
        )));
    }
    Ok(())
}
