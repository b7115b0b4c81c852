//! One backward call, one result: whatever runs the tasks, whatever the workspace holds, however tensors lie in memory,
//! alone, in a batch or among sequences.

use std::ops::Range;

use hyperattn_conformance::additive_mask::AdditiveMask;
use hyperattn_conformance::backward::{Backward, Loss, Slopes};
use hyperattn_conformance::executors::{Order, Threads};
use hyperattn_conformance::expected_gradients::{Expected, RELATIVE_TOLERANCE};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_conformance::run::Setup;
use hyperattn_conformance::storage::{Arrangement, Tensor};
use hyperattn_core::{DType, Division, Kernels, Mask, Method, Params, Residual, Sequences};

const SHAPE: Shape =
    Shape { batch: 2, heads_q: 6, heads_kv: 2, n_q: 150, n_k: 163, head_dim: 20, value_dim: 13 };

/// A call, but for who runs it.
struct Case {
    params: Params,
    inputs: Inputs,
    loss: Loss,
    block_mask: Option<OwnedMask>,
    mask: Option<AdditiveMask>,
}

impl Case {
    fn new(params: Params, inputs: &Inputs) -> Self {
        let loss = Loss::normal(&inputs.shape, inputs.dtypes.q, 2401);
        Case { params, inputs: inputs.clone(), loss, block_mask: None, mask: None }
    }

