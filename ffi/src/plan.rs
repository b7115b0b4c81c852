//! A call that is checked and divided once and then run many times, on the library's threads or task by task on the
//! caller's.

use hyperattn_core::{BlockMask, Layout, Layouts, Method, Tensors};

use crate::boundary::{check_pointer, guard, required};
use crate::cpu::{Workspace, check_buffer, read_exec, read_tensors};
use crate::error::{Failure, Result};
use crate::executor::{Chosen, kernels};
use crate::memory::{boxed, copied};
use crate::params::{self, Options};
use crate::planned::Planned;
use crate::types::*;
use crate::{call, cpu};

/// A forward call without its data: made once for params and the shapes of tensors, then run many times. It never
/// changes, so that any number of threads may use it at the same time, and it holds no memory but a copy of its
/// arguments.
pub struct hyperattn_plan {
    planned: Planned,
    /// The blocks that the plan was made with: offsets and columns.
    blocks: (Vec<i64>, Vec<i32>),
    tasks: usize,
    task_workspace: Layout,
}

/// Makes a plan for hyperattn_plan_run() and hyperattn_plan_run_tasks(). *out is written on success only; free it with
/// hyperattn_plan_destroy().
///
/// params and what it points to are copied. Of the tensors their dtypes and shapes, num_sequences with both cu_seqlens,
/// and block_mask belong to the plan. Their data are not looked at and may be NULL; data and strides may be others in
/// every run. lse and error can be asked for in a run when their dtype is not 0 here; a mask must be given in every
/// run when its dtype is not 0 here.
///
/// A run's tensors must have the plan's dtypes and shapes, sequences and numbers of blocks, else it answers
/// HYPERATTN_STATUS_INVALID_ARGUMENT; it may leave out lse and error. The arrays of a block_mask may hold other
/// blocks in every run; with one the methods must be PAPER, since what AUTO takes depends on the blocks.
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
        let (planned, executor) = (&plan.planned, chosen.executor());
        let (params, division, layouts) = (&planned.options.params, planned.division(), plan.layouts());
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
        let (plan, from) = unsafe { (required(plan, "plan")?, read_tensors(tensors)?) };
        // SAFETY: as above.
        let exec = unsafe { read_exec(exec) }?;
        // SAFETY: as above.
        let mut tensors = unsafe { plan.tensors(&from) }?;
        // SAFETY: as above.
        let chosen = unsafe { Chosen::new(&exec) }?;
        let (options, division) = (&plan.planned.options, plan.planned.division());
        cpu::run(options, &division, &mut tensors, chosen.executor(), exec.workspace)
    })
}

/// How many tasks the plan's work is divided into, at least 1 (0 for NULL). The number does not depend on the threads.
///
/// A task is one query head of one batch item or sequence, which hashes or summarises its keys for itself; where the
/// head is exact it is a tile of up to 256 queries, those of the other heads of its KV head included. In the order of
/// their numbers the tasks of a head cost alike two by two, also under a causal mask, so that equal ranges of tasks
/// are equal shares. Where methods or lengths of sequences differ, let threads fetch tasks from a counter instead.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hyperattn_plan_task_count(plan: *const hyperattn_plan) -> usize {
    // SAFETY: the pointer is what the header asks for.
    unsafe { plan.as_ref() }.map_or(0, |plan| plan.tasks)
}

/// Size and alignment of the workspace of one thread for hyperattn_plan_run_tasks(), whatever its tasks. Each thread
/// needs one of its own. *out is written on success only.
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

/// Runs the tasks from number begin up to, but not including, end on the calling thread, one after the other. Tasks
/// need nothing from one another: run each once, in any order, on any threads, with the same tensors, and the outputs
/// are complete when all have returned, with the bits of hyperattn_plan_run(). Each writes rows of its own and
/// nothing else; until then no output may be used for anything.
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
        let mut workspace =
            Workspace::new(workspace, plan.task_workspace, plan.planned.options.may_allocate)?;
        let (params, division) = (&plan.planned.options.params, plan.planned.division());
        let memory = workspace.bytes();
        // SAFETY: the caller runs each task once at a time and leaves its rows alone meanwhile.
        unsafe { hyperattn_core::run_tasks(params, &division, &tensors, kernels(), begin..end, memory) }?;
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
        let blocks = layouts.block_mask.map_or((&[][..], &[][..]), |mask| (mask.row_offsets, mask.columns));
        let blocks = (copied(blocks.0)?, copied(blocks.1)?);
        Ok(hyperattn_plan {
            planned: Planned::new(options, &division, layouts)?,
            blocks,
            tasks,
            task_workspace,
        })
    }

    /// What the plan was made for.
    fn layouts(&self) -> Layouts<'_> {
        let (row_offsets, columns) = &self.blocks;
        let mask = self.planned.layouts.block_mask.map(|mask| BlockMask { row_offsets, columns, ..mask });
        Layouts { block_mask: mask, ..self.planned.layouts }
    }

    /// The tensors of a run.
    ///
    /// # Safety
    /// As for [`call::tensors`].
    unsafe fn tensors<'a>(&self, from: &hyperattn_tensors) -> Result<Tensors<'a>> {
        // SAFETY: the caller's contract.
        let tensors = unsafe { call::tensors(from) }?;
        // SAFETY: as above.
        let division = unsafe { call::division(&self.planned.options, from, tensors.q.layout()) }?;
        self.planned.check(&tensors.layouts(), division.sequences.as_ref())?;
        Ok(tensors)
    }
}
