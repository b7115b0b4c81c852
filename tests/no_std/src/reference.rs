//! Softmax attention as a loop in f64.

use crate::inputs::{HEAD_DIM, HEADS, LEN, Output, VALUE_DIM};

/// Fills `to` from packed q, k and v; with `causal`, query i sees keys 0..=i.
pub(crate) fn attention(q: &[f32], k: &[f32], v: &[f32], causal: bool, to: &mut Output) {
    let scale = 1.0 / libm::sqrt(HEAD_DIM as f64);
    for row in 0..HEADS * LEN {
        let query = &q[row * HEAD_DIM..][..HEAD_DIM];
        let visible = if causal { row % LEN + 1 } else { LEN };
        let mut logits = [f64::NEG_INFINITY; LEN];
        let mut max = f64::NEG_INFINITY;
        for (key, logit) in k.chunks(HEAD_DIM).zip(&mut logits[..visible]) {
            let dot: f64 = query.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            *logit = dot * scale;
            max = max.max(*logit);
        }
        let (mut sum, mut out) = (0.0, [0.0; VALUE_DIM]);
        for (value, logit) in v.chunks(VALUE_DIM).zip(&logits[..visible]) {
            let weight = libm::exp(logit - max);
            sum += weight;
            for (to, &x) in out.iter_mut().zip(value) {
                *to += weight * f64::from(x);
            }
        }
        for (to, x) in to.out[row * VALUE_DIM..].iter_mut().zip(out) {
            *to = (x / sum) as f32;
        }
        to.lse[row] = (max + libm::log(sum)) as f32;
    }
}

/// Frobenius norm of `a - b` over that of `b`.
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&x, &y) in a.iter().zip(b) {
        let (x, y) = (f64::from(x), f64::from(y));
        difference += (x - y) * (x - y);
        norm += y * y;
    }
    libm::sqrt(difference / norm)
}
