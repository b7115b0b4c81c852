//! Where the work runs: the calling thread, the caller's threads, or the library's.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock};

use hyperattn_core::{Executor, Isa, Kernels, Serial};
use rayon::prelude::*;

use crate::error::{Failure, Result};
use crate::sized;
use crate::types::*;

/// The kernels of this process: detected once, held down by HYPERATTN_MAX_ISA.
pub(crate) fn kernels() -> &'static Kernels {
    static KERNELS: OnceLock<&'static Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| {
        let limit = std::env::var("HYPERATTN_MAX_ISA").ok();
        Kernels::detect(limit.as_deref().and_then(Isa::from_name))
    })
}

/// The library's own threads, started at first use; absent where none can be started.
fn library_threads() -> Option<&'static rayon::ThreadPool> {
    static THREADS: OnceLock<Option<rayon::ThreadPool>> = OnceLock::new();
    let start = || {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let builder = rayon::ThreadPoolBuilder::new().num_threads(count);
        builder.thread_name(|i| format!("hyperattn-{i}")).build().ok()
    };
    THREADS.get_or_init(start).as_ref()
}

/// Where one call runs.
pub(crate) enum Chosen {
    Serial,
    Library { threads: &'static rayon::ThreadPool, lanes: usize },
    Caller(CallerThreads),
}

/// A caller never runs more tasks at once than this; each has its own scratch.
const MOST_LANES: usize = 4096;

impl Chosen {
    /// What `exec` asks for.
    ///
    /// # Safety
    /// `exec.pool` is NULL or valid, with callbacks that keep their contract.
    pub(crate) unsafe fn new(exec: &hyperattn_cpu_exec) -> Result<Self> {
        if !exec.pool.is_null() {
            // SAFETY: the caller's contract.
            return unsafe { CallerThreads::new(exec.pool) }.map(Chosen::Caller);
        }
        if exec.num_threads == 1 {
            return Ok(Chosen::Serial);
        }
        Ok(match library_threads() {
            Some(threads) if threads.current_num_threads() > 1 => {
                let most = threads.current_num_threads();
                let asked = if exec.num_threads == 0 { most } else { exec.num_threads as usize };
                Chosen::Library { threads, lanes: asked.min(most) }
            }
            _ => Chosen::Serial,
        })
    }

    pub(crate) fn executor(&self) -> &dyn Executor {
        match self {
            Chosen::Serial => &Serial,
            Chosen::Library { .. } => self,
            Chosen::Caller(threads) => threads,
        }
    }
}

impl Executor for Chosen {
    fn lanes(&self) -> usize {
        match self {
            Chosen::Library { lanes, .. } => *lanes,
            _ => self.executor().lanes(),
        }
    }

    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        match self {
            Chosen::Library { threads, .. } => {
                threads.install(|| (0..count).into_par_iter().with_max_len(1).for_each(task));
            }
            _ => self.executor().run(count, task),
        }
    }
}

/// The caller's thread pool.
pub(crate) struct CallerThreads {
    pool: hyperattn_threadpool,
    lanes: usize,
}

// SAFETY: the pool is used by the thread that called the library only; `run` is not called from tasks.
unsafe impl Sync for CallerThreads {}

impl CallerThreads {
    /// # Safety
    /// `pool` is valid, and its callbacks keep their contract.
    unsafe fn new(pool: *const hyperattn_threadpool) -> Result<Self> {
        let defaults = hyperattn_threadpool {
            struct_size: 0,
            ctx: std::ptr::null_mut(),
            num_threads: None,
            parallel_for: None,
        };
        // SAFETY: the caller's contract.
        let pool = unsafe { sized::read(pool, "exec.pool", defaults) }?;
        if pool.parallel_for.is_none() {
            return Err(Failure::invalid(format_args!("exec.pool->parallel_for is NULL")));
        }
        let Some(num_threads) = pool.num_threads else {
            return Err(Failure::invalid(format_args!("exec.pool->num_threads is NULL")));
        };
        // SAFETY: the callback keeps its contract.
        let lanes = unsafe { num_threads(pool.ctx) } as usize;
        if lanes == 0 {
            return Err(Failure::invalid(format_args!(
                "exec.pool->num_threads answered 0, at least 1 is required"
            )));
        }
        Ok(CallerThreads { pool, lanes: lanes.min(MOST_LANES) })
    }
}

/// A task on its way through C, and the panic that it may bring back.
struct Passage<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    count: usize,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

/// Runs one task for the caller's threads; no panic unwinds into their code.
unsafe extern "C" fn enter(passage: *mut c_void, index: usize) {
    // SAFETY: `run` passed this pointer, and the passage outlives parallel_for.
    let passage = unsafe { &*passage.cast::<Passage<'_>>() };
    if index >= passage.count {
        return;
    }
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (passage.task)(index)))
        && let Ok(mut first) = passage.panic.lock()
    {
        first.get_or_insert(panic);
    }
}

impl Executor for CallerThreads {
    fn lanes(&self) -> usize {
        self.lanes
    }

    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        let passage = Passage { task, count, panic: Mutex::new(None) };
        let pointer = std::ptr::from_ref(&passage).cast_mut().cast();
        if let Some(parallel_for) = self.pool.parallel_for {
            // SAFETY: the callback keeps its contract: it calls `enter` with this pointer and returns when all have returned.
            unsafe { parallel_for(self.pool.ctx, count, Some(enter), pointer) };
        }
        if let Some(panic) = passage.panic.into_inner().unwrap_or(None) {
            resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    unsafe extern "C" fn two(_: *mut c_void) -> u32 {
        2
    }

    type Task = Option<unsafe extern "C" fn(*mut c_void, usize)>;

    /// Runs the tasks in reverse, and one that was not asked for.
    unsafe extern "C" fn reverse(_: *mut c_void, n: usize, task: Task, task_ctx: *mut c_void) {
        for i in (0..=n).rev() {
            // SAFETY: called as the contract says, but for the index n, which must do no harm.
            unsafe { task.unwrap()(task_ctx, i) };
        }
    }

    fn pool() -> hyperattn_threadpool {
        hyperattn_threadpool {
            struct_size: size_of::<hyperattn_threadpool>(),
            ctx: std::ptr::null_mut(),
            num_threads: Some(two),
            parallel_for: Some(reverse),
        }
    }

    #[test]
    fn the_caller_s_threads_run_every_task_once() {
        // SAFETY: the pool is valid.
        let threads = unsafe { CallerThreads::new(&pool()) }.unwrap();
        assert_eq!(threads.lanes(), 2);
        let sum = AtomicUsize::new(0);
        threads.run(5, &|i| {
            sum.fetch_add(1 << (4 * i), Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 0x11111);
    }

    #[test]
    fn a_panic_in_a_task_comes_back_on_the_calling_thread() {
        // SAFETY: the pool is valid.
        let threads = unsafe { CallerThreads::new(&pool()) }.unwrap();
        let status = crate::boundary::guard(|| {
            threads.run(3, &|i| assert!(i != 1, "task {i}"));
            Ok(())
        });
        assert_eq!(status, HYPERATTN_STATUS_INTERNAL);
    }
}
