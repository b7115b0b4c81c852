//! METHOD_REFINED where there is nothing to estimate, how many keys it counts, and what it refuses.

use hyperattn_conformance::compare::{F32_TOLERANCE, check_setup, head_errors};
use hyperattn_conformance::expected::{exact_output, mean_visible_keys, visible_keys};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_conformance::run::Setup;
use hyperattn_core::{
    DType, ErrorKind, Kernels, Mask, Method, Params, Residual, Serial, TensorLayout, TensorMut, TensorRef,
    Tensors, forward, forward_workspace,
};

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];

/// Probe rows of a tile of queries.
const PROBE_ROWS: usize = 4;

fn refined(mask: Mask) -> Params {
    Params { method: Method::Refined, mask, min_seq_len: 0, budget: 128, ..Params::default() }
}

fn shape(n_q: usize, n_k: usize) -> Shape {
    Shape { batch: 2, heads_q: 4, heads_kv: 2, value_dim: 12, ..Shape::single(n_q, n_k) }
}

/// A budget of all keys, or no more keys than min_seq_len: within the tolerance of exact attention, error 0.
#[test]
fn nothing_to_estimate_is_exact() {
    for mask in MASKS {
        for (n_q, n_k) in [(300, 300), (40, 300), (300, 260)] {
            for (budget, min_seq_len) in [(300, 0), (u32::MAX, 0), (64, 300)] {
                for (target_error, dtypes) in
                    [(0.0, DTypes::from(DType::F32)), (0.05, DType::BF16.into()), (0.05, DType::F16.into())]
                {
                    let inputs = Inputs::normal(shape(n_q, n_k), 2000).rounded(dtypes);
                    let params = Params { budget, min_seq_len, target_error, ..refined(mask) };
                    check_setup(&params, &inputs, F32_TOLERANCE, |setup| setup);
                    for_each_table(|kernels| {
                        let setup = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) };
                        let outcome = setup.run();
                        assert_eq!(outcome.error, [0.0; 8]);
                        let visible = mean_visible_keys(mask, &inputs.shape) as f32;
                        assert!(
                            outcome.keys_per_query.iter().all(|&keys| (keys / visible - 1.0).abs() < 1e-6)
                        );
                    });
                }
            }
        }
    }
}

/// Whatever the method, exact attention reports an error of 0 and the keys that a query sees.
#[test]
fn exact_attention_has_no_error() {
    for mask in MASKS {
        for (n_q, n_k) in [(300, 300), (1, 500), (7, 500), (500, 7)] {
            let inputs = Inputs::normal(shape(n_q, n_k), 2010);
            let params = Params { method: Method::Exact, ..refined(mask) };
            for_each_table(|kernels| {
                let outcome = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run();
                assert_eq!(outcome.error, [0.0; 8]);
                let visible = mean_visible_keys(mask, &inputs.shape) as f32;
                assert!(outcome.keys_per_query.iter().all(|&keys| (keys / visible - 1.0).abs() < 1e-6));
            });
        }
    }
}

/// Without a target no query meets more than the budget on average, provided that what every query meets (first
/// keys, the band and the queries of a tile, which see each other) fits into it; and not much less where there is more
/// to see. The part of the band that a tile's queries see is a mean that is rounded down: up to one key more.
#[test]
fn keys_per_query_stay_within_the_budget() {
    for mask in MASKS {
        for (n_q, n_k) in [(1500, 1500), (200, 3000), (2000, 1200)] {
            for (budget, band) in [(512, 128), (700, 0), (512, 200)] {
                for residual in [Residual::Uniform, Residual::None] {
                    let params = Params { budget, band, residual, target_error: 0.0, ..refined(mask) };
                    let inputs = Inputs::normal(Shape::single(n_q, n_k), 2020);
                    for_each_table(|kernels| {
                        let outcome =
                            Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run();
                        let met = outcome.keys_per_query[0];
                        let visible = visible_keys(mask, &inputs.shape);
                        let capped = visible.iter().map(|&keys| keys.min(budget as usize)).sum::<usize>();
                        let most = capped as f32 / n_q as f32;
                        assert!(met < budget as f32 + 1.0, "{met} keys of {budget}, {params:?}");
                        assert!(met >= 0.8 * most, "{met} keys of {most}, {params:?}");
                    });
                }
            }
        }
    }
}

