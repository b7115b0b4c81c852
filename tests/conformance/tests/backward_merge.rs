//! Keys in parts: with the merged out and lse one backward call for each part gives the gradients of the whole.

use hyperattn_conformance::backward::{Backward, Loss};
use hyperattn_conformance::expected_gradients::{Expected, RELATIVE_TOLERANCE};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::run::Setup;
use hyperattn_core::{DType, Kernels, Method, Params, TensorMut, TensorRef, merge};

#[test]
fn dq_adds_up_and_dk_and_dv_are_those_of_the_parts() {
    let shape = Shape { value_dim: 24, ..Shape::single(97, 203) };
    let inputs = Inputs::normal(shape, 2500);
    let loss = Loss::normal(&shape, DType::F32, 2501);
    let params = Params { method: Method::Exact, ..Params::default() };
    let expected = Expected::new(&Setup::new(Kernels::scalar(), &params, &inputs), &loss);
    for_each_table(|kernels| {
        for split in [1, 70, 202] {
            let parts = [inputs.rows(0..97, 0..split), inputs.rows(0..97, split..203)];
            let calls = parts.each_ref().map(|part| Backward::new(Setup::new(kernels, &params, part), &loss));
            let [mut merged, other] = calls.each_ref().map(|call| call.of.run());
            merge(
                kernels,
                &mut TensorMut::contiguous(&mut merged.out, shape.out()).unwrap(),
                &mut TensorMut::contiguous(&mut merged.lse, shape.lse()).unwrap(),
                &TensorRef::contiguous(&other.out, shape.out()).unwrap(),
                &TensorRef::contiguous(&other.lse, shape.lse()).unwrap(),
            )
            .unwrap();
            let [mut whole, second] = calls.each_ref().map(|call| call.run_from(&merged));
            whole.dq.iter_mut().zip(second.dq).for_each(|(sum, x)| *sum += x);
            whole.dk.extend(second.dk);
            whole.dv.extend(second.dv);
            expected.assert_near(&whole, &shape, RELATIVE_TOLERANCE, &format!("{split} and the others"));
        }
    });
}
