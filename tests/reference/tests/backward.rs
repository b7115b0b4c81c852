//! Gradients against central differences of a forward pass that is run again with the same selection.

use hyperattn_reference::{
    Generator, Gradients, Mask, Output, Partial, Problem, Row, RowNormSamples, Terms, backward, blocks_only,
    exact_rows, masked_rows, row_norm, row_norm_probabilities, uniform,
};

const HEAD_DIM: usize = 5;
const VALUE_DIM: usize = 3;

/// One head, and the gradients of a loss that is linear in out and lse.
struct Case {
    query: Vec<f64>,
    key: Vec<f64>,
    value: Vec<f64>,
    mask: Option<Vec<f64>>,
    dout: Vec<f64>,
    dlse: Vec<f64>,
}

impl Case {
    fn draw(generator: &mut Generator, num_queries: usize, num_keys: usize) -> Self {
        Case {
            query: generator.normal_matrix(num_queries, HEAD_DIM),
            key: generator.normal_matrix(num_keys, HEAD_DIM),
            value: generator.normal_matrix(num_keys, VALUE_DIM),
            mask: None,
            dout: generator.normal_matrix(num_queries, VALUE_DIM),
            dlse: generator.normal_matrix(num_queries, 1),
        }
    }

    fn problem<'a>(&'a self, [query, key, value]: [&'a [f64]; 3]) -> Problem<'a> {
        let problem = Problem::new(query, key, value, HEAD_DIM, VALUE_DIM, 0.7);
        self.mask.as_ref().map_or(problem, |mask| problem.masked(mask))
    }

    fn whole(&self) -> Problem<'_> {
        self.problem([&self.query, &self.key, &self.value])
    }

    /// The loss of these inputs, the rows' terms being `rows`.
    fn loss(&self, inputs: [&[f64]; 3], rows: &[Terms]) -> f64 {
        let Output { out, lse } = Output::from_terms(&self.problem(inputs), rows);
        let of_lse = lse.iter().zip(&self.dlse).filter(|(lse, _)| lse.is_finite());
        let of_out = out.iter().zip(&self.dout);
        of_out.chain(of_lse).map(|(x, gradient)| x * gradient).sum()
    }

    /// [`backward`] of `rows` agrees with central differences.
    fn check(&self, rows: &[Terms], what: &str) -> Gradients {
        let output = Output::from_terms(&self.whole(), rows);
        let gradients = backward(&self.whole(), rows, &output, &self.dout, &self.dlse);
        let inputs = [&self.query, &self.key, &self.value];
        for (which, gradient) in [&gradients.dq, &gradients.dk, &gradients.dv].into_iter().enumerate() {
            for (at, &expected) in gradient.iter().enumerate() {
                let moved = |step: f64| {
                    let mut input = inputs[which].clone();
                    input[at] += step;
                    let mut inputs = inputs.map(Vec::as_slice);
                    inputs[which] = &input;
                    self.loss(inputs, rows)
                };
                // The truncation is of the order of step^2, the rounding of 1e-15 / step.
                let step = 1e-4;
                let difference = (moved(step) - moved(-step)) / (2.0 * step);
                let error = (difference - expected).abs();
                assert!(
                    error <= 1e-6 * (1.0 + expected.abs()),
                    "{what}: {which} {at}: {expected} {difference}"
                );
            }
        }
        gradients
    }
}

/// Terms give the rows that the forward pass sums up.
fn assert_same_output(problem: &Problem, rows: &[Terms], partials: &[Partial], what: &str) {
    let (from_terms, expected) = (Output::from_terms(problem, rows), Output::from_partials(partials));
    let pairs = from_terms.out.iter().zip(&expected.out).chain(from_terms.lse.iter().zip(&expected.lse));
    pairs.for_each(|(a, e)| assert!(a == e || (a - e).abs() <= 1e-12 * (1.0 + e.abs()), "{what}: {a} {e}"));
}

/// Calls `check` with a generator for each of several seeds.
fn for_each_seed(check: impl Fn(&mut Generator)) {
    for seed in [11, 12, 13] {
        println!("seed {seed}");
        check(&mut Generator::new(seed));
    }
}

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];

#[test]
fn exact_attention() {
    for_each_seed(|generator| {
        for (num_queries, num_keys) in [(6, 6), (4, 9), (9, 4), (1, 7), (3, 1)] {
            let mut case = Case::draw(generator, num_queries, num_keys);
            for mask in MASKS {
                let rows: Vec<Terms> =
                    exact_rows(&case.whole(), |i, j| mask.visible(num_queries, num_keys, i, j));
                let gradients = case.check(&rows, &format!("{num_queries} x {num_keys} {mask:?}"));
                assert_sum_rules(&case, &rows, &gradients);
            }
            let entry = |generator: &mut Generator| match generator.below(3) {
                0 => f64::NEG_INFINITY,
                _ => generator.normal(),
            };
            case.mask = Some((0..num_queries * num_keys).map(|_| entry(generator)).collect());
            case.check(&exact_rows(&case.whole(), |_, _| true), "additive mask");
        }
    });
}

