//! The shape of one call, checked: whatever passes here is safe to compute.

use crate::element::DType;
use crate::error::{Error, ErrorKind, Result, invalid};
use crate::math;
use crate::overlap::{overlap, overlaps_itself};
use crate::params::{BlockMask, Mask, Method, Params, Residual};
use crate::view::{TensorLayout, TensorMut, TensorRef};

/// Largest head_dim and value dimension.
pub const MAX_HEAD_DIM: i64 = 256;

/// What sentences call the mask tensor: there is a [`Params::mask`] too.
const MASK: &str = "tensors.mask";

/// The tensors of one forward call.
///
/// k and v share one element type. q has that type or f32: f32 queries may meet f16 or bf16 keys and values. out
/// has q's type or f32.
#[derive(Debug)]
pub struct Tensors<'a> {
    /// Queries `[batch, heads_q, n_q, head_dim]`.
    pub q: TensorRef<'a>,
    /// Keys `[batch, heads_kv, n_k, head_dim]`; heads_q is a multiple of heads_kv.
    pub k: TensorRef<'a>,
    /// Values `[batch, heads_kv, n_k, value_dim]`.
    pub v: TensorRef<'a>,
    /// Output `[batch, heads_q, n_q, value_dim]`.
    pub out: TensorMut<'a>,
    /// Natural log-sum-exp of the scaled logits, f32 `[batch, heads_q, n_q, 1]`, when wanted.
    pub lse: Option<TensorMut<'a>>,
    /// Exact blocks for [`Method::Paper`] instead of sortLSH.
    pub block_mask: Option<BlockMask<'a>>,
    /// Estimate of the relative error of each head's output, f32 `[batch, heads_q, 1, 1]`, when wanted: the
    /// Frobenius norm of the error over that of the output, from rows that were computed exactly. 0 for
    /// exact heads.
    pub error: Option<TensorMut<'a>>,
    /// Keys and columns that a query of each head met on average, f32 `[batch, heads_q, 1, 1]`, when wanted.
    pub keys_per_query: Option<TensorMut<'a>>,
    /// Added to the logits (natural logarithm), `[batch or 1, heads_q or 1, n_q or 1, n_k]` of any type, for
    /// [`Method::Exact`]: a key is seen where [`Params::mask`] shows it and this is not -inf. Less than -2^127
    /// counts as -inf.
    pub mask: Option<TensorRef<'a>>,
}

/// The layouts of one forward call: what planning needs.
#[derive(Debug, Clone, Copy)]
pub struct Layouts<'a> {
    /// See [`Tensors::q`].
    pub q: TensorLayout,
    /// See [`Tensors::k`].
    pub k: TensorLayout,
    /// See [`Tensors::v`].
    pub v: TensorLayout,
    /// See [`Tensors::out`].
    pub out: TensorLayout,
    /// See [`Tensors::lse`].
    pub lse: Option<TensorLayout>,
    /// See [`Tensors::block_mask`].
    pub block_mask: Option<BlockMask<'a>>,
    /// See [`Tensors::error`].
    pub error: Option<TensorLayout>,
    /// See [`Tensors::keys_per_query`].
    pub keys_per_query: Option<TensorLayout>,
    /// See [`Tensors::mask`].
    pub mask: Option<TensorLayout>,
}

impl<'a> Tensors<'a> {
    /// The layouts alone.
    pub fn layouts(&self) -> Layouts<'a> {
        Layouts {
            q: *self.q.layout(),
            k: *self.k.layout(),
            v: *self.v.layout(),
            out: *self.out.layout(),
            lse: self.lse.as_ref().map(|lse| *lse.layout()),
            block_mask: self.block_mask,
            error: self.error.as_ref().map(|error| *error.layout()),
            keys_per_query: self.keys_per_query.as_ref().map(|keys| *keys.layout()),
            mask: self.mask.map(|mask| *mask.layout()),
        }
    }

    /// See the function of this name.
    pub(crate) fn check_overlap(&self) -> Result<()> {
        fn place<'t>(name: &'static str, view: &'t TensorRef<'_>) -> Place<'t> {
            Place { name, address: view.address(), layout: view.layout() }
        }
        let required = [place("q", &self.q), place("k", &self.k), place("v", &self.v)];
        let mask = self.mask.as_ref().map(|mask| place(MASK, mask));
        let outputs = [
            ("out", Some(self.out.reborrow())),
            ("lse", self.lse.as_ref().map(TensorMut::reborrow)),
            ("error", self.error.as_ref().map(TensorMut::reborrow)),
            ("keys_per_query", self.keys_per_query.as_ref().map(TensorMut::reborrow)),
        ];
        let outputs = outputs.each_ref().map(|(name, view)| Some(place(name, view.as_ref()?)));
        check_overlap(&required, &outputs)?;
        check_overlap(mask.as_slice(), &outputs)
    }
}

