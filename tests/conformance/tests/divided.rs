//! A call in parts: tasks in any order, sequences one after the other, and heads with methods of their own have the
//! bits of calls that are not divided.

use std::ops::Range;

use hyperattn_conformance::additive_mask::AdditiveMask;
use hyperattn_conformance::executors::{Order, Threads};
use hyperattn_conformance::for_each_table;
use hyperattn_conformance::inputs::{DTypes, Inputs, Shape};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_conformance::random_problem::{RandomProblem, pick};
use hyperattn_conformance::run::{Outcome, Setup, Workspace};
use hyperattn_core::{
    DType, Division, ErrorKind, Layout, Mask, Method, Params, Result, Sequences, Tensors, run_tasks,
    task_count, task_workspace,
};
use hyperattn_reference::Generator;

const CASES: u64 = 30;
const FIRST_SEED: u64 = 5200;

/// A random call of any method, with several tiles and several query heads for each KV head more often than not.
fn random_problem(generator: &mut Generator, seed: u64, most_rows: f64) -> RandomProblem {
    let mut problem = RandomProblem::draw(generator, seed, most_rows, 40.0);
    if problem.block_mask.is_none() && generator.below(3) == 0 {
        let refined =
            Params { method: Method::Refined, min_seq_len: 0, budget: 64, band: 20, ..problem.params };
        let target_error = pick(generator, &[0.0, 0.05, 0.3, 0.8]);
        problem.params = Params { num_first_keys: 3, target_error, ..refined };
    }
    problem
}

/// Runs the tasks of a call, each by itself, shuffled.
fn run_shuffled(setup: &Setup<'_>, tensors: &Tensors<'_>, generator: &mut Generator) -> Result<()> {
    let Setup { kernels, params, division, .. } = *setup;
    let count = task_count(params, &division, &tensors.layouts(), kernels)?;
    let mut tasks: Vec<usize> = (0..count).collect();
    (1..count).for_each(|i| tasks.swap(i, generator.below(i + 1)));
    let layout = task_workspace(params, &division, &tensors.layouts(), kernels)?;
    let mut workspace = Workspace::new(layout, setup.fill);
    for task in tasks {
        // SAFETY: one task at a time.
        unsafe { run_tasks(params, &division, tensors, kernels, task..task + 1, workspace.exact()) }?;
        assert!(workspace.guards_are_intact(), "a workspace of {layout:?} was overrun");
    }
    Ok(())
}

/// Runs equal ranges of the tasks on three threads.
fn run_on_threads(setup: &Setup<'_>, tensors: &Tensors<'_>) -> Result<()> {
    let Setup { kernels, params, division, .. } = *setup;
    let count = task_count(params, &division, &tensors.layouts(), kernels)?;
    let layout = task_workspace(params, &division, &tensors.layouts(), kernels)?;
    let run = |tasks: Range<usize>| {
        let mut workspace = Workspace::new(layout, setup.fill);
        // SAFETY: threads have different tasks.
        unsafe { run_tasks(params, &division, tensors, kernels, tasks, workspace.exact()) }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..3).map(|ith| scope.spawn(move || run(count * ith / 3..count * (ith + 1) / 3))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no task panics"))
    })
}

/// The tasks of `setup` write the bits of the call, which are returned.
fn check_tasks(setup: &Setup<'_>, generator: &mut Generator) -> Outcome {
    let expected = setup.run();
    let shuffled = setup.outcome_of(|tensors| run_shuffled(setup, tensors, generator));
    assert!(shuffled.expect("the call is legal").bits() == expected.bits(), "shuffled tasks differ");
    let threaded = setup.outcome_of(|tensors| run_on_threads(setup, tensors));
    assert!(threaded.expect("the call is legal").bits() == expected.bits(), "tasks of threads differ");
    expected
}

#[test]
fn tasks_have_the_bits_of_the_call() {
    for seed in FIRST_SEED..FIRST_SEED + CASES {
        let generator = &mut Generator::new(seed);
        let RandomProblem { params, inputs, block_mask } = random_problem(generator, seed, 900.0);
        let block_mask = block_mask.as_ref().map(OwnedMask::view);
        for_each_table(|kernels| {
            let setup = Setup { block_mask, estimates: true, ..Setup::new(kernels, &params, &inputs) };
            check_tasks(&setup, generator);
        });
    }
}

