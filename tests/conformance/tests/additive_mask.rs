//! Exact attention with a mask tensor, against the oracle and against what the same keys give without one.

use hyperattn_conformance::additive_mask::{AdditiveMask, HIDDEN};
use hyperattn_conformance::compare::{F32_TOLERANCE, check_setup};
use hyperattn_conformance::executors::{Order, Threads};
use hyperattn_conformance::expected::{mean_visible_keys, oracle_mask};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::run::{Outcome, Setup};
use hyperattn_conformance::storage::Arrangement;
use hyperattn_core::{DType, ErrorKind, Mask, Method, Params};
use hyperattn_reference::Generator;

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A mask entry of some units adds its own rounding to a logit: within the tolerance's margin up to about 10.
const TOLERANCE: f64 = F32_TOLERANCE;

fn exact(mask: Mask) -> Params {
    Params { method: Method::Exact, mask, ..Params::default() }
}

/// Groups, batch items, and more keys than are looked at together.
fn shape() -> Shape {
    Shape { batch: 2, heads_q: 4, heads_kv: 2, head_dim: 24, value_dim: 19, ..Shape::single(71, 475) }
}

fn check(params: &Params, inputs: &Inputs, mask: &AdditiveMask) {
    check_setup(params, inputs, TOLERANCE, |setup| Setup { mask: Some(mask), ..setup });
}

#[test]
fn element_types() {
    for (i, dtypes) in DTypes::ALL.into_iter().enumerate() {
        let inputs = Inputs::normal(shape(), 2000 + i as u64).rounded(dtypes);
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            let mask = AdditiveMask::random([2, 4, 71, 475], dtype, 2010 + (3 * i + j) as u64);
            check(&exact(MASKS[(i + j) % 3]), &inputs, &mask);
        }
    }
}

/// Lengths around the tiles' own, from the single query of decoding on.
#[test]
fn lengths() {
    let lengths =
        [(1, 1), (1, 997), (5, 64), (64, 63), (70, 65), (300, 129), (257, 1100), (600, 200), (3, 2100)];
    for (i, (n_q, n_k)) in lengths.into_iter().enumerate() {
        for params_mask in MASKS {
            let inputs = Inputs::normal(Shape { heads_q: 2, ..Shape::single(n_q, n_k) }, 2030);
            let mask = AdditiveMask::random([1, 1, n_q, n_k], DType::F16, 2031 + i as u64);
            check(&exact(params_mask), &inputs, &mask);
        }
    }
}

/// Extents of 1 serve all, to the bit as if they were written out.
#[test]
fn broadcast_extents() {
    let inputs = Inputs::normal(shape(), 2050);
    for form in 0..8 {
        let extent = |bit: usize, extent: usize| if form >> bit & 1 == 1 { 1 } else { extent };
        let extents = [extent(0, 2), extent(1, 4), extent(2, 71), 475];
        let mask = AdditiveMask::random(extents, DType::F16, 2051 + form as u64);
        check(&exact(Mask::None), &inputs, &mask);
        let whole = mask.expanded(&inputs.shape);
        for_each_table(|kernels| {
            let params = exact(Mask::CausalBottomRight);
            let run = |mask| Setup { mask: Some(mask), ..Setup::new(kernels, &params, &inputs) }.run().bits();
            assert!(run(&mask) == run(&whole), "{extents:?}");
        });
    }
}

/// Strides, also of 0, do not change a bit, and what lies between the elements is not read.
#[test]
fn arrangements() {
    let inputs = Inputs::normal(shape(), 2060);
    let params = exact(Mask::CausalBottomRight);
    for dtype in DTYPES {
        let mask = AdditiveMask::random([2, 4, 71, 475], dtype, 2061);
        let last_row = |i: usize| mask.entries[(i / 71 * 71 + 70) * 475..][..475].to_vec();
        let one_row = AdditiveMask { entries: (0..8 * 71).flat_map(last_row).collect(), ..mask.clone() };
        let last_head = &mask.entries[7 * 71 * 475..];
        let one_head = AdditiveMask { entries: last_head.repeat(8), ..mask.clone() };
        for (mask, arrangements) in [
            (&mask, &[Arrangement::TokensFirst, Arrangement::Padded, Arrangement::Reversed][..]),
            (&one_row, &[Arrangement::OneRow]),
            (&one_head, &[Arrangement::OneHead]),
        ] {
            for_each_table(|kernels| {
                let run = |mask: &AdditiveMask| {
                    Setup { mask: Some(mask), ..Setup::new(kernels, &params, &inputs) }.run().bits()
                };
                for &arrangement in arrangements {
                    let strided = AdditiveMask { arrangement, ..mask.clone() };
                    assert!(run(mask) == run(&strided), "{arrangement:?} {dtype:?}");
                }
            });
        }
    }
}

