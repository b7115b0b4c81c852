//! Who runs the tasks of a call. The core has no threads of its own.

use core::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::scratch::{Chunks, Lanes};

/// Runs tasks, possibly in parallel. A call splits its work into items whose results do not depend
/// on who computes them, so every executor gives the same bits.
pub trait Executor: Sync {
    /// How many tasks can usefully run at once, at least 1. Every one gets its own scratch.
    fn lanes(&self) -> usize;

    /// Calls `task(i)` for every `i` in `0..count`, each once, and returns when all have returned.
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync));
}

/// Runs everything on the calling thread.
#[derive(Debug, Clone, Copy, Default)]
pub struct Serial;

impl Executor for Serial {
    fn lanes(&self) -> usize {
        1
    }

    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(task);
    }
}

/// Calls `item(scratch, index)` for every index in `0..items`, drawn from a shared counter by
/// as many tasks as there are lanes. Returns when every item is done.
pub(crate) fn for_each_item(
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    items: usize,
    item: &(dyn Fn(&mut [u8], usize) + Sync),
) -> Result<()> {
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let lanes = lanes.share();
    let task = |_: usize| {
        // The lane comes from a counter and not from the task's index: a faulty executor that
        // repeats an index must not make two tasks share scratch.
        let Some(scratch) = lanes.claim() else { return };
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= items {
                break;
            }
            item(scratch, index);
            done.fetch_add(1, Ordering::Release);
        }
    };
    match lanes.count().min(items) {
        0 => {}
        1 => task(0),
        count => executor.run(count, &task),
    }
    if done.load(Ordering::Acquire) == items {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Executor,
        format_args!("the thread pool returned before every task had run ({items} items of work were given)"),
    ))
}

/// What is done to one chunk: (scratch, index of the chunk, chunk).
type ChunkTask<'a, T> = dyn Fn(&mut [u8], usize, &mut [T]) + Sync + 'a;

/// Calls `body(scratch, index, chunk)` for every chunk of `chunk_len` elements of `slice`; the last may be shorter.
pub(crate) fn for_each_chunk<T: Send>(
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    slice: &mut [T],
    chunk_len: usize,
    body: &ChunkTask<'_, T>,
) -> Result<()> {
    let chunks = Chunks::new(slice, chunk_len);
    for_each_item(executor, lanes, chunks.count(), &|scratch, _| {
        if let Some((index, chunk)) = chunks.claim() {
            body(scratch, index, chunk);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicU32;

    /// Drops the last task: what a faulty pool would do.
    struct Forgetful;
    impl Executor for Forgetful {
        fn lanes(&self) -> usize {
            2
        }
        fn run(&self, _count: usize, _task: &(dyn Fn(usize) + Sync)) {}
    }

    #[test]
    fn every_item_runs_once() {
        let mut bytes = [0u8; 192];
        let mut lanes = Lanes::new(&mut bytes, 64, 3);
        let hits: [AtomicU32; 10] = Default::default();
        for_each_item(&Serial, &mut lanes, 10, &|_, i| {
            hits[i].fetch_add(1, Ordering::Relaxed);
        })
        .unwrap();
        assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn a_pool_that_forgets_tasks_is_an_error() {
        let mut bytes = [0u8; 128];
        let mut lanes = Lanes::new(&mut bytes, 64, 2);
        let error = for_each_item(&Forgetful, &mut lanes, 10, &|_, _| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Executor);
    }

    #[test]
    fn chunks_cover_the_slice() {
        let mut bytes = [0u8; 64];
        let mut lanes = Lanes::new(&mut bytes, 64, 1);
        let mut data = [0usize; 23];
        for_each_chunk(&Serial, &mut lanes, &mut data, 5, &|_, index, chunk| {
            chunk.iter_mut().for_each(|x| *x += index + 1);
        })
        .unwrap();
        assert!(data.iter().enumerate().all(|(i, &x)| x == i / 5 + 1));
    }
}
