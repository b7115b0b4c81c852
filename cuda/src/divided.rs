//! A call in parts, sequences or heads with methods of their own, which are views of its tensors.

use std::ops::Range;

use hyperattn_core::device::{Divided, Section};
use hyperattn_core::{Division, Method, Params, Result};

use crate::call::{Call, DeviceBlockMask, DeviceTensor, DeviceTensors};
use crate::method::Run;

/// The parts of a call that is checked.
pub(crate) struct Parts<'a> {
    params: Params,
    tensors: DeviceTensors,
    divided: Divided<'a>,
}

/// A part of a call, which is one call of its own.
pub(crate) struct Part {
    params: Params,
    tensors: DeviceTensors,
    section: Section,
}

impl<'a> Parts<'a> {
    /// Checks everything but addresses and what each part checks for itself.
    pub(crate) fn new(params: &Params, division: &Division<'a>, tensors: &DeviceTensors) -> Result<Self> {
        if let Some(sequences) = &division.sequences {
            // The layouts below know nothing of a block mask.
            sequences.check(&tensors.q.layout, &tensors.k.layout, tensors.block_mask.is_some())?;
        }
        let divided = Divided::new(params, division, &tensors.layouts())?;
        Ok(Parts { params: *params, tensors: *tensors, divided })
    }

    pub(crate) fn count(&self) -> usize {
        self.divided.count()
    }

    /// Query heads of a KV head in the whole call.
    pub(crate) fn group(&self) -> usize {
        let heads = |tensor: &DeviceTensor| tensor.layout.shape[1] as usize;
        heads(&self.tensors.q) / heads(&self.tensors.k)
    }

    /// Part `index`. What METHOD_AUTO takes does not depend on which other heads have it.
    pub(crate) fn part(&self, index: usize) -> Result<Part> {
        let (section, method) = self.divided.section(index);
        let item = Section { masked: section.masked, ..self.divided.item(index) };
        let mut params = Params { method, ..self.params };
        if method == Method::Auto && section.heads != item.heads {
            let item = self.tensors.part(&item);
            params.method = Run::of(&Call::new(&params, &item)?).method();
        }
        Ok(Part { params, tensors: self.tensors.part(&section), section })
    }
}

impl Part {
    /// The checked call.
    pub(crate) fn call(&self) -> Result<Call<'_>> {
        let mut call = Call::new(&self.params, &self.tensors)?;
        call.problem.first_head = self.section.heads.query.start;
        call.problem.first_kv_head = self.section.heads.kv.start;
        Ok(call)
    }

    /// Where it lies in the whole call's tensors.
    pub(crate) fn section(&self) -> &Section {
        &self.section
    }
}

impl DeviceTensors {
    fn part(&self, section: &Section) -> Self {
        let Section { batches, heads, queries, keys, .. } = section;
        let heads_q = self.q.layout.shape[1] as usize;
        let of_heads = |tensor: DeviceTensor| {
            section.of_heads.as_ref().map(|items| part_of(&tensor, [items, &heads.query, &(0..1)]))
        };
        DeviceTensors {
            q: part_of(&self.q, [batches, &heads.query, queries]),
            k: part_of(&self.k, [batches, &heads.kv, keys]),
            v: part_of(&self.v, [batches, &heads.kv, keys]),
            out: part_of(&self.out, [batches, &heads.query, queries]),
            lse: self.lse.map(|lse| part_of(&lse, [batches, &heads.query, queries])),
            block_mask: self.block_mask.filter(|_| section.masked).map(|mask| DeviceBlockMask {
                row_offsets: mask.row_offsets
                    + (section.first_pattern(heads_q) * mask.head_stride * size_of::<i64>()) as u64,
                ..mask
            }),
            error: self.error.and_then(of_heads),
            keys_per_query: self.keys_per_query.and_then(of_heads),
        }
    }
}

/// The view of these batch items, heads and rows alone.
pub(crate) fn part_of(tensor: &DeviceTensor, [batches, heads, rows]: [&Range<usize>; 3]) -> DeviceTensor {
    let (layout, offset) = tensor.layout.part(batches, heads, rows);
    DeviceTensor { address: tensor.address.wrapping_add_signed(offset as i64), layout }
}
