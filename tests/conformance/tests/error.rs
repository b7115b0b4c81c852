//! The error tensor: 0 for exact heads, else the relative error of the rows that it comes from.

use hyperattn_conformance::expected;
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::run::Setup;
use hyperattn_core::{Mask, Method, Params};
use hyperattn_reference::relative_frobenius_error;

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];
const METHODS: [Method; 4] = [Method::Auto, Method::Exact, Method::Paper, Method::Refined];

#[test]
fn exact_heads_have_none() {
    let shapes = [
        Shape { batch: 2, heads_q: 6, heads_kv: 2, ..Shape::single(131, 149) },
        Shape { heads_q: 2, ..Shape::single(70, 30) },
        Shape::single(1, 300),
        Shape::single(0, 5),
        Shape::single(5, 0),
    ];
    for (shape, seed) in shapes.into_iter().zip(1400..) {
        for dtypes in DTypes::ALL {
            let inputs = Inputs::normal(shape, seed).rounded(dtypes);
            for mask in MASKS {
                for method in METHODS {
                    // Fewer keys than the default threshold: every method is exact.
                    let params = Params { method, mask, ..Params::default() };
                    for_each_table(|kernels| {
                        let setup = Setup::new(kernels, &params, &inputs);
                        let with_error = Setup { estimates: true, ..setup }.run();
                        assert_eq!(with_error.error, vec![0.0; shape.batch * shape.heads_q], "{params:?}");
                        assert_eq!(with_error.out, setup.run().out, "{params:?}: the output depends on it");
                    });
                }
            }
        }
    }
}

/// Of four queries every one is a probe row, so the estimate is the truth up to the rounding of the exact rows.
#[test]
fn with_four_queries_the_estimate_is_the_error() {
    let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, ..Shape::single(4, 700) };
    let inputs = Inputs::clustered(shape, 1410);
    for mask in [Mask::None, Mask::CausalBottomRight] {
        let exact =
            expected::expected(&Params { method: Method::Exact, mask, ..Params::default() }, &inputs, None);
        for method in [Method::Paper, Method::Refined] {
            let params = Params {
                method,
                mask,
                min_seq_len: 64,
                block_size: 16,
                sample_size: 16,
                budget: 64,
                band: 16,
                target_error: 0.0,
                ..Params::default()
            };
            for_each_table(|kernels| {
                let outcome = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run();
                let len = shape.n_q * shape.value_dim;
                let heads = outcome.out.chunks(len).zip(exact.out.chunks(len)).zip(&outcome.error);
                for (head, ((out, exact), &estimate)) in heads.enumerate() {
                    let error = relative_frobenius_error(out, exact);
                    assert!(error > 1e-4, "{params:?}: head {head} shows nothing");
                    let off = (f64::from(estimate) - error).abs();
                    assert!(off <= 1e-5, "{params:?}: {estimate} of head {head} should be {error}");
                }
            });
        }
    }
}

/// A target that no estimate meets makes every head exact; one that all meet changes nothing.
#[test]
fn targets_out_of_reach_and_within() {
    let shape = Shape { heads_q: 4, heads_kv: 2, ..Shape::single(300, 700) };
    let inputs = Inputs::normal(shape, 1420);
    for mask in MASKS {
        let refined = Params {
            method: Method::Refined,
            mask,
            min_seq_len: 0,
            budget: 64,
            band: 16,
            target_error: 0.0,
            ..Params::default()
        };
        let strict = Params { target_error: 1e-7, ..refined };
        let loose = Params { target_error: 100.0, ..refined };
        let exact = expected::expected(&Params { method: Method::Exact, ..refined }, &inputs, None);
        for_each_table(|kernels| {
            let run = |params| Setup { estimates: true, ..Setup::new(kernels, params, &inputs) }.run();
            let (plain, strict, loose) = (run(&refined), run(&strict), run(&loose));
            assert!(plain.error.iter().all(|&error| error > 0.01 && error.is_finite()), "{:?}", plain.error);
            assert_eq!(loose.bits(), plain.bits());
            assert_eq!(strict.error, vec![0.0; shape.heads_q]);
            assert!(relative_frobenius_error(&strict.out, &exact.out) < 5e-6);
        });
    }
}

/// Fewer queries than probe rows in a tile: some are probed more than once.
#[test]
fn single_queries_can_be_estimated() {
    for n_q in 1..8 {
        let shape = Shape { heads_q: 4, heads_kv: 2, ..Shape::single(n_q, 700) };
        let inputs = Inputs::normal(shape, 1430);
        for mask in MASKS {
            for target_error in [0.0, 0.01] {
                let params = Params {
                    method: Method::Refined,
                    mask,
                    min_seq_len: 0,
                    budget: 64,
                    band: 16,
                    target_error,
                    ..Params::default()
                };
                for_each_table(|kernels| {
                    let outcome = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run();
                    assert!(outcome.out.iter().chain(&outcome.error).all(|x| x.is_finite()), "{params:?}");
                });
            }
        }
    }
}
