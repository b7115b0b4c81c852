//! The backward pass: the gradient of the estimator that the forward ran, see `docs/backward.md`.

use crate::division::{Divided, Division, Part};
use crate::error::{Result, invalid};
use crate::exec::{Executor, for_each_chunk, for_each_item};
use crate::gradient_exact;
use crate::gradient_hyper;
use crate::gradient_refined::SplitSums;
use crate::gradient_run::GradientRun;
use crate::gradient_tile::{GradientCall, GradientSums, GradientTile, Strides};
use crate::gradients::{Gradients, check_lse};
use crate::pack::PackedShape;
use crate::paper::Paper;
use crate::params::Params;
use crate::part::Section;
use crate::pass::Pass;
use crate::plan::Run;
use crate::problem::{Layouts, Problem, Tensors};
use crate::refined::Refined;
use crate::scratch::{Carver, Lanes, Layout, WORKSPACE_ALIGN};
use crate::simd::Kernels;
use crate::tile::Call;
use crate::tiling::HeadSet;
use crate::view::{Rows, TensorMut};
use crate::workspace::{Shared, Sizes, check_workspace};

/// Size and alignment of the workspace that [`backward`] needs for these options, layouts, division, kernels and number of
/// lanes. Every error that does not concern the gradients, addresses or contents is reported here too.
///
/// Sizes are those of one batch item or sequence:
///
/// - the sums of all gradients in f32, with rows of whole vectors: `4 head_dim` bytes for every query of every query head,
///   `4 (head_dim + value_dim)` for every key of every KV head;
/// - what the method's selection needs in [`forward_workspace`](crate::forward_workspace), without states;
/// - METHOD_PAPER: `4 sample_size (head_dim + value_dim)` bytes (twice that with the row-norm residual) for each of at least 8
///   and at most 64 chunks for every KV head;
/// - METHOD_REFINED: with less than 5 KV heads, sums of key gradients for up to 8 KV heads instead; 1 / 64 of them for blocks;
/// - for every lane a tile: `512 head_dim + 256 value_dim + 192 (head_dim + value_dim) + 32768` numbers of 4 bytes, and
///   16384 more with a mask tensor, beside that of the forward.
///
/// Never quadratic in the sequence.
pub fn backward_workspace(
    params: &Params,
    division: &Division<'_>,
    layouts: &Layouts<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
) -> Result<Layout> {
    let divided = divide(params, division, layouts)?;
    let sizes = BackwardSizes::new(&divided, kernels, executor.lanes().max(1))?;
    Ok(Layout { size: sizes.total, align: WORKSPACE_ALIGN })
}

/// Writes dq, dk and dv: the gradients of a loss with respect to q, k and v, where dout is that with respect to out (and dlse
/// that with respect to lse).
///
/// `tensors` are those of the forward call with the same `params` and `division`, `out` and `lse` as it left them; they are
/// only read, and `error` and `keys_per_query` not at all. What the forward selected is found again, and held fixed.
/// The result depends on nothing but the arguments and the kernels' instruction set: not on the executor, nor on the
/// workspace. Nothing is allocated. On an error nothing has been written, unless it is
/// [`ErrorKind::Executor`](crate::ErrorKind::Executor).
///
/// Cost: five products for each pair of a query and a key where the forward has two.
pub fn backward(
    params: &Params,
    division: &Division<'_>,
    tensors: &Tensors<'_>,
    gradients: &mut Gradients<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
) -> Result<()> {
    let layouts = tensors.layouts();
    let divided = divide(params, division, &layouts)?;
    gradients.layouts().check(&layouts)?;
    gradients.check_overlap(tensors)?;
    let sizes = BackwardSizes::new(&divided, kernels, executor.lanes().max(1))?;
    check_workspace(workspace, sizes.total)?;
    let gradients = &*gradients;
    for item in 0..divided.items() {
        run_item(&divided, item, tensors, gradients, kernels, executor, workspace)?;
    }
    Ok(())
}

fn divide<'a>(params: &Params, division: &Division<'a>, layouts: &Layouts<'a>) -> Result<Divided<'a>> {
    let divided = Divided::new(params, division, layouts)?;
    check_lse(layouts)?;
    Ok(divided)
}

/// Sums of the gradients of all keys of a batch item or sequence.
struct KeySumsOfItem<'a> {
    key: &'a mut [f32],
    value: &'a mut [f32],
}

impl<'a> KeySumsOfItem<'a> {
    /// `problem`: all heads of the item.
    fn carve(problem: &Problem, strides: Strides, carver: &mut Carver<'a>) -> Self {
        let rows = problem.heads_kv.saturating_mul(problem.n_k);
        KeySumsOfItem {
            key: carver.take(rows.saturating_mul(strides.key)),
            value: carver.take(rows.saturating_mul(strides.value)),
        }
    }
}

/// What all tasks of a part share besides [`Shared`].
struct SharedSums<'a> {
    query: &'a mut [f32],
    columns: &'a mut [f32],
    split_sums: SplitSums<'a>,
}

