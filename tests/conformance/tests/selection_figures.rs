//! kappa and captured mass of the sampled rows, against the oracle and against counts by hand.

use std::sync::atomic::AtomicU32;

use hyperattn_conformance::expected::{exact_output, expected, visible_keys};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::patterns::{needle, sinks_and_neighbours, square, together, topics};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_conformance::run::{Setup, Workspace};
use hyperattn_core::{
    BlockMask, DIAGNOSIS_ROWS, HeadFigures, Kernels, Mask, Method, Params, Residual, Serial, TensorMut,
    TensorRef, Tensors, Unmet, diagnosis_row, forward_recording, forward_workspace, head_figures,
    head_figures_workspace,
};
use hyperattn_reference::Output;

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];

/// The figures of every head, and the output of the call that was looked at.
fn diagnose(
    kernels: &Kernels,
    params: &Params,
    inputs: &Inputs,
    block_mask: Option<BlockMask<'_>>,
) -> (Vec<HeadFigures>, Vec<f32>) {
    let shape = &inputs.shape;
    let heads = shape.batch * shape.heads_q;
    let mut out = vec![0.0; heads * shape.n_q * shape.value_dim];
    let mut figures = vec![HeadFigures { alpha: 0.0, kappa: 0.0, captured_mass: 0.0 }; heads];
    {
        let mut tensors = Tensors {
            q: TensorRef::contiguous(&inputs.q, shape.q()).unwrap(),
            k: TensorRef::contiguous(&inputs.k, shape.k()).unwrap(),
            v: TensorRef::contiguous(&inputs.v, shape.v()).unwrap(),
            out: TensorMut::contiguous(&mut out, shape.out()).unwrap(),
            lse: None,
            block_mask,
            error: None,
            keys_per_query: None,
            mask: None,
        };
        let layouts = tensors.layouts();
        let count = Unmet::words_needed(params, &layouts).unwrap();
        let words: Vec<AtomicU32> = (0..count).map(|_| AtomicU32::new(u32::MAX)).collect();
        let unmet = Unmet::new(params, &layouts, &words).unwrap();
        let need = forward_workspace(params, &layouts, kernels, &Serial).unwrap();
        let mut workspace = Workspace::new(need, |_| 0xFF);
        forward_recording(params, &mut tensors, kernels, &Serial, workspace.exact(), &unmet).unwrap();
        let need = head_figures_workspace(params, &layouts, &Serial).unwrap();
        let mut workspace = Workspace::new(need, |_| 0xFF);
        let source = (false, &unmet);
        head_figures(params, &tensors, source, kernels, &Serial, workspace.exact(), &mut figures).unwrap();
        assert!(workspace.guards_are_intact());
    }
    (figures, out)
}

/// Sampled rows of each head, as places in lse.
fn sampled(shape: &Shape, head: usize) -> impl Iterator<Item = (usize, usize)> {
    let n_q = shape.n_q;
    let rows = (0..DIAGNOSIS_ROWS.min(n_q)).map(move |i| diagnosis_row(n_q, i));
    rows.map(move |row| (row, head * n_q + row))
}

/// Mass and kappa of each head from the f64 log-sum-exps over what is met and over everything.
fn from_sums(met: &Output, all: &Output, shape: &Shape, visible: &[usize]) -> Vec<[f64; 2]> {
    let of_head = |head| {
        let (mut mass, mut rows) = (0.0, 0.0);
        let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
        for (_, at) in sampled(shape, head).filter(|&(row, _)| visible[row] > 0) {
            let captured = (met.lse[at] - all.lse[at]).exp();
            mass += captured;
            rows += 1.0;
            // Below that it is rounding in f64: the row meets everything.
            if 1.0 - captured > 1e-12 {
                let rest = all.lse[at] + (1.0 - captured).ln();
                (least, most) = (rest.min(least), rest.max(most));
            }
        }
        [mass / rows, if most < least { 1.0 } else { (most - least).exp() }]
    };
    (0..shape.batch * shape.heads_q).map(of_head).collect()
}

