//! Algorithm 1: codes, ranks, order and blocks.

use hyperattn_reference::{
    SortedBlocks, gray_ranks, gray_sequence, key_block, lsh_code, query_block, sorted_order,
};

#[test]
fn gray_neighbours_differ_in_one_bit_and_every_code_occurs() {
    assert_eq!(gray_sequence(0), [0]);
    assert_eq!(gray_sequence(3), [0b000, 0b001, 0b011, 0b010, 0b110, 0b111, 0b101, 0b100]);
    for bits in 1..=12 {
        let sequence = gray_sequence(bits);
        for (position, code) in sequence.iter().enumerate() {
            let next = sequence[(position + 1) % sequence.len()];
            assert_eq!((code ^ next).count_ones(), 1, "{bits} bits, position {position}");
        }
        let ranks = gray_ranks(bits);
        assert!(sequence.iter().enumerate().all(|(rank, &code)| ranks[code as usize] == rank as u32));
        let mut codes = sequence;
        codes.sort_unstable();
        assert!(codes.into_iter().eq(0..1 << bits));
    }
}

#[test]
fn bit_j_of_a_code_is_the_sign_of_the_product_with_column_j() {
    // The products of (1, -2) with the columns are 1, -2, 3 and 0.
    let projections = [1.0, 0.0, 1.0, 2.0, 0.0, 1.0, -1.0, 1.0];
    assert_eq!(lsh_code(&[1.0, -2.0], &projections, 4), 0b0101);
    assert_eq!(lsh_code(&[1.0, -2.0], &[], 0), 0);
    assert_eq!(lsh_code(&[f32::NAN], &[1.0], 1), 0);
}

#[test]
fn products_are_fused_and_ascending() {
    // (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24, whose last term only a fused multiply-add sees, and only when it
    // is the second one: unfused or descending, the product is 0.
    let (x, rounded) = (1.0 + 2.0f32.powi(-12), 1.0 + 2.0f32.powi(-11));
    assert_eq!(x * x, rounded);
    assert_eq!(lsh_code(&[1.0, x], &[-rounded, x], 1), 1);
    assert_eq!(lsh_code(&[x, 1.0], &[x, -rounded], 1), 0);
}

#[test]
fn equal_ranks_keep_their_positions() {
    assert_eq!(sorted_order(&[3, 1, 3, 0, 1, 3]), [3, 1, 4, 0, 2, 5]);
    assert_eq!(sorted_order(&[0; 5]), [0, 1, 2, 3, 4]);
}

#[test]
fn queries_spread_over_the_key_blocks() {
    let blocks = |num_queries, num_keys, size| -> Vec<usize> {
        (0..num_queries).map(|p| query_block(p, num_queries, num_keys, size)).collect()
    };
    assert_eq!(blocks(3, 8, 2), [0, 1, 2]);
    assert_eq!(blocks(8, 3, 2), [0, 0, 0, 0, 0, 0, 1, 1]);
    for (n, size) in [(1, 1), (7, 3), (64, 16), (100, 7), (5, 9)] {
        assert!((0..n).all(|p| query_block(p, n, n, size) == key_block(p, size)));
        assert_eq!(key_block(n - 1, size) + 1, n.div_ceil(size));
        for num_queries in 1..40 {
            let blocks = blocks(num_queries, n, size);
            assert!(blocks.is_sorted() && blocks[0] == 0 && blocks[num_queries - 1] < n.div_ceil(size));
        }
    }
}

#[test]
fn covered_entries_share_a_sorted_block() {
    // Sorted queries: 1, 3, 0, 2. Sorted keys: 3, 0, 4, 1, 2. Blocks of two keys, the last of one.
    let blocks = SortedBlocks::new(&[2, 0, 3, 1], &[1, 4, 5, 0, 1], 2);
    let covered: Vec<(usize, usize)> =
        (0..4).flat_map(|i| (0..5).map(move |j| (i, j))).filter(|&(i, j)| blocks.covered(i, j)).collect();
    // Queries at positions 0..4 are in blocks floor(5 p / 8) = 0, 0, 1, 1.
    assert_eq!(covered, [(0, 1), (0, 4), (1, 0), (1, 3), (2, 1), (2, 4), (3, 0), (3, 3)]);
    assert!(!SortedBlocks::new(&[0], &[0], 0).covered(0, 0));
}