/// A mask that says what the causal mask says gives its bits, and one that says nothing those without a mask.
#[test]
fn staircases_are_causal_masks() {
    for (n_q, n_k) in [(300, 300), (70, 1300), (500, 90), (1, 200)] {
        let shape = Shape { heads_q: 2, ..Shape::single(n_q, n_k) };
        for (i, dtypes) in DTypes::ALL.into_iter().enumerate() {
            let inputs = Inputs::normal(shape, 2070).rounded(dtypes);
            for written in MASKS {
                let seen = |i, j| oracle_mask(written).visible(n_q, n_k, i, j);
                let hidden = [HIDDEN, HIDDEN, f32::MIN][i % 3];
                let dtype = if hidden == HIDDEN { DTYPES[i % 3] } else { DType::F32 };
                let mask = AdditiveMask::shared(&shape, dtype, |i, j| if seen(i, j) { 0.0 } else { hidden });
                for_each_table(|kernels| {
                    let run = |params: &Params, mask| {
                        Setup { mask, ..Setup::new(kernels, params, &inputs) }.run().bits()
                    };
                    let expected = run(&exact(written), None);
                    assert!(run(&exact(Mask::None), Some(&mask)) == expected, "{written:?} {n_q} {n_k}");
                    assert!(run(&exact(written), Some(&mask)) == expected, "{written:?} twice {n_q} {n_k}");
                });
            }
        }
    }
}

/// The bits of one row: output and lse.
fn row(outcome: &Outcome, shape: &Shape, row: usize) -> Vec<u32> {
    let out = &outcome.out[row * shape.value_dim..][..shape.value_dim];
    out.iter().chain([&outcome.lse[row]]).map(|x| x.to_bits()).collect()
}

/// Hidden keys and values may hold anything: at the end, as padding, where the keys need not be there, and in between.
#[test]
fn what_is_hidden_is_not_touched() {
    let shape = shape();
    let Shape { n_k, heads_kv, batch, .. } = shape;
    for (i, dtypes) in DTypes::ALL.into_iter().enumerate() {
        let clean = Inputs::normal(shape, 2080).rounded(dtypes);
        let mut generator = Generator::new(2081);
        let holes: Vec<bool> = (0..n_k).map(|_| generator.below(4) == 0).collect();
        let hidden = |j: usize| holes[j] || j >= 400;
        let mut dirty = clean.clone();
        for key in (0..batch * heads_kv * n_k).filter(|key| hidden(key % n_k)) {
            let anything = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][generator.below(3)];
            dirty.k[key * shape.head_dim..][..shape.head_dim].fill(anything);
            dirty.v[key * shape.value_dim..][..shape.value_dim].fill(anything);
        }
        for added in [0.0, 1.0] {
            // Every other row has a mask of numbers where both see a key.
            let entry =
                |i: usize, j: usize| if hidden(j) { HIDDEN } else { added * (i % 2 * (j % 3)) as f32 };
            let mask = AdditiveMask::shared(&shape, DTYPES[i % 3], entry);
            check(&exact(Mask::CausalBottomRight), &dirty, &mask);
        }
        let params = exact(Mask::None);
        let padding = AdditiveMask::shared(&shape, DType::F16, |_, j| if j >= 400 { HIDDEN } else { 0.0 });
        let mut padded = clean.clone();
        for key in (0..batch * heads_kv * n_k).filter(|key| key % n_k >= 400) {
            padded.k[key * shape.head_dim..][..shape.head_dim].fill(f32::NAN);
            padded.v[key * shape.value_dim..][..shape.value_dim].fill(f32::NAN);
        }
        let cut = |values: &[f32], width: usize| -> Vec<f32> {
            values.chunks(n_k * width).flat_map(|head| head[..400 * width].to_vec()).collect()
        };
        let short = Inputs {
            shape: Shape { n_k: 400, ..shape },
            k: cut(&clean.k, shape.head_dim),
            v: cut(&clean.v, shape.value_dim),
            ..clean.clone()
        };
        for_each_table(|kernels| {
            let masked = Setup { mask: Some(&padding), ..Setup::new(kernels, &params, &padded) }.run();
            let without = Setup::new(kernels, &params, &short).run();
            assert!(masked.bits() == without.bits(), "{dtypes:?}");
        });
    }
}

