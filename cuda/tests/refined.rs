//! REFINED on a device: its errors, by the oracle, against those of the CPU on the same numbers. Skips itself where
//! there is no device.

mod support;

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use hyperattn_conformance::compare::head_errors;
use hyperattn_conformance::expected::{mean_visible_keys, visible_keys};
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::patterns::{needle, sinks_and_neighbours, square, together, topics};
use hyperattn_conformance::real_data;
use hyperattn_conformance::run::Outcome;
use hyperattn_core::{DType, Mask, Method, Params, Residual};
use hyperattn_reference::relative_frobenius_error;

use support::call::Call;
use support::device::{Device, Stream, skip, synchronize};
use support::graph::Graph;
use support::refined::{TARGETS, most, oracle, refined};
use support::tensor::Arrangement;

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The relative error that rounding to 16 bits makes even in exact attention, and by how much an error may be off
/// besides.
fn rounding(inputs: &Inputs, out: DType) -> [f64; 2] {
    let DTypes { q, kv } = inputs.dtypes;
    let of_type = |dtype| match dtype {
        DType::F32 => [0.0, 1e-4],
        DType::F16 => [5e-4, 1e-3],
        DType::BF16 => [3e-3, 1e-3],
    };
    if q == kv { of_type(kv) } else { of_type(out) }
}

fn least(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::INFINITY, f64::min)
}

/// Asserts that the error of every head is the CPU's to 5 %, its estimate to 10 % and its keys to a thousandth, given
/// the exact output `truth`. The CPU runs in f32 and in the call's own types: what 16 bits do to the choice of keys
/// is between them.
fn assert_agrees(what: &str, call: &Call<'_>, outcome: &Outcome, truth: &[f64]) {
    let Call { params, inputs, .. } = *call;
    let what = format!("{what}, {params:?}, {:?}, {:?}, {:?}", inputs.shape, inputs.dtypes, call.out);
    let mut types = vec![DTypes::from(DType::F32), inputs.dtypes];
    types.dedup();
    let cpu = |params: &Params| -> Vec<Outcome> {
        types.iter().map(|&dtypes| Call { params, ..*call }.on_cpu(dtypes)).collect()
    };
    let references = cpu(params);
    let errors_of = |outcome: &Outcome| head_errors(&outcome.out, truth, &inputs.shape);
    let errors = errors_of(outcome);
    let reference_errors: Vec<Vec<f64>> = references.iter().map(errors_of).collect();
    println!("{what}: errors {errors:.4?}, of the CPU {reference_errors:.4?}");
    println!("  estimated {:.4?}, keys {:.1?}", outcome.error, outcome.keys_per_query);
    for reference in &references {
        println!("  CPU       {:.4?}, keys {:.1?}", reference.error, reference.keys_per_query);
    }
    // An estimate near the target may fall on either side of it: then the budget is that of a slightly different
    // target.
    let slack = if inputs.dtypes == DType::F32.into() { 0.02 } else { 0.1 };
    let with_target = |factor: f32| {
        let target_error = params.target_error * factor;
        if params.target_error > 0.0 { cpu(&Params { target_error, ..*params }) } else { references.clone() }
    };
    let bounds = OnceCell::new();
    let bounds = || bounds.get_or_init(|| (with_target(1.0 + slack), with_target(1.0 - slack)));
    let [rounded, absolute] = rounding(inputs, call.out);
    let visible = mean_visible_keys(params.mask, &inputs.shape);
    for head in 0..errors.len() {
        let keys = f64::from(outcome.keys_per_query[head]);
        let of = |outcomes: &[Outcome]| -> Vec<f64> {
            outcomes.iter().map(|outcome| f64::from(outcome.keys_per_query[head])).collect()
        };
        // Of the references with the same budget.
        let alike: Vec<usize> = of(&references)
            .into_iter()
            .enumerate()
            .filter(|(_, of_cpu)| (keys / of_cpu - 1.0).abs() <= 1e-3)
            .map(|(index, _)| index)
            .collect();
        if alike.is_empty() {
            let (loose, strict) = bounds();
            let (few, many) = (least(of(loose).into_iter()), most(of(strict).into_iter()));
            assert!(
                few * (1.0 - 1e-3) <= keys && keys <= many * (1.0 + 1e-3),
                "{what}: head {head} meets {keys} keys per query, the CPU {few} to {many}"
            );
            println!("  head {head}: the budget is at the edge, {few} to {many} keys");
            continue;
        }
        let error = errors[head];
        let of_cpu = || alike.iter().map(|&index| reference_errors[index][head]);
        let highest = (1.05 * most(of_cpu())).hypot(rounded) + absolute;
        let lowest = 0.95 * least(of_cpu()) - absolute;
        assert!(
            lowest <= error && error <= highest,
            "{what}: error {error:.5} of head {head}, expected {lowest:.5} to {highest:.5}"
        );
        let estimate = f64::from(outcome.error[head]);
        let of_cpu = || alike.iter().map(|&index| f64::from(references[index].error[head]));
        let highest = (1.1 * most(of_cpu())).hypot(rounded) + absolute;
        let lowest = 0.9 * least(of_cpu()) - absolute;
        assert!(
            lowest <= estimate && estimate <= highest,
            "{what}: estimate {estimate:.5} of head {head}, expected {lowest:.5} to {highest:.5}"
        );
        // As many keys as this has a head that the target has made exact, and one whose band holds them.
        let in_band = params.mask != Mask::None && params.band as usize >= inputs.shape.n_k;
        let exact = visible > 2.0 * f64::from(params.budget) && keys > 0.99 * visible && !in_band;
        if params.target_error > 0.0 && exact && most(of_cpu()) == 0.0 {
            assert_eq!(estimate, 0.0, "{what}: head {head} is exact");
        }
    }
}

