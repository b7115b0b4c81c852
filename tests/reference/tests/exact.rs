//! Exact attention and the merge of partial rows.

use hyperattn_reference::{Generator, Mask, Output, Partial, Problem, Row, exact, exact_rows};

fn assert_close(actual: &[f64], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len());
    for (a, e) in actual.iter().zip(expected) {
        assert!(a == e || (a - e).abs() <= 1e-12 * (1.0 + e.abs()), "{actual:?} is not {expected:?}");
    }
}

#[test]
fn a_hand_computed_case() {
    // Weights 1, 2, 3 for the first query and 1, 4, 9 for the second.
    let key = [1.0f64.ln(), 2.0f64.ln(), 3.0f64.ln()];
    let problem = Problem::new(&[2.0, 4.0], &key, &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0], 1, 2, 0.5);
    let all = exact(&problem, |_, _| true);
    assert_close(&all.out, &[4.0 / 6.0, 5.0 / 6.0, 10.0 / 14.0, 13.0 / 14.0]);
    assert_close(&all.lse, &[6.0f64.ln(), 14.0f64.ln()]);
    let bottom_right = exact(&problem, |i, j| Mask::CausalBottomRight.visible(2, 3, i, j));
    assert_close(&bottom_right.out, &[1.0 / 3.0, 2.0 / 3.0, 10.0 / 14.0, 13.0 / 14.0]);
    let top_left = exact(&problem, |i, j| Mask::CausalTopLeft.visible(2, 3, i, j));
    assert_close(&top_left.out, &[1.0, 0.0, 0.2, 0.8]);
    assert_close(&top_left.lse, &[0.0, 5.0f64.ln()]);
}

#[test]
fn agrees_with_the_literal_formula() {
    let seed = 1;
    println!("seed {seed}");
    let mut generator = Generator::new(seed);
    let (num_queries, num_keys, head_dim, value_dim, scale) = (7, 11, 5, 3, 0.4);
    let query = generator.normal_matrix(num_queries, head_dim);
    let key = generator.normal_matrix(num_keys, head_dim);
    let value = generator.normal_matrix(num_keys, value_dim);
    let problem = Problem::new(&query, &key, &value, head_dim, value_dim, scale);
    for mask in [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft] {
        let (mut out, mut lse) = (vec![0.0; num_queries * value_dim], vec![0.0; num_queries]);
        for i in 0..num_queries {
            for j in 0..num_keys {
                let mut dot = 0.0;
                for x in 0..head_dim {
                    dot += query[i * head_dim + x] * key[j * head_dim + x];
                }
                let seen = mask == Mask::None
                    || mask == Mask::CausalTopLeft && j <= i
                    || mask == Mask::CausalBottomRight && j <= i + num_keys - num_queries;
                let weight = if seen { (scale * dot).exp() } else { 0.0 };
                lse[i] += weight;
                for x in 0..value_dim {
                    out[i * value_dim + x] += weight * value[j * value_dim + x];
                }
            }
            out[i * value_dim..][..value_dim].iter_mut().for_each(|x| *x /= lse[i]);
            lse[i] = lse[i].ln();
        }
        let result = exact(&problem, |i, j| mask.visible(num_queries, num_keys, i, j));
        assert_close(&result.out, &out);
        assert_close(&result.lse, &lse);
    }
}

#[test]
fn bottom_right_with_more_queries_than_keys_leaves_the_first_rows_empty() {
    let problem = Problem::new(&[1.0; 3], &[1.0], &[5.0], 1, 1, 1.0);
    let result = exact(&problem, |i, j| Mask::CausalBottomRight.visible(3, 1, i, j));
    assert_eq!(result.out, [0.0, 0.0, 5.0]);
    assert_eq!(result.lse, [f64::NEG_INFINITY, f64::NEG_INFINITY, 1.0]);
}

#[test]
fn large_logits_do_not_overflow_and_infinite_ones_vanish() {
    let key = [5000.0, 5000.0 + 3.0f64.ln(), f64::NEG_INFINITY];
    let problem = Problem::new(&[1.0], &key, &[1.0, 5.0, 100.0], 1, 1, 1.0);
    let result = exact(&problem, |_, _| true);
    assert_close(&result.out, &[4.0]);
    assert_close(&result.lse, &[5000.0 + 4.0f64.ln()]);
    let only_infinite = exact(&problem, |_, j| j == 2);
    assert_eq!((only_infinite.out[0], only_infinite.lse[0]), (0.0, f64::NEG_INFINITY));
}

