//! One [`GradientStep`] of a kernel from plain rows, padded and packed as its documentation says.

use hyperattn_core::Kernels;
use hyperattn_core::simd::{GradientStep, KEY_TILE, Packing, StepOptions};

use crate::packing::{MASK_STRIDE, extended, pack_keys};

/// What goes into a step, without padding.
#[derive(Clone, Debug)]
pub struct GradientInputs {
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Factor on the products that makes them logits in base 2.
    pub scale_log2: f32,
    /// `[rows][head_dim]`
    pub query: Vec<f32>,
    /// `[rows][value_dim]`
    pub output_gradient: Vec<f32>,
    /// `[count][head_dim]`
    pub keys: Vec<f32>,
    /// `[count][value_dim]`
    pub values: Vec<f32>,
    /// Added to all logits.
    pub shift: f32,
    /// Added to the logits of each key.
    pub log_weight: Option<Vec<f32>>,
    /// How many leading keys each row sees.
    pub visible: Option<Vec<u32>>,
    /// Added to the logits (natural logarithm): `[rows][count]`.
    pub mask: Option<Vec<f32>>,
    /// Logits above are constants.
    pub cap: Option<Vec<f32>>,
    /// Whether the keys are in the sum.
    pub use_sum: bool,
    /// Whether the keys are in the products with the values.
    pub use_values: bool,
    /// Base-2 logarithm of each row's sum.
    pub log2_sum: Vec<f32>,
    /// `delta_i`
    pub delta: Vec<f32>,
}

/// Gradients, in plain rows as the inputs.
#[derive(Clone, Debug)]
pub struct StepGradients {
    /// `[rows][head_dim]`
    pub query: Vec<f32>,
    /// `[count][head_dim]`
    pub keys: Vec<f32>,
    /// `[count][value_dim]`
    pub values: Vec<f32>,
}

impl StepGradients {
    /// No gradient yet.
    pub fn zero(inputs: &GradientInputs) -> Self {
        StepGradients {
            query: vec![0.0; inputs.query.len()],
            keys: vec![0.0; inputs.keys.len()],
            values: vec![0.0; inputs.values.len()],
        }
    }
}

/// Behind every buffer that a step writes.
const SENTINEL: f32 = 12345.0;

/// How many sentinels there are: more than the lanes of any table.
const GUARD: usize = 32;

/// Rows of `width` numbers with zeros up to a multiple of the lanes, and `rest` behind the last.
fn padded(rows: &[f32], width: usize, lanes: usize, rest: f32) -> Vec<f32> {
    let stride = width.next_multiple_of(lanes);
    let mut all: Vec<f32> = rows.chunks(width).flat_map(|row| extended(row, stride, 0.0)).collect();
    all.extend([rest; GUARD]);
    all
}

/// The rows of [`padded`], after a step that must have left alone what lies behind them.
fn plain(mut all: Vec<f32>, width: usize, lanes: usize) -> Vec<f32> {
    let guard = all.split_off(all.len() - GUARD);
    assert!(guard.iter().all(|&x| x == SENTINEL), "something was written behind the last row: {guard:?}");
    all.chunks(width.next_multiple_of(lanes)).flat_map(|row| row[..width].to_vec()).collect()
}

impl GradientInputs {
    /// Query rows.
    pub fn rows(&self) -> usize {
        self.delta.len()
    }

    /// Keys.
    pub fn key_count(&self) -> usize {
        self.keys.len() / self.head_dim
    }

    /// The part of the inputs that belongs to the first `count` keys.
    pub fn leading_keys(&self, count: usize) -> Self {
        let mut part = self.clone();
        part.keys.truncate(count * self.head_dim);
        part.values.truncate(count * self.value_dim);
        part.log_weight.iter_mut().for_each(|weights| weights.truncate(count));
        let of_row = |row: &[f32]| row[..count].to_vec();
        part.mask = self.mask.as_ref().map(|mask| mask.chunks(self.key_count()).flat_map(of_row).collect());
        part
    }

