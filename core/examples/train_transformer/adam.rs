//! Adam (Kingma and Ba 2014), with a rate that rises over the first steps.

use crate::model::Weights;

const RATE: f32 = 5e-3;
const WARM_UP: i32 = 10;
const MEAN_DECAY: f32 = 0.9;
const SQUARE_DECAY: f32 = 0.98;
const SMALLEST_ROOT: f32 = 1e-8;

/// The running means of the gradients and of their squares.
pub struct Adam {
    steps: i32,
    mean: Weights,
    square: Weights,
}

impl Adam {
    /// Before the first step.
    pub fn new(weights: &Weights) -> Self {
        Adam { steps: 0, mean: weights.zeros(), square: weights.zeros() }
    }

    /// One step against the gradient.
    pub fn step(&mut self, weights: &mut Weights, gradient: &mut Weights) {
        self.steps += 1;
        let rate = RATE * (self.steps as f32 / WARM_UP as f32).min(1.0);
        let (of_mean, of_square) = (1.0 - MEAN_DECAY.powi(self.steps), 1.0 - SQUARE_DECAY.powi(self.steps));
        let moments = self.mean.tensors_mut().into_iter().zip(self.square.tensors_mut());
        let tensors = weights.tensors_mut().into_iter().zip(gradient.tensors_mut());
        for ((weights, gradient), (mean, square)) in tensors.zip(moments) {
            let moments = mean.iter_mut().zip(square);
            for ((weight, &gradient), (mean, square)) in weights.iter_mut().zip(&*gradient).zip(moments) {
                *mean += (1.0 - MEAN_DECAY) * (gradient - *mean);
                *square += (1.0 - SQUARE_DECAY) * (gradient * gradient - *square);
                *weight -= rate * (*mean / of_mean) / ((*square / of_square).sqrt() + SMALLEST_ROOT);
            }
        }
    }
}
