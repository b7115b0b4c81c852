//! The gradients of one backward call in the device's memory.

use hyperattn_core::device::{Place, Section, check_overlap};
use hyperattn_core::{GradientLayouts, Result};

use crate::call::{DeviceTensor, DeviceTensors, check_alignment};
use crate::divided::part_of;

/// Gradients of a loss with respect to what one forward call computed, and with respect to what it read. Shapes and element
/// types are those of [`hyperattn_core::Gradients`].
#[derive(Debug, Clone, Copy)]
pub struct DeviceGradients {
    /// With respect to the output.
    pub dout: DeviceTensor,
    /// With respect to the log-sum-exp; absent means 0.
    pub dlse: Option<DeviceTensor>,
    /// With respect to the queries.
    pub dq: DeviceTensor,
    /// With respect to the keys.
    pub dk: DeviceTensor,
    /// With respect to the values.
    pub dv: DeviceTensor,
}

impl DeviceGradients {
    /// Everything but addresses.
    pub(crate) fn check(&self, tensors: &DeviceTensors) -> Result<()> {
        let layouts = GradientLayouts {
            dout: self.dout.layout,
            dlse: self.dlse.map(|dlse| dlse.layout),
            dq: self.dq.layout,
            dk: self.dk.layout,
            dv: self.dv.layout,
        };
        layouts.check(&tensors.layouts())
    }

    /// Elements lie at multiples of their size, and what is written has memory of its own.
    pub(crate) fn check_addresses(&self, tensors: &DeviceTensors) -> Result<()> {
        let read = [
            ("q", Some(&tensors.q)),
            ("k", Some(&tensors.k)),
            ("v", Some(&tensors.v)),
            ("out", Some(&tensors.out)),
            ("lse", tensors.lse.as_ref()),
            ("dout", Some(&self.dout)),
            ("dlse", self.dlse.as_ref()),
        ];
        let read: Vec<_> = read.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect();
        let written = [("dq", &self.dq), ("dk", &self.dk), ("dv", &self.dv)];
        for (name, tensor) in read.iter().chain(&written) {
            check_alignment(name, tensor)?;
        }
        fn place<'t>(&(name, tensor): &(&'static str, &'t DeviceTensor)) -> Place<'t> {
            Place { name, address: tensor.address as usize, layout: &tensor.layout }
        }
        let read: Vec<_> = read.iter().map(place).collect();
        check_overlap(&read, &written.each_ref().map(|written| Some(place(written))))
    }

    /// Those of a part of the call.
    pub(crate) fn part(&self, section: &Section) -> Self {
        let Section { batches, heads, queries, keys, .. } = section;
        let of_queries = |tensor: &DeviceTensor| part_of(tensor, [batches, &heads.query, queries]);
        let of_keys = |tensor: &DeviceTensor| part_of(tensor, [batches, &heads.kv, keys]);
        DeviceGradients {
            dout: of_queries(&self.dout),
            dlse: self.dlse.as_ref().map(of_queries),
            dq: of_queries(&self.dq),
            dk: of_keys(&self.dk),
            dv: of_keys(&self.dv),
        }
    }
}
