//! Gradients of METHOD_REFINED. Its selection is the core's own, so the oracle gets it from the output: with the unit
//! vectors as values, row i of `out` has the share of every key.

use hyperattn_conformance::backward::{Backward, Loss, Slopes};
use hyperattn_conformance::expected::{oracle_mask, scale};
use hyperattn_conformance::expected_gradients::{Expected, RELATIVE_TOLERANCE};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::run::{Outcome, Setup};
use hyperattn_core::{DType, Kernels, Mask, Method, Params, Residual};
use hyperattn_reference::{Output, Problem, Term, Terms, backward, relative_frobenius_error};

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];
/// Neighbouring keys that have one mean.
const BLOCK: usize = 64;
const N: usize = 256;

fn refined(mask: Mask, residual: Residual) -> Params {
    Params {
        method: Method::Refined,
        mask,
        residual,
        min_seq_len: 0,
        budget: 64,
        num_first_keys: 3,
        band: 10,
        target_error: 0.0,
        ..Params::default()
    }
}

/// A budget of all keys makes the estimate exact.
#[test]
fn a_budget_of_all_keys() {
    let shape = Shape { heads_q: 4, heads_kv: 2, ..Shape::single(231, 247) };
    for (seed, dtypes) in (2300..).zip(DTypes::ALL) {
        let inputs = Inputs::normal(shape, seed).rounded(dtypes);
        let loss = Loss::normal(&shape, dtypes.q, seed);
        for mask in MASKS {
            let params = Params { budget: 300, ..refined(mask, Residual::Uniform) };
            let expected = Expected::new(&Setup::new(Kernels::scalar(), &params, &inputs), &loss);
            for_each_table(|kernels| {
                let call = Backward::new(Setup::new(kernels, &params, &inputs), &loss);
                let slopes = call.run_from(&expected.outcome);
                expected.assert_near(&slopes, &shape, RELATIVE_TOLERANCE, "all keys");
            });
        }
    }
}

/// The selection of one row.
struct Selected {
    /// Keys that are met.
    keys: Vec<usize>,
    /// Of every key, the share that its place in the column for the rest has of the row.
    rest: Vec<f64>,
}

/// Reads the selection of a row off its shares. `alone` are the shares that keys have when they are met.
fn selected(shares: &[f64], alone: &[f64], visible: usize, what: &str) -> Selected {
    let mut selected = Selected { keys: Vec::new(), rest: vec![0.0; shares.len()] };
    for block in (0..shares.len()).step_by(BLOCK) {
        let keys = block..(block + BLOCK).min(shares.len());
        // A key has its block's share of the rest, and its own on top of that where it is met; a block in which a row
        // sees less than all keys is not part of the rest.
        let candidates = [shares[block], shares[block] - alone[block], 0.0];
        let residue = |base: f64, j: usize| {
            let off = [shares[j] - base, shares[j] - base - alone[j]].map(f64::abs);
            off[0].min(off[1]) / (base.abs() + alone[j])
        };
        let fits = |base: f64| keys.clone().map(|j| residue(base, j)).fold(0.0, f64::max);
        let seen = keys.clone().take_while(|&j| j < visible).count();
        let base = if seen < keys.len() { 0.0 } else { least(candidates, fits) };
        for j in keys.clone().take(seen) {
            let residue = residue(base, j);
            assert!(residue < 1e-4, "{what}: key {j} has share {} beside {base} and {}", shares[j], alone[j]);
            if (shares[j] - base).abs() > (shares[j] - base - alone[j]).abs() {
                selected.keys.push(j);
            }
            selected.rest[j] = base.max(0.0);
        }
    }
    selected
}

fn least(candidates: [f64; 3], measure: impl Fn(f64) -> f64) -> f64 {
    candidates.into_iter().min_by(|&a, &b| measure(a).total_cmp(&measure(b))).expect("there are three")
}

