//! One call, one result: whatever runs the tasks, whatever the workspace holds, alone or in a batch.

use hyperattn_conformance::executors::{Order, Threads};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_conformance::run::Setup;
use hyperattn_core::{DType, Mask, Method, Params, Residual};

/// A name, options, inputs, and exact blocks of the caller.
type Case = (String, Params, Inputs, Option<OwnedMask>);

/// Calls that between them visit every stage: several chunks of hashing, tiles and heads.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let shape =
        Shape { batch: 2, heads_q: 6, heads_kv: 2, head_dim: 24, value_dim: 19, ..Shape::single(307, 331) };
    let clustered = Inputs::clustered(shape, 1000);
    for mask in [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft] {
        let exact = Params { method: Method::Exact, mask, ..Params::default() };
        cases.push((format!("exact {mask:?}"), exact, clustered.clone(), None));
        for residual in [Residual::Uniform, Residual::RowNorm, Residual::None] {
            let paper = Params {
                method: Method::Paper,
                residual,
                block_size: 32,
                sample_size: 40,
                min_seq_len: 70,
                seed: 10,
                ..exact
            };
            cases.push((format!("{residual:?} {mask:?}"), paper, clustered.clone(), None));
            if residual == Residual::None {
                continue;
            }
            let given = OwnedMask::random([307, 331], [16, 32], 12, 0.2, 1001);
            cases.push((
                format!("given blocks {residual:?} {mask:?}"),
                paper,
                clustered.clone(),
                Some(given),
            ));
            let unblocked = Params { block_size: 0, ..paper };
            cases.push((format!("no blocks {residual:?} {mask:?}"), unblocked, clustered.clone(), None));
            let long_codes = Params { lsh_num_projs: 20, ..paper };
            let halves = clustered.clone().rounded(DType::F16);
            cases.push((format!("f16, 20 hyperplanes {residual:?} {mask:?}"), long_codes, halves, None));
            let mixed = clustered.clone().rounded(DTypes { q: DType::F32, kv: DType::BF16 });
            cases.push((format!("f32 and bf16 {residual:?} {mask:?}"), paper, mixed, None));
        }
    }
    cases
}

#[test]
fn every_executor_gives_the_bits_of_the_serial_one() {
    for (name, params, inputs, mask) in cases() {
        for_each_table(|kernels| {
            let block_mask = mask.as_ref().map(OwnedMask::view);
            let serial = Setup { block_mask, ..Setup::new(kernels, &params, &inputs) };
            let expected = serial.run().bits();
            for (lanes, threads, order) in [
                (1, 1, Order::Forward),
                (2, 2, Order::Forward),
                (3, 3, Order::Reversed),
                (8, 4, Order::Random(1)),
                (5, 1, Order::Reversed),
                (64, 7, Order::Random(2)),
            ] {
                let executor = Threads { lanes, threads, order };
                let bits = Setup { executor: &executor, ..serial }.run().bits();
                assert!(bits == expected, "{name}: {executor:?} changed the result");
            }
        });
    }
}

#[test]
fn what_the_workspace_holds_does_not_matter() {
    let fills: [fn(usize) -> u8; 4] = [|_| 0, |_| 0xFF, |_| 0x7F, |i| (i * 131 + i / 257) as u8];
    for (name, params, inputs, mask) in cases() {
        for_each_table(|kernels| {
            let block_mask = mask.as_ref().map(OwnedMask::view);
            let results = fills
                .map(|fill| Setup { block_mask, fill, ..Setup::new(kernels, &params, &inputs) }.run().bits());
            assert!(
                results.iter().all(|bits| *bits == results[0]),
                "{name}: the workspace changed the result"
            );
        });
    }
}

#[test]
fn a_batch_item_alone_equals_the_item_in_a_batch() {
    for (name, params, inputs, mask) in cases() {
        for_each_table(|kernels| {
            // A mask per head names the heads of both items: take the second item's patterns for it alone.
            let block_mask = mask.as_ref().map(OwnedMask::view);
            let together = Setup { block_mask, ..Setup::new(kernels, &params, &inputs) }.run();
            for batch in 0..2 {
                let item = inputs.batch_item(batch);
                let block_mask = block_mask.map(|mut mask| {
                    let patterns = batch * inputs.shape.heads_q * mask.head_stride;
                    mask.row_offsets = &mask.row_offsets[patterns..];
                    mask
                });
                let alone = Setup { block_mask, ..Setup::new(kernels, &params, &item) }.run();
                let part = together.batch_item(batch, 2);
                assert!(alone.bits() == part.bits(), "{name}: batch item {batch} differs");
            }
        });
    }
}

#[test]
fn a_call_twice_gives_the_same_bits_and_another_seed_gives_others() {
    let shape = Shape { heads_q: 2, ..Shape::single(401, 401) };
    let inputs = Inputs::clustered(shape, 1010);
    for_each_table(|kernels| {
        let params = Params { method: Method::Paper, block_size: 32, sample_size: 32, ..Params::default() };
        let params = Params { min_seq_len: 0, ..params };
        let run = |params: Params| Setup::new(kernels, &params, &inputs).run().bits();
        assert_eq!(run(params), run(params));
        assert_ne!(run(params), run(Params { seed: 1, ..params }));
        assert_ne!(run(params), run(Params { offset: 1, ..params }));
    });
}