/// A NaN or +inf in the mask stays in its row, and does nothing where the causal mask hides the key.
#[test]
fn nan_and_infinity_in_the_mask() {
    let shape = Shape { heads_q: 2, ..Shape::single(150, 400) };
    let inputs = Inputs::normal(shape, 2090);
    for base in [0.0, -0.5] {
        for with in [f32::NAN, f32::INFINITY] {
            let clean = AdditiveMask::new([1, 2, 150, 400], DType::F32, |_, _, _, j| base * (j % 2) as f32);
            let mut dirty = clean.clone();
            let at = |head: usize, query: usize, key: usize| (head * 150 + query) * 400 + key;
            dirty.entries[at(0, 20, 269)] = with;
            dirty.entries[at(1, 77, 3)] = with;
            // Keys that the causal mask hides from these rows.
            dirty.entries[at(0, 30, 281)] = with;
            dirty.entries[at(1, 0, 399)] = with;
            let params = exact(Mask::CausalBottomRight);
            for_each_table(|kernels| {
                let run = |mask| Setup { mask: Some(mask), ..Setup::new(kernels, &params, &inputs) }.run();
                let (before, after) = (run(&clean), run(&dirty));
                for index in 0..300 {
                    if index == 20 || index == 227 {
                        let bits = row(&after, &shape, index);
                        assert!(bits.iter().all(|&x| f32::from_bits(x).is_nan()), "row {index}, {with}");
                    } else {
                        let near = before.lse[index] - after.lse[index];
                        assert!(near.abs() < 1e-5, "row {index}, {with}");
                        let values = |outcome: &Outcome| outcome.out[index * 16..][..16].to_vec();
                        let pairs = values(&before).into_iter().zip(values(&after));
                        assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-5), "row {index}, {with}");
                    }
                }
            });
        }
    }
}

/// Rows whose keys are all hidden, by -inf or by the lowest number of the type, are (0, -inf).
#[test]
fn rows_without_a_key() {
    let inputs = Inputs::normal(shape(), 2100);
    for (dtype, lowest) in [(DType::F32, f32::MIN), (DType::BF16, f32::MIN), (DType::F16, HIDDEN)] {
        for added in [0.0, 0.25] {
            let empty = |i: usize| i.is_multiple_of(3);
            let entry = |i: usize, j: usize| match (empty(i), j % 2) {
                (true, 0) => lowest,
                (true, _) => HIDDEN,
                _ => added * (j % 5) as f32,
            };
            let mask = AdditiveMask::shared(&inputs.shape, dtype, entry);
            check(&exact(Mask::None), &inputs, &mask);
            for_each_table(|kernels| {
                let params = exact(Mask::None);
                let outcome = Setup { mask: Some(&mask), ..Setup::new(kernels, &params, &inputs) }.run();
                for index in (0..outcome.lse.len()).filter(|index| empty(index % 71)) {
                    assert_eq!(outcome.lse[index], HIDDEN);
                    assert!(outcome.out[index * 19..][..19].iter().all(|x| x.to_bits() == 0));
                }
            });
        }
    }
}

/// Linear biases, as of ALiBi: hundreds of units between the first and the last key, of which a row's largest logits
/// are near 0.
#[test]
fn linear_biases() {
    for dtypes in DTypes::ALL {
        let shape = Shape { heads_q: 4, ..Shape::single(61, 700) };
        let inputs = Inputs::normal(shape, 2110).rounded(dtypes);
        let slope = |head: usize| -(0.5f32.powi(head as i32 + 1));
        let mask = AdditiveMask::new([1, 4, 61, 700], DType::F16, |_, head, i, j| {
            slope(head) * (i as f32 + 639.0 - j as f32).max(0.0)
        });
        check(&exact(Mask::CausalBottomRight), &inputs, &mask);
    }
}

