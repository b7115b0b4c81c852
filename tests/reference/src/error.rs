//! How far a result is from the oracle's.

use crate::partial::maximum;

/// |actual - reference|_F / |reference|_F, the measure of every accuracy figure. Both zero: 0. A zero
/// reference and another result: infinity. A NaN anywhere: NaN, which passes no bound.
pub fn relative_frobenius_error<T: Copy + Into<f64>>(actual: &[T], reference: &[f64]) -> f64 {
    assert_eq!(actual.len(), reference.len(), "outputs of different size");
    let difference: f64 = actual.iter().zip(reference).map(|(&a, r)| (a.into() - r).powi(2)).sum();
    let norm: f64 = reference.iter().map(|r| r * r).sum();
    if difference == 0.0 && norm == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

/// The largest |actual - reference| over the log-sum-exps ln D_i. Two empty rows (-inf, -inf) are equal, an
/// empty row against another is infinitely far. A NaN anywhere: NaN, which passes no bound.
pub fn max_abs_lse_difference<T: Copy + Into<f64>>(actual: &[T], reference: &[f64]) -> f64 {
    assert_eq!(actual.len(), reference.len(), "outputs of different size");
    let empty = f64::NEG_INFINITY;
    let differences = actual.iter().zip(reference).map(|(&a, &r)| match (a.into(), r) {
        (a, r) if a == empty && r == empty => 0.0,
        (a, r) => (a - r).abs(),
    });
    differences.fold(0.0, maximum)
}
