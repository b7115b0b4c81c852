//! Whether other programs took the cores, as Linux counts it; nothing elsewhere.

use std::fs;
use std::time::{Duration, Instant};

/// How much of some time the process's threads could have run but had no core.
#[derive(Clone, Copy, Debug, Default)]
pub struct Waiting {
    waited: Duration,
    wall: Duration,
}

impl Waiting {
    /// Adds what happened since `start`.
    pub fn add_since(&mut self, start: &Moment) {
        let now = Moment::now();
        if let Some((before, after)) = start.waited.zip(now.waited) {
            self.waited += after.saturating_sub(before);
            self.wall += now.clock - start.clock;
        }
    }

    /// The waiting threads' share of the time of `threads` threads.
    pub fn share(&self, threads: usize) -> Option<f64> {
        let whole = self.wall.as_secs_f64() * threads as f64;
        (whole > 0.0).then(|| self.waited.as_secs_f64() / whole)
    }
}

/// A point in time, with what all threads of the process had waited until then.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    clock: Instant,
    waited: Option<Duration>,
}

impl Moment {
    /// This moment.
    pub fn now() -> Self {
        Moment { clock: Instant::now(), waited: waited() }
    }
}

fn waited() -> Option<Duration> {
    let mut total = Duration::ZERO;
    for thread in fs::read_dir("/proc/self/task").ok()? {
        // A thread may end meanwhile.
        let statistics = fs::read_to_string(thread.ok()?.path().join("schedstat")).unwrap_or_default();
        total += in_queue(&statistics).unwrap_or_default();
    }
    Some(total)
}

/// The second of the three numbers: nanoseconds in a run queue.
fn in_queue(statistics: &str) -> Option<Duration> {
    statistics.split_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_of_all_threads() {
        assert_eq!(in_queue("900 250 3\n"), Some(Duration::from_nanos(250)));
        assert_eq!(in_queue(""), None);
        let waiting = Waiting { waited: Duration::from_secs(1), wall: Duration::from_secs(5) };
        assert_eq!((waiting.share(1), waiting.share(2)), (Some(0.2), Some(0.1)));
        assert_eq!(Waiting::default().share(1), None);
    }

    #[test]
    fn more_threads_than_cores_wait() {
        let start = Moment::now();
        if start.waited.is_none() {
            println!("SKIPPED: /proc/self/task cannot be read here");
            return;
        }
        // All processors, also those that this process is kept from.
        let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processors = processors.lines().filter(|line| line.starts_with("processor")).count();
        let threads = 4 * processors.max(1);
        let mut waiting = Waiting::default();
        // Counted while they run: what has ended is no longer listed.
        let barrier = std::sync::Barrier::new(threads + 1);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let clock = Instant::now();
                    while clock.elapsed() < Duration::from_millis(200) {}
                    barrier.wait();
                    barrier.wait();
                });
            }
            barrier.wait();
            waiting.add_since(&start);
            barrier.wait();
        });
        // Three of four wait at any time, and threads of other tests beside them; half of it is asked for.
        let share = waiting.share(threads).expect("time has passed");
        assert!(share > 0.375, "{share}");
    }
}