/// Where a tensor lies. The address is compared, never followed.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// What the sentences call it.
    pub name: &'static str,
    /// Address of element `[0, 0, 0, 0]`.
    pub address: usize,
    /// Element type, extents and strides.
    pub layout: &'a TensorLayout,
}

/// Outputs overlap neither each other nor an input; absent ones count for nothing. That an output does not overlap
/// itself is part of [`Problem::new`].
pub fn check_overlap(inputs: &[Place<'_>], outputs: &[Option<Place<'_>>]) -> Result<()> {
    let share = |a: &Place<'_>, b: &Place<'_>| overlap((a.address, a.layout), (b.address, b.layout));
    for (index, output) in outputs.iter().enumerate() {
        let Some(output) = output else { continue };
        if let Some(input) = inputs.iter().find(|input| share(output, input)) {
            overlapping(output, input)?;
        }
        if let Some(earlier) = outputs[..index].iter().flatten().find(|earlier| share(output, earlier)) {
            overlapping(earlier, output)?;
        }
    }
    Ok(())
}

fn overlapping(first: &Place<'_>, second: &Place<'_>) -> Result<()> {
    invalid!("{} and {} overlap in memory; outputs need memory of their own", first.name, second.name);
}

/// The sizes of one call.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Batch items.
    pub batch: usize,
    /// Query heads.
    pub heads_q: usize,
    /// Heads of keys and values.
    pub heads_kv: usize,
    /// Query heads per KV head.
    pub group: usize,
    /// Queries of a head.
    pub n_q: usize,
    /// Keys of a head.
    pub n_k: usize,
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Which keys a query may see.
    pub mask: Mask,
    /// Whether there is a mask tensor besides.
    pub has_mask_tensor: bool,
    /// The element type of q, k and v, where it is one.
    pub shared_dtype: Option<DType>,
    /// Factor on the queries that gives logits in base 2.
    pub scale_log2: f32,
}

impl Problem {
    /// Checks options and layouts against each other.
    pub fn new(params: &Params, layouts: &Layouts<'_>) -> Result<Self> {
        check_params(params)?;
        check_layouts(layouts)?;
        let [batch, heads_q, n_q, head_dim] = layouts.q.extents();
        let [_, heads_kv, n_k, value_dim] = layouts.v.extents();
        let scale = if params.scale == 0.0 { 1.0 / libm::sqrtf(head_dim as f32) } else { params.scale };
        let problem = Problem {
            batch,
            heads_q,
            heads_kv,
            group: heads_q / heads_kv,
            n_q,
            n_k,
            head_dim,
            value_dim,
            mask: params.mask,
            has_mask_tensor: layouts.mask.is_some(),
            shared_dtype: (layouts.q.dtype == layouts.k.dtype).then_some(layouts.k.dtype),
            scale_log2: scale * math::LOG2_E,
        };
        if let Some(mask) = &layouts.block_mask {
            check_block_mask(params, mask, &problem)?;
        }
        if let Some(mask) = &layouts.mask {
            check_mask(params, mask, layouts)?;
        }
        Ok(problem)
    }

    /// Keys that a query sees, on average.
    pub fn mean_visible_keys(&self) -> f64 {
        let (n_q, n_k) = (self.n_q as f64, self.n_k as f64);
        let square = n_q.min(n_k);
        let pairs = match self.mask {
            Mask::None => n_q * n_k,
            Mask::CausalTopLeft => square * (square + 1.0) / 2.0 + (n_q - square) * n_k,
            Mask::CausalBottomRight => square * (square + 1.0) / 2.0 + square * (n_k - square),
        };
        if self.n_q == 0 { 0.0 } else { pairs / n_q }
    }

    /// How many leading keys query `i` sees.
    pub fn visible_keys(&self, i: usize) -> usize {
        match self.mask {
            Mask::None => self.n_k,
            Mask::CausalTopLeft => (i + 1).min(self.n_k),
            Mask::CausalBottomRight => (i + 1 + self.n_k).saturating_sub(self.n_q),
        }
    }
}