    fn call(&self, kernels: &'static Kernels) -> Backward<'_> {
        let setup = Setup::new(kernels, &self.params, &self.inputs);
        let block_mask = self.block_mask.as_ref().map(OwnedMask::view);
        Backward::new(Setup { block_mask, mask: self.mask.as_ref(), ..setup }, &self.loss)
    }
}

fn exact(mask: Mask) -> Params {
    Params { method: Method::Exact, mask, ..Params::default() }
}

fn paper(mask: Mask, residual: Residual) -> Params {
    Params {
        method: Method::Paper,
        residual,
        block_size: 32,
        sample_size: 40,
        min_seq_len: 50,
        seed: 10,
        ..exact(mask)
    }
}

fn refined(mask: Mask) -> Params {
    Params { method: Method::Refined, min_seq_len: 0, budget: 64, band: 10, target_error: 0.3, ..exact(mask) }
}

/// Calls that between them visit every stage.
fn cases() -> Vec<Case> {
    let inputs = Inputs::clustered(SHAPE, 2400);
    let mut cases = Vec::new();
    for mask in [Mask::None, Mask::CausalBottomRight] {
        cases.push(Case::new(exact(mask), &inputs));
        cases.push(Case::new(refined(mask), &inputs));
        for residual in [Residual::Uniform, Residual::RowNorm, Residual::None] {
            cases.push(Case::new(paper(mask, residual), &inputs));
        }
        let given = OwnedMask::random([SHAPE.n_q, SHAPE.n_k], [16, 32], 12, 0.2, 2402);
        let uniform = paper(mask, Residual::Uniform);
        cases.push(Case { block_mask: Some(given), ..Case::new(uniform, &inputs) });
    }
    let mask = AdditiveMask::random([1, 6, SHAPE.n_q, SHAPE.n_k], DType::F16, 2403);
    cases.push(Case { mask: Some(mask), ..Case::new(exact(Mask::None), &inputs) });
    let mixed = inputs.clone().rounded(DTypes { q: DType::F32, kv: DType::BF16 });
    cases.push(Case::new(paper(Mask::CausalTopLeft, Residual::Uniform), &mixed));
    cases
}

#[test]
fn every_executor_gives_the_bits_of_the_serial_one_whatever_the_workspace_holds() {
    let fills: [fn(usize) -> u8; 3] = [|_| 0, |_| 0x7F, |i| (i * 131 + i / 257) as u8];
    for case in cases() {
        for_each_table(|kernels| {
            let call = case.call(kernels);
            let outcome = call.of.run();
            let expected = call.run_from(&outcome).bits();
            for (fill, (lanes, threads, order)) in fills.into_iter().zip([
                (2, 2, Order::Forward),
                (3, 3, Order::Reversed),
                (16, 4, Order::Random(1)),
            ]) {
                let executor = Threads { lanes, threads, order };
                let of = Setup { executor: &executor, fill, ..call.of };
                let bits = Backward { of, ..call }.run_from(&outcome).bits();
                assert!(bits == expected, "{:?}: {executor:?} changed the result", case.params);
            }
        });
    }
}

/// The CPU's sums have one order, whatever the caller permits.
#[test]
fn permission_for_any_order_changes_no_bit() {
    for case in cases() {
        for_each_table(|kernels| {
            let call = case.call(kernels);
            let params = Params { deterministic: false, ..case.params };
            let permitted = Backward { of: Setup { params: &params, ..call.of }, ..call };
            let [(one, slopes), (other, other_slopes)] = [call, permitted].map(|call| {
                let outcome = call.of.run();
                let slopes = call.run_from(&outcome);
                (outcome, slopes)
            });
            assert!(one.out == other.out && one.lse == other.lse, "{params:?}: out or lse");
            assert!(slopes.bits() == other_slopes.bits(), "{params:?}: gradients");
        });
    }
}

/// The part of a packed tensor `[heads][rows][columns]` that some of its rows are.
fn rows_of(values: &[f32], rows: usize, columns: usize, range: &Range<usize>) -> Vec<f32> {
    let heads = values.chunks((rows * columns).max(1));
    heads.flat_map(|head| head[range.start * columns..range.end * columns].to_vec()).collect()
}

impl Case {
    /// Batch item `batch` alone.
    fn batch_item(&self, batch: usize) -> (Inputs, Loss) {
        let part = |values: &[f32]| {
            let len = values.len() / SHAPE.batch;
            values[batch * len..][..len].to_vec()
        };
        let dlse = self.loss.dlse.as_ref().map(|dlse| part(dlse));
        (self.inputs.batch_item(batch), Loss { dout: part(&self.loss.dout), dlse })
    }
}

#[test]
fn a_batch_item_alone_equals_the_item_in_a_batch() {
    for case in cases() {
        for_each_table(|kernels| {
            let call = case.call(kernels);
            let together = call.run();
            for batch in 0..2 {
                let (inputs, loss) = case.batch_item(batch);
                let block_mask = call.of.block_mask.map(|mut mask| {
                    mask.row_offsets = &mask.row_offsets[batch * SHAPE.heads_q * mask.head_stride..];
                    mask
                });
                let alone = Backward::new(Setup { inputs: &inputs, block_mask, ..call.of }, &loss).run();
                for (together, alone) in together.all().into_iter().zip(alone.all()) {
                    let part = &together[batch * alone.len()..][..alone.len()];
                    assert!(part.iter().zip(alone).all(|(a, b)| a.to_bits() == b.to_bits()), "item {batch}");
                }
            }
        });
    }
}

/// Gaps of the inputs are NaN; gaps of the gradients are checked by the call.
#[test]
fn arrangements_do_not_change_a_bit() {
    let orders = [Arrangement::TokensFirst, Arrangement::Padded, Arrangement::Reversed];
    for dtypes in [DTypes::ALL[0], DTypes::ALL[1], DTypes::ALL[4]] {
        let inputs = Inputs::normal(SHAPE, 2410).rounded(dtypes);
        let (q, kv) = (dtypes.q, dtypes.kv);
        let mask = Mask::CausalBottomRight;
        for params in [exact(mask), refined(mask), paper(mask, Residual::RowNorm)] {
            let case = Case::new(params, &inputs);
            for_each_table(|kernels| {
                let call = Backward { dtypes: [q, q, kv, kv], ..case.call(kernels) };
                let outcome = call.of.run();
                let packed = call.run_from(&outcome).bits();
                for first in 0..orders.len() {
                    let arrangements = [0, 1, 2, 3].map(|i| orders[(first + i) % orders.len()]);
                    let of = Setup { arrangements, ..call.of };
                    let strided = Backward { of, arrangements, ..call }.run_from(&outcome);
                    assert!(strided.bits() == packed, "{arrangements:?} {dtypes:?} {params:?}");
                }
            });
        }
    }
}

/// A stride of 0 gives what the same rows give when they are there as often as the extent says.
#[test]
fn broadcast_inputs() {
    for broadcast in [Arrangement::OneRow, Arrangement::OneHead] {
        let mut inputs = Inputs::normal(SHAPE, 2420);
        let spread = |values: &[f32], shape| Tensor::new(values, shape, DType::F32, broadcast, 0.0).values();
        inputs.q = spread(&inputs.q, SHAPE.q());
        inputs.k = spread(&inputs.k, SHAPE.k());
        inputs.v = spread(&inputs.v, SHAPE.v());
        for params in [exact(Mask::CausalBottomRight), paper(Mask::None, Residual::Uniform)] {
            let mut case = Case::new(params, &inputs);
            case.loss.dout = spread(&case.loss.dout, SHAPE.out());
            for_each_table(|kernels| {
                let call = case.call(kernels);
                let outcome = call.of.run();
                let packed = call.run_from(&outcome).bits();
                for place in 0..3 {
                    let mut arrangements = [Arrangement::Packed; 4];
                    arrangements[place] = broadcast;
                    let of = Setup { arrangements, ..call.of };
                    assert!(Backward { of, ..call }.run_from(&outcome).bits() == packed, "tensor {place}");
                }
                let mut arrangements = [Arrangement::Packed; 4];
                arrangements[0] = broadcast;
                assert!(Backward { arrangements, ..call }.run_from(&outcome).bits() == packed, "dout");
            });
        }
    }
}

#[test]
fn a_sequence_has_the_bits_that_it_has_alone() {
    let shape = Shape { batch: 1, n_q: 500, n_k: 500, ..SHAPE };
    let (starts_q, starts_k) = ([0, 90, 90, 300, 500], [0, 120, 130, 309, 500]);
    let inputs = Inputs::clustered(shape, 2430);
    let mask = Mask::CausalBottomRight;
    for params in [exact(mask), refined(mask), paper(mask, Residual::Uniform)] {
        let case = Case::new(params, &inputs);
        for_each_table(|kernels| {
            let call = case.call(kernels);
            let sequences = Some(Sequences { cu_seqlens_q: &starts_q, cu_seqlens_k: &starts_k });
            let division = Division { sequences, head_methods: None };
            let of = Setup { division, ..call.of };
            let together = Backward { of, ..call }.run();
            for lanes in [3, 16] {
                let executor = Threads { lanes, threads: 3, order: Order::Reversed };
                let of = Setup { executor: &executor, ..of };
                assert!(Backward { of, ..call }.run().bits() == together.bits(), "{lanes} lanes");
            }
            for index in 0..4 {
                let rows = |starts: &[i32]| starts[index] as usize..starts[index + 1] as usize;
                let (queries, keys) = (rows(&starts_q), rows(&starts_k));
                let inputs = inputs.rows(queries.clone(), keys.clone());
                let loss = Loss {
                    dout: rows_of(&case.loss.dout, 500, shape.value_dim, &queries),
                    dlse: case.loss.dlse.as_ref().map(|dlse| rows_of(dlse, 500, 1, &queries)),
                };
                let alone = Backward::new(Setup { inputs: &inputs, ..call.of }, &loss).run();
                let part = Slopes {
                    dq: rows_of(&together.dq, 500, shape.head_dim, &queries),
                    dk: rows_of(&together.dk, 500, shape.head_dim, &keys),
                    dv: rows_of(&together.dv, 500, shape.value_dim, &keys),
                };
                assert!(alone.bits() == part.bits(), "sequence {index} of {params:?}");
            }
        });
    }
}

/// Heads of one KV head with methods of their own: each has the dq that it has where all have its method, and dk and dv
/// are sums over them.
#[test]
fn heads_with_methods_of_their_own() {
    let inputs = Inputs::clustered(SHAPE, 2440);
    let methods = [Method::Exact, Method::Paper, Method::Paper, Method::Paper, Method::Exact, Method::Exact];
    let division = Division { sequences: None, head_methods: Some(&methods) };
    for mask in [Mask::None, Mask::CausalBottomRight] {
        let params = paper(mask, Residual::Uniform);
        let case = Case::new(params, &inputs);
        let of = Setup { division, ..case.call(Kernels::scalar()).of };
        let expected = Expected::new(&of, &case.loss);
        for_each_table(|kernels| {
            let call = case.call(kernels);
            let mixed = Backward { of: Setup { division, ..call.of }, ..call };
            let mixed = mixed.run_from(&expected.outcome);
            expected.assert_near(&mixed, &SHAPE, RELATIVE_TOLERANCE, "methods of heads");
            let len = SHAPE.n_q * SHAPE.head_dim;
            for method in [Method::Exact, Method::Paper] {
                let params = Params { method, ..params };
                let whole = Backward { of: Setup { params: &params, ..call.of }, ..call };
                let whole = whole.run_from(&expected.outcome);
                for head in (0..2 * SHAPE.heads_q).filter(|head| methods[head % SHAPE.heads_q] == method) {
                    let of_head = |slopes: &Slopes| slopes.dq[head * len..][..len].to_vec();
                    assert!(of_head(&mixed) == of_head(&whole), "dq of head {head}, {method:?}");
                }
            }
        });
    }
}
