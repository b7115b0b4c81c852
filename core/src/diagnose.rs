//! Figures by which the paper judges an attention matrix and a selection of keys: for people who decide whether to
//! estimate, not for the way of a call.

use crate::error::{Error, ErrorKind, Result, invalid};
use crate::exec::{Executor, for_each_chunk};
use crate::math::exp2;
use crate::params::Params;
use crate::problem::{Layouts, Problem, Tensors};
use crate::scratch::{Carver, Lanes, Layout, WORKSPACE_ALIGN};
use crate::simd::Kernels;
use crate::unmet::{DIAGNOSIS_ROWS, Unmet, UnmetKeys, diagnosis_row};

/// Keys that are widened together.
const KEYS_AT_ONCE: usize = 64;

/// What [`head_figures`] finds out about one head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadFigures {
    /// The paper's alpha: n_q times the largest squared norm of a column of the attention matrix, from every row or
    /// from [`DIAGNOSIS_ROWS`] of them.
    ///
    /// From sampled rows each column's squared norm is scaled up by n_q over their number. The largest of n_k
    /// such figures is too high by up to that factor where every row has a heavy column of its own (n_q rows that
    /// each weigh another key alone have alpha n_q, and 64 of them seem to have n_q^2 / 64), and columns that
    /// only other rows weigh are not seen. NaN where there is no query or no key, or a row that was looked at has a
    /// NaN.
    pub alpha: f64,
    /// The paper's kappa over the sampled rows: for each, the sum of exp(scale * q k) over the visible keys that it
    /// does not meet exactly; the largest of these sums over the smallest. Rows without such a key are left out,
    /// and so are rows that give no key any weight.
    ///
    /// 1 where no sampled row has such a key. Infinite where the smallest sum is 0 and the largest is not: logits of
    /// -inf, or so far below the row's largest that f64 has no number for their weight. NaN where there is nothing to
    /// divide, or a row that counts has a NaN.
    pub kappa: f64,
    /// Share of a row's softmax weight on the keys that it meets exactly, averaged over the sampled rows that give a
    /// key some weight. 1 where no sampled row has a visible key that it does not meet; else NaN where there is
    /// no row to average over, or a row that has such a key has a NaN.
    pub captured_mass: f64,
}

/// Scratch of one task of [`head_figures`].
struct FigureScratch<'a> {
    /// `[DIAGNOSIS_ROWS][head_dim]`, with the scale.
    queries: &'a mut [f32],
    /// `[KEYS_AT_ONCE][head_dim]`.
    keys: &'a mut [f32],
    /// Base-2 logits `[DIAGNOSIS_ROWS][n_k]`, of which each row's visible keys are used.
    logits: &'a mut [f32],
    /// Squared norms of the columns, `[n_k]`.
    squares: &'a mut [f64],
}

impl<'a> FigureScratch<'a> {
    fn carve(problem: &Problem, carver: &mut Carver<'a>) -> Self {
        FigureScratch {
            queries: carver.take(DIAGNOSIS_ROWS * problem.head_dim),
            keys: carver.take(KEYS_AT_ONCE * problem.head_dim),
            logits: carver.take(DIAGNOSIS_ROWS.saturating_mul(problem.n_k)),
            squares: carver.take(problem.n_k),
        }
    }
}

fn lane_size(problem: &Problem) -> Option<usize> {
    let mut carver = Carver::measuring();
    FigureScratch::carve(problem, &mut carver);
    carver.used()
}

/// Size and alignment of the workspace that [`head_figures`] needs.
pub fn head_figures_workspace(
    params: &Params,
    layouts: &Layouts<'_>,
    executor: &dyn Executor,
) -> Result<Layout> {
    let lane = lane_size(&Problem::new(params, layouts)?);
    let total = lane.and_then(|lane| lane.checked_mul(executor.lanes().max(1)));
    match total.filter(|&total| isize::try_from(total).is_ok()) {
        Some(size) => Ok(Layout { size, align: WORKSPACE_ALIGN }),
        None => invalid!("the shapes need more scratch memory than an address space holds"),
    }
}

/// Fills `figures`, `[batch, heads_q]`. With `every_row` alpha comes from every row, in quadratic time, and else all
/// figures from the sampled rows, see [`diagnosis_row`]. `unmet` is what [`crate::forward_recording`] made of the same
/// arguments.
pub fn head_figures(
    params: &Params,
    tensors: &Tensors<'_>,
    (every_row, unmet): (bool, &Unmet<'_>),
    kernels: &Kernels,
    executor: &dyn Executor,
    workspace: &mut [u8],
    figures: &mut [HeadFigures],
) -> Result<()> {
    let layouts = tensors.layouts();
    let problem = Problem::new(params, &layouts)?;
    let need = head_figures_workspace(params, &layouts, executor)?;
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
    assert_eq!(figures.len(), problem.batch * problem.heads_q);
    let count = executor.lanes().max(1);
    let mut lanes = Lanes::new(workspace, need.size / count, count);
    let source = Source { problem: &problem, tensors, kernels };
    for_each_chunk(executor, &mut lanes, figures, 1, &|scratch, index, figures| {
        let mut scratch = FigureScratch::carve(&problem, &mut Carver::new(scratch));
        let head = [index / problem.heads_q, index % problem.heads_q];
        figures[0] = source.figures_of(head, every_row, unmet, &mut scratch);
    })
}

/// Where logits come from.
struct Source<'r> {
    problem: &'r Problem,
    tensors: &'r Tensors<'r>,
    kernels: &'r Kernels,
}

