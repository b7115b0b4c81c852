//! The machine's own peak: the rate of multiply-add instructions on registers, which no attention kernel
//! that is made of them exceeds.

use std::time::{Duration, Instant};

use hyperattn_core::{DType, Isa};
use hyperattn_peak::{Kernel, kernels};

use crate::executor::Threads;

/// A round is at least this long, so that reading the clock costs nothing.
const ROUND: Duration = Duration::from_micros(300);

/// Rounds of one measurement on each thread; the fastest counts.
const ROUNDS: usize = 5;

/// A measurement is out of date after this long.
const LIFETIME: Duration = Duration::from_millis(50);

/// The peak beside a problem: measured again and again while the problem is, so that a change of
/// the clock rate changes both.
pub struct Peak {
    kernel: Kernel,
    iterations: u64,
    gflops: Vec<f64>,
    latest: Option<Instant>,
}

impl Peak {
    /// The peak that a table's kernels are held against: f32 multiply-add; when all inputs are bf16 and
    /// the processor has a dot product of bf16 pairs, the faster of the two (on some it is the slower).
    pub fn new(isa: Isa, inputs: [DType; 3]) -> Self {
        let mut fastest: Option<Peak> = None;
        for kernel in kernels(isa.name()) {
            if kernel.only_bf16 && inputs != [DType::BF16; 3] {
                continue;
            }
            let mut iterations = 1 << 10;
            while seconds(&kernel, iterations) < ROUND.as_secs_f64() {
                iterations *= 2;
            }
            let peak = Peak { kernel, iterations, gflops: Vec::new(), latest: None };
            if fastest.as_ref().is_none_or(|other| peak.rate() > other.rate()) {
                fastest = Some(peak);
            }
        }
        fastest.expect("every machine multiplies and adds")
    }

    /// GFLOP/s of the calling thread.
    fn rate(&self) -> f64 {
        let seconds = (0..ROUNDS).map(|_| seconds(&self.kernel, self.iterations));
        self.kernel.flops_per_iteration * self.iterations as f64 / seconds.fold(f64::INFINITY, f64::min)
            * 1e-9
    }

    /// Instruction and vector width.
    pub fn name(&self) -> &'static str {
        self.kernel.name
    }

    /// Measures on all threads at once, unless the latest measurement is still good.
    pub fn measure_if_due(&mut self, threads: &Threads) {
        if self.latest.is_some_and(|latest| latest.elapsed() < LIFETIME) {
            return;
        }
        let total = threads.on_each(|| self.rate()).iter().sum();
        self.gflops.push(total);
        self.latest = Some(Instant::now());
    }

    /// All measurements, in GFLOP/s.
    pub fn gflops(&self) -> &[f64] {
        &self.gflops
    }
}

fn seconds(kernel: &Kernel, iterations: u64) -> f64 {
    let clock = Instant::now();
    (kernel.run)(iterations);
    clock.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperattn_core::Kernels;

    /// Rates of one thread and of two.
    fn rates(kernels: &Kernels, dtype: DType) -> [f64; 2] {
        [1, 2].map(|count| {
            let threads = Threads::new(count).expect("threads start");
            let mut peak = Peak::new(kernels.isa(), [dtype; 3]);
            peak.measure_if_due(&threads);
            peak.measure_if_due(&threads);
            assert_eq!(peak.gflops().len(), 1, "the second measurement was not due");
            println!("{} {dtype:?} {count} threads: {:.1}", peak.name(), peak.gflops()[0]);
            peak.gflops()[0]
        })
    }

    /// Measured again where another program may have taken a core meanwhile.
    #[test]
    fn every_table_has_a_peak_and_more_threads_are_not_slower() {
        for kernels in Kernels::available() {
            let as_expected = || {
                let [f32, bf16] = [DType::F32, DType::BF16].map(|dtype| rates(kernels, dtype));
                // With one core each of two threads gets a part. Of bf16 it is the faster of two loops.
                [f32, bf16].iter().all(|rates| rates[0] > 0.0 && rates[1] > 0.5 * rates[0])
                    && bf16[0] > 0.5 * f32[0]
            };
            assert!((0..20).any(|_| as_expected()), "{kernels:?}: the rates are above");
        }
    }

    #[test]
    fn mixed_inputs_are_held_against_f32() {
        let f32 = Peak::new(Kernels::detect(None).isa(), [DType::F32; 3]);
        let mixed = Peak::new(Kernels::detect(None).isa(), [DType::F32, DType::BF16, DType::BF16]);
        assert_eq!(f32.name(), mixed.name());
        assert!(f32.name().starts_with("f32"), "{}", f32.name());
    }
}