/// Keys and a row's column for the rest as another key behind them; its gradients go to what it is the mean of.
fn expected(params: &Params, inputs: &Inputs, outcome: &Outcome, loss: &Loss) -> ([Vec<f64>; 3], [usize; 2]) {
    let Shape { n_q, n_k, head_dim, .. } = inputs.shape;
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&x| x.into()).collect() };
    let (q, k, v) = (wide(&inputs.q), wide(&inputs.k), wide(&inputs.v));
    let (out, lse, dout) = (wide(&outcome.out), wide(&outcome.lse), wide(&loss.dout));
    let dlse = wide(loss.dlse.as_ref().expect("losses have one"));
    let plain = Problem::new(&q, &k, &v, head_dim, n_k, scale(params, head_dim));
    let mut total = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]];
    let mut counts = [0, 0];
    for i in 0..n_q {
        let visible = |j: &usize| oracle_mask(params.mask).visible(n_q, n_k, i, *j);
        let visible = (0..n_k).filter(visible).count();
        let alone: Vec<f64> = (0..n_k).map(|j| (plain.logit(i, j) - lse[i]).exp()).collect();
        let row = selected(&out[i * n_k..][..n_k], &alone, visible, &format!("{params:?} row {i}"));
        let share: f64 = row.rest.iter().sum();
        counts[0] += row.keys.len();
        counts[1] += usize::from(share > 0.0);
        let mean = |rows: &[f64], columns: usize| -> Vec<f64> {
            let column = |c: usize| (0..n_k).map(|j| row.rest[j] / share * rows[j * columns + c]).sum();
            if share > 0.0 { (0..columns).map(column).collect() } else { vec![0.0; columns] }
        };
        let (k, v) = ([&k[..], &mean(&k, head_dim)].concat(), [&v[..], &mean(&v, n_k)].concat());
        let query = &q[i * head_dim..][..head_dim];
        let problem = Problem::new(query, &k, &v, head_dim, n_k, scale(params, head_dim));
        let term = |key: usize, weight: f64| Term { key, weight, in_sum: true, in_product: true };
        let mut terms: Vec<Term> = row.keys.iter().map(|&key| term(key, 1.0)).collect();
        if share > 0.0 {
            terms.push(term(n_k, share / (problem.logit(0, n_k) - lse[i]).exp()));
        }
        let rows = [Terms { terms, log_constant: f64::NEG_INFINITY }];
        let output = Output { out: out[i * n_k..][..n_k].to_vec(), lse: vec![lse[i]] };
        let of_row = backward(&problem, &rows, &output, &dout[i * n_k..][..n_k], &dlse[i..=i]);
        total[0][i * head_dim..][..head_dim].copy_from_slice(&of_row.dq);
        let [_, dk, dv] = &mut total;
        for (total, part, columns) in [(dk, &of_row.dk, head_dim), (dv, &of_row.dv, n_k)] {
            for (at, total) in total.iter_mut().enumerate() {
                let (j, c) = (at / columns, at % columns);
                let of_rest = if share > 0.0 { row.rest[j] / share * part[n_k * columns + c] } else { 0.0 };
                *total += part[at] + of_rest;
            }
        }
    }
    (total, counts)
}

fn assert_near(slopes: &Slopes, expected: &[Vec<f64>; 3], tolerance: f64, what: &str) {
    for ((actual, expected), name) in slopes.all().into_iter().zip(expected).zip(["dq", "dk", "dv"]) {
        let error = relative_frobenius_error(actual, expected);
        println!("{what}: error {error:.1e} of {name}");
        assert!(error <= tolerance, "{what}: error {error:e} of {name}");
    }
}