fn check_params(params: &Params) -> Result<()> {
    if !params.scale.is_finite() {
        invalid!("params.scale = {} must be finite (0 means 1/sqrt(head_dim))", params.scale);
    }
    if params.lsh_num_projs > Params::MAX_PROJECTIONS {
        invalid!(
            "params.lsh_num_projs = {} must be at most {}",
            params.lsh_num_projs,
            Params::MAX_PROJECTIONS
        );
    }
    if params.block_size == 0 && (params.sample_size == 0 || params.residual == Residual::None) {
        invalid!(
            "params.block_size = 0 leaves nothing to compute with params.sample_size = {} and params.residual = {:?}",
            params.sample_size,
            params.residual
        );
    }
    if params.budget < Params::LEAST_BUDGET {
        invalid!("params.budget = {} must be at least {}", params.budget, Params::LEAST_BUDGET);
    }
    if !(params.target_error.is_finite() && params.target_error >= 0.0) {
        invalid!("params.target_error = {} must be finite and not negative", params.target_error);
    }
    if params.residual == Residual::RowNorm {
        for (name, value) in
            [("approx_d_epsilon", params.approx_d_epsilon), ("approx_d_kappa", params.approx_d_kappa)]
        {
            if !(value.is_finite() && value > 0.0) {
                invalid!("params.{name} = {value} must be positive and finite");
            }
        }
    }
    Ok(())
}

fn check_layouts(layouts: &Layouts<'_>) -> Result<()> {
    let Layouts { q, k, v, out, lse, error, keys_per_query, .. } = layouts;
    for (name, layout) in [("q", q), ("k", k), ("v", v), ("out", out)] {
        layout.check(name)?;
    }
    for (name, layout) in [("q", q), ("k", k), ("v", v)] {
        if layout.shape[3] > MAX_HEAD_DIM {
            invalid!(
                "{name}.shape[3] (head_dim) = {} is beyond the supported maximum {MAX_HEAD_DIM}",
                layout.shape[3]
            );
        }
    }
    let same = |a: (&str, &TensorLayout, usize), b: (&str, &TensorLayout, usize)| {
        let ((a_name, a, a_dim), (b_name, b, b_dim)) = (a, b);
        if a.shape[a_dim] != b.shape[b_dim] {
            invalid!(
                "{a_name}.shape[{a_dim}] = {} but {b_name}.shape[{b_dim}] = {}",
                a.shape[a_dim],
                b.shape[b_dim]
            );
        }
        Ok(())
    };
    same(("k", k, 0), ("q", q, 0))?;
    same(("k", k, 3), ("q", q, 3))?;
    same(("v", v, 0), ("k", k, 0))?;
    same(("v", v, 1), ("k", k, 1))?;
    same(("v", v, 2), ("k", k, 2))?;
    same(("out", out, 0), ("q", q, 0))?;
    same(("out", out, 1), ("q", q, 1))?;
    same(("out", out, 2), ("q", q, 2))?;
    same(("out", out, 3), ("v", v, 3))?;
    if q.shape[1] % k.shape[1] != 0 {
        invalid!("q.shape[1] = {} is not a multiple of k.shape[1] = {}", q.shape[1], k.shape[1]);
    }
    check_dtypes(layouts)?;
    check_output("out", out)?;
    if let Some(lse) = lse {
        check_scalars("lse", lse)?;
        same(("lse", lse, 0), ("q", q, 0))?;
        same(("lse", lse, 1), ("q", q, 1))?;
        same(("lse", lse, 2), ("q", q, 2))?;
    }
    for (name, of_heads) in [("error", error), ("keys_per_query", keys_per_query)] {
        let Some(of_heads) = of_heads else { continue };
        check_scalars(name, of_heads)?;
        same((name, of_heads, 0), ("q", q, 0))?;
        same((name, of_heads, 1), ("q", q, 1))?;
        if of_heads.shape[2] != 1 {
            invalid!("{name}.shape[2] = {} must be 1", of_heads.shape[2]);
        }
    }
    Ok(())
}

/// Which element types meet in one call: see [`Tensors`].
fn check_dtypes(layouts: &Layouts<'_>) -> Result<()> {
    let [q, k, v, out] = [&layouts.q, &layouts.k, &layouts.v, &layouts.out].map(|layout| layout.dtype);
    if v != k {
        invalid!("v.dtype = {v:?} but k.dtype = {k:?}; k and v share one dtype");
    }
    if q != k && q != DType::F32 {
        invalid!("q.dtype = {q:?} but k.dtype = {k:?}; q has the dtype of k and v, or F32");
    }
    if out != q && out != DType::F32 {
        invalid!("out.dtype = {out:?} but q.dtype = {q:?}; out has the dtype of q, or F32");
    }
    Ok(())
}

