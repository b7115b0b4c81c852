//! The layers of the model but for attention, each with its gradient. `x` are the rows of all tokens, one after the
//! other; the gradient of a loss with respect to `x` is called `dx`. Gradients of weights are added to.

use crate::matrix::{add_product, transposed};

/// `x w` for a `w` of `[width of x, columns]`.
pub fn linear(x: &[f32], w: &[f32], columns: usize) -> Vec<f32> {
    let width = w.len() / columns;
    let mut y = vec![0.0; x.len() / width * columns];
    add_product(&mut y, x, w, columns);
    y
}

/// Adds to the gradient of [`linear`]'s w and returns that of x.
pub fn linear_backward(dy: &[f32], x: &[f32], w: &[f32], dw: &mut [f32], columns: usize) -> Vec<f32> {
    let width = w.len() / columns;
    add_product(dw, &transposed(x, width), dy, columns);
    linear(dy, &transposed(w, columns), width)
}

const SMALLEST_SQUARE: f32 = 1e-5;

fn inverse_norm(row: &[f32]) -> f32 {
    let mean_square = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
    (mean_square + SMALLEST_SQUARE).sqrt().recip()
}

/// Every row over the root of its mean square, times `gain`.
pub fn norm(x: &[f32], gain: &[f32]) -> Vec<f32> {
    let mut y = x.to_vec();
    for row in y.chunks_exact_mut(gain.len()) {
        let inverse = inverse_norm(row);
        row.iter_mut().zip(gain).for_each(|(x, gain)| *x *= inverse * gain);
    }
    y
}

/// Adds to the gradient of [`norm`]'s gain and returns that of x.
pub fn norm_backward(dy: &[f32], x: &[f32], gain: &[f32], dgain: &mut [f32]) -> Vec<f32> {
    let width = gain.len();
    let mut dx = vec![0.0; x.len()];
    for ((dx, dy), x) in dx.chunks_exact_mut(width).zip(dy.chunks_exact(width)).zip(x.chunks_exact(width)) {
        let inverse = inverse_norm(x);
        let mut along = 0.0;
        for column in 0..width {
            dgain[column] += dy[column] * x[column] * inverse;
            along += dy[column] * gain[column] * x[column];
        }
        let share = along * inverse * inverse / width as f32;
        for column in 0..width {
            dx[column] = inverse * (dy[column] * gain[column] - x[column] * share);
        }
    }
    dx
}

/// x times the logistic function of x.
pub fn silu(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| x * logistic(x)).collect()
}

/// The gradient of [`silu`]'s x.
pub fn silu_backward(dy: &[f32], x: &[f32]) -> Vec<f32> {
    let slope = |x: f32| logistic(x) * (1.0 + x * (1.0 - logistic(x)));
    dy.iter().zip(x).map(|(dy, &x)| dy * slope(x)).collect()
}

fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Turns each pair of numbers (c, c + head_dim / 2) of every head by an angle that grows with the token's position,
/// so that products of queries and keys depend on their distance. `direction` 1 turns, -1 turns back, which is what a
/// gradient needs.
pub fn rotate(x: &mut [f32], width: usize, head_dim: usize, tokens: usize, direction: f32) {
    let half = head_dim / 2;
    for (position, row) in x.chunks_exact_mut(width).enumerate() {
        for pair in 0..half {
            let frequency = 1e4f32.powf(-(pair as f32) / half as f32);
            let (sine, cosine) = (direction * (position % tokens) as f32 * frequency).sin_cos();
            for head in row.chunks_exact_mut(head_dim) {
                let (a, b) = (head[pair], head[pair + half]);
                head[pair] = a * cosine - b * sine;
                head[pair + half] = a * sine + b * cosine;
            }
        }
    }
}

/// Mean cross entropy, in nats, of the targets under the softmax of each row of logits; and the logits' gradient.
pub fn cross_entropy(logits: &[f32], targets: &[usize]) -> (f64, Vec<f32>) {
    let width = logits.len() / targets.len();
    let mut gradient = logits.to_vec();
    let mut sum = 0.0;
    for (row, &target) in gradient.chunks_exact_mut(width).zip(targets) {
        let largest = row.iter().fold(f32::NEG_INFINITY, |largest, &x| largest.max(x));
        let of_target = f64::from(row[target] - largest);
        row.iter_mut().for_each(|x| *x = (*x - largest).exp());
        let total: f32 = row.iter().sum();
        sum += f64::from(total).ln() - of_target;
        row.iter_mut().for_each(|x| *x /= total);
        row[target] -= 1.0;
        row.iter_mut().for_each(|x| *x /= targets.len() as f32);
    }
    (sum / targets.len() as f64, gradient)
}
