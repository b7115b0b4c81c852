//! Gradients against differences of the forward along random directions, where the selection does not change with the
//! tensor that is moved.

use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{Inputs, Shape};
use hyperattn_conformance::run::Workspace;
use hyperattn_core::{
    BlockMask, Division, Gradients, Kernels, Mask, Method, Params, Residual, Serial, TensorMut, TensorRef,
    Tensors, backward, backward_workspace, forward_divided, forward_divided_workspace,
};
use hyperattn_reference::Generator;

/// One problem.
struct Case<'a> {
    name: &'a str,
    params: Params,
    shape: Shape,
    block_mask: Option<BlockMask<'a>>,
    /// Whether moving q and k leaves the selection as it is.
    fixed: bool,
    /// Whether moving v does.
    fixed_by_value: bool,
}

/// Runs `call` with tensors of f32 in packed order.
fn with_tensors<R>(
    case: &Case<'_>,
    [q, k, v]: [&[f32]; 3],
    (out, lse): (&mut [f32], &mut [f32]),
    call: impl FnOnce(&mut Tensors<'_>) -> R,
) -> R {
    let shape = &case.shape;
    let input = |values, extents| TensorRef::contiguous(values, extents).unwrap();
    call(&mut Tensors {
        q: input(q, shape.q()),
        k: input(k, shape.k()),
        v: input(v, shape.v()),
        out: TensorMut::contiguous(out, shape.out()).unwrap(),
        lse: Some(TensorMut::contiguous(lse, shape.lse()).unwrap()),
        block_mask: case.block_mask,
        error: None,
        keys_per_query: None,
        mask: None,
    })
}

fn forward(case: &Case<'_>, kernels: &Kernels, inputs: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
    let len = |extents: [i64; 4]| extents.iter().product::<i64>() as usize;
    let (mut out, mut lse) = (vec![0.0; len(case.shape.out())], vec![0.0; len(case.shape.lse())]);
    with_tensors(case, inputs, (&mut out, &mut lse), |tensors| {
        let division = Division::default();
        let layout =
            forward_divided_workspace(&case.params, &division, &tensors.layouts(), kernels, &Serial).unwrap();
        let mut workspace = Workspace::new(layout, |_| 0xFF);
        forward_divided(&case.params, &division, tensors, kernels, &Serial, workspace.exact()).unwrap();
    });
    (out, lse)
}

fn gradients(
    case: &Case<'_>,
    kernels: &Kernels,
    inputs: [&[f32]; 3],
    [dout, dlse]: [&[f32]; 2],
) -> [Vec<f32>; 3] {
    let (mut out, mut lse) = forward(case, kernels, inputs);
    let mut found = inputs.map(|input| vec![f32::NAN; input.len()]);
    let [dq, dk, dv] = &mut found;
    let shape = &case.shape;
    let mut wanted = Gradients {
        dout: TensorRef::contiguous(dout, shape.out()).unwrap(),
        dlse: Some(TensorRef::contiguous(dlse, shape.lse()).unwrap()),
        dq: TensorMut::contiguous(dq, shape.q()).unwrap(),
        dk: TensorMut::contiguous(dk, shape.k()).unwrap(),
        dv: TensorMut::contiguous(dv, shape.v()).unwrap(),
    };
    with_tensors(case, inputs, (&mut out, &mut lse), |tensors| {
        let division = Division::default();
        let layout =
            backward_workspace(&case.params, &division, &tensors.layouts(), kernels, &Serial).unwrap();
        let mut workspace = Workspace::new(layout, |_| 0xFF);
        backward(&case.params, &division, tensors, &mut wanted, kernels, &Serial, workspace.exact()).unwrap();
        assert!(workspace.guards_are_intact(), "{}: a workspace of {layout:?} was overrun", case.name);
    });
    found
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

fn check(case: &Case<'_>, kernels: &Kernels, seed: u64) {
    let inputs = Inputs::normal(case.shape, seed);
    let tensors = [&inputs.q[..], &inputs.k[..], &inputs.v[..]];
    let mut generator = Generator::new(seed + 1);
    let mut normal = |len: usize| -> Vec<f32> { (0..len).map(|_| generator.normal() as f32).collect() };
    let rows = case.shape.batch * case.shape.heads_q * case.shape.n_q;
    let (dout, dlse) = (normal(rows * case.shape.value_dim), normal(rows));
    let found = gradients(case, kernels, tensors, [&dout, &dlse]);
    let loss = |tensors: [&[f32]; 3]| {
        let (out, lse) = forward(case, kernels, tensors);
        let seen = lse.iter().map(|&x| if x == f32::NEG_INFINITY { 0.0 } else { x }).collect::<Vec<_>>();
        dot(&out, &dout) + dot(&seen, &dlse)
    };
    for (moved, name) in ["q", "k", "v"].into_iter().enumerate() {
        if !(if moved == 2 { case.fixed_by_value } else { case.fixed }) {
            continue;
        }
        let direction = normal(tensors[moved].len());
        let step = 1e-2;
        let at = |step: f32| {
            let there: Vec<f32> = tensors[moved].iter().zip(&direction).map(|(x, y)| x + step * y).collect();
            let mut tensors = tensors;
            tensors[moved] = &there;
            loss(tensors)
        };
        let difference = (at(step) - at(-step)) / (2.0 * f64::from(step));
        let along = dot(&found[moved], &direction);
        let scale = dot(&found[moved], &found[moved]).sqrt();
        println!("{} d{name}: {along:.5} by differences {difference:.5}, norm {scale:.3}", case.name);
        // Differences are off by step^2 / 6 of a third derivative, and by rounding of the losses.
        assert!((along - difference).abs() <= 2e-3 * scale.max(1.0), "seed {seed}: {} d{name}", case.name);
    }
}

#[test]
fn gradients_are_the_slopes_of_the_forward() {
    let seed = 71;
    let mask = BlockMask {
        query_block: 32,
        key_block: 48,
        num_query_blocks: 10,
        num_key_blocks: 7,
        row_offsets: &[0, 2, 2, 5, 6, 7, 8, 9, 10, 12, 13],
        columns: &[0, 3, 1, 2, 5, 4, 6, 0, 2, 3, 0, 1, 5],
        head_stride: 0,
    };
    let shape = Shape { batch: 2, heads_q: 4, heads_kv: 2, n_q: 300, n_k: 300, head_dim: 20, value_dim: 12 };
    let exact = Params { method: Method::Exact, ..Params::default() };
    let paper = Params {
        method: Method::Paper,
        min_seq_len: 64,
        block_size: 32,
        sample_size: 24,
        approx_d_kappa: 1e30,
        approx_d_epsilon: 1e10,
        ..Params::default()
    };
    let unsorted = Params { lsh_num_projs: 0, ..paper };
    let refined = Params {
        method: Method::Refined,
        min_seq_len: 1,
        budget: 64,
        target_error: 0.0,
        ..Params::default()
    };
    let case = |name, params, fixed, fixed_by_value| Case {
        name,
        params,
        shape,
        block_mask: None,
        fixed,
        fixed_by_value,
    };
    let with_mask = |mask_of_rows: Mask, params: Params| Params { mask: mask_of_rows, ..params };
    let row_norm = Params { residual: Residual::RowNorm, ..unsorted };
    let mut cases = Vec::new();
    for (name, mask_of_rows) in
        [("none", Mask::None), ("bottom right", Mask::CausalBottomRight), ("top left", Mask::CausalTopLeft)]
    {
        println!("{name}");
        let of = |params| with_mask(mask_of_rows, params);
        cases.push(case("exact", of(exact), true, true));
        cases.push(case("paper", of(paper), false, true));
        cases.push(case("paper, not sorted", of(unsorted), true, true));
        cases.push(case(
            "paper, blocks only",
            of(Params { residual: Residual::None, ..unsorted }),
            true,
            true,
        ));
        cases.push(case("paper, row norms", of(row_norm), true, false));
        cases.push(case("paper, no blocks", of(Params { block_size: 0, ..unsorted }), true, true));
        cases.push(case("refined", of(refined), false, true));
        cases.push(case("refined with a target", of(Params { target_error: 0.2, ..refined }), false, false));
        cases.push(Case { block_mask: Some(mask), ..case("paper, given blocks", of(paper), true, true) });
        for (n_q, n_k) in [(100, 400), (400, 100)] {
            let shape = Shape { n_q, n_k, ..shape };
            cases.push(Case { shape, ..case("exact, other lengths", of(exact), true, true) });
            cases.push(Case { shape, ..case("paper, other lengths", of(unsorted), true, true) });
            cases.push(Case { shape, ..case("refined, other lengths", of(refined), false, true) });
        }
    }
    for_each_table(|kernels| cases.iter().for_each(|case| check(case, kernels, seed)));
}