fn assert_few_queries_are_within(mask: Mask, n_q: usize, group: usize, target_error: f32) {
    let inputs = Inputs::normal(Shape { heads_q: group, ..Shape::single(n_q, 700) }, 2030);
    let params = Params { target_error, band: 32, ..refined(mask) };
    let truth = exact_output(&params, &inputs);
    let exact = mean_visible_keys(mask, &inputs.shape) as f32;
    for_each_table(|kernels| {
        let outcome = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run();
        assert!(outcome.out.iter().chain(&outcome.lse).all(|x| x.is_finite()));
        let errors = head_errors(&outcome.out, &truth.out, &inputs.shape);
        for ((keys, estimate), error) in outcome.keys_per_query.into_iter().zip(outcome.error).zip(errors) {
            if keys == exact {
                assert!(estimate == 0.0 && error < 1e-5, "{n_q} queries: {estimate}, {error}");
            } else {
                assert!(target_error > 0.0 || keys < 129.0, "{n_q} queries: {keys} keys");
                assert!(target_error == 0.0 || error <= f64::from(target_error), "{n_q} queries: {error}");
            }
            // Every query is a probe row.
            if n_q <= PROBE_ROWS {
                let difference = (f64::from(estimate) - error).abs();
                assert!(difference <= 1e-3 * error + 1e-6, "{n_q} queries: {estimate}, {error}");
            }
        }
    });
}

/// As few queries as a decoding step has, down to fewer rows in a call than are probed in a tile.
#[test]
fn few_queries_with_probes() {
    for n_q in [1, 2, 3, 5, 7] {
        for group in [1, 2, 7] {
            for target_error in [0.0, 0.05] {
                assert_few_queries_are_within(Mask::None, n_q, group, target_error);
                assert_few_queries_are_within(Mask::CausalBottomRight, n_q, group, target_error);
            }
        }
    }
}

/// The same without an error to estimate, and with rows enough for the probes.
#[test]
fn few_queries() {
    for (n_q, n_k) in [(1, 700), (2, 700), (3, 701), (5, 640)] {
        for group in [1, 2, 7] {
            for mask in MASKS {
                let inputs = Inputs::normal(Shape { heads_q: group, ..Shape::single(n_q, n_k) }, 2040);
                let params = Params { target_error: 0.0, ..refined(mask) };
                for_each_table(|kernels| {
                    let outcome = Setup::new(kernels, &params, &inputs).run();
                    assert!(outcome.out.iter().chain(&outcome.lse).all(|x| x.is_finite()));
                });
            }
        }
    }
    for n_q in [8, 9, 15, 33] {
        for group in [1, 7] {
            assert_few_queries_are_within(Mask::None, n_q, group, 0.0);
            assert_few_queries_are_within(Mask::CausalBottomRight, n_q, group, 0.05);
        }
    }
}

#[test]
fn empty_sequences() {
    for mask in MASKS {
        for (n_q, n_k) in [(0, 500), (500, 0), (0, 0)] {
            let inputs = Inputs::normal(shape(n_q, n_k), 2050);
            for_each_table(|kernels| {
                let params = refined(mask);
                let outcome = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run();
                assert!(outcome.out.iter().all(|x| x.to_bits() == 0));
                assert!(outcome.lse.iter().all(|&lse| lse == f32::NEG_INFINITY));
                assert_eq!((outcome.error, outcome.keys_per_query), (vec![0.0; 8], vec![0.0; 8]));
            });
        }
    }
}

#[test]
fn options_out_of_range_are_refused() {
    let inputs = Inputs::normal(Shape::single(100, 100), 2060);
    let base = refined(Mask::None);
    let mut refused: Vec<(&str, Params)> =
        [0, 1, 63].map(|budget| ("params.budget", Params { budget, ..base })).into();
    for target_error in [f32::NAN, -0.01, f32::NEG_INFINITY, f32::INFINITY] {
        refused.push(("params.target_error", Params { target_error, ..base }));
    }
    for (name, params) in refused {
        for_each_table(|kernels| {
            let error = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }
                .attempt(|layout| layout)
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains(name), "{error}");
        });
    }
    Setup::new(Kernels::scalar(), &Params { budget: 64, target_error: 0.0, ..base }, &inputs).run();
}