#[test]
fn nan_stays_in_its_row() {
    let problem = Problem::new(&[f64::NAN, 1.0], &[1.0, 2.0], &[1.0, 1.0], 1, 1, 1.0);
    let result = exact(&problem, |_, _| true);
    assert!(result.out[0].is_nan() && result.lse[0].is_nan());
    assert_close(&result.out[1..], &[1.0]);
}

#[test]
fn merge_adds_disjoint_keys_and_the_empty_row_is_neutral() {
    let seed = 2;
    println!("seed {seed}");
    let mut generator = Generator::new(seed);
    let (query, key) = (generator.normal_matrix(4, 3), generator.normal_matrix(9, 3));
    let value = generator.normal_matrix(9, 2);
    let problem = Problem::new(&query, &key, &value, 3, 2, 20.0);
    let whole = exact(&problem, |_, _| true);
    for split in 0..=9 {
        let mut merged: Vec<Partial> = exact_rows(&problem, |_, j| j < split);
        let rest: Vec<Partial> = exact_rows(&problem.slice(0..4, split..9), |_, _| true);
        merged.iter_mut().zip(&rest).for_each(|(row, other)| row.merge(other));
        let merged = Output::from_partials(&merged);
        assert_close(&merged.out, &whole.out);
        assert_close(&merged.lse, &whole.lse);
    }
    let row = &exact_rows::<Partial>(&problem, |_, _| true)[0];
    let (mut left, mut right) = (Partial::empty(2), row.clone());
    left.merge(row);
    right.merge(&Partial::empty(2));
    assert_eq!((&left, &right), (row, row));
    let mut empty = Partial::empty(2);
    empty.merge(&Partial::empty(2));
    assert_eq!(empty.finish(), (vec![0.0, 0.0], f64::NEG_INFINITY));
}

#[test]
fn empty_sequences_are_legal() {
    let no_keys = exact(&Problem::new(&[1.0, 2.0], &[], &[], 1, 3, 1.0), |_, _| true);
    assert_eq!((no_keys.out, no_keys.lse), (vec![0.0; 6], vec![f64::NEG_INFINITY; 2]));
    let no_queries = exact(&Problem::new(&[], &[1.0], &[1.0], 1, 1, 1.0), |_, _| true);
    assert!(no_queries.out.is_empty() && no_queries.lse.is_empty());
}

#[test]
fn merging_keeps_a_row_that_is_nan() {
    let nan = Partial { max: f64::NAN, sum: f64::NAN, weighted_values: vec![f64::NAN] };
    let some = Partial { max: 0.0, sum: 1.0, weighted_values: vec![2.0] };
    for (mut a, b) in [(Partial::empty(1), nan.clone()), (some.clone(), nan.clone()), (nan, some)] {
        a.merge(&b);
        let (out, lse) = a.finish();
        assert!(out[0].is_nan() && lse.is_nan(), "{a:?}");
    }
}

#[test]
fn an_additive_mask_multiplies_weights_and_hides_keys() {
    let key = [1.0f64.ln(), 2.0f64.ln(), 3.0f64.ln(), f64::NAN];
    let value = [1.0, 10.0, 100.0, f64::NAN];
    let problem = Problem::new(&[1.0, 2.0], &key, &value, 1, 1, 1.0);
    let hidden = f64::NEG_INFINITY;
    // Weights 1, 2, 3 and 1, 4, 9, times 6, 1, 0 and 1, 1/2, 1/3.
    let mask = [6.0f64.ln(), 0.0, hidden, hidden, 0.0, -2.0f64.ln(), -3.0f64.ln(), hidden];
    let result = exact(&problem.masked(&mask), |_, _| true);
    assert_close(&result.out, &[26.0 / 8.0, 321.0 / 6.0]);
    assert_close(&result.lse, &[8.0f64.ln(), 6.0f64.ln()]);
    let causal = exact(&problem.masked(&mask), |i, j| j <= i);
    assert_close(&causal.out, &[1.0, 21.0 / 3.0]);
    let part = exact(&problem.masked(&mask).slice(1..2, 1..3), |_, _| true);
    assert_close(&part.out, &[320.0 / 5.0]);
    let nothing = exact(&problem.masked(&[hidden; 8]), |_, _| true);
    assert_eq!((nothing.out, nothing.lse), (vec![0.0; 2], vec![hidden; 2]));
}