/// A vector added to all keys adds its product with a query to that row's lse and moves nothing else, so that the rows of
/// dS sum to dlse; one added to all values is added to every output.
fn assert_sum_rules(case: &Case, rows: &[Terms], gradients: &Gradients) {
    let sum_rows = |rows: &[f64], columns: usize| -> Vec<f64> {
        (0..columns).map(|c| rows.chunks(columns).map(|row| row[c]).sum()).collect()
    };
    let (mut of_keys, mut of_values) = (vec![0.0; HEAD_DIM], vec![0.0; VALUE_DIM]);
    for i in (0..rows.len()).filter(|&i| !rows[i].terms.is_empty()) {
        (0..HEAD_DIM).for_each(|c| of_keys[c] += 0.7 * case.dlse[i] * case.query[i * HEAD_DIM + c]);
        (0..VALUE_DIM).for_each(|c| of_values[c] += case.dout[i * VALUE_DIM + c]);
    }
    let actual = [sum_rows(&gradients.dk, HEAD_DIM), sum_rows(&gradients.dv, VALUE_DIM)].concat();
    for (a, e) in actual.iter().zip([of_keys, of_values].concat()) {
        assert!((a - e).abs() <= 1e-12 * (1.0 + e.abs()), "{a} {e}");
    }
}

/// What one sub-problem is estimated with.
fn estimate<R: Row>(residual: usize, problem: &Problem, samples: &[(usize, usize)], kappa: f64) -> Vec<R> {
    let covered = |i: usize, j: usize| (i + 2 * j).is_multiple_of(3);
    let probabilities = row_norm_probabilities(problem);
    let (n_q, n_k) = (problem.num_queries(), problem.num_keys());
    let keys: Vec<usize> = samples.iter().map(|sample| sample.0 % n_k).collect();
    let values: Vec<(usize, f64)> =
        samples.iter().map(|sample| sample.1 % n_k).map(|key| (key, probabilities[key])).collect();
    match residual {
        0 => blocks_only(problem, covered),
        1 => uniform(problem, covered, &keys),
        _ => {
            let tau_rows = [0, n_q / 2, n_q - 1];
            let samples = RowNormSamples {
                tau_rows: &tau_rows,
                row_sum_columns: &keys,
                value_columns: &values,
                epsilon: 1.5,
                kappa,
            };
            row_norm(problem, covered, &samples)
        }
    }
}

#[test]
fn the_published_estimators() {
    for_each_seed(|generator| {
        for (num_queries, num_keys) in [(7, 7), (5, 11), (11, 5)] {
            let case = Case::draw(generator, num_queries, num_keys);
            let samples: Vec<(usize, usize)> =
                (0..4).map(|_| (generator.below(100), generator.below(100))).collect();
            for (residual, kappa) in [(0, 1.0), (1, 1.0), (2, 1.0), (2, 5.0), (2, 1e9)] {
                for mask in MASKS {
                    let problem = &case.whole();
                    let rows: Vec<Terms> = masked_rows(problem, mask, 2, |queries, keys| {
                        estimate(residual, &problem.slice(queries, keys), &samples, kappa)
                    });
                    let partials: Vec<Partial> = masked_rows(problem, mask, 2, |queries, keys| {
                        estimate(residual, &problem.slice(queries, keys), &samples, kappa)
                    });
                    let what =
                        format!("residual {residual} kappa {kappa} {num_queries} x {num_keys} {mask:?}");
                    assert_same_output(problem, &rows, &partials, &what);
                    let gradients = case.check(&rows, &what);
                    if residual < 2 {
                        assert_sum_rules(&case, &rows, &gradients);
                    }
                }
            }
        }
    });
}

/// Caps, floors and terms of only one kind all occur, else the test above shows less than it seems to.
#[test]
fn caps_and_floors_occur_in_these_cases() {
    let seed = 11;
    println!("seed {seed}");
    let case = Case::draw(&mut Generator::new(seed), 7, 7);
    let samples = [(1, 2), (5, 3), (6, 0), (3, 3)];
    let rows = |kappa: f64| -> Vec<Terms> { estimate(2, &case.whole(), &samples, kappa) };
    let count = |rows: &[Terms], kind: (bool, bool)| {
        rows.iter().flat_map(|row| &row.terms).filter(|term| (term.in_sum, term.in_product) == kind).count()
    };
    let (floored, free) = (rows(1.0), rows(1e9));
    assert!(floored.iter().any(|row| row.log_constant.is_finite()));
    assert!(free.iter().any(|row| row.log_constant.is_finite()), "no term is capped");
    assert!(count(&free, (true, false)) > count(&floored, (true, false)));
    assert!(count(&free, (false, true)) > 0 && count(&free, (true, true)) > 0);
}

#[test]
fn a_part_of_the_terms_gets_its_share_and_an_empty_row_nothing() {
    for_each_seed(|generator| {
        let case = Case::draw(generator, 5, 8);
        let (problem, visible) = (&case.whole(), |i: usize, j: usize| j <= 2 * i && i != 3);
        let rows: Vec<Terms> = exact_rows(problem, visible);
        let output = Output::from_terms(problem, &rows);
        let whole = backward(problem, &rows, &output, &case.dout, &case.dlse);
        let part = |from: usize, to: usize| {
            let rows: Vec<Terms> = exact_rows(problem, |i, j| visible(i, j) && (from..to).contains(&j));
            backward(problem, &rows, &output, &case.dout, &case.dlse)
        };
        let (left, right) = (part(0, 3), part(3, 8));
        for ((whole, left), right) in [
            ((&whole.dq, &left.dq), &right.dq),
            ((&whole.dk, &left.dk), &right.dk),
            ((&whole.dv, &left.dv), &right.dv),
        ] {
            for ((whole, left), right) in whole.iter().zip(left).zip(right) {
                assert!((whole - left - right).abs() <= 1e-12 * (1.0 + whole.abs()));
            }
        }
        assert!(left.dv[3 * VALUE_DIM..].iter().all(|&x| x == 0.0));
        assert_eq!(whole.dq[3 * HEAD_DIM..4 * HEAD_DIM], [0.0; HEAD_DIM]);
    });
}
