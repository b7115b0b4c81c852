//! The published estimators, given mask and samples.

use hyperattn_reference::{
    Generator, Output, Partial, Problem, Row, RowNormSamples, blocks_only, exact, exact_rows, row_norm,
    row_norm_probabilities, uniform,
};

/// The unnormalised sums: denominator first, then the numerator.
fn sums(partial: &Partial) -> Vec<f64> {
    let unscaled = partial.weighted_values.iter().chain([&partial.sum]).rev();
    unscaled.map(|x| x * partial.max.exp()).collect()
}

fn assert_close(actual: &[f64], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len());
    for (a, e) in actual.iter().zip(expected) {
        assert!(a == e || (a - e).abs() <= 1e-12 * (1.0 + e.abs()), "{actual:?} is not {expected:?}");
    }
}

/// One query whose entries of A are 1, 2, 3, 4 with values 1, 2, 3, 4; key 0 is covered.
const VALUES: [f64; 4] = [1.0, 2.0, 3.0, 4.0];

fn first(_: usize, j: usize) -> bool {
    j == 0
}

#[test]
fn uniform_by_hand() {
    let key = VALUES.map(f64::ln);
    let problem = Problem::new(&[1.0], &key, &VALUES, 1, 1, 1.0);
    // Weight 4 / 3 each; the sample of key 0 is covered and counts as zero, key 2 counts twice.
    let result = Output::from_partials(&uniform(&problem, first, &[2, 0, 2]));
    assert_close(&result.out, &[(1.0 + 4.0 / 3.0 * 18.0) / (1.0 + 4.0 / 3.0 * 6.0)]);
    assert_close(&result.lse, &[9.0f64.ln()]);
    let without = Output::from_partials(&blocks_only(&problem, first));
    assert_eq!((without.out[0], without.lse[0]), (1.0, 0.0));
    assert_eq!(uniform::<Partial>(&problem, first, &[]), blocks_only(&problem, first));
    assert_eq!(uniform::<Partial>(&problem, |_, _| true, &[1, 2]), exact_rows(&problem, |_, _| true));
}

#[test]
fn row_norm_by_hand() {
    let key = VALUES.map(f64::ln);
    let problem = Problem::new(&[1.0], &key, &VALUES, 1, 1, 1.0);
    // e = 1, tau = 9, numerator 1 + 3 * 3 / (2 * 0.5) = 10; the covered sample of key 0 counts as zero.
    let samples = |epsilon, kappa| RowNormSamples {
        tau_rows: &[0],
        row_sum_columns: &[3, 0],
        value_columns: &[(2, 0.5), (0, 0.25)],
        epsilon,
        kappa,
    };
    let row_sum = |epsilon, kappa| {
        let result = Output::from_partials(&row_norm(&problem, first, &samples(epsilon, kappa)));
        assert_close(&result.out, &[10.0 / result.lse[0].exp()]);
        result.lse[0].exp()
    };
    let cap = |epsilon: f64, floor: f64| epsilon * epsilon * 2.0 / (4.0 * 4.0f64.ln()) * (1.0 + floor);
    assert!(cap(1.0, 3.0) < 1.5 && cap(1.0, 1.0) > 0.5 && cap(2.0, 3.0) > 4.0);
    // The floor tau / kappa = 3 exceeds d = 2 C.
    assert_close(&[row_sum(1.0, 3.0)], &[1.0 + 3.0]);
    // The floor is 1, and d = 2 C exceeds it.
    assert_close(&[row_sum(1.0, 9.0)], &[1.0 + 2.0 * cap(1.0, 1.0)]);
    // The cap exceeds the sampled entry: d = 2 * 4.
    assert_close(&[row_sum(2.0, 3.0)], &[1.0 + 8.0]);
    // Two keys, A = 1, 2: ln 2 is below 1, so C = 1 / 2 (1 + 2 / 4) and d = 2 C.
    let two_keys = problem.slice(0..1, 0..2);
    let one_sample = RowNormSamples { row_sum_columns: &[1], value_columns: &[], ..samples(1.0, 4.0) };
    assert_close(&sums(&row_norm(&two_keys, first, &one_sample)[0]), &[2.5, 1.0]);
    let no_samples = RowNormSamples { row_sum_columns: &[], value_columns: &[], ..samples(1.0, 3.0) };
    assert_close(&sums(&row_norm(&problem, first, &no_samples)[0]), &[4.0, 1.0]);
    let nothing = RowNormSamples { tau_rows: &[], ..no_samples };
    assert_eq!(row_norm::<Partial>(&problem, |_, _| false, &nothing), [Partial::empty(1)]);
}

