//! Executors that try hard to change a result.

use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use hyperattn_core::Executor;
use hyperattn_reference::Generator;

/// In which order the tasks are started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Ascending.
    Forward,
    /// Descending.
    Reversed,
    /// Shuffled, and every thread sleeps for a random moment before a task.
    Random(u64),
}

/// Runs tasks on several threads, or on the calling one when there is one.
#[derive(Clone, Copy, Debug)]
pub struct Threads {
    /// Tasks that the call may split into.
    pub lanes: usize,
    /// Threads that run them.
    pub threads: usize,
    /// In which order.
    pub order: Order,
}

impl Executor for Threads {
    fn lanes(&self) -> usize {
        self.lanes
    }

    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        let mut tasks: Vec<usize> = (0..count).collect();
        let mut delays = vec![0; count];
        match self.order {
            // Tasks are taken from the end.
            Order::Forward => tasks.reverse(),
            Order::Reversed => {}
            Order::Random(seed) => {
                let mut generator = Generator::new(seed);
                (1..count).for_each(|i| tasks.swap(i, generator.below(i + 1)));
                delays.iter_mut().for_each(|delay| *delay = generator.below(200) as u64);
            }
        }
        let tasks = Mutex::new(tasks);
        let work = || {
            loop {
                let next = tasks.lock().expect("no task panicked").pop();
                let Some(index) = next else { break };
                thread::sleep(Duration::from_micros(delays[index]));
                task(index);
            }
        };
        if self.threads == 1 {
            return work();
        }
        thread::scope(|scope| {
            (0..self.threads).for_each(|_| {
                scope.spawn(work);
            });
        });
    }
}
