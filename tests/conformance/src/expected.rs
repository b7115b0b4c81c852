//! What the oracle says a call must give, with the projections and samples that the core's public stages
//! draw. Everything else, from the codes to the recursion, is the oracle's own.

use std::ops::Range;
use std::sync::OnceLock;

use hyperattn_core::{BlockMask, Mask, Method, Params, Residual, stages};
use hyperattn_reference::{
    Output, Problem, Row, RowNormSamples, SortedBlocks, blocks_only, exact_rows, gray_ranks, lsh_code,
    masked_rows, row_norm, row_norm_probabilities, sorted_order, uniform,
};

use crate::additive_mask::AdditiveMask;
use crate::inputs::{Inputs, Shape};
use crate::random_mask;

/// The oracle's name of a mask.
pub fn oracle_mask(mask: Mask) -> hyperattn_reference::Mask {
    match mask {
        Mask::None => hyperattn_reference::Mask::None,
        Mask::CausalBottomRight => hyperattn_reference::Mask::CausalBottomRight,
        Mask::CausalTopLeft => hyperattn_reference::Mask::CausalTopLeft,
    }
}

/// How many keys each query sees.
pub fn visible_keys(mask: Mask, shape: &Shape) -> Vec<usize> {
    let visible = |i, j| oracle_mask(mask).visible(shape.n_q, shape.n_k, i, j);
    (0..shape.n_q).map(|i| (0..shape.n_k).filter(|&j| visible(i, j)).count()).collect()
}

/// How many keys a query sees on average: what exact attention meets.
pub fn mean_visible_keys(mask: Mask, shape: &Shape) -> f64 {
    visible_keys(mask, shape).iter().sum::<usize>() as f64 / shape.n_q as f64
}

/// The output of exact attention, whatever the method of `params`.
pub fn exact_output(params: &Params, inputs: &Inputs) -> Output {
    expected(&Params { method: Method::Exact, ..*params }, inputs, None)
}

/// The softmax scale of a call.
pub fn scale(params: &Params, head_dim: usize) -> f64 {
    if params.scale == 0.0 { 1.0 / (head_dim as f64).sqrt() } else { f64::from(params.scale) }
}

/// Projections `[head_dim][lsh_num_projs]` of one KV head.
pub fn projections(params: &Params, head_dim: usize, kv_head: usize) -> Vec<f32> {
    let num_projs = params.lsh_num_projs as usize;
    let mut projections = vec![0.0; head_dim * num_projs];
    if num_projs > 0 {
        let stream_of = (params.seed, params.offset, kv_head);
        stages::fill_projections(stream_of, head_dim, num_projs, num_projs, &mut projections);
    }
    projections
}

/// The Gray rank of every code of `num_projs` bits, made once.
pub fn rank_table(num_projs: u32) -> &'static [u32] {
    static TABLES: [OnceLock<Vec<u32>>; 25] = [const { OnceLock::new() }; 25];
    TABLES[num_projs as usize].get_or_init(|| gray_ranks(num_projs))
}

/// The ranks of the rows of one head, all 0 when there are no hyperplanes.
pub fn ranks(params: &Params, rows: &[f32], head_dim: usize, kv_head: usize) -> Vec<u32> {
    let projections = projections(params, head_dim, kv_head);
    let table = rank_table(params.lsh_num_projs);
    let code = |row| lsh_code(row, &projections, params.lsh_num_projs as usize);
    rows.chunks_exact(head_dim).map(|row| table[code(row) as usize]).collect()
}

/// What [`Params::min_seq_len`] and a sorted block that holds all keys make of the threshold.
fn leaf(params: &Params, block_mask: Option<&BlockMask<'_>>) -> usize {
    let block = if block_mask.is_some() { 0 } else { params.block_size as usize };
    params.min_seq_len.max(block).max(1)
}

/// One (batch item, query head) of a call.
struct Head<'a> {
    params: &'a Params,
    mask: Option<(&'a BlockMask<'a>, usize)>,
    problem: Problem<'a>,
    head: usize,
    kv_head: usize,
    query_ranks: Vec<u32>,
    key_ranks: Vec<u32>,
    /// |v|^2 as f32 sums in ascending order: the draws by row norm depend on their bits.
    norms: Vec<f32>,
}

