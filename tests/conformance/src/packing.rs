//! One [`Step`] of a kernel from plain rows, packed as its documentation says.

use hyperattn_core::Kernels;
use hyperattn_core::simd::{KEY_TILE, Step};

/// The state of some query rows.
#[derive(Clone, Debug)]
pub struct State {
    kernels: &'static Kernels,
    rows: usize,
    head_dim: usize,
    value_dim: usize,
    query: Vec<f32>,
    /// Running maximum of each row's logits; rows beyond those given are padding.
    pub max: Vec<f32>,
    /// Running sum of each row's weights.
    pub sum: Vec<f32>,
    accumulated: Vec<f32>,
}

/// The keys of one step.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    /// `[count][head_dim]`
    pub keys: &'a [f32],
    /// `[count][value_dim]`
    pub values: &'a [f32],
    /// Added to the logits of each key.
    pub log_weight: Option<&'a [f32]>,
    /// How many leading keys each row sees.
    pub visible: Option<&'a [u32]>,
    /// Upper bound on each row's logits.
    pub cap: Option<&'a [f32]>,
    /// Whether the keys enter the sum.
    pub use_sum: bool,
    /// Whether the keys enter the product with the values.
    pub use_values: bool,
}

/// `values` followed by `filler` up to `len`.
fn extended<T: Copy>(values: &[T], len: usize, filler: T) -> Vec<T> {
    values.iter().copied().chain(std::iter::repeat(filler)).take(len).collect()
}

impl State {
    /// Empty rows for `query` (`[rows][head_dim]`, in base-2 logits).
    pub fn new(kernels: &'static Kernels, query: &[f32], head_dim: usize, value_dim: usize) -> Self {
        let rows = query.len() / head_dim;
        let group = kernels.query_rows();
        let padded = rows.next_multiple_of(group);
        let mut packed = vec![0.0; padded * head_dim];
        for (index, &x) in query.iter().enumerate() {
            let (row, i) = (index / head_dim, index % head_dim);
            packed[row / group * group * head_dim + i * group + row % group] = x;
        }
        let value_dim = value_dim.next_multiple_of(kernels.panel());
        State {
            kernels,
            rows,
            head_dim,
            value_dim,
            query: packed,
            max: vec![f32::NEG_INFINITY; padded],
            sum: vec![0.0; padded],
            accumulated: vec![0.0; padded * value_dim],
        }
    }

    /// What row `row` has accumulated.
    pub fn accumulated(&self, row: usize) -> &[f32] {
        &self.accumulated[row * self.value_dim..][..self.value_dim]
    }

    /// Attends to `keys`. Beyond the last key everything is NaN, as scratch memory may be: no kernel may
    /// let it through.
    pub fn attend(&mut self, keys: Keys<'_>) {
        let (panel, d) = (self.kernels.panel(), self.head_dim);
        let count = keys.keys.len() / d;
        let value_width = keys.values.len() / count;
        let mut packed_keys = vec![f32::NAN; KEY_TILE * d];
        for (index, &x) in keys.keys.iter().enumerate() {
            let (key, i) = (index / d, index % d);
            packed_keys[key / panel * panel * d + i * panel + key % panel] = x;
        }
        let mut packed_values = vec![f32::NAN; KEY_TILE * self.value_dim];
        for key in 0..count {
            for column in 0..self.value_dim {
                let x = if column < value_width { keys.values[key * value_width + column] } else { 0.0 };
                packed_values[(column / panel * KEY_TILE + key) * panel + column % panel] = x;
            }
        }
        let padded = self.max.len();
        let log_weight = keys.log_weight.map(|weights| extended(weights, KEY_TILE, f32::NAN));
        let visible = keys.visible.map(|visible| extended(&visible[..self.rows], padded, 0));
        let cap = keys.cap.map(|cap| extended(&cap[..self.rows], padded, f32::NAN));
        self.kernels.attend(&mut Step {
            head_dim: d,
            value_dim: self.value_dim,
            query: &self.query,
            keys: &packed_keys,
            values: &packed_values,
            key_count: count,
            log_weight: log_weight.as_deref(),
            visible: visible.as_deref(),
            cap: cap.as_deref(),
            use_sum: keys.use_sum,
            use_values: keys.use_values,
            max: &mut self.max,
            sum: &mut self.sum,
            accumulated: &mut self.accumulated,
            scores: &mut vec![f32::NAN; self.kernels.query_rows() * KEY_TILE],
        });
    }
}