/// One call with poisoned outputs.
fn check_call(what: &str, call: &Call<'_>) {
    assert_agrees(what, call, &call.run(), &oracle(call.params, call.inputs));
}

/// Calls with these targets.
fn check_targets(what: &str, params: &Params, inputs: &Inputs, targets: &[f32]) {
    let truth = oracle(params, inputs);
    for &target_error in targets {
        let params = Params { target_error, ..*params };
        let call = Call::new(&params, inputs);
        assert_agrees(what, &call, &call.run(), &truth);
    }
}

/// A diffuse head, one with a needle, one with topics and one that looks at first keys and neighbours.
fn mixed(n: usize, dim: usize, seed: u64) -> Inputs {
    let shape = square(n, dim);
    together(&[
        Inputs::normal(shape, seed),
        needle(shape, n / 5, seed + 10),
        topics(shape, seed + 20),
        sinks_and_neighbours(shape, seed + 30),
    ])
}

#[test]
fn heads_of_every_kind() {
    let Some(_device) = Device::first() else { return };
    for (n, dim, budget) in [(1500, 64, 256), (1200, 128, 128)] {
        let inputs = mixed(n, dim, 2300);
        for mask in MASKS {
            for dtype in DTYPES {
                check_targets(
                    "mixed",
                    &refined(mask, budget, 0.0),
                    &inputs.clone().rounded(dtype),
                    &[0.0, 0.05, 0.01],
                );
            }
        }
    }
}

/// Groups, batches, dimensions, lengths, element types and arrangements of which none changes what is promised.
#[test]
fn every_kind_of_problem() {
    let Some(_device) = Device::first() else { return };
    let one = Shape::single(1, 1);
    let problems = [
        (Mask::None, Shape { n_q: 1500, n_k: 1500, head_dim: 32, value_dim: 32, ..one }),
        (Mask::None, Shape { n_q: 300, n_k: 3000, heads_q: 2, head_dim: 64, value_dim: 20, ..one }),
        (
            Mask::CausalBottomRight,
            Shape { batch: 2, heads_q: 4, heads_kv: 2, n_q: 1300, n_k: 1300, head_dim: 64, value_dim: 48 },
        ),
        (
            Mask::CausalBottomRight,
            Shape { heads_q: 7, n_q: 300, n_k: 3000, head_dim: 80, value_dim: 80, ..one },
        ),
        (Mask::CausalBottomRight, Shape { n_q: 2000, n_k: 1500, head_dim: 64, value_dim: 64, ..one }),
        (
            Mask::CausalTopLeft,
            Shape { heads_q: 2, n_q: 2000, n_k: 1500, head_dim: 128, value_dim: 64, ..one },
        ),
        (Mask::CausalTopLeft, Shape { n_q: 1500, n_k: 2000, head_dim: 64, value_dim: 64, ..one }),
        (Mask::CausalBottomRight, Shape { n_q: 1100, n_k: 1111, head_dim: 57, value_dim: 33, ..one }),
        (Mask::None, Shape { n_q: 700, n_k: 1501, head_dim: 250, value_dim: 7, ..one }),
        (Mask::CausalBottomRight, Shape { n_q: 900, n_k: 900, head_dim: 24, value_dim: 256, ..one }),
        (Mask::CausalBottomRight, Shape { n_q: 1000, n_k: 1000, head_dim: 192, value_dim: 128, ..one }),
        (Mask::None, Shape { heads_q: 4, n_q: 1, n_k: 2500, head_dim: 128, value_dim: 128, ..one }),
        (Mask::CausalBottomRight, Shape { heads_q: 4, n_q: 33, n_k: 2500, ..square(1, 64) }),
    ];
    use Arrangement::{Packed, PaddedBy3, PaddedBy8, Reversed, TokensFirst};
    let all = [Packed, TokensFirst, PaddedBy3, PaddedBy8, Reversed];
    for (index, (mask, shape)) in problems.into_iter().enumerate() {
        let topics = topics(shape, 2140 + index as u64);
        for (turn, dtypes) in DTypes::ALL.into_iter().enumerate() {
            let arrangements = [all[(index + turn) % 5], all[(2 * index + turn) % 5]];
            let inputs = topics.clone().rounded(dtypes);
            let truth = oracle(&refined(mask, 512, 0.0), &inputs);
            for target_error in TARGETS {
                let params = refined(mask, if turn % 2 == 0 { 512 } else { 200 }, target_error);
                let call = Call { arrangements, ..Call::new(&params, &inputs) };
                assert_agrees("topics", &call, &call.run(), &truth);
            }
        }
    }
}

