//! One [`Step`] or one [`Weighing`] of a kernel from plain rows, packed as its documentation says.

use hyperattn_core::Kernels;
use hyperattn_core::bf16;
use hyperattn_core::simd::{KEY_TILE, Packing, Step, StepOptions, WEIGHING_QUERIES, Weighing};

/// The state of some query rows.
#[derive(Clone, Debug)]
pub struct State {
    kernels: &'static Kernels,
    packing: Packing,
    rows: usize,
    head_dim: usize,
    value_dim: usize,
    query: Vec<u32>,
    /// What each row's weights are relative to; rows beyond those given are padding.
    pub max: Vec<f32>,
    sum: Vec<f32>,
    accumulated: Vec<f32>,
}

/// The keys of one step.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    /// `[count][head_dim]`
    pub keys: &'a [f32],
    /// `[count][value_dim]`
    pub values: &'a [f32],
    /// Added to all logits.
    pub shift: f32,
    /// Added to the logits of each key.
    pub log_weight: Option<&'a [f32]>,
    /// How many leading keys each row sees.
    pub visible: Option<&'a [u32]>,
    /// Added to the logits (natural logarithm): `[rows][count]`.
    pub mask: Option<&'a [f32]>,
    /// Upper bound on each row's logits.
    pub cap: Option<&'a [f32]>,
    /// Whether the keys enter the sum.
    pub use_sum: bool,
    /// Whether the keys enter the product with the values.
    pub use_values: bool,
}

/// `values` followed by `filler` up to `len`.
pub(crate) fn extended<T: Copy>(values: &[T], len: usize, filler: T) -> Vec<T> {
    values.iter().copied().chain(std::iter::repeat(filler)).take(len).collect()
}

/// The words of a packed row; with pairs, its numbers must be bf16 already.
fn words(packing: Packing, row: &[f32]) -> Vec<u32> {
    let bits = |x: &f32| match packing {
        Packing::F32 => x.to_bits(),
        Packing::Bf16Pairs => {
            assert!(x.is_nan() || bf16::from_f32(*x).to_f32() == *x);
            bf16::from_f32(*x).to_bits().into()
        }
    };
    let word = |elements: &[f32]| elements.iter().rev().fold(0u32, |word, x| word.wrapping_shl(16) | bits(x));
    row.chunks(packing.depth()).map(word).collect()
}

/// Groups of packed queries with room for `padded` rows.
fn pack_queries(
    kernels: &Kernels,
    packing: Packing,
    query: &[f32],
    head_dim: usize,
    padded: usize,
) -> Vec<u32> {
    let (group, width) = (kernels.query_rows(), head_dim.div_ceil(packing.depth()));
    let mut packed = vec![0; padded.next_multiple_of(group) * width];
    for (row, query) in query.chunks(head_dim).enumerate() {
        for (i, word) in words(packing, query).into_iter().enumerate() {
            packed[row / group * group * width + i * group + row % group] = word;
        }
    }
    packed
}

/// From one row of a mask to the next.
pub(crate) const MASK_STRIDE: usize = KEY_TILE + 3;

/// A NaN in every packing, for what no kernel may look at.
const NAN: u32 = 0x7fff_7fff;

/// A tile of packed keys.
pub(crate) fn pack_keys(kernels: &Kernels, packing: Packing, keys: &[f32], head_dim: usize) -> Vec<u32> {
    let (panel, width) = (kernels.panel(), head_dim.div_ceil(packing.depth()));
    let mut packed = vec![NAN; KEY_TILE * width];
    for (key, row) in keys.chunks(head_dim).enumerate() {
        for (i, word) in words(packing, row).into_iter().enumerate() {
            packed[key / panel * panel * width + i * panel + key % panel] = word;
        }
    }
    packed
}

/// How much weight the queries (`[WEIGHING_QUERIES][head_dim]`, in base-2 logits) give to each of the keys
/// (`[count][head_dim]`), relative to `start`.
pub fn weigh(
    kernels: &Kernels,
    packing: Packing,
    (query, keys): (&[f32], &[f32]),
    head_dim: usize,
    start: &[f32],
) -> Vec<f32> {
    let mut weights = vec![f32::NAN; KEY_TILE];
    let mut packed = vec![NAN; WEIGHING_QUERIES * head_dim.div_ceil(packing.depth())];
    for (row, query) in query.chunks(head_dim).enumerate() {
        for (i, word) in words(packing, query).into_iter().enumerate() {
            packed[i * WEIGHING_QUERIES + row] = word;
        }
    }
    kernels.weigh(&mut Weighing {
        packing,
        head_dim,
        scale: 1.0,
        query: &packed,
        keys: &pack_keys(kernels, packing, keys, head_dim),
        key_count: keys.len() / head_dim,
        start,
        logits: &mut vec![f32::NAN; kernels.query_rows() * kernels.panel()],
        weights: &mut weights,
    });
    weights.truncate(keys.len() / head_dim);
    weights
}