impl Source<'_> {
    fn figures_of(
        &self,
        head: [usize; 2],
        every_row: bool,
        unmet: &Unmet<'_>,
        scratch: &mut FigureScratch<'_>,
    ) -> HeadFigures {
        let n_q = self.problem.n_q;
        scratch.squares.fill(0.0);
        let mut rows = [0; DIAGNOSIS_ROWS];
        let sampled = &mut rows[..DIAGNOSIS_ROWS.min(n_q)];
        sampled.iter_mut().enumerate().for_each(|(i, row)| *row = diagnosis_row(n_q, i));
        self.fill_logits(head, sampled, scratch);
        let mut captured = Captured::default();
        for (i, (&row, logits)) in sampled.iter().zip(logits_of(scratch.logits, self.problem)).enumerate() {
            captured.add(&logits[..self.problem.visible_keys(row)], unmet.keys(head, i));
        }
        let mut count = sampled.len();
        if every_row {
            for start in (0..n_q).step_by(DIAGNOSIS_ROWS) {
                let rows = &mut rows[..DIAGNOSIS_ROWS.min(n_q - start)];
                rows.iter_mut().enumerate().for_each(|(i, row)| *row = start + i);
                self.fill_logits(head, rows, scratch);
                self.add_squared_weights(rows, scratch);
            }
            count = n_q;
        } else {
            self.add_squared_weights(sampled, scratch);
        }
        let scale = n_q as f64 * (n_q as f64 / count as f64);
        // A NaN is larger than every number here.
        let largest = scratch.squares.iter().copied().reduce(|a, b| if b <= a { a } else { b });
        HeadFigures {
            alpha: largest.map_or(f64::NAN, |largest| scale * largest),
            kappa: captured.kappa(),
            captured_mass: captured.mass(),
        }
    }

    /// Fills in the logits of the visible keys of `rows`, which ascend.
    fn fill_logits(&self, [batch, head]: [usize; 2], rows: &[usize], scratch: &mut FigureScratch<'_>) {
        let Source { problem, tensors, kernels } = *self;
        let head_dim = problem.head_dim;
        for (&row, query) in rows.iter().zip(scratch.queries.chunks_exact_mut(head_dim)) {
            tensors.q.read_row(kernels, batch, head, row, query);
            query.iter_mut().for_each(|x| *x *= problem.scale_log2);
        }
        // Under every mask a later row sees no fewer keys.
        let most = rows.last().map_or(0, |&row| problem.visible_keys(row));
        for start in (0..most).step_by(KEYS_AT_ONCE) {
            let positions = start..most.min(start + KEYS_AT_ONCE);
            for (position, key) in positions.clone().zip(scratch.keys.chunks_exact_mut(head_dim)) {
                tensors.k.read_row(kernels, batch, head / problem.group, position, key);
            }
            let queries = scratch.queries.chunks_exact(head_dim).zip(logits_of(scratch.logits, problem));
            for (query, logits) in queries.take(rows.len()) {
                let keys = scratch.keys.chunks_exact(head_dim);
                for (logit, key) in logits[positions.clone()].iter_mut().zip(keys) {
                    *logit = dot(query, key);
                }
            }
        }
    }

    /// Adds the squares of the rows' attention weights to the columns' squared norms. Uses their logits up.
    fn add_squared_weights(&self, rows: &[usize], scratch: &mut FigureScratch<'_>) {
        for (&row, logits) in rows.iter().zip(logits_of(scratch.logits, self.problem)) {
            let weights = &mut logits[..self.problem.visible_keys(row)];
            let Some(max) = largest(weights) else { continue };
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
}

/// `[DIAGNOSIS_ROWS][n_k]`, row by row; none without keys.
fn logits_of<'r>(logits: &'r mut [f32], problem: &Problem) -> impl Iterator<Item = &'r mut [f32]> {
    logits.chunks_exact_mut(problem.n_k.max(1))
}

/// The largest logit, none in a row that gives no key any weight. NaNs are passed over but where there is nothing else.
fn largest(logits: &[f32]) -> Option<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let empty = max == f32::NEG_INFINITY && !logits.iter().any(|logit| logit.is_nan());
    (!empty).then_some(max)
}