/// Real lengths, where METHOD_REFINED settles heads of one KV head differently.
#[test]
fn refined_tasks_settle_the_budgets_of_the_call() {
    let shape = Shape { heads_q: 6, heads_kv: 2, head_dim: 32, ..Shape::single(1500, 1500) };
    let mut inputs = Inputs::clustered(shape, 5300);
    // Some heads look at everything, which no budget estimates well.
    let of_head = shape.n_q * shape.head_dim;
    inputs.q[of_head..2 * of_head].iter_mut().for_each(|x| *x *= 0.01);
    for dtype in [DType::F32, DType::BF16] {
        let inputs = inputs.clone().rounded(dtype);
        for mask in [Mask::None, Mask::CausalBottomRight] {
            for target_error in [0.02, 0.3] {
                let params = Params { method: Method::Refined, mask, min_seq_len: 64, ..Params::default() };
                let params = Params { budget: 128, target_error, ..params };
                for_each_table(|kernels| {
                    let setup = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) };
                    check_tasks(&setup, &mut Generator::new(5301));
                });
            }
        }
    }
}

/// Numbers that ascend from 0 to `n`, some of them equal.
fn random_starts(generator: &mut Generator, count: usize, n: usize) -> Vec<i32> {
    let mut starts: Vec<i32> = (0..count - 1).map(|_| generator.below(n + 1) as i32).collect();
    starts.extend([0, n as i32]);
    starts.sort_unstable();
    starts
}

/// Rows `queries` of what a call of one batch item wrote, and what belongs to sequence `index` of `count`.
fn part_of(
    outcome: &Outcome,
    shape: &Shape,
    queries: Range<usize>,
    (index, count): (usize, usize),
) -> Outcome {
    let rows = |values: &[f32], dim: usize| -> Vec<f32> {
        let heads = values.chunks((shape.n_q * dim).max(1)).take(shape.heads_q);
        heads.flat_map(|head| head[queries.start * dim..queries.end * dim].to_vec()).collect()
    };
    let of_heads =
        |values: &[f32]| values[index * values.len() / count..(index + 1) * values.len() / count].to_vec();
    Outcome {
        out: rows(&outcome.out, shape.value_dim),
        lse: rows(&outcome.lse, 1),
        error: of_heads(&outcome.error),
        keys_per_query: of_heads(&outcome.keys_per_query),
    }
}

#[test]
fn a_sequence_has_the_bits_that_it_has_alone() {
    for seed in FIRST_SEED + 200..FIRST_SEED + 200 + CASES / 2 {
        let generator = &mut Generator::new(seed);
        let RandomProblem { mut params, inputs, .. } = random_problem(generator, seed, 1200.0);
        params.method = pick(generator, &[params.method, Method::Auto]);
        let inputs = inputs.batch_item(0);
        let shape = inputs.shape;
        let count = pick(generator, &[1, 2, 5, 40]);
        let cu_seqlens_q = random_starts(generator, count, shape.n_q);
        let cu_seqlens_k = if shape.n_q == shape.n_k {
            cu_seqlens_q.clone()
        } else {
            random_starts(generator, count, shape.n_k)
        };
        let sequences = Some(Sequences { cu_seqlens_q: &cu_seqlens_q, cu_seqlens_k: &cu_seqlens_k });
        println!("queries {cu_seqlens_q:?}, keys {cu_seqlens_k:?}");
        for_each_table(|kernels| {
            let alone = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) };
            let setup = Setup { division: Division { sequences, head_methods: None }, ..alone };
            let together = check_tasks(&setup, generator);
            for lanes in [3, 16] {
                let executor = Threads { lanes, threads: 3, order: Order::Reversed };
                let bits = Setup { executor: &executor, ..setup }.run().bits();
                assert!(bits == together.bits(), "{lanes} lanes changed the result");
            }
            for index in 0..count {
                let rows = |starts: &[i32]| starts[index] as usize..starts[index + 1] as usize;
                let (queries, keys) = (rows(&cu_seqlens_q), rows(&cu_seqlens_k));
                let inputs = inputs.rows(queries.clone(), keys);
                let alone = Setup { inputs: &inputs, ..alone }.run();
                let part = part_of(&together, &shape, queries, (index, count));
                assert!(alone.bits() == part.bits(), "sequence {index} differs");
            }
        });
    }
}

