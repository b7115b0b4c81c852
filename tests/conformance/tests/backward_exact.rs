//! Gradients of exact attention against the oracle's.

use hyperattn_conformance::additive_mask::{AdditiveMask, HIDDEN};
use hyperattn_conformance::backward::{Backward, Loss};
use hyperattn_conformance::expected_gradients::{Expected, RELATIVE_TOLERANCE, check, check_setup};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape, UNEVEN_LENGTHS};
use hyperattn_conformance::run::Setup;
use hyperattn_core::{DType, Kernels, Mask, Method, Params};

const MASKS: [Mask; 3] = [Mask::None, Mask::CausalBottomRight, Mask::CausalTopLeft];

fn exact(mask: Mask) -> Params {
    Params { method: Method::Exact, mask, ..Params::default() }
}

/// Several tiles of queries and of keys, none of them whole, more queries than keys and fewer.
#[test]
fn lengths() {
    for (seed, (n_q, n_k, ..)) in
        (2000..).zip(UNEVEN_LENGTHS).filter(|(_, (n_q, n_k, ..))| n_q * n_k < 300_000)
    {
        for mask in MASKS {
            check(&exact(mask), &Inputs::normal(Shape::single(n_q, n_k), seed), seed);
        }
    }
}

#[test]
fn heads_batch_and_dimensions() {
    for (seed, (head_dim, value_dim)) in (2020..).zip([(1, 1), (24, 35), (64, 64), (7, 256), (256, 3)]) {
        let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, ..Shape::single(83, 91) };
        let inputs = Inputs::normal(Shape { head_dim, value_dim, ..shape }, seed);
        MASKS.into_iter().for_each(|mask| check(&exact(mask), &inputs, seed));
    }
}

#[test]
fn element_types() {
    for (seed, dtypes) in (2030..).zip(DTypes::ALL) {
        let shape = Shape { heads_q: 2, heads_kv: 1, head_dim: 40, value_dim: 24, ..Shape::single(157, 143) };
        let inputs = Inputs::normal(shape, seed).rounded(dtypes);
        MASKS.into_iter().for_each(|mask| check(&exact(mask), &inputs, seed));
    }
}

#[test]
fn scales() {
    for (seed, scale) in (2040..).zip([-0.2, 1e-3, 1.0]) {
        let params = Params { scale, ..exact(Mask::None) };
        check(&params, &Inputs::normal(Shape::single(70, 90), seed), seed);
    }
}

/// Every kind of additive mask, broadcast and not, among them rows that see nothing.
#[test]
fn additive_masks() {
    let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, ..Shape::single(203, 187) };
    let inputs = Inputs::normal(shape, 2050);
    let extents = [[2, 4, 203, 187], [1, 1, 203, 187], [2, 1, 1, 187], [1, 4, 203, 187]];
    for (seed, extents) in (2050..).zip(extents) {
        for dtype in [DType::F32, DType::F16] {
            let additive = AdditiveMask::random(extents, dtype, seed);
            for mask in [Mask::None, Mask::CausalBottomRight] {
                let params = exact(mask);
                check_setup(&params, &inputs, seed, |setup| Setup { mask: Some(&additive), ..setup });
            }
        }
    }
}

/// Rows that see no key have gradient 0 and add nothing, keys that nobody sees have gradient 0.
#[test]
fn rows_and_keys_that_see_nothing() {
    let seed = 2060;
    let rows_without = |params: &Params, shape: Shape, additive: Option<&AdditiveMask>, rows: &[usize]| {
        let inputs = Inputs::normal(shape, seed);
        let loss = Loss::normal(&shape, DType::F32, seed);
        for_each_table(|kernels| {
            let slopes =
                Backward::new(Setup { mask: additive, ..Setup::new(kernels, params, &inputs) }, &loss);
            let slopes = slopes.run();
            for &row in rows {
                assert_eq!(slopes.dq[row * 16..][..16], [0.0; 16], "row {row}");
            }
            assert!(slopes.bits().into_iter().all(|bits| f32::from_bits(bits).is_finite()));
        });
    };
    let first: Vec<usize> = (0..60).collect();
    rows_without(&exact(Mask::CausalBottomRight), Shape::single(100, 40), None, &first);
    let hidden = AdditiveMask::shared(&Shape::single(100, 40), DType::F32, |i, _| [0.0, HIDDEN][i % 2]);
    let odd: Vec<usize> = (0..50).map(|i| 2 * i + 1).collect();
    rows_without(&exact(Mask::None), Shape::single(100, 40), Some(&hidden), &odd);

    let shape = Shape::single(40, 100);
    let (inputs, loss) = (Inputs::normal(shape, seed), Loss::normal(&shape, DType::F32, seed));
    let params = exact(Mask::CausalTopLeft);
    for_each_table(|kernels| {
        let slopes = Backward::new(Setup::new(kernels, &params, &inputs), &loss).run();
        let unseen = 40 * 16..;
        assert!(slopes.dk[unseen.clone()].iter().chain(&slopes.dv[unseen]).all(|&x| x == 0.0));
    });
}

#[test]
fn without_queries_or_keys() {
    for method in [Method::Exact, Method::Paper, Method::Refined] {
        for mask in MASKS {
            let params = Params { method, min_seq_len: 0, ..exact(mask) };
            for shape in [Shape::single(0, 70), Shape::single(70, 0), Shape::single(0, 0)] {
                let (inputs, loss) = (Inputs::normal(shape, 2070), Loss::normal(&shape, DType::F32, 2070));
                for_each_table(|kernels| {
                    let slopes = Backward::new(Setup::new(kernels, &params, &inputs), &loss).run();
                    assert!(slopes.bits().into_iter().all(|bits| bits == 0), "{params:?} {shape:?}");
                });
            }
        }
    }
}

/// A loss that does not depend on lse is one whose gradient with respect to lse is 0.
#[test]
fn no_dlse_is_a_dlse_of_zeros() {
    let shape = Shape { heads_q: 4, heads_kv: 2, ..Shape::single(93, 107) };
    let inputs = Inputs::normal(shape, 2080);
    let loss = Loss::normal(&shape, DType::F32, 2080);
    let zeros = Loss { dlse: Some(vec![0.0; 4 * 93]), ..loss.clone() };
    let none = Loss { dlse: None, ..loss };
    let params = exact(Mask::CausalBottomRight);
    let expected = Expected::new(&Setup::new(Kernels::scalar(), &params, &inputs), &none);
    for_each_table(|kernels| {
        let setup = Setup::new(kernels, &params, &inputs);
        let slopes = Backward::new(setup, &none).run();
        expected.assert_near(&slopes, &shape, RELATIVE_TOLERANCE, "without dlse");
        assert!(slopes.bits() == Backward::new(setup, &zeros).run().bits());
    });
}