/// What the sampled rows of a head give to the keys that they meet, and to those that they do not.
#[derive(Default)]
struct Captured {
    /// Whether a row has a key that it does not meet.
    selects: bool,
    /// Rows that give a key some weight.
    rows: f64,
    /// Sum of their captured mass.
    mass: f64,
    /// Base-2 logs of the smallest and the largest sum over keys that are not met.
    rests: Option<[f64; 2]>,
}

impl Captured {
    /// Adds the row with these visible logits.
    fn add(&mut self, logits: &[f32], unmet: UnmetKeys<'_>) {
        let meets_all = unmet.is_empty();
        self.selects |= !meets_all;
        let Some(max) = largest(logits) else { return };
        self.rows += 1.0;
        if meets_all {
            self.mass += 1.0;
            return;
        }
        let (mut met, mut rest) = (0.0, 0.0);
        for (key, &logit) in logits.iter().enumerate() {
            // In f64: the rest may be far below the row's largest weight.
            let weight = libm::exp2(f64::from(logit) - f64::from(max));
            *(if unmet.contains(key) { &mut rest } else { &mut met }) += weight;
        }
        self.mass += met / (met + rest);
        if (met + rest).is_nan() {
            self.rests = Some([f64::NAN; 2]);
            return;
        }
        let rest = f64::from(max) + libm::log2(rest);
        let [least, most] = self.rests.get_or_insert([rest; 2]);
        // Neither replaces a NaN.
        if rest < *least {
            *least = rest;
        }
        if rest > *most {
            *most = rest;
        }
    }

    fn kappa(&self) -> f64 {
        match self.rests {
            _ if !self.selects => 1.0,
            Some([least, most]) => libm::exp2(most - least),
            None => f64::NAN,
        }
    }

