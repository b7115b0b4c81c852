//! EXACT on a device against the oracle. Skips itself where there is no device.

mod support;

use hyperattn_core::{DType, ErrorKind, Mask};

use support::device::{Context, Device, Memory, Stream, cuda, current_context, synchronize};
use support::expect::assert_near;
use support::graph::Graph;
use support::problem::{Inputs, OnDevice, Outcome, Setup};
use support::tensor::{Arrangement, POISON, Tensor, rounded};

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// One call with poisoned outputs, compared with the oracle.
fn check(setup: Setup, seed: u64) {
    let inputs = Inputs::normal(&setup, seed);
    assert_near(&setup, &inputs, &OnDevice::new(&setup, &inputs).run());
}

#[test]
fn every_dimension_and_type() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        for dim in [64, 80, 96, 128, 192, 256] {
            for mask in MASKS {
                check(Setup { mask, ..Setup::new(300, 333, dim).dtype(dtype) }, 10);
            }
        }
        for dim in [1, 7, 8, 24, 40, 57, 72, 100, 160, 250] {
            check(Setup { mask: Mask::CausalTopLeft, ..Setup::new(70, 150, dim).dtype(dtype) }, 11);
        }
        for (head_dim, value_dim) in [(64, 128), (128, 64), (192, 128), (40, 256), (256, 8), (3, 65)] {
            for mask in [Mask::None, Mask::CausalBottomRight] {
                check(Setup { head_dim, value_dim, mask, ..Setup::new(150, 260, 64).dtype(dtype) }, 12);
            }
        }
    }
}

#[test]
fn lengths_around_tiles() {
    let Some(_device) = Device::first() else { return };
    for (n_q, n_k) in [
        (1, 1),
        (1, 2000),
        (2, 1),
        (63, 64),
        (64, 65),
        (127, 128),
        (128, 127),
        (129, 129),
        (256, 256),
        (257, 31),
        (500, 1025),
        (1025, 500),
        (1300, 1300),
    ] {
        for mask in MASKS {
            for dtype in [DType::BF16, DType::F32] {
                check(Setup { mask, ..Setup::new(n_q, n_k, 64).dtype(dtype) }, 20);
            }
            check(Setup { mask, ..Setup::new(n_q, n_k, 128) }, 21);
        }
    }
}

#[test]
fn heads_share_keys() {
    let Some(_device) = Device::first() else { return };
    for (batch, heads_q, heads_kv) in [(1, 4, 4), (2, 4, 2), (3, 6, 1), (2, 8, 4), (1, 7, 7)] {
        for mask in MASKS {
            for dtype in [DType::F16, DType::F32] {
                check(
                    Setup { mask, ..Setup::new(290, 290, 64).heads(batch, heads_q, heads_kv).dtype(dtype) },
                    30,
                );
            }
        }
    }
}

/// Few queries over many keys, which tiles meet in parts.
#[test]
fn few_queries_and_many_keys() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        for dim in [64, 80, 96, 128, 192, 256] {
            for mask in MASKS {
                check(Setup { mask, ..Setup::new(5, 9001, dim).dtype(dtype) }, 31);
            }
        }
        for (head_dim, value_dim) in [(3, 65), (250, 7), (40, 256), (128, 200)] {
            check(Setup { head_dim, value_dim, ..Setup::new(2, 7000, 64).dtype(dtype) }, 32);
        }
        for dim in [64, 128] {
            check(Setup::new(1, 65_536, dim).dtype(dtype), 33);
            let mask = Mask::CausalBottomRight;
            check(Setup { mask, ..Setup::new(300, 20_000, dim).heads(1, 2, 1).dtype(dtype) }, 34);
            check(Setup { mask, ..Setup::new(2, 10_000, dim).heads(3, 8, 2).dtype(dtype) }, 35);
        }
    }
    let setup = Setup { q: DType::F32, out: DType::F32, ..Setup::new(1, 8192, 128) };
    check(setup.heads(1, 4, 1), 36);
    use Arrangement::*;
    for (inputs, outputs) in [(TokensFirst, PaddedBy3), (PaddedBy8, Reversed), (PaddedBy3, TokensFirst)] {
        for dtype in DTYPES {
            check(Setup { inputs, outputs, ..Setup::new(3, 9000, 64).heads(2, 4, 2).dtype(dtype) }, 37);
        }
    }
}