#[test]
fn a_head_has_the_bits_that_it_has_when_all_have_its_method() {
    let methods = [Method::Auto, Method::Exact, Method::Paper, Method::Refined];
    for seed in FIRST_SEED + 400..FIRST_SEED + 400 + CASES / 2 {
        let generator = &mut Generator::new(seed);
        let RandomProblem { params, inputs, block_mask } = random_problem(generator, seed, 600.0);
        let params = Params { budget: 64, min_seq_len: params.min_seq_len.min(50), ..params };
        let block_mask = block_mask.as_ref().map(OwnedMask::view);
        let shape = inputs.shape;
        let head_methods: Vec<Method> = (0..shape.heads_q).map(|_| pick(generator, &methods)).collect();
        println!("{head_methods:?}");
        for_each_table(|kernels| {
            let setup = Setup { block_mask, estimates: true, ..Setup::new(kernels, &params, &inputs) };
            let division = Division { sequences: None, head_methods: Some(&head_methods) };
            let mixed = check_tasks(&Setup { division, ..setup }, generator);
            for method in methods {
                let params = Params { method, ..params };
                let masked = matches!(method, Method::Auto | Method::Paper);
                let whole =
                    Setup { params: &params, block_mask: block_mask.filter(|_| masked), ..setup }.run();
                for head in (0..shape.heads_q).filter(|&head| head_methods[head] == method) {
                    for batch in 0..shape.batch {
                        let (of_mixed, of_whole) =
                            (head_of(&mixed, &shape, batch, head), head_of(&whole, &shape, batch, head));
                        assert!(of_mixed == of_whole, "{method:?} head {head} of batch item {batch} differs");
                    }
                }
            }
        });
    }
}

/// The bits of one head.
fn head_of(outcome: &Outcome, shape: &Shape, batch: usize, head: usize) -> Vec<u32> {
    let index = batch * shape.heads_q + head;
    let part = |values: &[f32], len: usize| values[index * len..(index + 1) * len].to_vec();
    let all = [
        part(&outcome.out, shape.n_q * shape.value_dim),
        part(&outcome.lse, shape.n_q),
        part(&outcome.error, 1),
        part(&outcome.keys_per_query, 1),
    ];
    all.concat().into_iter().map(f32::to_bits).collect()
}

#[test]
fn sequences_may_have_methods_of_heads() {
    let shape = Shape { heads_q: 4, heads_kv: 2, ..Shape::single(600, 600) };
    let inputs = Inputs::clustered(shape, 5302).rounded(DTypes { q: DType::F32, kv: DType::F16 });
    let params =
        Params { mask: Mask::CausalBottomRight, block_size: 32, sample_size: 20, ..Params::default() };
    let params = Params { min_seq_len: 60, budget: 64, ..params };
    let starts = [0, 70, 70, 400, 600];
    let head_methods = [Method::Paper, Method::Exact, Method::Refined, Method::Refined];
    for_each_table(|kernels| {
        let setup = Setup { estimates: true, ..Setup::new(kernels, &params, &inputs) };
        let sequences = Some(Sequences { cu_seqlens_q: &starts, cu_seqlens_k: &starts });
        let both = Division { sequences, head_methods: Some(&head_methods) };
        let together = check_tasks(&Setup { division: both, ..setup }, &mut Generator::new(5303));
        for index in 0..4 {
            let rows = starts[index] as usize..starts[index + 1] as usize;
            let inputs = inputs.rows(rows.clone(), rows.clone());
            let division = Division { sequences: None, ..both };
            let alone = Setup { inputs: &inputs, division, ..setup }.run();
            assert!(alone.bits() == part_of(&together, &shape, rows, (index, 4)).bits(), "sequence {index}");
        }
    });
}

