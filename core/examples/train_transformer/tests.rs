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
const TOKENS: usize = 256;

struct Start {
    weights: Weights,
    sequences: Sequences,
    generator: Generator,
}

fn start() -> Start {
    println!("seed {SEED}");
    let (text, mut generator) = (Text::new(), Generator(SEED));
    let sizes = Sizes { vocabulary: text.vocabulary, layers: 2, width: 32, heads: 2, hidden: 64 };
    let weights = Weights::random(sizes, &mut generator);
    Start { weights, sequences: text.sample(BATCH, TOKENS, &mut generator), generator }
}

fn attention(params: Params) -> Attention {
    Attention::new(params, [BATCH, TOKENS, 2, 16])
}

/// (loss(w + h d) - loss(w - h d)) / 2 h for a change d of tensor `tensor`.
fn difference_quotient(
    start: &Start,
    params: Params,
    tensor: usize,
    direction: &[f32],
    h: f32,
) -> Result<f64> {
    let mut attention = attention(params);
    let [above, below] = [h, -h].map(|h| {
        let mut weights = start.weights.clone();
        weights.tensors_mut()[tensor].iter_mut().zip(direction).for_each(|(w, d)| *w += h * d);
        loss(&weights, &mut attention, &start.sequences)
    });
    Ok((above? - below?) / (2.0 * f64::from(h)))
}

fn check_gradient(params: Params) -> Result<()> {
    let start = start();
    let (_, mut gradient) = loss_and_gradient(&start.weights, &mut attention(params), &start.sequences)?;
    for (tensor, gradient) in gradient.tensors_mut().into_iter().enumerate() {
        let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let along: Vec<f32> = gradient.iter().map(|&g| (f64::from(g) / norm) as f32).collect();
        let steepest =
            (0..gradient.len()).max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs())).unwrap();
        let mut one_weight = vec![0.0; gradient.len()];
        one_weight[steepest] = 1.0;
        for (what, direction, slope) in
            [("along", &along, norm), ("one", &one_weight, f64::from(gradient[steepest]))]
        {
            for h in [1e-1, 3e-2f32, 1e-2, 3e-3, 1e-3] {
                let q = difference_quotient(&start, params, tensor, direction, h)?;
                println!(
                    "{tensor} {what} h {h} slope {slope:.6} quotient {q:.6} {:.1e}",
                    (q - slope) / slope
                );
            }
        }
    }
    Ok(())
}

#[test]
fn exact() -> Result<()> {
    check_gradient(methods::exact())
}