    /// The part of the inputs that belongs to one row.
    pub fn row(&self, row: usize) -> Self {
        let cut = |all: &[f32], width: usize| all[row * width..][..width].to_vec();
        GradientInputs {
            query: cut(&self.query, self.head_dim),
            output_gradient: cut(&self.output_gradient, self.value_dim),
            visible: self.visible.as_ref().map(|visible| vec![visible[row]]),
            mask: self.mask.as_ref().map(|mask| cut(mask, self.key_count())),
            cap: self.cap.as_ref().map(|cap| vec![cap[row]]),
            log2_sum: vec![self.log2_sum[row]],
            delta: vec![self.delta[row]],
            ..self.clone()
        }
    }

    /// Adds one step to `gradients`. Whatever lies beyond the last row and key is NaN, as scratch memory may be: no
    /// kernel may let it through, nor write there.
    pub fn add_to(&self, kernels: &Kernels, gradients: &mut StepGradients) {
        let (rows, count, lanes) = (self.rows(), self.key_count(), kernels.lanes());
        let (d, dv) = (self.head_dim, self.value_dim);
        // Without them nobody looks at the values' side, which may then be absent.
        let of_values = |rows: &[f32], rest| {
            if self.use_values { padded(rows, dv, lanes, rest) } else { vec![SENTINEL; GUARD] }
        };
        let packed_values =
            if self.use_values { pack_keys(kernels, Packing::F32, &self.values, dv) } else { Vec::new() };
        let log_weight = self.log_weight.as_ref().map(|weights| extended(weights, KEY_TILE, f32::NAN));
        let mask = self.mask.as_ref().map(|mask| {
            mask.chunks(count).flat_map(|row| extended(row, MASK_STRIDE, f32::NAN)).collect::<Vec<f32>>()
        });
        let mut query_gradient = padded(&gradients.query, d, lanes, SENTINEL);
        let mut key_gradient = padded(&gradients.keys, d, lanes, SENTINEL);
        let mut value_gradient = of_values(&gradients.values, SENTINEL);
        let mut room = vec![f32::NAN; rows * KEY_TILE];
        room.extend([SENTINEL; GUARD]);
        let mut other_room = room.clone();
        kernels.attend_gradient(&mut GradientStep {
            head_dim: d,
            value_dim: dv,
            scale_log2: self.scale_log2,
            query: &padded(&self.query, d, lanes, f32::NAN),
            output_gradient: &of_values(&self.output_gradient, f32::NAN),
            keys: &padded(&self.keys, d, lanes, f32::NAN),
            key_panels: &pack_keys(kernels, Packing::F32, &self.keys, d),
            value_panels: &packed_values,
            options: StepOptions {
                key_count: count,
                shift: self.shift,
                log_weight: log_weight.as_deref(),
                visible: self.visible.as_deref(),
                mask: mask.as_deref().map(|mask| (mask, MASK_STRIDE)),
                cap: self.cap.as_deref(),
                use_sum: self.use_sum,
                use_values: self.use_values,
            },
            log2_sum: &self.log2_sum,
            delta: &self.delta,
            query_gradient: &mut query_gradient,
            key_gradient: &mut key_gradient,
            value_gradient: &mut value_gradient,
            weights: &mut room,
            logit_gradients: &mut other_room,
        });
        plain(room, KEY_TILE, lanes);
        plain(other_room, KEY_TILE, lanes);
        gradients.query = plain(query_gradient, d, lanes);
        gradients.keys = plain(key_gradient, d, lanes);
        let values = plain(value_gradient, dv, lanes);
        if self.use_values {
            gradients.values = values;
        }
    }

    /// The gradients of one step alone.
    pub fn gradients(&self, kernels: &Kernels) -> StepGradients {
        let mut gradients = StepGradients::zero(self);
        self.add_to(kernels, &mut gradients);
        gradients
    }
}
