//! One model in training.

use hyperattn_core::Result;

use crate::adam::Adam;
use crate::attention::Attention;
use crate::model::{Weights, loss, loss_and_gradient};
use crate::text::Sequences;

/// A model, how its attention is computed, and the optimizer's state.
pub struct Training {
    weights: Weights,
    attention: Attention,
    adam: Adam,
    steps: u64,
}

impl Training {
    /// Starts from `weights`.
    pub fn new(weights: Weights, attention: Attention) -> Self {
        let adam = Adam::new(&weights);
        Training { weights, attention, adam, steps: 0 }
    }

    /// One step on `text`, with random numbers of its own for the attention. Returns the loss before it, in nats.
    pub fn step(&mut self, text: &Sequences) -> Result<f64> {
        self.steps += 1;
        self.attention.reseed(self.steps);
        let (loss, mut gradient) = loss_and_gradient(&self.weights, &mut self.attention, text)?;
        self.adam.step(&mut self.weights, &mut gradient);
        Ok(loss)
    }

    /// The loss with `attention`, which may be another than that trained with.
    pub fn loss(&self, attention: &mut Attention, text: &Sequences) -> Result<f64> {
        loss(&self.weights, attention, text)
    }
}
