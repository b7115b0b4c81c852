//! The threads that compute, and that measure the peak.

use std::sync::Barrier;

use hyperattn_core::Executor;
use rayon::prelude::*;

/// A number of threads; one is the calling thread.
pub struct Threads {
    pool: Option<rayon::ThreadPool>,
}

impl Threads {
    /// `count` threads.
    ///
    /// # Errors
    /// When the system starts none.
    pub fn new(count: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let start = || rayon::ThreadPoolBuilder::new().num_threads(count).build();
        Ok(Threads { pool: if count > 1 { Some(start()?) } else { None } })
    }

    /// What `measure` returns on each thread; all begin together.
    pub fn on_each(&self, measure: impl Fn() -> f64 + Sync) -> Vec<f64> {
        let Some(pool) = &self.pool else { return vec![measure()] };
        let start = Barrier::new(pool.current_num_threads());
        pool.broadcast(|_| {
            start.wait();
            measure()
        })
    }
}

impl Executor for Threads {
    fn lanes(&self) -> usize {
        self.pool.as_ref().map_or(1, rayon::ThreadPool::current_num_threads)
    }

    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        match &self.pool {
            Some(pool) => pool.install(|| (0..count).into_par_iter().with_max_len(1).for_each(task)),
            None => (0..count).for_each(task),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_task_runs_once_and_every_thread_measures() {
        for count in [1, 3] {
            let threads = Threads::new(count).expect("threads start");
            assert_eq!(threads.lanes(), count);
            let hits: [AtomicUsize; 9] = Default::default();
            threads.run(9, &|i| {
                hits[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
            assert_eq!(threads.on_each(|| 2.0), vec![2.0; count]);
        }
    }
}