#[test]
fn tau_is_the_largest_unmasked_row_sum_of_the_sampled_rows() {
    // Unmasked row sums 2, 4, 6 (A = 1, 2, 3 in each of three columns, the first covered).
    let query = [1.0f64.ln(), 2.0f64.ln(), 3.0f64.ln()];
    let problem = Problem::new(&query, &[1.0; 3], &[1.0; 3], 1, 1, 1.0);
    for (rows, tau) in [(&[0usize, 1][..], 4.0), (&[2, 0], 6.0), (&[0, 0], 2.0)] {
        let samples = RowNormSamples {
            tau_rows: rows,
            row_sum_columns: &[],
            value_columns: &[],
            epsilon: 1.0,
            kappa: 0.5,
        };
        let denominators: Vec<f64> = row_norm(&problem, first, &samples).iter().map(|p| sums(p)[0]).collect();
        assert_close(&denominators, &[1.0 + 2.0 * tau, 2.0 + 2.0 * tau, 3.0 + 2.0 * tau]);
    }
}

/// Small random inputs with the mask "same parity".
fn with_small_problem(check: impl Fn(&Problem, &[Vec<f64>])) {
    let seed = 3;
    println!("seed {seed}");
    let mut generator = Generator::new(seed);
    let (query, key) = (generator.normal_matrix(3, 4), generator.normal_matrix(5, 4));
    let value = generator.normal_matrix(5, 2);
    let problem = Problem::new(&query, &key, &value, 4, 2, 0.5);
    let truth: Vec<Vec<f64>> = exact_rows(&problem, |_, _| true).iter().map(sums).collect();
    check(&problem, &truth);
}

fn same_parity(i: usize, j: usize) -> bool {
    (i + j).is_multiple_of(2)
}

fn add_weighted(mean: &mut [Vec<f64>], weight: f64, partials: &[Partial]) {
    for (total, partial) in mean.iter_mut().zip(partials) {
        total.iter_mut().zip(sums(partial)).for_each(|(t, s)| *t += weight * s);
    }
}

#[test]
fn uniform_sums_are_unbiased_over_all_samples() {
    with_small_problem(|problem, truth| {
        let (mut one, mut two) = (vec![vec![0.0; 3]; 3], vec![vec![0.0; 3]; 3]);
        for a in 0..5 {
            add_weighted(&mut one, 1.0 / 5.0, &uniform(problem, same_parity, &[a]));
            for b in 0..5 {
                add_weighted(&mut two, 1.0 / 25.0, &uniform(problem, same_parity, &[a, b]));
            }
        }
        for (row, expected) in truth.iter().enumerate() {
            assert_close(&one[row], expected);
            assert_close(&two[row], expected);
        }
    });
}

#[test]
fn row_norm_sums_are_unbiased_over_all_samples_when_neither_cap_nor_floor_bites() {
    with_small_problem(|problem, truth| {
        let p = row_norm_probabilities(problem);
        assert_close(&[p.iter().sum()], &[1.0]);
        let mut mean = vec![vec![0.0; 3]; 3];
        for (row_sums, product) in (0..25).map(|x| (x / 5, x % 5)) {
            for other in 0..5 {
                let samples = RowNormSamples {
                    tau_rows: &[0, 1, 2],
                    row_sum_columns: &[row_sums],
                    value_columns: &[(product, p[product]), (other, p[other])],
                    epsilon: 1e6,
                    kappa: 1e15,
                };
                let weight = p[product] * p[other] / 5.0;
                add_weighted(&mut mean, weight, &row_norm(problem, same_parity, &samples));
            }
        }
        mean.iter().zip(truth).for_each(|(row, expected)| assert_close(row, expected));
    });
}

