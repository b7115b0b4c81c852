//! Fits a small transformer to a novel three times from the same weights on the same text, with exact attention and with
//! both estimators, and prints how the loss falls.
//!
//! `cargo run --release -p hyperattn-core --example train_transformer [STEPS]`: 300 steps take about a minute on one core.

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
    let steps: usize = std::env::args().nth(1).map_or(Ok(300), |argument| argument.parse())?;
    let text = Text::new();
    let sizes = Sizes { vocabulary: text.vocabulary, layers: 2, width: 64, heads: 4, hidden: 192 };
    let shape = [BATCH, TOKENS, sizes.heads, sizes.head_dim()];
    let mut generator = Generator(SEED);
    let weights = Weights::random(sizes, &mut generator);
    let methods = methods::all();
    let mut trainings =
        methods.clone().map(|(_, params)| Training::new(weights.clone(), Attention::new(params, shape)));

    println!(
        "cross entropy in nats a character, mean of {REPORT_EVERY} steps of {TOKENS} characters; seed {SEED}"
    );
    println!("{:>10} {}", "step", row(methods.map(|(name, _)| name.to_string())));
    println!(
        "{:>10} {}",
        "keys/query",
        row(methods::keys_per_query(shape)?.map(|keys| format!("{keys:.0}")))
    );
    let mut sums = [0.0; 3];
    for step in 1..=steps {
        let sequences = text.sample(BATCH, TOKENS, &mut generator);
        for (training, sum) in trainings.iter_mut().zip(&mut sums) {
            *sum += training.step(&sequences)? / REPORT_EVERY as f64;
        }
        if step % REPORT_EVERY == 0 {
            println!("{step:>10} {}", row(sums.map(|mean| format!("{mean:.3}"))));
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
    println!(
        "on {} characters that were not trained on, with the method trained with and with exact attention:",
        HELD_OUT * TOKENS
    );
    println!("{:>10} {}", "as trained", row(as_trained.map(|loss| format!("{loss:.3}"))));
    println!("{:>10} {}", "exact", row(exactly.map(|loss| format!("{loss:.3}"))));
    Ok(())
}

fn row(cells: [String; 3]) -> String {
    cells.map(|cell| format!("{cell:>9}")).join(" ")
}