/// Compares METHOD_PAPER's figures with those of the oracle's own selection; returns how many heads had rows of which
/// some key is not met.
fn check_paper(params: &Params, inputs: &Inputs, block_mask: Option<BlockMask<'_>>) -> usize {
    let blocks_only = Params { residual: Residual::None, ..*params };
    let met = expected(&blocks_only, inputs, block_mask.as_ref());
    let all = exact_output(params, inputs);
    let shape = &inputs.shape;
    let want = from_sums(&met, &all, shape, &visible_keys(params.mask, shape));
    for_each_table(|kernels| {
        let (figures, out) = diagnose(kernels, params, inputs, block_mask);
        let plain = Setup { block_mask, ..Setup::new(kernels, params, inputs) }.run();
        assert_eq!(out, plain.out, "recording changes the output");
        for (head, (figures, [mass, kappa])) in figures.iter().zip(&want).enumerate() {
            println!("{params:?} head {head}: {figures:?}, mass {mass}, kappa {kappa}");
            // f32 logits of a few units: some 1e-6 of every weight.
            assert!((figures.captured_mass - mass).abs() < 2e-5, "mass {mass}, {figures:?}");
            assert!((figures.kappa / kappa - 1.0).abs() < 1e-4, "kappa {kappa}, {figures:?}");
        }
    });
    want.iter().filter(|[mass, _]| *mass < 1.0 - 1e-9).count()
}

fn paper(mask: Mask, residual: Residual) -> Params {
    Params {
        method: Method::Paper,
        mask,
        residual,
        block_size: 24,
        sample_size: 20,
        min_seq_len: 50,
        seed: 9,
        approx_d_epsilon: 10.0,
        ..Params::default()
    }
}

#[test]
fn paper_selects_what_the_oracle_selects() {
    let mut estimated = 0;
    for mask in MASKS {
        for (n_q, n_k) in [(200, 200), (130, 300), (300, 130), (40, 97)] {
            let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, ..Shape::single(n_q, n_k) };
            let inputs = Inputs::clustered(shape, 5000);
            for residual in [Residual::Uniform, Residual::RowNorm, Residual::None] {
                estimated += check_paper(&paper(mask, residual), &inputs, None);
            }
            let unsorted = Params { lsh_num_projs: 0, ..paper(mask, Residual::Uniform) };
            estimated += check_paper(&unsorted, &inputs, None);
        }
    }
    // All but those of 40 queries that see up to 40 keys, which are exact.
    assert_eq!(estimated, 8 * 4 * 11);
}

#[test]
fn paper_with_given_blocks() {
    for (mask, patterns) in MASKS.into_iter().flat_map(|mask| [(mask, 1), (mask, 8)]) {
        let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, ..Shape::single(150, 170) };
        let inputs = Inputs::clustered(shape, 5010);
        let blocks = OwnedMask::random([150, 170], [16, 11], patterns, 0.3, 5011);
        assert!(check_paper(&paper(mask, Residual::Uniform), &inputs, Some(blocks.view())) > 0);
    }
}

fn refined(mask: Mask) -> Params {
    let base = Params { method: Method::Refined, mask, target_error: 0.0, ..Params::default() };
    Params { min_seq_len: 0, budget: 128, num_first_keys: 5, band: 40, ..base }
}

/// With equal keys every selection of as many keys has the same mass, and the rest of a row is a number of keys.
#[test]
fn refined_counts_equal_keys() {
    let shape = Shape { heads_q: 2, ..Shape::single(900, 1000) };
    let mut inputs = Inputs::normal(shape, 5020);
    inputs.q.fill(0.0);
    for_each_table(|kernels| {
        let (figures, _) = diagnose(kernels, &refined(Mask::None), &inputs, None);
        for figures in figures {
            // 1000 = 15 * 64 + 40: the last 40 keys are met as they come, the first 5, and 82 are chosen; the 128th
            // is the column for the rest.
            assert!((figures.captured_mass - 127.0 / 1000.0).abs() < 1e-6, "{figures:?}");
            assert!((figures.kappa - 1.0).abs() < 1e-6, "{figures:?}");
        }
        let (figures, _) = diagnose(kernels, &refined(Mask::CausalTopLeft), &inputs, None);
        let (mut mass, mut rests) = (0.0, Vec::new());
        for (row, _) in sampled(&shape, 0) {
            let first = row / 128 * 128;
            let last = (first + 128).min(900) - 1;
            // The first tile sees no more than the budget. Another meets what it sees from a block 40 keys before
            // its first query on, and 127 keys together on average, but 16 chosen ones at least.
            let near = (first + 1).saturating_sub(40) / 64 * 64;
            let band = (first + last) / 2 + 1 - near;
            let unmet = if first == 0 { 0 } else { near - 5 - 127usize.saturating_sub(5 + band).max(16) };
            mass += 1.0 - unmet as f64 / (row + 1) as f64;
            if unmet > 0 {
                rests.push(unmet as f64);
            }
        }
        let kappa = rests.iter().copied().fold(0.0, f64::max) / rests.iter().copied().fold(1e9, f64::min);
        for figures in figures {
            assert!((figures.captured_mass - mass / 64.0).abs() < 1e-6, "{figures:?}, mass {}", mass / 64.0);
            assert!((figures.kappa / kappa - 1.0).abs() < 1e-6, "{figures:?}, kappa {kappa}");
        }
    });
}

