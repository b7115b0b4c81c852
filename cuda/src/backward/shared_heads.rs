//! A KV head whose query heads are in several parts of a call: each part leaves its dk and dv in f32 in the workspace, and
//! they are added in the order of the parts.

use hyperattn_core::device::Problem;
use hyperattn_core::{DType, Result, TensorLayout};

use crate::abi::{View, element_type};
use crate::call::DeviceTensor;
use crate::divided::Part;
use crate::gradients::DeviceGradients;
use crate::launch::{Queue, args};
use crate::workspace::{Carver, Pointer};

/// Threads of the blocks that add, an element each.
const THREADS: u32 = 256;

/// One of dk and dv in f32.
#[derive(Clone, Copy)]
struct Sums {
    /// Of the parts so far; the first part writes them itself.
    all: Pointer<f32>,
    own: Pointer<f32>,
    rows: usize,
    dim: usize,
}

/// What a part with some query heads of a KV head needs besides.
pub(super) struct SharedHeads {
    keys: Sums,
    values: Sums,
    is_first: bool,
    is_last: bool,
}

impl SharedHeads {
    /// Nothing for a part with all query heads of its KV heads, which are `group` each. All parts of a KV head get the
    /// same places, before anything else is carved.
    pub(super) fn carve(part: &Part, group: usize, problem: &Problem, carver: &mut Carver) -> Option<Self> {
        let heads = &part.section().heads;
        if heads.query.len() == heads.kv.len() * group {
            return None;
        }
        let mut sums = |dim: usize| {
            let len = problem.n_k.saturating_mul(dim);
            Sums { all: carver.take(len), own: carver.take(len), rows: problem.n_k, dim }
        };
        Some(SharedHeads {
            keys: sums(problem.head_dim),
            values: sums(problem.value_dim),
            is_first: heads.query.start.is_multiple_of(group),
            is_last: heads.query.end.is_multiple_of(group),
        })
    }

    /// The gradients that the part is to write, where `whole` are those of the call's tensors.
    pub(super) fn gradients_of_part(&self, whole: &DeviceGradients) -> DeviceGradients {
        let tensor = |sums: &Sums| DeviceTensor {
            address: if self.is_first { sums.all } else { sums.own }.address(),
            layout: TensorLayout::contiguous(DType::F32, [1, 1, sums.rows as i64, sums.dim as i64]),
        };
        DeviceGradients { dk: tensor(&self.keys), dv: tensor(&self.values), ..*whole }
    }

    /// Adds what the part has written; after the last one the whole is there.
    ///
    /// # Safety
    /// The part's work and that of those before it is enqueued on `queue`, and the gradients are the call's to write.
    pub(super) unsafe fn add(&self, queue: &Queue<'_>, whole: &DeviceGradients) -> Result<()> {
        if self.is_first {
            return Ok(());
        }
        for (sums, to) in [(&self.keys, &whole.dk), (&self.values, &whole.dv)] {
            let count = (sums.rows * sums.dim) as u64;
            let view = if self.is_last { to.view() } else { View::NULL };
            let (to_type, dim) = (element_type(to.layout.dtype), sums.dim as u32);
            let grid = [count.div_ceil(THREADS.into()) as u32, 1, 1];
            let arguments = args![sums.all, sums.own, view, to_type, dim, count];
            // SAFETY: these are the kernel's parameters; the sums have been enqueued before.
            unsafe { queue.launch(c"backward_add_parts", grid, THREADS, 0, arguments) }?;
        }
        Ok(())
    }
}