    fn mass(&self) -> f64 {
        if self.selects { self.mass / self.rows } else { 1.0 }
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
    use core::sync::atomic::AtomicU32;

    use crate::exec::Serial;
    use crate::params::Mask;
    use crate::view::{TensorMut, TensorRef};

    const KEYS: usize = 200;
    const DIM: usize = 4;

    #[repr(align(64))]
    struct Memory([u8; 80 << 10]);

    fn alpha_of(mask: Mask, queries: &[f32], keys: &[f32], every_row: bool) -> f64 {
        figures_of(mask, queries, keys, every_row, |_| {}).alpha
    }

    /// The figures of one head whose queries and keys have the given first elements and zeros else, when `note` says
    /// what is not met.
    fn figures_of(
        mask: Mask,
        queries: &[f32],
        keys: &[f32],
        every_row: bool,
        note: impl Fn(&Unmet<'_>),
    ) -> HeadFigures {
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
            mask: None,
        };
        let params = Params { mask, scale: 1.0, ..Params::default() };
        let mut memory = Memory([0; 80 << 10]);
        let mut figures = [HeadFigures { alpha: 0.0, kappa: 0.0, captured_mass: 0.0 }];
        let kernels = Kernels::scalar();
        let words = [const { AtomicU32::new(0) }; 64 * KEYS.div_ceil(32)];
        let layouts = tensors.layouts();
        let words = &words[..Unmet::words_needed(&params, &layouts).unwrap()];
        let unmet = Unmet::new(&params, &layouts, words).unwrap();
        note(&unmet);
        let source = (every_row, &unmet);
        head_figures(&params, &tensors, source, kernels, &Serial, &mut memory.0, &mut figures).unwrap();
        figures[0]
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

    /// Equal logits: the mass is the number of keys that are met over that of those seen, and kappa the largest number
    /// that is not met over the smallest.
    #[test]
    fn equal_weights_count_keys() {
        for every_row in [false, true] {
            let note = |unmet: &Unmet<'_>| {
                for i in 0..64 {
                    let row = diagnosis_row(128, i);
                    unmet.add([0, 0], row, 20 + i..120);
                }
            };
            let figures = figures_of(Mask::None, &[0.0; 128], &[1.0; KEYS], every_row, note);
            let mass: f64 = (0..64).map(|i| 1.0 - f64::from(100 - i) / KEYS as f64).sum::<f64>() / 64.0;
            assert!((figures.captured_mass - mass).abs() < 1e-9, "{figures:?}");
            assert!((figures.kappa - 100.0 / 37.0).abs() < 1e-9, "{figures:?}");
        }
    }

    /// Rows without such keys count for the mass and not for kappa; rows that see nothing count for neither.
    #[test]
    fn the_mask_counts_for_the_mass() {
        // Query i sees keys up to i - 2.
        let note = |unmet: &Unmet<'_>| (4..10).for_each(|i| unmet.add([0, 0], i, 1..i - 2));
        let figures = figures_of(Mask::CausalBottomRight, &[1.0; 10], &[0.0; 8], false, note);
        let mass: f64 = 1.0 + 1.0 + (4..10).map(|i| 2.0 / f64::from(i - 1)).sum::<f64>();
        assert!((figures.captured_mass - mass / 8.0).abs() < 1e-9, "{figures:?}");
        assert!((figures.kappa - 6.0).abs() < 1e-9, "{figures:?}");
    }

    /// Sums far below what is met keep their precision, and a heavy key's weight goes where the key is.
    #[test]
    fn a_heavy_key_counts_where_it_is() {
        let mut keys = [0.0; KEYS];
        (keys[7], keys[8]) = (90.0, -90.0);
        let queries: [f32; 64] = core::array::from_fn(|i| if i % 2 == 0 { 1.0 } else { 0.5 });
        let beside = |unmet: &Unmet<'_>| (0..64).for_each(|i| unmet.add([0, 0], i, 8..10));
        let figures = figures_of(Mask::None, &queries, &keys, false, beside);
        assert!((figures.captured_mass - 1.0).abs() < 1e-9, "{figures:?}");
        // 1 + e^-90 over 1 + e^-45.
        assert!((figures.kappa - 1.0).abs() < 1e-9, "{figures:?}");
        let only = |unmet: &Unmet<'_>| (0..64).for_each(|i| unmet.add([0, 0], i, 8..9));
        let figures = figures_of(Mask::None, &queries, &keys, false, only);
        assert!((figures.kappa / libm::exp(45.0) - 1.0).abs() < 1e-5, "{figures:?}");
        let heavy = |unmet: &Unmet<'_>| (0..64).for_each(|i| unmet.add([0, 0], i, 7..8));
        let figures = figures_of(Mask::None, &queries, &keys, false, heavy);
        assert!(figures.captured_mass < 1e-9 && figures.captured_mass >= 0.0, "{figures:?}");
        assert!((figures.kappa / libm::exp(45.0) - 1.0).abs() < 1e-5, "{figures:?}");
    }

    #[test]
    fn figures_that_do_not_exist() {
        let every = |unmet: &Unmet<'_>| (0..64).for_each(|i| unmet.add([0, 0], i, 0..2));
        let mut keys = [1.0; 5];
        // No weight at all on what is not met: 0 over 0, and then 1 over 0.
        keys[..2].fill(f32::NEG_INFINITY);
        let figures = figures_of(Mask::None, &[1.0; 64], &keys, false, every);
        assert!(figures.kappa.is_nan() && figures.captured_mass == 1.0, "{figures:?}");
        let some =
            |unmet: &Unmet<'_>| (0..64).for_each(|i| unmet.add([0, 0], i, 0..if i < 9 { 2 } else { 3 }));
        let figures = figures_of(Mask::None, &[1.0; 64], &keys, false, some);
        assert!(figures.kappa == f64::INFINITY && figures.captured_mass < 1.0, "{figures:?}");
        // No row gives any key a weight.
        let figures = figures_of(Mask::None, &[1.0; 64], &[f32::NEG_INFINITY; 5], false, every);
        assert!(figures.kappa.is_nan() && figures.captured_mass.is_nan(), "{figures:?}");
        let figures = figures_of(Mask::None, &[1.0; 64], &[f32::NEG_INFINITY; 5], false, |_| {});
        assert!(figures.kappa == 1.0 && figures.captured_mass == 1.0, "{figures:?}");
        // A NaN or an infinity in a row, whether first, last or met.
        for (row, key, x) in
            [(0, 1, f32::NAN), (63, 4, f32::NAN), (30, 0, f32::INFINITY), (30, 3, f32::INFINITY)]
        {
            let (mut queries, mut keys) = ([1.0; 64], [1.0; 5]);
            keys[key] = x;
            let figures = figures_of(Mask::None, &queries, &keys, false, every);
            assert!(figures.kappa.is_nan() && figures.captured_mass.is_nan(), "{figures:?}");
            queries[row] = x;
            let figures = figures_of(Mask::None, &queries, &[1.0; 5], false, every);
            assert!(figures.kappa.is_nan() && figures.captured_mass.is_nan(), "{figures:?}");
        }
        // Rows that meet every key have the figures of exact attention whatever the inputs.
        let figures = figures_of(Mask::None, &[f32::NAN; 64], &[1.0; 5], false, |_| {});
        assert!(figures.kappa == 1.0 && figures.captured_mass == 1.0, "{figures:?}");
        for (queries, keys) in [(0, 5), (5, 0)] {
            let figures = figures_of(Mask::None, &[1.0; 5][..queries], &[1.0; 5][..keys], true, |_| {});
            assert!(figures.kappa == 1.0 && figures.captured_mass == 1.0, "{figures:?}");
        }
    }
}