/// So many keys that probe rows meet them in parts, of which some rows see nothing under a causal mask.
#[test]
fn many_keys() {
    let Some(_device) = Device::first() else { return };
    let few = Shape { heads_q: 4, heads_kv: 2, head_dim: 64, value_dim: 64, ..Shape::single(300, 12_000) };
    for dtype in DTYPES {
        let inputs = topics(few, 2480).rounded(dtype);
        for mask in [Mask::None, Mask::CausalBottomRight] {
            check_targets("few of many", &refined(mask, 512, 0.0), &inputs, &TARGETS);
        }
    }
    for (dtype, dim) in [(DType::BF16, 64), (DType::F16, 128), (DType::F32, 64)] {
        let inputs = topics(square(11_000, dim), 2481).rounded(dtype);
        check_targets("many", &refined(Mask::CausalBottomRight, 512, 0.0), &inputs, &TARGETS[1..]);
    }
}

/// Options that change what a query meets.
#[test]
fn options() {
    let Some(_device) = Device::first() else { return };
    let shape = Shape { heads_q: 4, heads_kv: 2, head_dim: 64, value_dim: 64, ..Shape::single(1100, 1300) };
    let topics = topics(shape, 2400);
    for mask in MASKS {
        let base = refined(mask, 256, 0.0);
        let options = [
            Params { budget: 64, ..base },
            Params { budget: 1000, ..base },
            Params { band: 0, ..base },
            Params { band: 200, ..base },
            Params { band: 5000, ..base },
            Params { num_first_keys: 0, ..base },
            Params { num_first_keys: 300, ..base },
            Params { num_first_keys: 0, band: 0, ..base },
            Params { residual: Residual::None, ..base },
            Params { residual: Residual::RowNorm, ..base },
            Params { scale: 0.05, ..base },
            Params { scale: -0.1, ..base },
            Params { seed: 77, offset: u64::MAX, ..base },
        ];
        for (turn, dtype) in DTYPES.into_iter().enumerate() {
            let inputs = topics.clone().rounded(dtype);
            let truth = oracle(&base, &inputs);
            // Half of them for each type of 16 bits.
            let options =
                options.into_iter().enumerate().filter(|(index, _)| turn == 0 || index % 2 == turn - 1);
            for (_, params) in options {
                let check = |call: &Call<'_>| {
                    if call.params.scale == base.scale {
                        assert_agrees("options", call, &call.run(), &truth);
                    } else {
                        check_call("options", call);
                    }
                };
                check(&Call { out: DType::F32, ..Call::new(&params, &inputs) });
                let params = Params { target_error: 0.05, ..params };
                check(&Call::new(&params, &inputs));
            }
        }
    }
}

/// Half of the queries of each head want one far key more than all others.
#[test]
fn needles() {
    let Some(_device) = Device::first() else { return };
    let heads = [40, 200, 500, 700, 900].map(|position| needle(square(2048, 64), position, 2130));
    let inputs = together(&heads);
    for mask in [Mask::None, Mask::CausalBottomRight] {
        for dtype in DTYPES {
            check_targets("needles", &refined(mask, 400, 0.0), &inputs.clone().rounded(dtype), &TARGETS);
        }
    }
}

