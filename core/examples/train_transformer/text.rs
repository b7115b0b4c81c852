//! The text: the first chapters of a novel, character by character.

use crate::random::Generator;

const TEXT: &str = include_str!("../../../tests/data/pride-and-prejudice/chapters_1_to_17.txt");

/// Sequences of one length, one after the other, as numbers of characters.
pub struct Sequences {
    /// Tokens of a sequence.
    pub tokens: usize,
    /// The characters.
    pub characters: Vec<usize>,
    /// For each the one that follows it.
    pub successors: Vec<usize>,
}

/// The novel as numbers of characters.
pub struct Text {
    characters: Vec<usize>,
    /// How many different ones there are.
    pub vocabulary: usize,
}

impl Text {
    /// All of it.
    pub fn new() -> Self {
        let mut alphabet: Vec<char> = TEXT.chars().collect();
        alphabet.sort_unstable();
        alphabet.dedup();
        let number = |c: char| alphabet.binary_search(&c).expect("the alphabet has every character");
        Text { characters: TEXT.chars().map(number).collect(), vocabulary: alphabet.len() }
    }

    /// The last tenth is not trained on.
    fn held_out_start(&self) -> usize {
        self.characters.len() / 10 * 9
    }

    /// Sequences from anywhere in what is trained on.
    pub fn sample(&self, batch: usize, tokens: usize, generator: &mut Generator) -> Sequences {
        let places = self.held_out_start() - tokens;
        self.sequences(tokens, (0..batch).map(|_| generator.below(places)))
    }

    /// The first sequences of the held-out part.
    pub fn held_out(&self, batch: usize, tokens: usize) -> Sequences {
        self.sequences(tokens, (0..batch).map(|index| self.held_out_start() + index * tokens))
    }

    fn sequences(&self, tokens: usize, starts: impl Iterator<Item = usize>) -> Sequences {
        let mut sequences = Sequences { tokens, characters: Vec::new(), successors: Vec::new() };
        for start in starts {
            sequences.characters.extend(&self.characters[start..][..tokens]);
            sequences.successors.extend(&self.characters[start + 1..][..tokens]);
        }
        sequences
    }
}
