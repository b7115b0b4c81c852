//! Fits a small transformer to a novel three times, from the same weights and on the same text: with exact attention and
//! with both estimators. Prints how the loss falls, and in the end the loss on text that was not trained on, with the
//! method trained with and with exact attention.
//!
//! `cargo run --release -p hyperattn-core --example train_transformer [STEPS]`, 450 of them by default: about a minute on
//! one core.

mod adam;
mod attention;
mod layers;
mod matrix;
mod methods;
mod model;
mod random;
#[cfg(test)]
mod tests;
mod text;
mod training;

use std::error::Error;

use attention::Attention;
use model::{Sizes, Weights};
use random::Generator;
use text::Text;
use training::Training;

const SEED: u64 = 20261126;
const BATCH: usize = 1;
const TOKENS: usize = 512;
/// Sequences for the loss on text that was not trained on.
const HELD_OUT: usize = 16;
const REPORT_EVERY: usize = 10;

fn main() -> Result<(), Box<dyn Error>> {
    let steps: usize = std::env::args().nth(1).map_or(Ok(450), |argument| argument.parse())?;
    let text = Text::new();
    let sizes = Sizes { vocabulary: text.vocabulary, layers: 2, width: 64, heads: 4, hidden: 192 };
    let shape = [BATCH, TOKENS, sizes.heads, sizes.head_dim()];
    let mut generator = Generator(SEED);
    let weights = Weights::random(sizes, &mut generator);
    let methods = methods::all();
    let mut trainings =
        methods.map(|(_, params)| Training::new(weights.clone(), Attention::new(params, shape)));

    println!(
        "cross entropy in nats a character, mean of {REPORT_EVERY} steps of {TOKENS} characters; seed {SEED}"
    );
    print_row("step", methods.map(|(name, _)| name.to_string()));
    print_row("keys/query", methods::keys_per_query(shape)?.map(|keys| format!("{keys:.0}")));
    let mut sums = [0.0; 3];
    for step in 1..=steps {
        let sequences = text.sample(BATCH, TOKENS, &mut generator);
        for (training, sum) in trainings.iter_mut().zip(&mut sums) {
            *sum += training.step(&sequences)? / REPORT_EVERY as f64;
        }
        if step % REPORT_EVERY == 0 {
            print_losses(&step.to_string(), sums);
            sums = [0.0; 3];
        }
    }

    let held_out = text.held_out(HELD_OUT, TOKENS);
    let shape = [HELD_OUT, TOKENS, sizes.heads, sizes.head_dim()];
    let mut exact = Attention::new(methods::exact(), shape);
    let (mut as_trained, mut exactly) = ([0.0; 3], [0.0; 3]);
    for (index, (training, (_, params))) in trainings.iter().zip(methods).enumerate() {
        as_trained[index] = training.loss(&mut Attention::new(params, shape), &held_out)?;
        exactly[index] = training.loss(&mut exact, &held_out)?;
    }
    println!("on {} characters that were not trained on:", HELD_OUT * TOKENS);
    print_losses("as trained", as_trained);
    print_losses("exact", exactly);
    Ok(())
}

fn print_row(name: &str, [exact, paper, refined]: [String; 3]) {
    println!("{name:>10} {exact:>9} {paper:>9} {refined:>9}");
}

fn print_losses(name: &str, losses: [f64; 3]) {
    print_row(name, losses.map(|loss| format!("{loss:.3}")));
}
