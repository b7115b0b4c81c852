//! The cost model behind METHOD_AUTO, measured on a GPU.

use hyperattn_core::device::{RefinedPlan, Screening};

use crate::call::Call;

/// Measured on an H200 with 4 and 32 bf16 heads that need exact attention after all, n = 16 to 128 thousand: a pair takes
/// .57 ps at head_dim 64. METHOD_AUTO must not lose 5 %.
const SCREENING: Screening = Screening {
    of_a_key: 700.0,
    of_a_query: 1200.0,
    of_a_probe_row: 2.0,
    latency: 1.1e9,
    latency_of_a_key: 4e3,
    most: 0.04,
    most_without_target: 0.5,
    least_visible_per_budget: 4.0,
};

/// Whether METHOD_REFINED is the faster choice, or hardly slower where all heads need exact attention after all.
pub(crate) fn refining_pays(call: &Call<'_>) -> bool {
    let probes = RefinedPlan::new(call.params, &call.problem, false).probes;
    let probe_rows = probes.map_or(0, |probes| probes.tiles * probes.rows_of_a_tile);
    SCREENING.pays(call.params, &call.problem, probe_rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{DeviceTensor, DeviceTensors};
    use hyperattn_core::{DType, Mask, Method, Params, TensorLayout};

    fn pays(mask: Mask, heads: i64, n: i64, target_error: f32) -> bool {
        let params = Params { method: Method::Auto, mask, target_error, ..Params::default() };
        let layout = TensorLayout::contiguous(DType::BF16, [1, heads, n, 64]);
        let tensor = DeviceTensor { address: 0, layout };
        let tensors = DeviceTensors::new(tensor, tensor, tensor, tensor);
        refining_pays(&Call::new(&params, &tensors).unwrap())
    }

    /// Where trying costs more than 5 % of exact attention's time, it is not tried: measured 4.9 % for 32 heads of 65,536
    /// keys without a mask, 9.5 % with; 4 % for 131,072 keys with or without.
    #[test]
    fn refining_is_tried_where_trying_costs_little() {
        assert!(!pays(Mask::None, 32, 65_536, 0.05));
        assert!(pays(Mask::None, 32, 81_920, 0.05));
        assert!(!pays(Mask::CausalBottomRight, 32, 98_304, 0.05));
        assert!(pays(Mask::CausalBottomRight, 32, 131_072, 0.05));
        // One head has no others to hide what a call takes.
        assert!(!pays(Mask::None, 1, 131_072, 0.05));
    }

    #[test]
    fn without_a_target_it_is_to_be_faster() {
        assert!(!pays(Mask::CausalBottomRight, 32, 8192, 0.0));
        assert!(pays(Mask::CausalBottomRight, 32, 32_768, 0.0));
    }
}
