//! A decoder over characters: rotary positions, norms before attention and before the hidden layer.

use hyperattn_core::Result;

use crate::attention::{Attended, Attention};
use crate::layers::{
    cross_entropy, linear, linear_backward, norm, norm_backward, rotate, silu, silu_backward,
};
use crate::random::Generator;
use crate::text::Sequences;

/// The extents of a model.
#[derive(Clone, Copy)]
pub struct Sizes {
    /// Different characters.
    pub vocabulary: usize,
    /// Layers.
    pub layers: usize,
    /// Numbers of a token between layers: heads times head_dim.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Numbers of a token in a hidden layer.
    pub hidden: usize,
}

impl Sizes {
    /// Numbers of a query, key or value.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }
}

/// The weights of a layer, or their gradients.
#[derive(Clone)]
struct Layer {
    attention_norm: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    output: Vec<f32>,
    hidden_norm: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

/// The weights of a model, or their gradients.
#[derive(Clone)]
pub struct Weights {
    sizes: Sizes,
    embedding: Vec<f32>,
    layers: Vec<Layer>,
    last_norm: Vec<f32>,
    logits: Vec<f32>,
}

impl Weights {
    /// Matrices that keep the mean square of what they multiply, but for those that add to the tokens, which are
    /// smaller.
    pub fn random(sizes: Sizes, generator: &mut Generator) -> Self {
        let Sizes { vocabulary, layers, width, hidden, .. } = sizes;
        let mut matrix = |rows: usize, columns: usize, scale: f32| -> Vec<f32> {
            (0..rows * columns).map(|_| scale * generator.symmetric() / (rows as f32).sqrt()).collect()
        };
        let into_the_sum = 1.0 / (2.0 * layers as f32).sqrt();
        let layer = |_| Layer {
            attention_norm: vec![1.0; width],
            query: matrix(width, width, 1.0),
            key: matrix(width, width, 1.0),
            value: matrix(width, width, 1.0),
            output: matrix(width, width, into_the_sum),
            hidden_norm: vec![1.0; width],
            up: matrix(width, hidden, 1.0),
            down: matrix(hidden, width, into_the_sum),
        };
        Weights {
            sizes,
            layers: (0..layers).map(layer).collect(),
            embedding: matrix(vocabulary, width, (vocabulary as f32).sqrt()),
            last_norm: vec![1.0; width],
            logits: matrix(width, vocabulary, 0.1),
        }
    }

    /// As many zeros.
    pub fn zeros(&self) -> Self {
        let mut zeros = self.clone();
        zeros.tensors_mut().into_iter().for_each(|tensor| tensor.fill(0.0));
        zeros
    }

