//! Algorithm 1, second half: one stable counting sort by (rank, position), and its restriction to the
//! intervals of the causal recursion.

/// Bits counted in one pass. Up to 12 hyperplanes need one pass, more need two.
const DIGIT_BITS: u32 = 12;

/// Counters that [`sort_by_rank`] needs.
pub fn counter_len(num_projs: u32) -> usize {
    1 << num_projs.min(DIGIT_BITS)
}

/// Whether [`sort_by_rank`] needs its `spare` slice.
pub fn needs_spare(num_projs: u32) -> bool {
    num_projs > DIGIT_BITS
}

/// One stable counting pass: writes the elements of `from` to `to`, ascending by `digit`.
fn counting_pass(
    from: impl Iterator<Item = u32> + Clone,
    digit: impl Fn(u32) -> usize,
    to: &mut [u32],
    counters: &mut [u32],
) {
    counters.fill(0);
    for position in from.clone() {
        counters[digit(position)] += 1;
    }
    let mut start = 0;
    for counter in counters.iter_mut() {
        start += core::mem::replace(counter, start);
    }
    for position in from {
        let slot = &mut counters[digit(position)];
        to[*slot as usize] = position;
        *slot += 1;
    }
}

/// Fills `order` with the positions `0..ranks.len()`, ascending by (rank, position). Every rank is
/// below `2^num_projs`. Linear in the number of positions.
pub fn sort_by_rank(
    ranks: &[u32],
    num_projs: u32,
    order: &mut [u32],
    spare: &mut [u32],
    counters: &mut [u32],
) {
    let positions = 0..ranks.len() as u32;
    let mask = (1u32 << DIGIT_BITS) - 1;
    let low = |position: u32| (ranks[position as usize] & mask) as usize;
    if needs_spare(num_projs) {
        let high = |position: u32| (ranks[position as usize] >> DIGIT_BITS) as usize;
        counting_pass(positions, low, spare, counters);
        counting_pass(spare.iter().copied(), high, order, counters);
    } else {
        counting_pass(positions, low, order, counters);
    }
}

/// Splits sorted positions at `middle`: those below it first, both parts still in their order.
/// A slice sorted by (rank, position) thus becomes two slices sorted the same way.
pub fn split(from: &[u32], middle: usize, to: &mut [u32]) {
    let below = from.iter().filter(|&&position| (position as usize) < middle);
    let rest = from.iter().filter(|&&position| (position as usize) >= middle);
    for (slot, position) in to.iter_mut().zip(below.chain(rest)) {
        *slot = *position;
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::rng::philox;
    use std::vec::Vec;

    #[test]
    fn equals_the_standard_library_s_stable_sort() {
        for (num_projs, len) in [(1, 100), (7, 1000), (12, 5000), (13, 5000), (24, 3000), (7, 0), (7, 1)] {
            let ranks: Vec<u32> =
                (0..len).map(|i| philox([5, 5], [i, 0, 0, 0])[0] & ((1 << num_projs) - 1)).collect();
            let mut expected: Vec<u32> = (0..len).collect();
            expected.sort_by_key(|&i| ranks[i as usize]);
            let mut order = std::vec![0; len as usize];
            let mut spare = std::vec![0; len as usize];
            let mut counters = std::vec![0; counter_len(num_projs)];
            sort_by_rank(&ranks, num_projs, &mut order, &mut spare, &mut counters);
            assert_eq!(order, expected, "{num_projs} hyperplanes, {len} positions");
        }
    }

    #[test]
    fn split_keeps_the_order_of_both_parts() {
        let mut to = [0; 6];
        split(&[5, 0, 3, 4, 1, 2], 3, &mut to);
        assert_eq!(to, [0, 1, 2, 5, 3, 4]);
    }
}