impl<'a> SharedSums<'a> {
    fn carve(part: &Part<'_>, strides: Strides, carver: &mut Carver<'a>) -> Self {
        let problem = &part.plan.problem;
        let rows = problem.heads_q.saturating_mul(problem.n_q);
        let columns = match part.plan.run {
            Run::Paper => gradient_hyper::partial_len(&part.params, problem, strides).unwrap_or(usize::MAX),
            Run::Exact | Run::Refined => 0,
        };
        SharedSums {
            query: carver.take(rows.saturating_mul(strides.key)),
            columns: carver.take(columns),
            split_sums: match part.plan.run {
                Run::Refined => SplitSums::carve(problem, strides, carver),
                Run::Exact | Run::Paper => SplitSums::none(),
            },
        }
    }
}

/// Bytes of the parts of the workspace.
struct BackwardSizes {
    /// Sums for the keys of an item.
    item: usize,
    total: usize,
}

impl BackwardSizes {
    fn new(divided: &Divided<'_>, kernels: &Kernels, lanes: usize) -> Result<Self> {
        let sizes = || {
            let (mut item, mut part) = (0, 0);
            for index in 0..divided.count() {
                let mut carver = Carver::measuring();
                let of_part = divided.gradient_part(index, kernels);
                let strides = Strides::new(kernels, &of_part.plan.problem);
                KeySumsOfItem::carve(&divided.item_problem(index), strides, &mut carver);
                item = carver.used()?.max(item);
                part = PartSizes::new(&of_part, kernels, lanes)?.total.max(part);
            }
            let total = item.checked_add(part)?;
            isize::try_from(total).ok()?;
            Some(BackwardSizes { item, total })
        };
        match sizes() {
            Some(sizes) => Ok(sizes),
            None => invalid!("the shapes need more scratch memory than an address space holds"),
        }
    }
}

/// Bytes of the workspace of a part.
struct PartSizes {
    shared: usize,
    lane: usize,
    total: usize,
}

impl PartSizes {
    fn new(part: &Part<'_>, kernels: &Kernels, lanes: usize) -> Option<Self> {
        let problem = &part.plan.problem;
        let forward = Sizes::new(&part.plan, &part.params, kernels, lanes).ok()?;
        let mut carver = Carver::measuring();
        SharedSums::carve(part, Strides::new(kernels, problem), &mut carver);
        let shared = carver.used()?.checked_add(forward.shared)?;
        let mut carver = Carver::measuring();
        GradientTile::measure(kernels, problem, &mut carver);
        // The forward's tile, or what one selection needs, lies beside it.
        let lane = carver.used()?.checked_add(forward.lane)?;
        let total = lane.checked_mul(lanes)?.checked_add(shared)?;
        Some(PartSizes { shared, lane, total })
    }
}

impl<'a> Divided<'a> {
    /// Part `index` as the backward plans it: all heads at once, without states between passes.
    fn gradient_part(&self, index: usize, kernels: &Kernels) -> Part<'a> {
        let mut part = self.part(index, kernels);
        part.plan.sum_gradients();
        part
    }
}

/// All heads of a batch item or sequence, or all batch items where they are alike: sums, the methods of its parts, outputs.
fn run_item(
    divided: &Divided<'_>,
    item: usize,
    tensors: &Tensors<'_>,
    gradients: &Gradients<'_>,
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
) -> Result<()> {
    let parts = divided.parts_of(item);
    let section = divided.item(parts.start);
    let problem = divided.item_problem(parts.start);
    let strides = Strides::new(kernels, &problem);
    let lane_count = executor.lanes().max(1);
    let (of_item, of_parts) = workspace.split_at_mut(BackwardSizes::new(divided, kernels, lane_count)?.item);
    let KeySumsOfItem { key, value } = KeySumsOfItem::carve(&problem, strides, &mut Carver::new(of_item));
    for batch in 0..section.batches.len() {
        {
            let mut lanes = Lanes::new(&mut *of_parts, WORKSPACE_ALIGN, lane_count);
            fill(executor, &mut lanes, key)?;
            fill(executor, &mut lanes, value)?;
        }
        for index in parts.clone() {
            let part = divided.gradient_part(index, kernels);
            let first = part.section.heads.kv.start * problem.n_k;
            let sums = (&mut key[first * strides.key..], &mut value[first * strides.value..]);
            run_part(&part, batch, (tensors, gradients), sums, kernels, executor, of_parts)?;
        }
        let mut lanes = Lanes::new(&mut *of_parts, WORKSPACE_ALIGN, lane_count);
        // SAFETY: dk and dv are this call's, and nobody else writes them.
        let (dk, dv) = unsafe {
            let keys = |view| part_of(view, &section, Side::Key);
            (keys(&gradients.dk), keys(&gradients.dv))
        };
        write(executor, &mut lanes, (key, strides.key), &dk, batch)?;
        write(executor, &mut lanes, (value, strides.value), &dv, batch)?;
    }
    Ok(())
}