/// A target that no estimate meets makes every head exact; one that all meet changes nothing at the least budget.
#[test]
fn targets_out_of_reach_and_within() {
    let Some(_device) = Device::first() else { return };
    let shape = Shape { heads_q: 4, heads_kv: 2, head_dim: 64, ..Shape::single(300, 700) };
    for dtype in DTYPES {
        let inputs = Inputs::normal(shape, 1420).rounded(dtype);
        for mask in MASKS {
            let base = Params { band: 16, ..refined(mask, 64, 0.0) };
            let run = |params: &Params| Call::new(params, &inputs).run();
            let plain = run(&base);
            let strict = run(&Params { target_error: 1e-7, ..base });
            let loose = run(&Params { target_error: 100.0, ..base });
            assert!(plain.error.iter().all(|&error| error > 0.01 && error.is_finite()), "{:?}", plain.error);
            assert_eq!(loose.bits(), plain.bits(), "{dtype:?}, {base:?}");
            assert_eq!(strict.error, vec![0.0; shape.heads_q]);
            let truth = oracle(&base, &inputs);
            let bound = match dtype {
                DType::F32 => 1e-5,
                DType::F16 => 1.5e-3,
                DType::BF16 => 1e-2,
            };
            let errors = head_errors(&strict.out, &truth, &shape);
            assert!(errors.iter().all(|&error| error <= bound), "{dtype:?}, {base:?}: {errors:?}");
            let visible = visible_keys(mask, &shape).iter().sum::<usize>() as f32 / shape.n_q as f32;
            for keys in &strict.keys_per_query {
                assert!((keys / visible - 1.0).abs() < 1e-6, "{keys} keys per query");
            }
        }
    }
}

/// Of four queries every one is a probe row, so the estimate is the truth up to rounding. Of fewer some count for
/// nothing.
#[test]
fn few_queries() {
    let Some(_device) = Device::first() else { return };
    let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, ..Shape::single(4, 700) };
    for mask in [Mask::None, Mask::CausalBottomRight] {
        let inputs = Inputs::clustered(shape, 1410);
        let params = Params { band: 16, ..refined(mask, 64, 0.0) };
        let truth = oracle(&params, &inputs);
        let outcome = Call::new(&params, &inputs).run();
        let len = shape.n_q * shape.value_dim;
        let heads = outcome.out.chunks(len).zip(truth.chunks(len)).zip(&outcome.error);
        for (head, ((out, truth), &estimate)) in heads.enumerate() {
            let error = relative_frobenius_error(out, truth);
            let off = (f64::from(estimate) - error).abs();
            assert!(off <= 2e-5, "{params:?}: {estimate} of head {head} should be {error}");
        }
    }
    for n_q in 1..8 {
        let shape = Shape { heads_q: 4, heads_kv: 2, head_dim: 64, ..Shape::single(n_q, 700) };
        for (index, mask) in MASKS.into_iter().enumerate() {
            let inputs = Inputs::normal(shape, 1430).rounded(DTYPES[(n_q + index) % 3]);
            for target_error in [0.0, 0.01] {
                let params = Params { band: 16, ..refined(mask, 64, target_error) };
                check_call("few queries", &Call::new(&params, &inputs));
            }
        }
    }
}

/// With as many keys as the budget or the threshold it is exact attention, to the bit.
#[test]
fn few_keys_are_exact() {
    let Some(_device) = Device::first() else { return };
    for (n_q, n_k, budget, min_seq_len) in
        [(300, 128, 128, 0), (300, 700, 64, 700), (0, 700, 64, 0), (300, 0, 64, 0), (300, 700, 4096, 0)]
    {
        for (mask, dtype) in MASKS.into_iter().zip(DTYPES) {
            let inputs =
                Inputs::normal(Shape { head_dim: 64, ..Shape::single(n_q, n_k) }, 2420).rounded(dtype);
            for target_error in TARGETS {
                let params = Params { min_seq_len, ..refined(mask, budget, target_error) };
                let exact = Params { method: Method::Exact, ..params };
                let bits = |params| Call::new(params, &inputs).run().bits();
                assert_eq!(bits(&params), bits(&exact), "{params:?}");
            }
        }
    }
}

/// The stored problem of a real model: HYPERATTN_TEST_DATA, or the folder in the repository.
fn real_inputs() -> Option<Inputs> {
    const NAME: &str = "tests/data/qwen2.5-coder-0.5b_novel_layer12";
    let manifest = |path: &Path| path.join("..").join(NAME);
    let folder = match std::env::var_os("HYPERATTN_TEST_DATA") {
        Some(folder) => PathBuf::from(folder),
        None => match std::env::var_os("CARGO_MANIFEST_DIR") {
            Some(path) => manifest(Path::new(&path)),
            None => manifest(Path::new(env!("CARGO_MANIFEST_DIR"))),
        },
    };
    let inputs = real_data::from_folder(&folder);
    if let Err(error) = &inputs {
        skip(&format!("{}: {error}", folder.display()));
    }
    inputs.ok()
}

