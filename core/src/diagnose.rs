//! Figures by which the paper judges an attention matrix, and which method a call takes: for people who decide
//! whether to estimate, not for the way of a call.

use crate::error::{Error, ErrorKind, Result, invalid};
use crate::exec::{Executor, for_each_chunk};
use crate::math::exp2;
use crate::params::{Method, Params};
use crate::plan::{Plan, Run};
use crate::problem::{Layouts, Problem, Tensors};
use crate::scratch::{Carver, Lanes, Layout, WORKSPACE_ALIGN};
use crate::simd::Kernels;

/// Rows of a head that a sampled figure comes from, where there are so many.
pub const DIAGNOSIS_ROWS: usize = 64;

/// Keys that are widened together.
const KEYS_AT_ONCE: usize = 64;

/// Sampled row number `i` of [`DIAGNOSIS_ROWS`]: the middle of each of as many equal stretches.
pub fn diagnosis_row(n_q: usize, i: usize) -> usize {
    if n_q <= DIAGNOSIS_ROWS {
        return i;
    }
    ((2 * i + 1) as u128 * n_q as u128 / (2 * DIAGNOSIS_ROWS) as u128) as usize
}

/// The method that a call with these arguments runs: never [`Method::Auto`], and [`Method::Exact`] also where
/// another was asked for and there is nothing to estimate. Single heads of [`Method::Refined`] may still be exact.
pub fn method_that_runs(params: &Params, layouts: &Layouts<'_>, kernels: &Kernels) -> Result<Method> {
    Ok(match Plan::new(params, layouts, kernels)?.run {
        Run::Exact => Method::Exact,
        Run::Paper => Method::Paper,
        Run::Refined => Method::Refined,
    })
}

/// Scratch of one task of [`alpha`].
struct AlphaScratch<'a> {
    /// `[DIAGNOSIS_ROWS][head_dim]`, with the scale.
    queries: &'a mut [f32],
    /// `[KEYS_AT_ONCE][head_dim]`.
    keys: &'a mut [f32],
    /// `[DIAGNOSIS_ROWS][n_k]`, of which each row's visible keys are used.
    weights: &'a mut [f32],
    /// Squared norms of the columns, `[n_k]`.
    squares: &'a mut [f64],
}

impl<'a> AlphaScratch<'a> {
    fn carve(problem: &Problem, carver: &mut Carver<'a>) -> Self {
        AlphaScratch {
            queries: carver.take(DIAGNOSIS_ROWS * problem.head_dim),
            keys: carver.take(KEYS_AT_ONCE * problem.head_dim),
            weights: carver.take(DIAGNOSIS_ROWS.saturating_mul(problem.n_k)),
            squares: carver.take(problem.n_k),
        }
    }
}

fn lane_size(problem: &Problem) -> Option<usize> {
    let mut carver = Carver::measuring();
    AlphaScratch::carve(problem, &mut carver);
    carver.used()
}

/// Size and alignment of the workspace that [`alpha`] needs.
pub fn alpha_workspace(params: &Params, layouts: &Layouts<'_>, executor: &dyn Executor) -> Result<Layout> {
    let lane = lane_size(&Problem::new(params, layouts)?);
    let total = lane.and_then(|lane| lane.checked_mul(executor.lanes().max(1)));
    match total.filter(|&total| isize::try_from(total).is_ok()) {
        Some(size) => Ok(Layout { size, align: WORKSPACE_ALIGN }),
        None => invalid!("the shapes need more scratch memory than an address space holds"),
    }
}

/// The paper's alpha of every head, `[batch, heads_q]`: n_q times the largest squared norm of a column of the
/// attention matrix, from every row or from [`DIAGNOSIS_ROWS`] of them, see [`diagnosis_row`].
///
/// From sampled rows each column's squared norm is scaled up by n_q over their number. The largest of n_k
/// such figures is too high by up to that factor where every row has a heavy column of its own (n_q rows that
/// each weigh another key alone have alpha n_q, and 64 of them seem to have n_q^2 / 64), and columns that
/// only other rows weigh are not seen. NaN where there is no query or no key, or a sampled row has a NaN.
pub fn alpha(
    params: &Params,
    tensors: &Tensors<'_>,
    every_row: bool,
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
    alphas: &mut [f64],
) -> Result<()> {
    let layouts = tensors.layouts();
    let problem = Problem::new(params, &layouts)?;
    let need = alpha_workspace(params, &layouts, executor)?;
    if !workspace.as_ptr().addr().is_multiple_of(WORKSPACE_ALIGN) || workspace.len() < need.size {
        return Err(Error::new(
            ErrorKind::WorkspaceTooSmall,
            format_args!(
                "workspace of {} bytes at {:p}, but {} at a multiple of {WORKSPACE_ALIGN} are needed",
                workspace.len(),
                workspace.as_ptr(),
                need.size
            ),
        ));
    }
    assert_eq!(alphas.len(), problem.batch * problem.heads_q);
    let count = executor.lanes().max(1);
    let mut lanes = Lanes::new(workspace, need.size / count, count);
    for_each_chunk(executor, &mut lanes, alphas, 1, &|scratch, index, alpha| {
        let mut scratch = AlphaScratch::carve(&problem, &mut Carver::new(scratch));
        let head = [index / problem.heads_q, index % problem.heads_q];
        alpha[0] = alpha_of_head(&problem, tensors, every_row, kernels, head, &mut scratch);
    })
}