/// The keys that are met, the column for the rest, and the means that it is made of.
#[test]
fn a_selection_read_off_the_output() {
    for (seed, (n_q, mask, residual)) in (2320..).zip([
        (N, Mask::None, Residual::Uniform),
        (N, Mask::CausalBottomRight, Residual::Uniform),
        (N, Mask::CausalTopLeft, Residual::Uniform),
        (100, Mask::CausalBottomRight, Residual::Uniform),
        (300, Mask::CausalTopLeft, Residual::Uniform),
        (N, Mask::None, Residual::None),
    ]) {
        let shape = Shape { value_dim: N, ..Shape::single(n_q, N) };
        let mut inputs = Inputs::normal(shape, seed);
        inputs.v = (0..N * N).map(|at| f32::from(at / N == at % N)).collect();
        let params = refined(mask, residual);
        let loss = Loss::normal(&shape, DType::F32, seed);
        for_each_table(|kernels| {
            let call = Backward::new(Setup::new(kernels, &params, &inputs), &loss);
            let outcome = call.of.run();
            let (expected, [met, with_rest]) = expected(&params, &inputs, &outcome, &loss);
            println!("{} keys and {} columns for the rest of {n_q} rows", met, with_rest);
            // Else this shows nothing of what it is for.
            assert!(
                residual == Residual::None || with_rest > n_q / 4,
                "{with_rest} of {n_q} rows have a rest"
            );
            assert!(met < n_q * N * 3 / 4, "{met} keys are met");
            // The shares are read with f32 precision, and so the oracle's selection is.
            assert_near(
                &call.run_from(&outcome),
                &expected,
                5.0 * RELATIVE_TOLERANCE,
                &format!("{params:?}"),
            );
        });
    }
}

/// A vector added to all keys adds its product with a query to that row's lse, and nothing else; one added to all values is
/// added to all outputs. Whatever is selected, the gradients add up accordingly.
#[test]
fn sums_over_the_keys() {
    let shape = Shape { heads_q: 4, heads_kv: 2, head_dim: 24, ..Shape::single(500, 500) };
    for (seed, (dtype, target_error)) in
        (2340..).zip([(DType::F32, 0.0), (DType::F32, 0.3), (DType::BF16, 0.0)])
    {
        let inputs = Inputs::clustered(shape, seed).rounded(dtype);
        let loss = Loss::normal(&shape, dtype, seed);
        for mask in MASKS {
            let params = Params { target_error, ..refined(mask, Residual::Uniform) };
            for_each_table(|kernels| {
                let slopes = Backward::new(Setup::new(kernels, &params, &inputs), &loss).run();
                assert_sums(&slopes, &inputs, &loss, f64::from(dtype == DType::BF16) * 2e-2);
            });
        }
    }
}

fn assert_sums(slopes: &Slopes, inputs: &Inputs, loss: &Loss, tolerance: f64) {
    let Shape { heads_kv, n_q, n_k, head_dim, value_dim, .. } = inputs.shape;
    let scale = 1.0 / (head_dim as f64).sqrt();
    let dlse = loss.dlse.as_ref().expect("losses have one");
    for kv_head in 0..heads_kv {
        let rows = kv_head * inputs.shape.group() * n_q..(kv_head + 1) * inputs.shape.group() * n_q;
        let sum = |values: &[f32], columns: usize, c: usize, rows: std::ops::Range<usize>| -> (f64, f64) {
            let column = rows.map(|row| f64::from(values[row * columns + c]));
            column.fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x))
        };
        let keys = kv_head * n_k..(kv_head + 1) * n_k;
        let compare = |name: &str, (actual, squares): (f64, f64), expected: f64| {
            // Rounding errors of the parts, which cancel in the sum.
            let bound = (2e-5 + tolerance) * (squares.sqrt() * 10.0 + expected.abs() + 1.0);
            assert!((actual - expected).abs() <= bound, "sum of {name}: {actual} instead of {expected}");
        };
        for c in 0..head_dim {
            let of_lse =
                rows.clone().map(|row| f64::from(dlse[row]) * f64::from(inputs.q[row * head_dim + c]));
            compare("dk", sum(&slopes.dk, head_dim, c, keys.clone()), scale * of_lse.sum::<f64>());
        }
        for c in 0..value_dim {
            let expected = sum(&loss.dout, value_dim, c, rows.clone()).0;
            compare("dv", sum(&slopes.dv, value_dim, c, keys.clone()), expected);
        }
    }
}