/// The latest `n_q` queries.
fn latest(inputs: &Inputs, n_q: usize) -> Inputs {
    let Shape { n_q: all, head_dim, .. } = inputs.shape;
    let heads = inputs.q.chunks(all * head_dim);
    Inputs {
        shape: Shape { n_q, ..inputs.shape },
        q: heads.flat_map(|head| &head[(all - n_q) * head_dim..]).copied().collect(),
        ..inputs.clone()
    }
}

#[test]
fn a_real_model() {
    let Some(_device) = Device::first() else { return };
    let Some(inputs) = real_inputs() else { return };
    let params = |mask, budget| Params { scale: real_data::SCALE, ..refined(mask, budget, 0.0) };
    for dtype in DTYPES {
        let prefix = real_data::prefix(&inputs, 2048).rounded(dtype);
        check_targets("prefix", &params(Mask::CausalBottomRight, 256), &prefix, &TARGETS);
        let latest = latest(&inputs, 200).rounded(dtype);
        for mask in [Mask::CausalBottomRight, Mask::None] {
            check_targets("latest queries", &params(mask, 1024), &latest, &TARGETS);
        }
    }
}

#[test]
fn the_same_bits_every_time() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        for mask in MASKS {
            let shape = Shape {
                batch: 2,
                heads_q: 4,
                heads_kv: 2,
                head_dim: 64,
                value_dim: 64,
                ..Shape::single(1200, 1200)
            };
            let inputs = topics(shape, 2430).rounded(dtype);
            for target_error in TARGETS {
                let params = refined(mask, 256, target_error);
                let call = Call::new(&params, &inputs);
                let first = call.run();
                for _ in 0..2 {
                    assert_eq!(call.run().bits(), first.bits(), "{params:?}, {dtype:?}");
                }
                let alone = Call { all_outputs: false, ..call }.run();
                assert_eq!(alone.out, first.out, "{params:?}, {dtype:?}: the output depends on the others");
            }
        }
    }
}

/// A batch item is what it is alone.
#[test]
fn batch_items_by_themselves() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        for mask in [Mask::None, Mask::CausalBottomRight] {
            let shape = Shape {
                batch: 3,
                heads_q: 4,
                heads_kv: 2,
                head_dim: 64,
                value_dim: 64,
                ..Shape::single(700, 900)
            };
            let inputs = topics(shape, 2440).rounded(dtype);
            let params = refined(mask, 200, 0.05);
            let together = Call::new(&params, &inputs).run();
            for batch in 0..shape.batch {
                let alone = Call::new(&params, &inputs.batch_item(batch)).run();
                assert_eq!(
                    alone.bits(),
                    together.batch_item(batch, shape.batch).bits(),
                    "{params:?}, {dtype:?}"
                );
            }
        }
    }
}

#[test]
fn without_a_workspace() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        let inputs = mixed(900, 64, 2450).rounded(dtype);
        let params = refined(Mask::CausalBottomRight, 128, 0.05);
        let call = Call::new(&params, &inputs);
        let prepared = call.prepare();
        // SAFETY: the tensors outlive the work, which `synchronize` waits for.
        unsafe { hyperattn_cuda::forward(&params, &prepared.tensors(), None, std::ptr::null_mut()) }.unwrap();
        synchronize();
        assert_eq!(prepared.outcome().bits(), call.run().bits());
    }
}

/// A captured call decides about its heads anew in every replay.
#[test]
fn captured_and_replayed() {
    let Some(_device) = Device::alone() else { return };
    for mask in [Mask::None, Mask::CausalBottomRight] {
        for dtype in DTYPES {
            for target_error in TARGETS {
                let params = refined(mask, 128, target_error);
                // No head needs more than the least budget at first.
                let inputs =
                    sinks_and_neighbours(Shape { heads_q: 4, heads_kv: 4, ..square(1000, 64) }, 2460)
                        .rounded(dtype);
                let prepared = Call::new(&params, &inputs).prepare();
                let stream = Stream::new();
                // The first call of these kernels may be the captured one.
                let graph = Graph::capture(&stream, || prepared.enqueue(&stream).unwrap());
                for inputs in
                    [inputs, mixed(1000, 64, 2461).rounded(dtype), mixed(1000, 64, 2462).rounded(dtype)]
                {
                    prepared.write(&inputs);
                    graph.launch(&stream);
                    let direct = Call::new(&params, &inputs).run();
                    assert_eq!(prepared.outcome().bits(), direct.bits(), "{params:?}, {dtype:?}");
                }
            }
        }
    }
}