fn alpha_of_head(
    problem: &Problem,
    tensors: &Tensors<'_>,
    every_row: bool,
    kernels: &Kernels,
    head: [usize; 2],
    scratch: &mut AlphaScratch<'_>,
) -> f64 {
    let n_q = problem.n_q;
    let count = if every_row { n_q } else { n_q.min(DIAGNOSIS_ROWS) };
    scratch.squares.fill(0.0);
    for start in (0..count).step_by(DIAGNOSIS_ROWS) {
        let mut rows = [0; DIAGNOSIS_ROWS];
        let rows = &mut rows[..DIAGNOSIS_ROWS.min(count - start)];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = if every_row { start + i } else { diagnosis_row(n_q, i) };
        }
        add_squared_weights(problem, tensors, kernels, head, rows, scratch);
    }
    let scale = n_q as f64 * (n_q as f64 / count as f64);
    // A NaN is larger than every number here.
    let largest = scratch.squares.iter().copied().reduce(|a, b| if b <= a { a } else { b });
    largest.map_or(f64::NAN, |largest| scale * largest)
}

/// Adds the squares of the rows' attention weights to the columns' squared norms.
fn add_squared_weights(
    problem: &Problem,
    tensors: &Tensors<'_>,
    kernels: &Kernels,
    [batch, head]: [usize; 2],
    rows: &[usize],
    scratch: &mut AlphaScratch<'_>,
) {
    let (n_k, head_dim) = (problem.n_k, problem.head_dim);
    for (&row, query) in rows.iter().zip(scratch.queries.chunks_exact_mut(head_dim)) {
        tensors.q.read_row(kernels, batch, head, row, query);
        query.iter_mut().for_each(|x| *x *= problem.scale_log2);
    }
    // Rows ascend, and under every mask a later row sees no fewer keys.
    let most = rows.last().map_or(0, |&row| problem.visible_keys(row));
    for start in (0..most).step_by(KEYS_AT_ONCE) {
        let positions = start..most.min(start + KEYS_AT_ONCE);
        for (position, key) in positions.clone().zip(scratch.keys.chunks_exact_mut(head_dim)) {
            tensors.k.read_row(kernels, batch, head / problem.group, position, key);
        }
        let queries = scratch.queries.chunks_exact(head_dim).zip(scratch.weights.chunks_exact_mut(n_k));
        for (query, weights) in queries.take(rows.len()) {
            let keys = scratch.keys.chunks_exact(head_dim);
            for (weight, key) in weights[positions.clone()].iter_mut().zip(keys) {
                *weight = dot(query, key);
            }
        }
    }
    if n_k == 0 {
        return;
    }
    for (&row, weights) in rows.iter().zip(scratch.weights.chunks_exact_mut(n_k)) {
        let weights = &mut weights[..problem.visible_keys(row)];
        let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if max == f32::NEG_INFINITY && !weights.iter().any(|logit| logit.is_nan()) {
            continue; // an empty row
        }
        let mut sum = 0.0;
        for weight in weights.iter_mut() {
            *weight = exp2(*weight - max);
            sum += f64::from(*weight);
        }
        for (square, &weight) in scratch.squares.iter_mut().zip(weights.iter()) {
            let weight = f64::from(weight) / sum;
            *square += weight * weight;
        }
    }
}

