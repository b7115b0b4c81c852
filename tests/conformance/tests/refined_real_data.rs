//! METHOD_REFINED on Q, K and V of a real model: layer 12, query heads 1 and 5, 8,192 tokens of a novel. Bounds are 1.3
//! times what was measured when they were written, where there is no target.

use hyperattn_conformance::compare::head_errors;
use hyperattn_conformance::expected::exact_output;
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::Inputs;
use hyperattn_conformance::real_data::{SCALE, folder, from_folder, prefix};
use hyperattn_conformance::run::Setup;
use hyperattn_core::{Kernels, Mask, Method, Params};

fn refined(budget: u32) -> Params {
    Params {
        method: Method::Refined,
        mask: Mask::CausalBottomRight,
        scale: SCALE,
        min_seq_len: 0,
        budget,
        target_error: 0.0,
        ..Params::default()
    }
}

fn inputs() -> Inputs {
    from_folder(&folder()).expect("the data are in the repository")
}

/// The first 2,048 tokens, every table, a budget of an eighth of them.
#[test]
fn errors_of_a_prefix_are_within_the_recorded_ones() {
    let inputs = prefix(&inputs(), 2048);
    let params = refined(256);
    let truth = exact_output(&params, &inputs);
    for_each_table(|kernels| {
        let outcome = Setup::new(kernels, &params, &inputs).run();
        let errors = head_errors(&outcome.out, &truth.out, &inputs.shape);
        println!("errors of the heads {errors:.4?}");
        let bounds = [0.123, 0.141];
        assert!(errors.iter().zip(bounds).all(|(error, bound)| *error <= bound), "{errors:?}");
    });
}

/// All 8,192 tokens, at a budget of an eighth of them and with the default target: the truth is exact
/// attention by the same kernels, which is far nearer to the oracle than these errors.
#[test]
fn errors_at_8192_tokens_are_within_the_recorded_ones() {
    let inputs = inputs();
    let kernels = Kernels::detect(None);
    println!("table {}", kernels.isa().name());
    let exact = Params { method: Method::Exact, ..refined(1024) };
    let truth: Vec<f64> = Setup::new(kernels, &exact, &inputs).run().out.iter().map(|&x| x.into()).collect();
    for (params, bounds) in
        [(refined(1024), [0.041, 0.017]), (Params { target_error: 0.05, ..refined(1024) }, [0.1, 0.1])]
    {
        let outcome = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) }.run();
        let errors = head_errors(&outcome.out, &truth, &inputs.shape);
        println!("errors of the heads {errors:.4?}, estimated {:.4?}", outcome.error);
        println!("keys per query {:?}", outcome.keys_per_query);
        assert!(errors.iter().zip(bounds).all(|(error, bound)| *error <= bound), "{errors:?}");
    }
}