#[test]
fn the_cap_lowers_row_sums_and_the_floor_bounds_them() {
    with_small_problem(|problem, truth| {
        let samples = |epsilon, kappa| RowNormSamples {
            tau_rows: &[0, 1, 2],
            row_sum_columns: &[0, 1, 2, 3, 4],
            value_columns: &[],
            epsilon,
            kappa,
        };
        let denominators = |epsilon, kappa| -> Vec<f64> {
            row_norm(problem, same_parity, &samples(epsilon, kappa)).iter().map(|p| sums(p)[0]).collect()
        };
        let covered: Vec<f64> = blocks_only(problem, same_parity).iter().map(|p| sums(p)[0]).collect();
        let (loose, tight, floored) =
            (denominators(1e6, 1e15), denominators(0.1, 1e15), denominators(1.0, 1.0));
        let tau = (0..3).map(|i| truth[i][0] - covered[i]).fold(0.0, f64::max);
        for i in 0..3 {
            assert_close(&[loose[i]], &truth[i][..1]);
            assert!(covered[i] < tight[i] && tight[i] < loose[i]);
            assert_close(&[floored[i]], &[covered[i] + tau]);
        }
    });
}

#[test]
fn probabilities_are_the_squared_row_norms_and_uniform_without_any() {
    let problem = |value| Problem::new(&[], &[0.0; 3], value, 1, 2, 1.0);
    assert_close(
        &row_norm_probabilities(&problem(&[1.0, 1.0, 0.0, 0.0, 3.0, 5.0])),
        &[2.0 / 36.0, 0.0, 34.0 / 36.0],
    );
    assert_close(&row_norm_probabilities(&problem(&[0.0; 6])), &[1.0 / 3.0; 3]);
}

#[test]
fn a_constant_added_to_all_logits_moves_only_the_lse() {
    // The second component of every key adds 900 to the logit: exp of it overflows.
    let at = |shift: f64| {
        let key: Vec<f64> = VALUES.iter().flat_map(|x| [x.ln(), shift]).collect();
        let problem = Problem::new(&[1.0, 1.0], &key, &VALUES, 2, 1, 1.0);
        let samples = RowNormSamples {
            tau_rows: &[0],
            row_sum_columns: &[3, 1],
            value_columns: &[(2, 0.5), (1, 0.25)],
            epsilon: 1.0,
            kappa: 9.0,
        };
        [uniform(&problem, first, &[2, 3]), row_norm(&problem, first, &samples), blocks_only(&problem, first)]
            .map(|partials| Output::from_partials(&partials))
    };
    for (low, high) in at(0.0).iter().zip(at(900.0)) {
        assert!((low.out[0] - high.out[0]).abs() < 1e-9 && (low.lse[0] + 900.0 - high.lse[0]).abs() < 1e-9);
    }
}

#[test]
fn estimated_rows_add_up_over_disjoint_keys_and_are_exact_where_all_is_covered() {
    with_small_problem(|problem, _| {
        let (left, right) = (problem.slice(0..3, 0..2), problem.slice(0..3, 2..5));
        let samples = RowNormSamples {
            tau_rows: &[1],
            row_sum_columns: &[0, 1],
            value_columns: &[(1, 0.5)],
            epsilon: 1.0,
            kappa: 10.0,
        };
        let from_left: Vec<Partial> = row_norm(&left, same_parity, &samples);
        let from_right: Vec<Partial> = uniform(&right, same_parity, &[2, 1]);
        for (a, b) in from_left.iter().zip(&from_right) {
            let mut merged = a.clone();
            merged.merge(b);
            let expected: Vec<f64> = sums(a).iter().zip(sums(b)).map(|(x, y)| x + y).collect();
            assert_close(&sums(&merged), &expected);
        }
        let everything = exact(&left, |_, _| true);
        let covered = Output::from_partials(&row_norm(&left, |_, _| true, &samples));
        assert_close(&covered.out, &everything.out);
        assert_close(&covered.lse, &everything.lse);
    });
}