/// Of so many queries that their tiles are not divided, some by themselves, which are.
#[test]
fn parts_make_what_the_whole_makes() {
    let Some(_device) = Device::first() else { return };
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 3e-3), (DType::BF16, 2e-2)] {
        for dim in [64, 128, 256] {
            let all = Setup::new(17_000, 9000, dim).dtype(dtype);
            let inputs = Inputs::normal(&all, 38);
            let whole = OnDevice::new(&all, &inputs).run();
            for n_q in [1, 7, 128] {
                let first = 16_000;
                let some = Inputs { q: inputs.q[first * dim..][..n_q * dim].to_vec(), ..inputs.clone() };
                let outcome = OnDevice::new(&Setup { n_q, ..all }, &some).run();
                let expected = &whole.out[first * dim..][..n_q * dim];
                let off = outcome.out.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
                let norm = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
                assert!(off <= tolerance * norm, "{dtype:?}, {dim}: {n_q} queries are {off} of {norm} off");
                for (a, b) in outcome.lse.iter().zip(&whole.lse[first..]) {
                    assert!((a - b).abs() <= 1e-5 * b.abs(), "{dtype:?}, {dim}: lse {a}, not {b}");
                }
            }
        }
    }
}

/// What is not finite or has no weight, in some of the parts.
#[test]
fn parts_without_weight_and_with_nan() {
    let Some(_device) = Device::first() else { return };
    let (n_q, n_k, dim) = (4, 9000, 64);
    for dtype in DTYPES {
        let mask = Mask::CausalBottomRight;
        let setup = Setup { mask, ..Setup::new(n_q, n_k, dim).dtype(dtype) };
        let mut inputs = Inputs::normal(&setup, 39);
        inputs.q.iter_mut().step_by(dim).for_each(|x| *x = x.abs() + 1.0);
        inputs.q = rounded(&inputs.q, dtype);
        let clean = OnDevice::new(&setup, &inputs).run();
        for at in [10, 5000, n_k - 2] {
            for in_value in [false, true] {
                let mut dirty = inputs.clone();
                let rows = if in_value { &mut dirty.v } else { &mut dirty.k };
                rows[at * dim + 5] = f32::NAN;
                let outcome = OnDevice::new(&setup, &dirty).run();
                for row in 0..n_q {
                    let out = &outcome.out[row * dim..][..dim];
                    if at <= n_k - n_q + row {
                        assert!(out[5].is_nan(), "{setup:?}: row {row} does not show the NaN at {at}");
                    } else {
                        let near =
                            out.iter().zip(&clean.out[row * dim..]).all(|(a, b)| (a - b).abs() <= 1e-3);
                        assert!(near, "{setup:?}: row {row} feels the NaN at {at}");
                    }
                }
            }
        }
        // The latest keys alone weigh anything.
        let hidden = 8000;
        let hide = |inputs: &Inputs, end: usize| {
            let mut hidden = inputs.clone();
            for key in hidden.k[..end * dim].chunks_mut(dim) {
                key.fill(0.0);
                key[0] = f32::NEG_INFINITY;
            }
            hidden
        };
        let outcome = OnDevice::new(&setup, &hide(&inputs, hidden)).run();
        let late = Inputs {
            k: inputs.k[hidden * dim..].to_vec(),
            v: inputs.v[hidden * dim..].to_vec(),
            ..inputs.clone()
        };
        assert_near(
            &Setup { n_k: n_k - hidden, ..setup },
            &late,
            &Outcome { keys_per_query: Vec::new(), ..outcome },
        );
        let nothing = OnDevice::new(&setup, &hide(&inputs, n_k)).run();
        assert!(nothing.out.iter().all(|&x| x == 0.0), "{setup:?}");
        assert!(nothing.lse.iter().all(|&lse| lse == f32::NEG_INFINITY), "{setup:?}");
    }
}