impl Head<'_> {
    /// The estimator over an unmasked sub-problem.
    fn estimate<R: Row>(&self, queries: Range<usize>, keys: Range<usize>) -> Vec<R> {
        let Params { seed, offset, .. } = *self.params;
        let samples = self.params.sample_size as usize;
        let problem = &self.problem.slice(queries.clone(), keys.clone());
        let (query_ranks, key_ranks) = (&self.query_ranks[queries.clone()], &self.key_ranks[keys.clone()]);
        let blocks = SortedBlocks::new(query_ranks, key_ranks, self.params.block_size as usize);
        let covered = |i: usize, j: usize| match self.mask {
            Some((mask, pattern)) => random_mask::names(mask, pattern, queries.start + i, keys.start + j),
            None => blocks.covered(i, j),
        };
        let (query_order, key_order) = (sorted_order(query_ranks), sorted_order(key_ranks));
        let key_at = |column: stages::Column| key_order[column.position - keys.start];
        let uniform_keys: Vec<usize> = {
            let stream = stages::uniform_stream(seed, offset, self.kv_head);
            stages::uniform_columns(stream, keys.clone(), samples).map(key_at).collect()
        };
        if samples == 0 {
            return blocks_only(problem, covered);
        }
        match self.params.residual {
            Residual::None => blocks_only(problem, covered),
            Residual::Uniform => uniform(problem, covered, &uniform_keys),
            Residual::RowNorm => {
                let tau_rows: Vec<usize> = (0..stages::tau_rows(self.params, queries.len()))
                    .map(|i| stages::tau_position(self.params, self.head, &queries, i))
                    .map(|position| query_order[position - queries.start])
                    .collect();
                let mut prefix = vec![0.0; keys.len()];
                let norms = key_order.iter().map(|&key| self.norms[keys.start + key]);
                stages::accumulate_norms(norms, &mut prefix);
                let probabilities = row_norm_probabilities(problem);
                let stream = stages::row_norm_stream(seed, offset, self.kv_head);
                let value_columns: Vec<(usize, f64)> =
                    stages::row_norm_columns(stream, keys.clone(), samples, &prefix)
                        .map(|column| (key_at(column), probabilities[key_at(column)]))
                        .collect();
                let samples = RowNormSamples {
                    tau_rows: &tau_rows,
                    row_sum_columns: &uniform_keys,
                    value_columns: &value_columns,
                    epsilon: self.params.approx_d_epsilon.into(),
                    kappa: self.params.approx_d_kappa.into(),
                };
                row_norm(problem, covered, &samples)
            }
        }
    }

    /// Algorithm 4 over [`Head::estimate`]: dense parts have the threshold of the squares, the
    /// off-diagonal parts of a divided square have none.
    fn paper<R: Row>(&self) -> Vec<R> {
        let (n_q, n_k) = (self.problem.num_queries(), self.problem.num_keys());
        let leaf = leaf(self.params, self.mask.map(|(mask, _)| mask));
        let mask = self.params.mask;
        masked_rows(&self.problem, oracle_mask(mask), leaf, |queries, keys| {
            let dense = match mask {
                Mask::None => true,
                Mask::CausalBottomRight => n_k > n_q && keys.start == 0,
                Mask::CausalTopLeft => n_q > n_k && queries.start == n_k,
            };
            if dense && keys.len() <= leaf {
                return exact_rows(&self.problem.slice(queries, keys), |_, _| true);
            }
            self.estimate(queries, keys)
        })
    }
}

/// The result of every head, packed like the outputs of a call.
pub fn expected(params: &Params, inputs: &Inputs, block_mask: Option<&BlockMask<'_>>) -> Output {
    expected_masked(params, inputs, block_mask, None)
}

/// [`expected`] with a mask tensor, which only exact attention takes.
pub fn expected_masked(
    params: &Params,
    inputs: &Inputs,
    block_mask: Option<&BlockMask<'_>>,
    additive_mask: Option<&AdditiveMask>,
) -> Output {
    let Shape { batch, heads_q, .. } = inputs.shape;
    let mut whole = Output { out: Vec::new(), lse: Vec::new() };
    for at in (0..batch).flat_map(|batch| (0..heads_q).map(move |head| (batch, head))) {
        let output = with_rows(params, inputs, (block_mask, additive_mask), at, |_, rows| {
            Output::from_partials(&rows)
        });
        whole.out.extend(output.out);
        whole.lse.extend(output.lse);
    }
    whole
}

/// Calls `use_rows` with the problem and the rows of one query head of one batch item.
pub(crate) fn with_rows<R: Row, T>(
    params: &Params,
    inputs: &Inputs,
    (block_mask, additive_mask): (Option<&BlockMask<'_>>, Option<&AdditiveMask>),
    (batch, head): (usize, usize),
    use_rows: impl FnOnce(&Problem<'_>, Vec<R>) -> T,
) -> T {
    let shape = &inputs.shape;
    let kv_head = head / shape.group();
    let (queries, keys) = (inputs.query_head(batch, head), inputs.key_head(batch, kv_head));
    let values = inputs.value_head(batch, kv_head);
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&x| x.into()).collect() };
    let (q, k, v) = (wide(queries), wide(keys), wide(values));
    let scale = scale(params, shape.head_dim);
    let problem = Problem::new(&q, &k, &v, shape.head_dim, shape.value_dim, scale);
    if params.method != Method::Paper {
        let added = additive_mask.map(|mask| mask.of_head(shape, batch, head));
        let problem = added.as_ref().map_or(problem, |added| problem.masked(added));
        let mask = oracle_mask(params.mask);
        let rows = exact_rows(&problem, |i, j| mask.visible(shape.n_q, shape.n_k, i, j));
        return use_rows(&problem, rows);
    }
    // Without sorted blocks the order in memory is the order, as if all ranks were equal.
    let sorted = block_mask.is_none() && params.block_size > 0;
    let hashed = if sorted { *params } else { Params { lsh_num_projs: 0, ..*params } };
    let norm = |row: &[f32]| row.iter().map(|x| x * x).sum();
    let head = Head {
        params,
        mask: block_mask.map(|mask| (mask, batch * shape.heads_q + head)),
        problem,
        head,
        kv_head,
        query_ranks: ranks(&hashed, queries, shape.head_dim, kv_head),
        key_ranks: ranks(&hashed, keys, shape.head_dim, kv_head),
        norms: values.chunks_exact(shape.value_dim).map(norm).collect(),
    };
    use_rows(&problem, head.paper())
}