#[test]
fn blocks_of_the_caller_are_refused() {
    let inputs = Inputs::normal(Shape::single(100, 100), 2070);
    let mask = OwnedMask::random([100, 100], [16, 16], 1, 0.5, 2071);
    let params = refined(Mask::None);
    let setup = Setup { block_mask: Some(mask.view()), ..Setup::new(Kernels::scalar(), &params, &inputs) };
    let error = setup.attempt(|layout| layout).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("block_mask"), "{error}");
}

/// The extents and element types that a tensor of one number per head may not have, and memory that is another's.
#[test]
fn tensors_of_estimates_are_checked() {
    let (rows, d) = (20, 16);
    let scalars = |shape: [i64; 4]| TensorLayout::contiguous(DType::F32, shape);
    let legal = scalars([2, 4, 1, 1]);
    let wrong = [
        scalars([1, 4, 1, 1]),
        scalars([2, 3, 1, 1]),
        scalars([2, 2, 1, 1]),
        scalars([2, 4, 20, 1]),
        scalars([2, 4, 1, 2]),
        TensorLayout::contiguous(DType::F16, [2, 4, 1, 1]),
        TensorLayout::contiguous(DType::BF16, [2, 4, 1, 1]),
        TensorLayout { stride: [0, 1, 1, 1], ..legal },
        TensorLayout { stride: [4, 0, 1, 1], ..legal },
    ];
    let shape = [2, 4, rows as i64, d as i64];
    for method in [Method::Exact, Method::Paper, Method::Refined] {
        let params = Params { method, ..refined(Mask::None) };
        // The first tensor is the one under test; the second is legal and has memory of its own, if it is there.
        let attempt = |name: &str, layout: TensorLayout, place: &str| {
            let mut memory = vec![0.0f32; 2 * 4 * rows * d];
            let (mut out, mut own, mut other) = (memory.clone(), vec![0.0f32; 4096], vec![0.0f32; 8]);
            let mut lse = vec![0.0f32; 2 * 4 * rows];
            let (q, out_data) = (memory.as_mut_ptr(), out.as_mut_ptr());
            let (lse_data, other_data) = (lse.as_mut_ptr(), other.as_mut_ptr());
            let at = match place {
                "q" => q,
                "out" => out_data,
                "lse" => lse_data,
                "the other" => other_data,
                _ => own.as_mut_ptr(),
            };
            let packed = TensorLayout::contiguous(DType::F32, shape);
            // SAFETY: every view lies in one of the vectors, which outlive it; what overlaps is refused before
            // it is used.
            let (input, under_test, other, out, lse) = unsafe {
                (
                    TensorRef::from_raw(q.cast(), packed),
                    TensorMut::from_raw(at.cast(), layout),
                    TensorMut::from_raw(other_data.cast(), legal),
                    TensorMut::from_raw(out_data.cast(), packed),
                    TensorMut::from_raw(lse_data.cast(), scalars([2, 4, rows as i64, 1])),
                )
            };
            let (error, keys_per_query) =
                if name == "error" { (under_test, other) } else { (other, under_test) };
            let mut tensors = Tensors {
                q: input,
                k: input,
                v: input,
                out,
                lse: Some(lse),
                block_mask: None,
                error: Some(error),
                keys_per_query: Some(keys_per_query),
                mask: None,
            };
            let layout = forward_workspace(&params, &tensors.layouts(), Kernels::scalar(), &Serial)?;
            let mut workspace = hyperattn_conformance::run::Workspace::new(layout, |_| 0);
            forward(&params, &mut tensors, Kernels::scalar(), &Serial, workspace.exact())
        };
        for name in ["error", "keys_per_query"] {
            attempt(name, legal, "memory of its own").unwrap();
            for layout in wrong {
                let error = attempt(name, layout, "memory of its own").unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidArgument);
                assert!(error.to_string().contains(name), "{error} does not name {name}");
            }
            for place in ["q", "out", "lse", "the other"] {
                let error = attempt(name, legal, place).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{name} in {place}");
                assert!(error.to_string().contains(name), "{error} does not name {name}");
                assert!(error.to_string().contains("overlap"), "{error}");
            }
        }
    }
}