/// An output's elements have memory of their own.
pub(crate) fn check_output(name: &str, layout: &TensorLayout) -> Result<()> {
    if overlaps_itself(layout) {
        invalid!(
            "{name}.stride = {:?} makes {name} overlap itself for {name}.shape = {:?}",
            layout.stride,
            layout.shape
        );
    }
    Ok(())
}

/// An output of one f32 number per row, by itself.
pub(crate) fn check_scalars(name: &str, lse: &TensorLayout) -> Result<()> {
    lse.check(name)?;
    if lse.dtype != DType::F32 {
        invalid!("{name}.dtype = {:?} must be F32", lse.dtype);
    }
    if lse.shape[3] != 1 {
        invalid!("{name}.shape[3] = {} must be 1", lse.shape[3]);
    }
    check_output(name, lse)
}

/// The mask tensor, by itself and beside the others.
fn check_mask(params: &Params, mask: &TensorLayout, layouts: &Layouts<'_>) -> Result<()> {
    mask.check_mask(MASK)?;
    for dim in 0..3 {
        let (extent, of_q) = (mask.shape[dim], layouts.q.shape[dim]);
        if extent != 1 && extent != of_q {
            invalid!("{MASK}.shape[{dim}] = {extent} must be 1 or q.shape[{dim}] = {of_q}");
        }
    }
    if mask.shape[3] != layouts.k.shape[2] {
        invalid!("{MASK}.shape[3] = {} but k.shape[2] = {}", mask.shape[3], layouts.k.shape[2]);
    }
    let unsupported = |what: &str| {
        let sentence = format_args!("{MASK} is given, but {what}; METHOD_EXACT and METHOD_AUTO take it");
        Err(Error::new(ErrorKind::Unsupported, sentence))
    };
    match params.method {
        Method::Paper => unsupported("params.method = PAPER takes none"),
        Method::Refined => unsupported("params.method = REFINED takes none"),
        Method::Auto if layouts.block_mask.is_some() => unsupported("so is block_mask, which is for PAPER"),
        Method::Auto | Method::Exact => Ok(()),
    }
}

fn check_block_mask(params: &Params, mask: &BlockMask<'_>, problem: &Problem) -> Result<()> {
    for (method, name) in [(Method::Exact, "EXACT"), (Method::Refined, "REFINED")] {
        if params.method == method {
            invalid!("block_mask is given but params.method = {name} does not use one; pass NULL");
        }
    }
    mask.check_counts(problem.n_q as i64, problem.n_k as i64)?;
    let patterns = if mask.head_stride == 0 { 1 } else { problem.batch * problem.heads_q };
    let offsets_needed = (patterns - 1)
        .checked_mul(mask.head_stride)
        .and_then(|start| start.checked_add(mask.num_query_blocks + 1));
    if offsets_needed.is_none_or(|needed| mask.row_offsets.len() < needed) {
        invalid!("block_mask.row_offsets has {} entries, too few for the heads", mask.row_offsets.len());
    }
    for pattern in 0..patterns {
        let offsets = &mask.row_offsets[pattern * mask.head_stride..][..mask.num_query_blocks + 1];
        for (row, pair) in offsets.windows(2).enumerate() {
            if pair[0] < 0 || pair[1] < pair[0] || pair[1] > mask.columns.len() as i64 {
                invalid!(
                    "block_mask.row_offsets[{row}] = {} and [{}] = {} of head {pattern} are not ascending offsets into {} columns",
                    pair[0],
                    row + 1,
                    pair[1],
                    mask.columns.len()
                );
            }
            let columns = mask.row(pattern, row);
            for (at, &column) in columns.iter().enumerate() {
                if column < 0 || column as usize >= mask.num_key_blocks {
                    invalid!(
                        "block_mask.columns: row {row} of head {pattern} names key block {column}, but num_key_blocks = {}",
                        mask.num_key_blocks
                    );
                }
                if at > 0 && columns[at - 1] >= column {
                    invalid!(
                        "block_mask.columns: row {row} of head {pattern} has {} before {column}; ascending and unique is required",
                        columns[at - 1]
                    );
                }
            }
        }
    }
    Ok(())
}

/// One head of unit dimensions, for tests of what depends on lengths and the mask only.
#[cfg(test)]
pub(crate) fn one_head(mask: crate::params::Mask, n_q: usize, n_k: usize) -> Problem {
    Problem {
        batch: 1,
        heads_q: 1,
        heads_kv: 1,
        group: 1,
        n_q,
        n_k,
        head_dim: 1,
        value_dim: 1,
        mask,
        has_mask_tensor: false,
        shared_dtype: None,
        scale_log2: 1.0,
    }
}