/// The product of two rows, in as many sums as keep vector units busy.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const SUMS: usize = 16;
    let (a_parts, a_rest) = a.as_chunks::<SUMS>();
    let (b_parts, b_rest) = b.as_chunks::<SUMS>();
    let mut sums = [0.0; SUMS];
    for (a, b) in a_parts.iter().zip(b_parts) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::Serial;
    use crate::params::Mask;
    use crate::view::{TensorMut, TensorRef};

    const KEYS: usize = 200;
    const DIM: usize = 4;

    #[repr(align(64))]
    struct Memory([u8; 80 << 10]);

    /// alpha of one head whose queries and keys have the given first elements and zeros else.
    fn alpha_of(mask: Mask, queries: &[f32], keys: &[f32], every_row: bool) -> f64 {
        let spread = |from: &[f32]| {
            let mut rows = [0.0; DIM * KEYS];
            rows.iter_mut().step_by(DIM).zip(from).for_each(|(to, &x)| *to = x);
            rows
        };
        let (q, k, mut out) = (spread(queries), spread(keys), [0.0; DIM * KEYS]);
        let shape = |rows: &[f32]| [1, 1, rows.len() as i64, DIM as i64];
        let tensors = Tensors {
            q: TensorRef::contiguous(&q[..DIM * queries.len()], shape(queries)).unwrap(),
            k: TensorRef::contiguous(&k[..DIM * keys.len()], shape(keys)).unwrap(),
            v: TensorRef::contiguous(&k[..DIM * keys.len()], shape(keys)).unwrap(),
            out: TensorMut::contiguous(&mut out[..DIM * queries.len()], shape(queries)).unwrap(),
            lse: None,
            block_mask: None,
            error: None,
            keys_per_query: None,
        };
        let params = Params { mask, scale: 1.0, ..Params::default() };
        let mut memory = Memory([0; 80 << 10]);
        let mut alphas = [0.0];
        let kernels = Kernels::scalar();
        alpha(&params, &tensors, every_row, kernels, &Serial, &mut memory.0, &mut alphas).unwrap();
        alphas[0]
    }

    /// Equal logits: every weight is 1/n, so alpha is n * n / n^2, from any rows.
    #[test]
    fn equal_weights_have_alpha_one() {
        for every_row in [false, true] {
            let alpha = alpha_of(Mask::None, &[0.0; KEYS], &[1.0; KEYS], every_row);
            assert!((alpha - 1.0).abs() < 1e-5, "{alpha}");
        }
    }

    /// All weight on one key: alpha is n * n, whatever rows are looked at.
    #[test]
    fn one_heavy_key_has_alpha_n_squared() {
        let mut keys = [0.0; KEYS];
        keys[7] = 60.0;
        for every_row in [false, true] {
            let alpha = alpha_of(Mask::None, &[1.0; 150], &keys, every_row);
            assert!((alpha - 150.0 * 150.0).abs() < 0.1, "{alpha}");
        }
    }

    /// Under a causal mask key 0 has weight 1/(i + 1) in row i.
    #[test]
    fn the_mask_counts() {
        let n = 130;
        for mask in [Mask::CausalBottomRight, Mask::CausalTopLeft] {
            let norm: f64 = (0..n).map(|i| 1.0 / ((i + 1) * (i + 1)) as f64).sum();
            let every = alpha_of(mask, &[0.0; KEYS][..n], &[1.0; KEYS][..n], true);
            assert!((every / (n as f64 * norm) - 1.0).abs() < 1e-5, "{mask:?}: {every}");
            let rows = (0..DIAGNOSIS_ROWS).map(|i| diagnosis_row(n, i));
            let norm: f64 = rows.map(|i| 1.0 / ((i + 1) * (i + 1)) as f64).sum();
            let scale = n as f64 * n as f64 / DIAGNOSIS_ROWS as f64;
            let sampled = alpha_of(mask, &[0.0; KEYS][..n], &[1.0; KEYS][..n], false);
            assert!((sampled / (scale * norm) - 1.0).abs() < 1e-5, "{mask:?}: {sampled}");
        }
    }

    #[test]
    fn nan_and_nothing_have_no_alpha() {
        let mut queries = [1.0; 80];
        queries[79] = f32::NAN;
        assert!(alpha_of(Mask::None, &queries, &[1.0; 80], true).is_nan());
        assert!(alpha_of(Mask::None, &[], &[1.0; 80], true).is_nan());
        assert!(alpha_of(Mask::None, &[1.0; 80], &[], false).is_nan());
        // Rows that see nothing add nothing.
        let seen = alpha_of(Mask::CausalBottomRight, &[0.0; 3], &[1.0; 1], true);
        assert!((seen - 3.0).abs() < 1e-6, "{seen}");
    }

    #[test]
    fn sampled_rows_ascend_and_spread() {
        for n_q in [1, 63, 64, 65, 1000, 1 << 31] {
            let count = DIAGNOSIS_ROWS.min(n_q);
            let rows = (0..count).map(|i| diagnosis_row(n_q, i));
            assert!(rows.clone().zip(rows.clone().skip(1)).all(|(a, b)| a < b), "{n_q}");
            assert!(rows.clone().all(|row| row < n_q));
            assert!(diagnosis_row(n_q, 0) <= n_q / DIAGNOSIS_ROWS);
        }
    }
}