/// Batch item `batch` of a part: adds to the sums of its keys, and writes dq.
fn run_part(
    part: &Part<'_>,
    batch: usize,
    (tensors, gradients): (&Tensors<'_>, &Gradients<'_>),
    (key, value): (&mut [f32], &mut [f32]),
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
) -> Result<()> {
    let Part { section, params, plan, .. } = part;
    let problem = plan.problem;
    let strides = Strides::new(kernels, &problem);
    let lane_count = executor.lanes().max(1);
    let sizes = PartSizes::new(part, kernels, lane_count).expect("the workspace has been measured");
    let (shared, rest) = workspace.split_at_mut(sizes.shared);
    let mut lanes = Lanes::new(rest, sizes.lane, lane_count);
    let mut carver = Carver::new(shared);
    let mut shared = Shared::carve(plan, params, kernels, &mut carver);
    let SharedSums { query, columns, mut split_sums } = SharedSums::carve(part, strides, &mut carver);
    fill(executor, &mut lanes, query)?;

    // SAFETY: outputs are only read through these, and dq is this call's.
    let (tensors, gradients) = unsafe {
        let Gradients { dout, dlse, dq, dk, dv } = gradients;
        let Section { batches, heads, queries, .. } = section;
        let of_queries = Gradients {
            dout: dout.part(batches, &heads.query, queries),
            dlse: dlse.as_ref().map(|dlse| dlse.part(batches, &heads.query, queries)),
            dq: part_of(dq, section, Side::Query),
            dk: part_of(dk, section, Side::Key),
            dv: part_of(dv, section, Side::Key),
        };
        (tensors.part(section), of_queries)
    };
    let mask =
        tensors.mask.map(|mask| mask.expanded([problem.batch, problem.heads_q, problem.n_q, problem.n_k]));
    let shape = PackedShape::new(kernels, &problem);
    let call = Call { kernels, params, problem, tensors: &tensors, mask, shape, unmet: None };
    let of = GradientCall { call: &call, gradients: &gradients };
    {
        let sums = GradientSums {
            query: Rows::new(query, strides.key),
            key: Rows::new(key, strides.key),
            value: Rows::new(value, strides.value),
        };
        let gradient = GradientRun { of: &of, sums: &sums, columns, split_sums: &mut split_sums };
        let (lanes, shared) = (&mut lanes, &mut shared);
        match plan.run {
            Run::Exact => {
                let pass =
                    Pass { rectangle: &|_| Some(plan.rectangle.clone()), count: 1, states: None, last: true };
                let heads = HeadSet::all(&problem);
                gradient_exact::run_pass(&of, executor, lanes, (batch, &heads), &pass, &sums)?;
            }
            Run::Paper => {
                Paper { plan, call: &call, executor, lanes, shared, gradient: Some(gradient) }
                    .run_batch(batch)?;
            }
            Run::Refined => {
                Refined { plan, call: &call, executor, lanes, shared, gradient: Some(gradient) }
                    .run_batch(batch)?;
            }
        }
    }
    write(executor, &mut lanes, (query, strides.key), &gradients.dq, batch)
}

/// Whose rows a gradient has.
#[derive(Clone, Copy)]
enum Side {
    Query,
    Key,
}

/// The rows of a section.
///
/// # Safety
/// As for [`TensorMut::part`].
unsafe fn part_of<'p>(view: &'p TensorMut<'_>, section: &Section, side: Side) -> TensorMut<'p> {
    let (heads, rows) = match side {
        Side::Query => (&section.heads.query, &section.queries),
        Side::Key => (&section.heads.kv, &section.keys),
    };
    // SAFETY: the caller's contract.
    unsafe { view.part(&section.batches, heads, rows) }
}

/// Numbers that a task fills at a time.
const FILLED: usize = 1 << 16;

fn fill(executor: &dyn Executor, lanes: &mut Lanes<'_>, sums: &mut [f32]) -> Result<()> {
    for_each_chunk(executor, lanes, sums, FILLED, &|_, _, chunk| chunk.fill(0.0))
}

/// Rows that a task writes at a time.
const WRITTEN_ROWS: usize = 256;

/// Writes sums, rows of a stride, to batch item `batch` of a gradient.
fn write(
    executor: &dyn Executor,
    lanes: &mut Lanes<'_>,
    (sums, stride): (&[f32], usize),
    to: &TensorMut<'_>,
    batch: usize,
) -> Result<()> {
    let [_, heads, rows, width] = to.layout().extents();
    for_each_item(executor, lanes, (heads * rows).div_ceil(WRITTEN_ROWS), &|_, item| {
        for index in item * WRITTEN_ROWS..(heads * rows).min((item + 1) * WRITTEN_ROWS) {
            // SAFETY: each task has its own rows, and nobody reads them.
            unsafe { to.write_row(batch, index / rows, index % rows, &sums[index * stride..][..width]) };
        }
    })
}
