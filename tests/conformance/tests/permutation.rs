//! Sorting against the oracle, and the restriction of one sort to intervals.

use hyperattn_conformance::expected::{rank_table, ranks};
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_core::{Params, stages};
use hyperattn_reference::{Generator, sorted_order};

/// The core's order of `ranks`.
fn order_of(ranks: &[u32], num_projs: u32) -> Vec<u32> {
    let spare_len = if stages::needs_spare(num_projs) { ranks.len() } else { 0 };
    let (mut order, mut spare) = (vec![u32::MAX; ranks.len()], vec![u32::MAX; spare_len]);
    let mut counters = vec![u32::MAX; stages::counter_len(num_projs)];
    stages::sort_by_rank(ranks, num_projs, &mut order, &mut spare, &mut counters);
    order
}

fn oracle_order(ranks: &[u32]) -> Vec<u32> {
    sorted_order(ranks).into_iter().map(|position| position as u32).collect()
}

#[test]
fn gray_ranks_equal_the_oracle_s() {
    for num_projs in [1, 2, 7, 13, 24] {
        let table = rank_table(num_projs);
        assert!((0..table.len()).all(|code| stages::gray_rank(code as u32) == table[code]));
    }
}

#[test]
fn the_order_equals_the_oracle_s() {
    let seed = 120;
    for (lsh_num_projs, n) in
        [(1, 997), (2, 997), (7, 1), (7, 2), (7, 4099), (11, 997), (12, 4099), (13, 4099), (24, 4099)]
    {
        let params = Params { lsh_num_projs, seed, ..Params::default() };
        let inputs = Inputs::clustered(Shape { head_dim: 8, ..Shape::single(1, n) }, seed);
        let ranks = ranks(&params, &inputs.k, 8, 0);
        if lsh_num_projs == 7 && n > 1000 {
            assert!((1..128).filter(|rank| ranks.contains(rank)).count() > 20, "too few buckets to sort");
        }
        assert_eq!(order_of(&ranks, lsh_num_projs), oracle_order(&ranks), "{lsh_num_projs} hyperplanes");
    }
    for num_projs in [1, 12, 13, 24] {
        // Every rank the same, and the largest.
        assert_eq!(order_of(&[(1 << num_projs) - 1; 77], num_projs), (0..77).collect::<Vec<u32>>());
        assert!(order_of(&[], num_projs).is_empty());
    }
}

/// Divides `order`, which holds positions `start..start + order.len()`, down to single positions and compares
/// every part with a sort of its own.
fn divide(ranks: &[u32], order: &[u32], start: usize) {
    let sorted: Vec<u32> = oracle_order(&ranks[start..start + order.len()]);
    let shifted: Vec<u32> = sorted.into_iter().map(|position| position + start as u32).collect();
    assert_eq!(order, shifted);
    if order.len() > 1 {
        let half = order.len().div_ceil(2);
        let mut parts = vec![u32::MAX; order.len()];
        stages::split(order, start + half, &mut parts);
        divide(ranks, &parts[..half], start);
        divide(ranks, &parts[half..], start + half);
    }
}

#[test]
fn splitting_the_order_equals_sorting_the_interval() {
    let seed = 121;
    println!("seed {seed}");
    let mut generator = Generator::new(seed);
    for (num_projs, n) in [(1, 100), (7, 1021), (13, 512), (24, 1021)] {
        let ranks: Vec<u32> = (0..n).map(|_| generator.below(1 << num_projs) as u32).collect();
        divide(&ranks, &order_of(&ranks, num_projs), 0);
    }
}

#[test]
fn a_split_at_an_end_changes_nothing() {
    let order = [3, 0, 2, 1];
    for middle in [0, 4] {
        let mut parts = [9; 4];
        stages::split(&order, middle, &mut parts);
        assert_eq!(parts, order);
    }
}
