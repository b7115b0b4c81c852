//! The kernels of every table that work on rows of f32 without a product of matrices, against f64.

use hyperattn_core::Kernels;
use hyperattn_reference::Generator;

/// Below, at and above whole vectors and whole chunks of them, with every table.
const WIDTHS: [usize; 11] = [1, 3, 15, 16, 17, 64, 80, 127, 128, 129, 300];

/// Rounding errors of a chain of `n` sums of terms whose magnitudes add up to `magnitude`: at most (n + 1) 2^-24 of it.
fn bound(n: usize, magnitude: f64) -> f64 {
    (n + 1) as f64 * 2f64.powi(-24) * magnitude
}

#[test]
fn weighted_sums_agree_with_f64() {
    let seed = 340;
    println!("seed {seed}");
    for kernels in Kernels::available() {
        let mut generator = Generator::new(seed);
        for width in WIDTHS {
            for (count, padding) in [(0, 1), (1, 0), (2, 5), (37, 0), (256, 3)] {
                let stride = width + padding;
                let rows: Vec<f32> = (0..count * stride).map(|_| generator.normal() as f32).collect();
                let weights: Vec<f32> = (0..count).map(|_| generator.normal() as f32).collect();
                let start: Vec<f32> = (0..width).map(|_| generator.normal() as f32).collect();
                let mut sum = start.clone();
                kernels.add_weighted(&rows, stride, &weights, &mut sum);
                for (i, (&sum, &start)) in sum.iter().zip(&start).enumerate() {
                    let products = || {
                        let row = rows.chunks(stride).zip(&weights);
                        row.map(|(row, &weight)| f64::from(row[i]) * f64::from(weight))
                    };
                    let expected = f64::from(start) + products().sum::<f64>();
                    let magnitude = f64::from(start).abs() + products().map(f64::abs).sum::<f64>();
                    let error = (f64::from(sum) - expected).abs();
                    let isa = kernels.isa();
                    assert!(
                        error <= bound(count, magnitude),
                        "{isa:?}, {width}, {count}: {sum} for {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn rows_without_weight_and_what_lies_between_rows_are_not_looked_at() {
    for kernels in Kernels::available() {
        for width in WIDTHS {
            let stride = width + 2;
            let mut rows = vec![f32::NAN; 4 * stride];
            rows[..width].fill(1.0);
            rows[stride..stride + width].fill(f32::INFINITY);
            rows[3 * stride..3 * stride + width].fill(3.0);
            let mut sum = vec![0.5; width];
            kernels.add_weighted(&rows, stride, &[2.0, 0.0, -0.0, 4.0], &mut sum);
            assert_eq!(sum, vec![14.5; width], "{:?}", kernels.isa());
        }
    }
}

#[test]
fn squared_distances_agree_with_f64() {
    let seed = 341;
    println!("seed {seed}");
    for kernels in Kernels::available() {
        let mut generator = Generator::new(seed);
        for width in WIDTHS {
            let count = 19;
            let rows: Vec<f32> = (0..count * width).map(|_| 10.0 * generator.normal() as f32).collect();
            let center: Vec<f32> = (0..width).map(|_| generator.normal() as f32).collect();
            let mut distances = vec![0.0; count];
            kernels.squared_distances(&rows, &center, &mut distances);
            for (row, distance) in rows.chunks(width).zip(distances) {
                let squares = row.iter().zip(&center).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
                let expected: f64 = squares.sum();
                // Each difference is rounded before it is squared: twice 2^-24 more.
                let error = (f64::from(distance) - expected).abs();
                let isa = kernels.isa();
                assert!(error <= bound(width + 2, expected), "{isa:?}, {width}: {distance} for {expected}");
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_has_no_finite_distance() {
    for kernels in Kernels::available() {
        for width in WIDTHS {
            for i in 0..width {
                let mut rows = vec![1.0; 3 * width];
                rows[i] = f32::NAN;
                rows[width + i] = f32::NEG_INFINITY;
                let mut distances = [0.0; 3];
                kernels.squared_distances(&rows, &vec![0.5; width], &mut distances);
                assert!(distances[0].is_nan() && distances[1] == f32::INFINITY, "{distances:?}");
                assert_eq!(distances[2], 0.25 * width as f32, "{:?}", kernels.isa());
            }
        }
    }
}