/// In how many parts the keys are met follows from one batch item.
#[test]
fn batch_items_by_themselves() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        let setup = Setup::new(3, 9000, 64).heads(5, 4, 2).dtype(dtype);
        let inputs = Inputs::normal(&setup, 41);
        let together = OnDevice::new(&setup, &inputs).run();
        for batch in 0..setup.batch {
            let part =
                |values: &[f32]| values.chunks(values.len() / setup.batch).nth(batch).unwrap().to_vec();
            let item = Inputs { q: part(&inputs.q), k: part(&inputs.k), v: part(&inputs.v) };
            let alone = OnDevice::new(&Setup { batch: 1, ..setup }, &item).run();
            assert_eq!(alone.out, part(&together.out), "{dtype:?}, batch item {batch}");
            assert_eq!(alone.lse, part(&together.lse), "{dtype:?}, batch item {batch}");
        }
    }
}

#[test]
fn arrangements() {
    let Some(_device) = Device::first() else { return };
    use Arrangement::*;
    for inputs in [Packed, TokensFirst, PaddedBy8, PaddedBy3, Reversed, OneHead] {
        for outputs in [Packed, TokensFirst, PaddedBy8, PaddedBy3, Reversed] {
            for dtype in DTYPES {
                let mask = Mask::CausalBottomRight;
                let setup =
                    Setup { inputs, outputs, mask, ..Setup::new(140, 200, 64).heads(2, 4, 2).dtype(dtype) };
                check(setup, 40);
            }
        }
    }
}

#[test]
fn mixed_types() {
    let Some(_device) = Device::first() else { return };
    for (q, kv, out) in [
        (DType::F32, DType::BF16, DType::F32),
        (DType::F32, DType::F16, DType::F32),
        (DType::BF16, DType::BF16, DType::F32),
        (DType::F16, DType::F16, DType::F32),
    ] {
        for dim in [64, 128] {
            check(Setup { q, kv, out, mask: Mask::CausalTopLeft, ..Setup::new(200, 200, dim) }, 50);
        }
    }
}

#[test]
fn nothing_to_see_and_nobody_to_look() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        for mask in MASKS {
            check(Setup { mask, ..Setup::new(200, 0, 64).dtype(dtype) }, 60);
            check(Setup { mask, ..Setup::new(0, 200, 64).dtype(dtype) }, 60);
            check(Setup { mask, ..Setup::new(0, 0, 128).dtype(dtype) }, 60);
        }
        // The first queries see no key.
        check(Setup { mask: Mask::CausalBottomRight, ..Setup::new(500, 40, 64).dtype(dtype) }, 61);
        check(Setup { mask: Mask::CausalBottomRight, ..Setup::new(300, 1, 128).dtype(dtype) }, 61);
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        for scale in [3.0, -2.0, 40.0] {
            // Weights are all or nothing here; what matters is that nothing is NaN and that the maximum wins.
            let setup = Setup { scale, mask: Mask::CausalTopLeft, ..Setup::new(260, 260, 64).dtype(dtype) };
            let inputs = Inputs::normal(&setup, 70);
            let outcome = OnDevice::new(&setup, &inputs).run();
            assert!(outcome.out.iter().chain(&outcome.lse).all(|x| x.is_finite()), "{setup:?}");
            // The first row sees one key.
            let expected = &inputs.v[..64];
            assert_eq!(&outcome.out[..64], expected, "{setup:?}");
        }
    }
}