/// The mass that is captured is what a call without a residual attends to; recording changes no bit of the output.
#[test]
fn refined_captures_what_it_attends_to_without_a_residual() {
    let shape = square(700, 32);
    let heads = [Inputs::normal(shape, 5030), topics(shape, 5031), sinks_and_neighbours(shape, 5032)];
    let inputs = together(&heads);
    for mask in MASKS {
        let params = refined(mask);
        let all = exact_output(&params, &inputs);
        for_each_table(|kernels| {
            let (figures, out) = diagnose(kernels, &params, &inputs, None);
            assert_eq!(out, Setup::new(kernels, &params, &inputs).run().out, "recording changes the output");
            let dropping = Params { residual: Residual::None, ..params };
            let met = Setup::new(kernels, &dropping, &inputs).run().lse;
            for (head, figures) in figures.iter().enumerate() {
                let shares =
                    sampled(&inputs.shape, head).map(|(_, at)| (f64::from(met[at]) - all.lse[at]).exp());
                let mass = shares.sum::<f64>() / DIAGNOSIS_ROWS as f64;
                println!("{mask:?} head {head}: {figures:?}, mass {mass}");
                assert!((figures.captured_mass - mass).abs() < 1e-4, "mass {mass}, {figures:?}");
                assert!(mass > 0.05 && mass < 0.9999, "{mass}");
            }
        });
    }
}

/// The queries of the second half give nearly all of their weight to one key, which is chosen: with this budget the keys of
/// all blocks are weighed one by one.
#[test]
fn refined_meets_a_heavy_key() {
    let inputs = needle(square(1024, 64), 300, 5040);
    for_each_table(|kernels| {
        let params = Params { budget: 256, ..refined(Mask::None) };
        let (figures, _) = diagnose(kernels, &params, &inputs, None);
        let mass = |queries: std::ops::Range<usize>| {
            let part = Inputs {
                shape: Shape { n_q: queries.len(), ..inputs.shape },
                q: inputs.q[queries.start * 64..queries.end * 64].to_vec(),
                ..inputs.clone()
            };
            diagnose(kernels, &params, &part, None).0[0].captured_mass
        };
        let [diffuse, heavy] = [mass(0..512), mass(512..1024)];
        println!("{figures:?}, halves {diffuse} and {heavy}");
        assert!(heavy > 0.98 && heavy <= 1.0 && diffuse < 0.6, "{diffuse}, {heavy}");
        assert!((figures[0].captured_mass - (diffuse + heavy) / 2.0).abs() < 0.05, "{figures:?}");
    });
}

/// Heads at budgets of their own, and exact ones, are each reported at what they settled at.
#[test]
fn refined_heads_that_settle_apart() {
    let shape = square(2048, 32);
    let inputs = together(&[Inputs::normal(shape, 5050), sinks_and_neighbours(shape, 5051)]);
    let kernels = Kernels::detect(None);
    println!("table {}", kernels.isa().name());
    let params = Params { target_error: 0.05, budget: 256, ..refined(Mask::CausalBottomRight) };
    let (figures, _) = diagnose(kernels, &params, &inputs, None);
    let keys = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run().keys_per_query;
    println!("{figures:?}, {keys:?} keys per query");
    // Diffuse attention needs all keys.
    assert!(figures[0].captured_mass == 1.0 && figures[0].kappa == 1.0 && keys[0] == 1024.5);
    assert!(figures[1].captured_mass < 1.0 && figures[1].kappa > 1.0 && keys[1] < 1024.0);
    let [settled] = [64, 128, 256, 512]
        .map(|budget| Params { budget, target_error: 0.0, ..params })
        .into_iter()
        .filter(|at| {
            let run = Setup { estimates: true, ..Setup::new(kernels, at, &inputs) }.run();
            run.keys_per_query[1] == keys[1]
        })
        .collect::<Vec<_>>()[..]
    else {
        panic!("one budget has so many keys");
    };
    assert_eq!(diagnose(kernels, &settled, &inputs, None).0[1], figures[1], "{settled:?}");
}
