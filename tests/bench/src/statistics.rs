//! Medians, quartiles and slopes.

/// Median and quartiles of a sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Half of the sample is not above.
    pub median: f64,
    /// The first quartile.
    pub low: f64,
    /// The third quartile.
    pub high: f64,
}

impl Summary {
    /// Panics on an empty sample.
    pub fn of(sample: &[f64]) -> Self {
        let mut sorted = sample.to_vec();
        sorted.sort_by(f64::total_cmp);
        Summary {
            median: quantile(&sorted, 0.5),
            low: quantile(&sorted, 0.25),
            high: quantile(&sorted, 0.75),
        }
    }

    /// The same in another unit.
    pub fn scaled(self, factor: f64) -> Self {
        Summary { median: self.median * factor, low: self.low * factor, high: self.high * factor }
    }

    /// Distance between the quartiles as a fraction of the median.
    pub fn spread(&self) -> f64 {
        (self.high - self.low) / self.median
    }
}

/// The value at `fraction` of the way through `sorted`, linear between neighbours.
fn quantile(sorted: &[f64], fraction: f64) -> f64 {
    let at = fraction * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

/// The exponent p of the least-squares fit y = c x^p; none without two different x.
pub fn log_log_slope(points: &[(f64, f64)]) -> Option<f64> {
    let count = points.len() as f64;
    let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let mean_x = logs.iter().map(|point| point.0).sum::<f64>() / count;
    let mean_y = logs.iter().map(|point| point.1).sum::<f64>() / count;
    let (mut xx, mut xy) = (0.0, 0.0);
    for (x, y) in logs {
        xx += (x - mean_x).powi(2);
        xy += (x - mean_x) * (y - mean_y);
    }
    (points.iter().any(|point| point.0 != points[0].0)).then(|| xy / xx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_of_known_samples() {
        let summary = Summary::of(&[5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!(summary, Summary { median: 3.0, low: 2.0, high: 4.0 });
        let even = Summary::of(&[4.0, 1.0, 2.0, 3.0]);
        assert_eq!(even, Summary { median: 2.5, low: 1.75, high: 3.25 });
        assert_eq!(even.spread(), 0.6);
        assert_eq!(Summary::of(&[7.0]), Summary { median: 7.0, low: 7.0, high: 7.0 });
    }

    #[test]
    fn an_outlier_does_not_move_the_median() {
        assert_eq!(Summary::of(&[1.0, 1.0, 1.0, 1.0, 1000.0]).median, 1.0);
    }

    #[test]
    fn the_slope_of_a_power_is_its_exponent() {
        for exponent in [0.5, 1.0, 2.0] {
            let points: Vec<(f64, f64)> =
                [32.0f64, 64.0, 256.0, 1000.0].iter().map(|&x| (x, 3.0 * x.powf(exponent))).collect();
            let slope = log_log_slope(&points).unwrap();
            assert!((slope - exponent).abs() < 1e-12, "{slope}");
        }
        // ln y = 0, 1, 1 at ln x = 0, 1, 2: the least-squares slope is 1/2.
        let e = std::f64::consts::E;
        let slope = log_log_slope(&[(1.0, 1.0), (e, e), (e * e, e)]).unwrap();
        assert!((slope - 0.5).abs() < 1e-12, "{slope}");
    }

    #[test]
    fn one_place_has_no_slope() {
        assert_eq!(log_log_slope(&[(2.0, 1.0), (2.0, 3.0)]), None);
        assert_eq!(log_log_slope(&[(2.0, 1.0)]), None);
        assert_eq!(log_log_slope(&[]), None);
    }
}