/// Rows that share a warp with one that sees it may weigh relative to another logit: they are as near to what they were as
/// two roundings are.
#[test]
fn a_nan_stays_with_the_rows_that_see_it() {
    let Some(_device) = Device::first() else { return };
    /// Rows whose maxima are raised together, if one of them needs it, are among so many neighbours.
    const SHARED_ROWS: usize = 64;
    let norm = |row: &mut dyn Iterator<Item = f32>| row.map(|x| x * x).sum::<f32>().sqrt();
    for dtype in DTYPES {
        // What rounding differently does, to weights and to outputs.
        let tolerance = match dtype {
            DType::F32 => 1e-6,
            DType::F16 => 2e-3,
            DType::BF16 => 1.6e-2,
        };
        for dim in [64, 128, 192] {
            for at in [0, 63, 100, 128, 200, 299] {
                for in_value in [false, true] {
                    let setup = Setup { mask: Mask::CausalTopLeft, ..Setup::new(300, 300, dim).dtype(dtype) };
                    let mut inputs = Inputs::normal(&setup, 80);
                    let clean = OnDevice::new(&setup, &inputs).run();
                    let rows = if in_value { &mut inputs.v } else { &mut inputs.k };
                    rows[at * dim + 5] = f32::NAN;
                    let outcome = OnDevice::new(&setup, &inputs).run();
                    for row in 0..300 {
                        let (now, before) =
                            (&outcome.out[row * dim..][..dim], &clean.out[row * dim..][..dim]);
                        if row / SHARED_ROWS < at / SHARED_ROWS {
                            assert_eq!(now, before, "{setup:?}: row {row}, NaN at {at}");
                            assert_eq!(outcome.lse[row], clean.lse[row], "{setup:?}: row {row}, NaN at {at}");
                        } else if row < at {
                            let difference = norm(&mut now.iter().zip(before).map(|(a, b)| a - b));
                            let near = difference <= tolerance * norm(&mut before.iter().copied());
                            assert!(near, "{setup:?}: row {row} is {difference:e} off, NaN at {at}");
                            let lse = (outcome.lse[row] - clean.lse[row]).abs();
                            assert!(lse <= 1e-5, "{setup:?}: lse of row {row} is {lse:e} off, NaN at {at}");
                        } else {
                            assert!(now[5].is_nan(), "{setup:?}: row {row} does not show the NaN at {at}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn infinite_values_and_logits() {
    let Some(_device) = Device::first() else { return };
    for dtype in [DType::BF16, DType::F32] {
        let dim = 64;
        let setup = Setup { mask: Mask::CausalTopLeft, ..Setup::new(200, 200, dim).dtype(dtype) };
        let mut inputs = Inputs::normal(&setup, 90);
        // All queries point to where this key is infinitely far on the other side: its logit is -inf for all.
        inputs.q.iter_mut().step_by(dim).for_each(|x| *x = x.abs() + 1.0);
        inputs.k[50 * dim..][..dim].fill(0.0);
        inputs.k[50 * dim] = f32::NEG_INFINITY;
        let with = OnDevice::new(&setup, &inputs).run();
        // The oracle takes -inf logits too, but 0 * inf in its products is NaN where a query has a 0; none has.
        let mut finite = inputs.clone();
        finite.k[50 * dim] = -3e4;
        let expected = OnDevice::new(&setup, &finite).run();
        assert!(with.out.iter().all(|x| x.is_finite()), "{setup:?}");
        for (a, b) in with.out.iter().zip(&expected.out) {
            assert!((a - b).abs() <= 1e-2 * b.abs().max(1e-2), "{setup:?}: {a} {b}");
        }
    }
}

#[test]
fn the_same_bits_every_time() {
    let Some(_device) = Device::first() else { return };
    for dtype in DTYPES {
        for (n_q, n_k) in [(1500, 1500), (4, 9000)] {
            let mask = Mask::CausalBottomRight;
            let setup = Setup { mask, ..Setup::new(n_q, n_k, 64).heads(2, 6, 3).dtype(dtype) };
            let inputs = Inputs::normal(&setup, 100);
            let on_device = OnDevice::new(&setup, &inputs);
            let first = on_device.run();
            for _ in 0..5 {
                assert_eq!(on_device.run(), first);
            }
        }
    }
}

#[test]
fn without_a_workspace() {
    let Some(_device) = Device::first() else { return };
    let setup = Setup { mask: Mask::CausalTopLeft, ..Setup::new(700, 700, 64).heads(1, 4, 2) };
    let inputs = Inputs::normal(&setup, 110);
    let on_device = OnDevice::new(&setup, &inputs);
    let stream = Stream::new();
    on_device.enqueue(None, &stream).unwrap();
    stream.synchronize();
    assert_near(&setup, &inputs, &on_device.outcome());
    // The default stream, which has no handle.
    let again = OnDevice::new(&setup, &inputs);
    // SAFETY: the tensors outlive the work, which `synchronize` waits for.
    unsafe { hyperattn_cuda::forward(&setup.params(), &again.tensors(), None, std::ptr::null_mut()) }
        .unwrap();
    synchronize();
    assert_near(&setup, &inputs, &again.outcome());
}

#[test]
fn captured_and_replayed() {
    let Some(_device) = Device::alone() else { return };
    for dtype in DTYPES {
        for (n_q, n_k) in [(600, 900), (2, 9000)] {
            let mask = Mask::CausalBottomRight;
            let setup = Setup { mask, ..Setup::new(n_q, n_k, 128).heads(1, 4, 2).dtype(dtype) };
            let inputs = Inputs::normal(&setup, 120);
            let on_device = OnDevice::new(&setup, &inputs);
            let (stream, workspace) = (Stream::new(), on_device.workspace());
            // The first call of these kernels may be the captured one.
            let graph = Graph::capture(&stream, || on_device.enqueue(Some(&workspace), &stream).unwrap());
            graph.launch(&stream);
            assert_near(&setup, &inputs, &on_device.outcome());
            for seed in 121..124 {
                let inputs = Inputs::normal(&setup, seed);
                on_device.write(&inputs);
                graph.launch(&stream);
                assert_near(&setup, &inputs, &on_device.outcome());
            }
        }
    }
}

#[test]
fn two_streams_at_once() {
    let Some(_device) = Device::first() else { return };
    let setups = [
        Setup { mask: Mask::CausalBottomRight, ..Setup::new(2000, 2000, 64).heads(1, 2, 1) },
        Setup::new(1500, 2100, 128).heads(1, 2, 2).dtype(DType::F16),
    ];
    let inputs = setups.map(|setup| Inputs::normal(&setup, 130));
    let on_device: Vec<OnDevice> =
        setups.iter().zip(&inputs).map(|(setup, inputs)| OnDevice::new(setup, inputs)).collect();
    let streams = [Stream::new(), Stream::new()];
    let workspaces: Vec<Memory> = on_device.iter().map(OnDevice::workspace).collect();
    for _ in 0..20 {
        for (at, tensors) in on_device.iter().enumerate() {
            tensors.enqueue(Some(&workspaces[at]), &streams[at]).unwrap();
        }
    }
    streams.iter().for_each(Stream::synchronize);
    for (at, tensors) in on_device.iter().enumerate() {
        assert_near(&setups[at], &inputs[at], &tensors.outcome());
    }
}

#[test]
fn two_threads_at_once() {
    let Some(device) = Device::first() else { return };
    std::thread::scope(|scope| {
        for seed in 140..144 {
            let device = &device;
            scope.spawn(move || {
                device.make_current();
                for n in [100, 400, 700] {
                    check(Setup { mask: Mask::CausalTopLeft, ..Setup::new(n, n, 96).heads(1, 2, 1) }, seed);
                }
            });
        }
    });
}

#[test]
fn a_foreign_context() {
    let Some(device) = Device::first() else { return };
    let before = current_context();
    let run = |context: &Context| {
        assert_eq!(current_context(), context.address());
        check(Setup { mask: Mask::CausalBottomRight, ..Setup::new(300, 300, 64) }, 150);
        assert_eq!(current_context(), context.address(), "the call has left another context current");
    };
    // A context made after another has been destroyed may have its address, but none of its modules.
    for _ in 0..3 {
        let context = device.push_new_context();
        run(&context);
        context.destroy();
    }
    let (first, second) = (device.push_new_context(), device.push_new_context());
    run(&second);
    second.destroy();
    run(&first);
    first.destroy();
    assert_eq!(current_context(), before);
    check(Setup::new(300, 300, 64), 151);
}

#[test]
fn no_current_context() {
    // A thread of its own: contexts are current on threads, and the runner's may be used again.
    let checks = || {
        let Some(_device) = Device::first() else { return };
        let setup = Setup::new(100, 100, 64);
        let on_device = OnDevice::new(&setup, &Inputs::normal(&setup, 160));
        let (stream, workspace) = (Stream::new(), on_device.workspace());
        let context = current_context();
        cuda!(cuCtxSetCurrent(std::ptr::null_mut()));
        let error = on_device.enqueue(Some(&workspace), &stream).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DeviceUnavailable);
        assert!(error.message().contains("current"), "{error}");
        cuda!(cuCtxSetCurrent(context as cudarc::driver::sys::CUcontext));
        on_device.enqueue(Some(&workspace), &stream).unwrap();
        stream.synchronize();
    };
    std::thread::spawn(checks).join().expect("the checks pass");
}

#[test]
fn a_wrong_workspace_leaves_the_outputs_alone() {
    let Some(_device) = Device::first() else { return };
    let setup = Setup::new(100, 100, 64);
    let on_device = OnDevice::new(&setup, &Inputs::normal(&setup, 170));
    let workspace = on_device.workspace();
    let stream = Stream::new();
    for (address, size) in [
        (workspace.address(), workspace.size() - 1),
        (workspace.address() + 128, workspace.size()),
        (workspace.address(), 0),
    ] {
        let (params, tensors) = (setup.params(), on_device.tensors());
        let workspace = Some((address, size));
        // SAFETY: nothing is enqueued.
        let result = unsafe { hyperattn_cuda::forward(&params, &tensors, workspace, stream.raw()) };
        assert_eq!(result.unwrap_err().kind(), ErrorKind::WorkspaceTooSmall);
    }
    stream.synchronize();
    let poison = u32::from_le_bytes([POISON; 4]);
    assert!(on_device.lse.values(false).iter().all(|&x| x.to_bits() == poison));
}

/// The second head lies more than 2^31 elements after the first.
#[test]
fn strides_beyond_32_bits() {
    use hyperattn_core::TensorLayout;
    use hyperattn_cuda::{DeviceTensor, DeviceTensors};

    let Some(_device) = Device::first() else { return };
    let (n, dim) = (200usize, 64usize);
    let setup = Setup { mask: Mask::CausalTopLeft, ..Setup::new(n, n, dim).heads(1, 2, 2) };
    let inputs = Inputs::normal(&setup, 180);
    let expected = OnDevice::new(&setup, &inputs).run();
    let far: i64 = (1 << 31) + 64;
    let len = n * dim;
    // q, k, v and out of a head are neighbours.
    let Some(memory) = Memory::try_filled((far as usize + 4 * len) * 2, 0xa5) else {
        println!("SKIPPED: the device has no 4 GiB free");
        return;
    };
    let bytes = |values: &[f32]| -> Vec<u8> {
        values.iter().flat_map(|&x| hyperattn_core::bf16::from_f32(x).to_le_bytes()).collect()
    };
    for head in 0..2 {
        for (at, values) in [&inputs.q, &inputs.k, &inputs.v].into_iter().enumerate() {
            memory.write((head * far as usize + at * len) * 2, &bytes(&values[head * len..][..len]));
        }
    }
    let tensor = |at: usize| DeviceTensor {
        address: memory.address() + (at * len * 2) as u64,
        layout: TensorLayout {
            dtype: DType::BF16,
            shape: [1, 2, n as i64, dim as i64],
            stride: [0, far, dim as i64, 1],
        },
    };
    let lse = Tensor::poisoned([1, 2, n as i64, 1], DType::F32, Arrangement::Packed);
    let required = DeviceTensors::new(tensor(0), tensor(1), tensor(2), tensor(3));
    let tensors = DeviceTensors { lse: Some(lse.view()), ..required };
    // SAFETY: the memory outlives the work, which `synchronize` waits for.
    unsafe { hyperattn_cuda::forward(&setup.params(), &tensors, None, std::ptr::null_mut()) }.unwrap();
    synchronize();
    assert_eq!(lse.values(true), expected.lse);
    for head in 0..2 {
        let out = memory.read((head * far as usize + 3 * len) * 2, len * 2);
        assert!(out == bytes(&expected.out[head * len..][..len]), "head {head}");
    }
}
