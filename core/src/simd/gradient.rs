//! stand-in
#![allow(missing_docs)]
use super::{KEY_TILE, Kernels};
pub struct GradientStep<'a> {
    pub head_dim: usize,
    pub value_dim: usize,
    pub scale_log2: f32,
    pub query: &'a [f32],
    pub output_gradient: &'a [f32],
    pub keys: &'a [f32],
    pub key_panels: &'a [u32],
    pub value_panels: &'a [u32],
    pub key_count: usize,
    pub shift: f32,
    pub log_weight: Option<&'a [f32]>,
    pub visible: Option<&'a [u32]>,
    pub mask: Option<(&'a [f32], usize)>,
    pub cap: Option<&'a [f32]>,
    pub use_sum: bool,
    pub use_values: bool,
    pub log2_sum: &'a [f32],
    pub delta: &'a [f32],
    pub query_gradient: &'a mut [f32],
    pub key_gradient: &'a mut [f32],
    pub value_gradient: &'a mut [f32],
    pub weights: &'a mut [f32],
    pub logit_gradients: &'a mut [f32],
}
impl Kernels {
    pub fn attend_gradient(&self, s: &mut GradientStep<'_>) {
        let ks = s.head_dim.next_multiple_of(self.lanes());
        let vs = s.value_dim.next_multiple_of(self.lanes());
        let p = self.panel();
        let scale = s.scale_log2 * core::f32::consts::LN_2;
        for r in 0..s.delta.len() {
            if s.log2_sum[r] == f32::NEG_INFINITY {
                continue;
            }
            for j in 0..s.key_count {
                if s.visible.is_some_and(|v| j >= v[r] as usize) {
                    continue;
                }
                let m = s.mask.map_or(0.0, |(m, st)| m[r * st + j]);
                if m < -1.7e38 {
                    continue;
                }
                let logit: f32 = (0..s.head_dim)
                    .map(|i| {
                        s.query[r * ks + i]
                            * f32::from_bits(s.key_panels[j / p * p * s.head_dim + i * p + j % p])
                    })
                    .sum::<f32>()
                    * s.scale_log2;
                if s.cap.is_some_and(|c| logit > c[r]) {
                    continue;
                }
                let w = libm::exp2f(
                    (logit + s.shift + s.log_weight.map_or(0.0, |w| w[j]) + m * core::f32::consts::LOG2_E
                        - s.log2_sum[r])
                        .min(127.0),
                );
                let mut d = 0.0;
                if s.use_values {
                    d += (0..s.value_dim)
                        .map(|i| {
                            s.output_gradient[r * vs + i]
                                * f32::from_bits(s.value_panels[j / p * p * s.value_dim + i * p + j % p])
                        })
                        .sum::<f32>();
                    for i in 0..s.value_dim {
                        s.value_gradient[j * vs + i] += w * s.output_gradient[r * vs + i];
                    }
                }
                if s.use_sum {
                    d -= s.delta[r];
                }
                let ds = scale * w * d;
                for i in 0..s.head_dim {
                    s.query_gradient[r * ks + i] += ds * s.keys[j * ks + i];
                    s.key_gradient[j * ks + i] += ds * s.query[r * ks + i];
                }
            }
        }
        let _ = (KEY_TILE, &s.weights, &s.logit_gradients);
    }
}
