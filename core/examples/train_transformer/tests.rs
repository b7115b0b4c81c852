//! The gradient of the whole model's loss against finite differences, and losses that fall.

use hyperattn_core::{Params, Result};

use crate::attention::Attention;
use crate::methods;
use crate::model::{Sizes, Weights, loss, loss_and_gradient};
use crate::random::Generator;
use crate::text::{Sequences, Text};
use crate::training::Training;

const SEED: u64 = 20261126;
const BATCH: usize = 2;
const TOKENS: usize = 128;
/// The loss is a mean of 256 numbers near 4, each with an error of its own of some units in the 24th place.
const LOSS_ROUNDING: f64 = 1e-7;

/// A model and what it reads.
struct Start {
    text: Text,
    generator: Generator,
    weights: Weights,
}

impl Start {
    fn new() -> Self {
        println!("seed {SEED}");
        let (text, mut generator) = (Text::new(), Generator(SEED));
        let sizes = Sizes { vocabulary: text.vocabulary, layers: 2, width: 32, heads: 2, hidden: 64 };
        let weights = Weights::random(sizes, &mut generator);
        Start { text, generator, weights }
    }

    fn sequences(&mut self) -> Sequences {
        self.text.sample(BATCH, TOKENS, &mut self.generator)
    }
}

fn attention(params: Params) -> Attention {
    Attention::new(params, [BATCH, TOKENS, 2, 16])
}

/// Checks the derivative along the gradient of each tensor, and by the weight with the largest.
fn check_gradient(params: Params) -> Result<()> {
    let mut start = Start::new();
    let sequences = start.sequences();
    let mut attention = attention(params);
    let (_, mut gradient) = loss_and_gradient(&start.weights, &mut attention, &sequences)?;
    for (tensor, gradient) in gradient.tensors_mut().into_iter().enumerate() {
        let norm = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
        let along: Vec<f32> = gradient.iter().map(|g| g / norm).collect();
        let largest =
            gradient.iter().fold(0.0f32, |largest, &g| if g.abs() > largest.abs() { g } else { largest });
        let one: Vec<f32> = gradient.iter().map(|&g| f32::from(u8::from(g == largest))).collect();
        for (name, direction, slope) in [("along", along, norm), ("one", one, largest)] {
            let mut quotient = |step: f32| -> Result<f64> {
                let mut loss_at = |step: f32| {
                    let mut weights = start.weights.clone();
                    let moved = weights.tensors_mut().swap_remove(tensor);
                    moved.iter_mut().zip(&direction).for_each(|(weight, d)| *weight += step * d);
                    loss(&weights, &mut attention, &sequences)
                };
                Ok((loss_at(step)? - loss_at(-step)?) / (2.0 * f64::from(step)))
            };
            let (step, slope) = (0.03, f64::from(slope));
            let (near, far) = (quotient(step)?, quotient(2.0 * step)?);
            // The quotients' own error is quadratic in the step: that of `near` is a third of the distance to `far`.
            let bound = (far - near).abs() + LOSS_ROUNDING / f64::from(step);
            println!("tensor {tensor} {name}: {slope:.6}, differences {near:.6}, bound {bound:.1e}");
            assert!(bound < 0.01 * slope.abs(), "the differences are too inexact to judge by");
            assert!((near - slope).abs() <= bound);
        }
    }
    Ok(())
}

#[test]
fn gradient_with_exact_attention() -> Result<()> {
    check_gradient(methods::exact())
}

/// Without hashes the keys that a query meets depend on the seed alone.
#[test]
fn gradient_with_sampled_keys() -> Result<()> {
    let [_, (_, paper), _] = methods::all();
    check_gradient(Params { lsh_num_projs: 0, ..paper })
}

/// To what the frequencies of single characters allow, with each method alike.
#[test]
fn the_loss_falls() -> Result<()> {
    let mut start = Start::new();
    let mut trainings =
        methods::all().map(|(_, params)| Training::new(start.weights.clone(), attention(params)));
    let mut losses = [[0.0; 3]; 40];
    for losses in &mut losses {
        let sequences = start.sequences();
        for (training, loss) in trainings.iter_mut().zip(losses) {
            *loss = training.step(&sequences)?;
        }
    }
    let mean = |losses: &[[f64; 3]], method: usize| {
        losses.iter().map(|of_step| of_step[method]).sum::<f64>() / losses.len() as f64
    };
    let before = (start.text.vocabulary as f64).ln();
    let after = [0, 1, 2].map(|method| mean(&losses[30..], method));
    println!("from {before:.3} to {after:.3?}");
    for (method, after) in after.into_iter().enumerate() {
        assert!((losses[0][method] - before).abs() < 0.2 && after < 3.1);
        assert!((after - mean(&losses[30..], 0)).abs() < 0.05);
    }
    Ok(())
}
