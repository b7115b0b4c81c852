//! Algorithm 4: the recursion visits every visible entry once.

use hyperattn_reference::{Generator, Mask, Output, Partial, Problem, exact, exact_rows, masked_rows};

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];

#[test]
fn every_visible_entry_is_counted_once() {
    for (num_queries, num_keys) in [(13, 13), (16, 16), (1, 1), (5, 12), (12, 5), (0, 4), (4, 0)] {
        // All logits are 0 and the values are unit vectors: a row's numerator counts the visits to each key.
        let value: Vec<f64> =
            (0..num_keys * num_keys).map(|x| f64::from(x / num_keys == x % num_keys)).collect();
        let (query, key) = (vec![0.0; num_queries], vec![0.0; num_keys]);
        let problem = Problem::new(&query, &key, &value, 1, num_keys, 1.0);
        for (mask, leaf) in MASKS.into_iter().flat_map(|mask| (0..20).map(move |leaf| (mask, leaf))) {
            let rows: Vec<Partial> = masked_rows(&problem, mask, leaf, |queries, keys| {
                assert!(!queries.is_empty() && !keys.is_empty());
                exact_rows(&problem.slice(queries, keys), |_, _| true)
            });
            assert_eq!(rows.len(), num_queries);
            for (i, row) in rows.iter().enumerate() {
                let visible = |j| f64::from(mask.visible(num_queries, num_keys, i, j));
                let expected: Vec<f64> = (0..num_keys).map(visible).collect();
                assert_eq!(row.weighted_values, expected, "{num_queries} x {num_keys} {mask:?} {leaf} {i}");
                assert_eq!(row.sum, expected.iter().sum::<f64>());
            }
        }
    }
}

/// The sub-problems that are handed to the unmasked algorithm, in order.
fn unmasked_calls(num_queries: usize, num_keys: usize, mask: Mask, leaf: usize) -> Vec<[usize; 4]> {
    let (query, key) = (vec![0.0; num_queries], vec![0.0; num_keys]);
    let problem = Problem::new(&query, &key, &key, 1, 1, 1.0);
    let mut calls = Vec::new();
    masked_rows::<Partial>(&problem, mask, leaf, |queries, keys| {
        calls.push([queries.start, queries.end, keys.start, keys.end]);
        exact_rows(&problem.slice(queries, keys), |_, _| true)
    });
    calls
}

#[test]
fn the_left_half_is_the_larger_one() {
    let square = unmasked_calls(7, 7, Mask::CausalBottomRight, 2);
    assert_eq!(square, [[2, 4, 0, 2], [6, 7, 4, 6], [4, 7, 0, 4]]);
    assert_eq!(square, unmasked_calls(7, 7, Mask::CausalTopLeft, 2));
    assert!(unmasked_calls(7, 7, Mask::CausalTopLeft, 7).is_empty());
    assert_eq!(unmasked_calls(7, 7, Mask::CausalTopLeft, 6).len(), 1);
}

#[test]
fn unequal_lengths_become_an_unmasked_part_and_a_square() {
    assert_eq!(unmasked_calls(3, 7, Mask::None, 9), [[0, 3, 0, 7]]);
    assert_eq!(unmasked_calls(3, 7, Mask::CausalBottomRight, 3), [[0, 3, 0, 4]]);
    assert_eq!(unmasked_calls(7, 3, Mask::CausalBottomRight, 2), [[6, 7, 0, 2]]);
    assert_eq!(unmasked_calls(7, 3, Mask::CausalTopLeft, 3), [[3, 7, 0, 3]]);
    assert_eq!(unmasked_calls(3, 7, Mask::CausalTopLeft, 2), [[2, 3, 0, 2]]);
}

#[test]
fn with_exact_parts_the_recursion_is_exact() {
    let seed = 4;
    println!("seed {seed}");
    let mut generator = Generator::new(seed);
    for (num_queries, num_keys) in [(29, 29), (11, 30), (30, 11)] {
        let query = generator.normal_matrix(num_queries, 4);
        let (key, value) = (generator.normal_matrix(num_keys, 4), generator.normal_matrix(num_keys, 3));
        let problem = Problem::new(&query, &key, &value, 4, 3, 5.0);
        for mask in MASKS {
            let expected = exact(&problem, |i, j| mask.visible(num_queries, num_keys, i, j));
            let rows = masked_rows(&problem, mask, 3, |queries, keys| {
                exact_rows(&problem.slice(queries, keys), |_, _| true)
            });
            let result = Output::from_partials(&rows);
            let pairs = result.out.iter().zip(&expected.out).chain(result.lse.iter().zip(&expected.lse));
            pairs.for_each(|(a, e)| assert!(a == e || (a - e).abs() < 1e-11, "{a} is not {e}"));
        }
    }
}