/// Tasks and sequences have their part of a mask tensor, whatever it says for all batch items, heads or queries at once.
#[test]
fn a_mask_tensor_is_divided_as_the_call_is() {
    let shape = Shape { heads_q: 6, heads_kv: 2, ..Shape::single(700, 710) };
    let (starts_q, starts_k) = ([0, 90, 90, 470, 700], [0, 120, 130, 509, 710]);
    let sequences = Some(Sequences { cu_seqlens_q: &starts_q, cu_seqlens_k: &starts_k });
    for (seed, of) in (5310..).zip([[1, 1, 700], [1, 6, 700], [1, 6, 1], [1, 1, 1]]) {
        let inputs = Inputs::clustered(shape, seed);
        let dtype = [DType::F16, DType::F32, DType::BF16][seed as usize % 3];
        let tensor = AdditiveMask::random([of[0], of[1], of[2], shape.n_k], dtype, seed);
        for (mask, method) in [(Mask::None, Method::Exact), (Mask::CausalBottomRight, Method::Auto)] {
            let params = Params { method, mask, ..Params::default() };
            for_each_table(|kernels| {
                let generator = &mut Generator::new(seed);
                let setup =
                    Setup { mask: Some(&tensor), estimates: true, ..Setup::new(kernels, &params, &inputs) };
                check_tasks(&setup, generator);
                let division = Division { sequences, head_methods: None };
                let together = check_tasks(&Setup { division, ..setup }, generator);
                for index in 0..4 {
                    let rows = |starts: [i32; 5]| starts[index] as usize..starts[index + 1] as usize;
                    let (queries, keys) = (rows(starts_q), rows(starts_k));
                    let inputs = inputs.rows(queries.clone(), keys.clone());
                    let tensor = tensor.rows(queries.clone(), keys);
                    let alone = Setup { inputs: &inputs, mask: Some(&tensor), ..setup }.run();
                    let part = part_of(&together, &shape, queries, (index, 4));
                    assert!(alone.bits() == part.bits(), "sequence {index}, {of:?}, {mask:?}");
                }
            });
        }
    }
    // Heads with other methods take no mask.
    let inputs = Inputs::normal(shape, 5314);
    let tensor = AdditiveMask::random([1, 1, 700, 710], DType::F32, 5314);
    let params = Params { method: Method::Exact, min_seq_len: 10, ..Params::default() };
    let head_methods =
        [Method::Exact, Method::Exact, Method::Exact, Method::Exact, Method::Paper, Method::Exact];
    for_each_table(|kernels| {
        let division = Division { sequences: None, head_methods: Some(&head_methods) };
        let setup = Setup { mask: Some(&tensor), division, ..Setup::new(kernels, &params, &inputs) };
        let refused = setup.attempt(|layout| layout).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
    });
}

#[test]
fn the_workspace_is_what_is_asked_for_and_not_a_byte_less() {
    let shape = Shape { heads_q: 6, heads_kv: 2, ..Shape::single(700, 700) };
    let inputs = Inputs::normal(shape, 5304);
    let starts: Vec<i32> = (0..=70).map(|i| i * 10).collect();
    let head_methods = [Method::Paper, Method::Exact, Method::Refined].repeat(2);
    let params = Params { min_seq_len: 5, block_size: 16, sample_size: 8, ..Params::default() };
    let sequences = Some(Sequences { cu_seqlens_q: &starts, cu_seqlens_k: &starts });
    for_each_table(|kernels| {
        for division in [
            Division { sequences, head_methods: None },
            Division { sequences: None, head_methods: Some(&head_methods) },
            Division { sequences, head_methods: Some(&head_methods) },
        ] {
            for lanes in [1, 4] {
                let executor = Threads { lanes, threads: 2, order: Order::Forward };
                let setup = Setup { division, executor: &executor, ..Setup::new(kernels, &params, &inputs) };
                let setup = Setup { estimates: true, ..setup };
                setup.run();
                let refused = setup.attempt(|Layout { size, align }| Layout { size: size - 1, align });
                assert_eq!(refused.unwrap_err().kind(), ErrorKind::WorkspaceTooSmall);
            }
            let setup = Setup { division, estimates: true, ..Setup::new(kernels, &params, &inputs) };
            let refused = setup.outcome_of(|tensors| {
                let layout = task_workspace(&params, &division, &tensors.layouts(), kernels)?;
                let mut workspace = Workspace::new(Layout { size: layout.size - 1, ..layout }, |_| 0);
                // SAFETY: one thread.
                unsafe { run_tasks(&params, &division, tensors, kernels, 0..1, workspace.exact()) }
            });
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::WorkspaceTooSmall);
        }
    });
}
