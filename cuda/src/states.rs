//! Where attention kernels store the states of query rows.

use crate::abi::AttendParams;
use crate::workspace::{Carver, Pointer};

/// States of query rows between launches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct States {
    pub(crate) max: Pointer<f32>,
    pub(crate) sum: Pointer<f32>,
    pub(crate) accumulated: Pointer<f32>,
}

impl States {
    pub(crate) fn carve(rows: usize, value_dim: usize, carver: &mut Carver) -> Self {
        States {
            max: carver.take(rows),
            sum: carver.take(rows),
            accumulated: carver.take(rows.saturating_mul(value_dim)),
        }
    }

    /// Moved back by `rows` rows.
    pub(crate) fn before(&self, rows: usize, value_dim: usize) -> Self {
        States {
            max: self.max.before(rows),
            sum: self.sum.before(rows),
            accumulated: self.accumulated.before(rows * value_dim),
        }
    }

    /// Tells a launch where they are.
    pub(crate) fn give(&self, attention: &mut AttendParams) {
        attention.state_max = self.max;
        attention.state_sum = self.sum;
        attention.state_accumulated = self.accumulated;
    }
}
