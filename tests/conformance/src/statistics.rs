//! Means of many draws against a known value.

/// Running sums of one quantity.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mean {
    count: f64,
    mean: f64,
    /// Sum of squared deviations from the mean (Welford).
    squares: f64,
}

impl Mean {
    /// Takes one more draw in.
    pub fn add(&mut self, x: f64) {
        self.count += 1.0;
        let from_old = x - self.mean;
        self.mean += from_old / self.count;
        self.squares += from_old * (x - self.mean);
    }

    /// The mean of the draws.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// The standard error of the mean.
    pub fn standard_error(&self) -> f64 {
        (self.squares / (self.count - 1.0) / self.count).sqrt()
    }

    /// The deviation of the mean from `truth` in standard errors. Where the draws vary by less than `rounding`,
    /// which is what they lost on the way through f32, this is 0 when they agree within it, else infinity.
    pub fn z(&self, truth: f64, rounding: f64) -> f64 {
        let deviation = (self.mean - truth).abs();
        if self.standard_error() < rounding {
            return if deviation <= rounding { 0.0 } else { f64::INFINITY };
        }
        deviation / self.standard_error()
    }
}