    /// Every tensor, always in the same order.
    pub fn tensors_mut(&mut self) -> Vec<&mut [f32]> {
        let mut tensors: Vec<&mut Vec<f32>> =
            vec![&mut self.embedding, &mut self.last_norm, &mut self.logits];
        for layer in &mut self.layers {
            let Layer { attention_norm, query, key, value, output, hidden_norm, up, down } = layer;
            tensors.extend([attention_norm, query, key, value, output, hidden_norm, up, down]);
        }
        tensors.into_iter().map(Vec::as_mut_slice).collect()
    }
}

/// What a layer keeps for its gradient.
struct Kept {
    x: Vec<f32>,
    normed: Vec<f32>,
    attended: Attended,
    middle: Vec<f32>,
    middle_normed: Vec<f32>,
    hidden: Vec<f32>,
    activated: Vec<f32>,
}

/// Mean cross entropy, in nats, of each token's successor, of sequences.
pub fn loss(weights: &Weights, attention: &mut Attention, text: &Sequences) -> Result<f64> {
    let (x, _) = run_layers(weights, attention, text)?;
    let logits = linear(&norm(&x, &weights.last_norm), &weights.logits, weights.sizes.vocabulary);
    Ok(cross_entropy(&logits, &text.successors).0)
}

/// [`loss`] and its gradient.
pub fn loss_and_gradient(
    weights: &Weights,
    attention: &mut Attention,
    text: &Sequences,
) -> Result<(f64, Weights)> {
    let Sizes { vocabulary, width, .. } = weights.sizes;
    let mut gradient = weights.zeros();
    let (x, kept) = run_layers(weights, attention, text)?;
    let normed = norm(&x, &weights.last_norm);
    let (loss, dlogits) = cross_entropy(&linear(&normed, &weights.logits, vocabulary), &text.successors);
    let dnormed = linear_backward(&dlogits, &normed, &weights.logits, &mut gradient.logits, vocabulary);
    let mut dx = norm_backward(&dnormed, &x, &weights.last_norm, &mut gradient.last_norm);
    for (index, kept) in kept.into_iter().enumerate().rev() {
        let of_layer = (&weights.layers[index], &mut gradient.layers[index]);
        dx = layer_backward(index, &weights.sizes, of_layer, attention, text.tokens, kept, dx)?;
    }
    for (&token, dx) in text.characters.iter().zip(dx.chunks_exact(width)) {
        add(&mut gradient.embedding[token * width..][..width], dx);
    }
    Ok((loss, gradient))
}

/// What the layers return, and what each keeps.
fn run_layers(
    weights: &Weights,
    attention: &mut Attention,
    text: &Sequences,
) -> Result<(Vec<f32>, Vec<Kept>)> {
    let Sizes { width, .. } = weights.sizes;
    let rows = text.characters.iter().map(|token| &weights.embedding[token * width..][..width]);
    let mut x = rows.collect::<Vec<_>>().concat();
    let mut all_kept = Vec::new();
    for (index, layer) in weights.layers.iter().enumerate() {
        let (y, kept) = layer_forward(index, &weights.sizes, layer, attention, text.tokens, x)?;
        all_kept.push(kept);
        x = y;
    }
    Ok((x, all_kept))
}

fn layer_forward(
    index: usize,
    sizes: &Sizes,
    layer: &Layer,
    attention: &mut Attention,
    tokens: usize,
    x: Vec<f32>,
) -> Result<(Vec<f32>, Kept)> {
    let &Sizes { width, hidden: hidden_width, .. } = sizes;
    let normed = norm(&x, &layer.attention_norm);
    let [mut q, mut k, v] = [&layer.query, &layer.key, &layer.value].map(|w| linear(&normed, w, width));
    for turned in [&mut q, &mut k] {
        rotate(turned, width, sizes.head_dim(), tokens, 1.0);
    }
    let attended = attention.forward(index, [q, k, v])?;
    let mut middle = linear(&attended.out, &layer.output, width);
    add(&mut middle, &x);
    let middle_normed = norm(&middle, &layer.hidden_norm);
    let hidden = linear(&middle_normed, &layer.up, hidden_width);
    let activated = silu(&hidden);
    let mut y = linear(&activated, &layer.down, width);
    add(&mut y, &middle);
    Ok((y, Kept { x, normed, attended, middle, middle_normed, hidden, activated }))
}

/// Adds to the gradient of the layer's weights and returns that of its x.
fn layer_backward(
    index: usize,
    sizes: &Sizes,
    (layer, gradient): (&Layer, &mut Layer),
    attention: &mut Attention,
    tokens: usize,
    mut kept: Kept,
    dy: Vec<f32>,
) -> Result<Vec<f32>> {
    let &Sizes { width, hidden: hidden_width, .. } = sizes;
    let dactivated = linear_backward(&dy, &kept.activated, &layer.down, &mut gradient.down, width);
    let dhidden = silu_backward(&dactivated, &kept.hidden);
    let dnormed = linear_backward(&dhidden, &kept.middle_normed, &layer.up, &mut gradient.up, hidden_width);
    let mut dmiddle = dy;
    add(&mut dmiddle, &norm_backward(&dnormed, &kept.middle, &layer.hidden_norm, &mut gradient.hidden_norm));

    let dout = linear_backward(&dmiddle, &kept.attended.out, &layer.output, &mut gradient.output, width);
    let [mut dq, mut dk, dv] = attention.backward(index, &mut kept.attended, &dout)?;
    for turned in [&mut dq, &mut dk] {
        rotate(turned, width, sizes.head_dim(), tokens, -1.0);
    }
    let mut dnormed = vec![0.0; dout.len()];
    for (d, w, dw) in [
        (dq, &layer.query, &mut gradient.query),
        (dk, &layer.key, &mut gradient.key),
        (dv, &layer.value, &mut gradient.value),
    ] {
        add(&mut dnormed, &linear_backward(&d, &kept.normed, w, dw, width));
    }
    let mut dx = dmiddle;
    add(&mut dx, &norm_backward(&dnormed, &kept.x, &layer.attention_norm, &mut gradient.attention_norm));
    Ok(dx)
}

fn add(sum: &mut [f32], x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}