#[test]
fn executors_workspaces_and_batches_do_not_change_a_bit() {
    let inputs = Inputs::normal(shape(), 2120);
    let params = exact(Mask::CausalBottomRight);
    let mask = AdditiveMask::random([2, 4, 71, 475], DType::F16, 2121);
    for_each_table(|kernels| {
        let serial = Setup { mask: Some(&mask), ..Setup::new(kernels, &params, &inputs) };
        let whole = serial.run();
        let expected = whole.bits();
        for (lanes, threads, order) in
            [(2, 2, Order::Forward), (5, 3, Order::Random(3)), (64, 1, Order::Reversed)]
        {
            let executor = Threads { lanes, threads, order };
            assert!(Setup { executor: &executor, ..serial }.run().bits() == expected, "{executor:?}");
        }
        for fill in [|_| 0, |i| (i * 71 + i / 257) as u8] {
            assert!(Setup { fill, ..serial }.run().bits() == expected, "the workspace changed the result");
        }
        let short = serial.attempt(|need| hyperattn_core::Layout { size: need.size - 1, ..need });
        assert_eq!(short.unwrap_err().kind(), ErrorKind::WorkspaceTooSmall);
        for batch in 0..2 {
            let entries = mask.entries[batch * 4 * 71 * 475..][..4 * 71 * 475].to_vec();
            let mask = AdditiveMask { shape: [1, 4, 71, 475], entries, ..mask.clone() };
            let item = inputs.batch_item(batch);
            let alone = Setup { mask: Some(&mask), ..Setup::new(kernels, &params, &item) }.run();
            assert!(alone.bits() == whole.batch_item(batch, 2).bits(), "batch item {batch}");
        }
    });
}

/// METHOD_AUTO is exact with a mask, whatever the length, and its error is 0.
#[test]
fn auto_is_exact() {
    let shape = Shape::single(40, 40_000);
    let inputs = Inputs::normal(shape, 270);
    let mask = AdditiveMask::random([1, 1, 1, 40_000], DType::F16, 2131);
    let params = Params { method: Method::Auto, budget: 64, ..exact(Mask::None) };
    for_each_table(|kernels| {
        let automatic = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) };
        let masked = Setup { mask: Some(&mask), ..automatic }.run();
        let exact = exact(Mask::None);
        let expected = Setup { params: &exact, mask: Some(&mask), ..automatic }.run();
        assert!(masked.bits() == expected.bits());
        assert_eq!(masked.error, [0.0]);
        assert_eq!(f64::from(masked.keys_per_query[0]), mean_visible_keys(Mask::None, &shape));
    });
}

#[test]
fn sequences_without_elements() {
    for (n_q, n_k) in [(0, 5), (5, 0), (0, 0)] {
        let inputs = Inputs::normal(Shape { heads_q: 2, ..Shape::single(n_q, n_k) }, 2140);
        for rows in [1, n_q] {
            let mask = AdditiveMask::new([1, 2, rows, n_k], DType::F32, |_, _, _, _| 0.0);
            let params = exact(Mask::None);
            for_each_table(|kernels| {
                let outcome = Setup { mask: Some(&mask), ..Setup::new(kernels, &params, &inputs) }.run();
                assert!(outcome.out.iter().all(|&x| x == 0.0) && outcome.lse.iter().all(|&x| x == HIDDEN));
            });
        }
    }
}

#[test]
fn refusals() {
    let inputs = Inputs::normal(Shape { batch: 2, heads_q: 4, heads_kv: 2, ..Shape::single(30, 50) }, 2150);
    let refused = |params: &Params, extents: [usize; 4], kind: ErrorKind, part: &str| {
        let mask = AdditiveMask::new(extents, DType::F32, |_, _, _, _| 0.0);
        for_each_table(|kernels| {
            let setup = Setup { mask: Some(&mask), ..Setup::new(kernels, params, &inputs) };
            let error = setup.attempt(|need| need).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.message().contains(part), "{error}");
        });
    };
    let (invalid, unsupported) = (ErrorKind::InvalidArgument, ErrorKind::Unsupported);
    let params = exact(Mask::None);
    refused(&params, [3, 4, 30, 50], invalid, "tensors.mask.shape[0] = 3 must be 1 or q.shape[0] = 2");
    refused(&params, [2, 2, 30, 50], invalid, "tensors.mask.shape[1] = 2 must be 1 or q.shape[1] = 4");
    refused(&params, [2, 4, 29, 50], invalid, "tensors.mask.shape[2] = 29 must be 1 or q.shape[2] = 30");
    refused(&params, [2, 4, 30, 51], invalid, "tensors.mask.shape[3] = 51 but k.shape[2] = 50");
    refused(&params, [2, 4, 30, 1], invalid, "tensors.mask.shape[3] = 1 but k.shape[2] = 50");
    for (method, name) in [(Method::Paper, "PAPER"), (Method::Refined, "REFINED")] {
        refused(
            &Params { method, ..params },
            [1, 1, 30, 50],
            unsupported,
            &format!("params.method = {name}"),
        );
    }
}
