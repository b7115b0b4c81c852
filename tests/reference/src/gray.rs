//! The binary-reflected Gray order of the buckets.

/// All codes of `bits` bits, each differing from its neighbours in one bit (the order of buckets in
/// Algorithm 1 of arXiv 2310.05869), built by reflection: the sequence so far, then the same backwards
/// with the next higher bit set.
pub fn gray_sequence(bits: u32) -> Vec<u32> {
    let mut sequence = vec![0];
    for bit in 0..bits {
        let reflected: Vec<u32> = sequence.iter().rev().map(|code| code | 1 << bit).collect();
        sequence.extend(reflected);
    }
    sequence
}

/// The position of every code in [`gray_sequence`], indexed by the code.
pub fn gray_ranks(bits: u32) -> Vec<u32> {
    let mut ranks = vec![0; 1 << bits];
    for (rank, code) in gray_sequence(bits).into_iter().enumerate() {
        ranks[code as usize] = rank as u32;
    }
    ranks
}