impl State {
    /// Empty rows for `query` (`[rows][head_dim]`, in base-2 logits).
    pub fn new(
        kernels: &'static Kernels,
        packing: Packing,
        query: &[f32],
        head_dim: usize,
        value_dim: usize,
    ) -> Self {
        let rows = query.len() / head_dim;
        let padded = rows.next_multiple_of(kernels.row_multiple());
        let packed = pack_queries(kernels, packing, query, head_dim, padded);
        let value_dim = value_dim.next_multiple_of(kernels.lanes());
        State {
            kernels,
            packing,
            rows,
            head_dim,
            value_dim,
            query: packed,
            max: vec![f32::NEG_INFINITY; padded],
            sum: vec![0.0; padded * kernels.lanes()],
            accumulated: vec![0.0; padded * value_dim],
        }
    }

    /// The running sum of a row's weights.
    pub fn sum(&self, row: usize) -> f32 {
        let lanes = self.kernels.lanes();
        self.sum[row * lanes..][..lanes].iter().sum()
    }

    /// Makes the sum of `row` `sum`, relative to `max`.
    pub fn set_sum(&mut self, row: usize, max: f32, sum: f32) {
        let lanes = self.kernels.lanes();
        self.sum[row * lanes..][..lanes].fill(sum / lanes as f32);
        self.max[row] = max;
    }

    /// What row `row` has accumulated.
    pub fn accumulated(&self, row: usize) -> &[f32] {
        &self.accumulated[row * self.value_dim..][..self.value_dim]
    }

    /// Attends to `keys`. Beyond the last key everything is NaN, as scratch memory may be: no kernel may
    /// let it through.
    pub fn attend(&mut self, keys: Keys<'_>) {
        let (panel, lanes, d) = (self.kernels.panel(), self.kernels.lanes(), self.head_dim);
        let depth = self.packing.depth();
        let slots = KEY_TILE / depth;
        let count = keys.keys.len() / d;
        let value_width = keys.values.len() / count;
        let packed_keys = pack_keys(self.kernels, self.packing, keys.keys, d);
        let mut packed_values = vec![NAN; slots * self.value_dim];
        // Columns in whole panels, the rest in panels of one vector.
        let whole = self.value_dim / panel * panel;
        for column in 0..self.value_dim {
            let elements: Vec<f32> = (0..count)
                .map(|key| if column < value_width { keys.values[key * value_width + column] } else { 0.0 })
                .collect();
            let width = if column < whole { panel } else { lanes };
            for (slot, word) in words(self.packing, &elements).into_iter().enumerate() {
                packed_values[column / width * width * slots + slot * width + column % width] = word;
            }
        }
        let padded = self.max.len();
        let log_weight = keys.log_weight.map(|weights| extended(weights, KEY_TILE, f32::NAN));
        let visible = keys.visible.map(|visible| extended(&visible[..self.rows], padded, 0));
        let cap = keys.cap.map(|cap| extended(&cap[..self.rows], padded, f32::NAN));
        // A row that does not see all keys may find anything in the mask beyond those that it sees.
        let mask = keys.mask.map(|mask| {
            let mut padded_mask = vec![f32::NAN; padded * MASK_STRIDE];
            for (to, row) in padded_mask.chunks_mut(MASK_STRIDE).zip(mask.chunks(count)) {
                to[..count].copy_from_slice(row);
            }
            padded_mask
        });
        self.kernels.attend(&mut Step {
            packing: self.packing,
            head_dim: d,
            value_dim: self.value_dim,
            scale: 1.0,
            query: &self.query,
            keys: &packed_keys,
            values: &packed_values,
            options: StepOptions {
                key_count: count,
                shift: keys.shift,
                log_weight: log_weight.as_deref(),
                visible: visible.as_deref(),
                mask: mask.as_deref().map(|mask| (mask, MASK_STRIDE)),
                cap: cap.as_deref(),
                use_sum: keys.use_sum,
                use_values: keys.use_values,
            },
            max: &mut self.max,
            sum: &mut self.sum,
            accumulated: &mut self.accumulated,
            logits: &mut vec![f32::NAN; self.kernels.query_rows() * panel],
            weights: &mut vec![NAN; self.kernels.query_rows() * slots],
        });
    }
}
