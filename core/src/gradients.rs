//! The gradients of one backward call, checked against its tensors.

use crate::element::DType;
use crate::error::{Result, invalid};
use crate::problem::{Layouts, Place, Tensors, check_output, check_overlap};
use crate::view::{TensorLayout, TensorMut, TensorRef};

/// The gradients of a loss with respect to what one forward call computed, and with respect to what it read.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// With respect to the output, `[batch, heads_q, n_q, value_dim]`: q's type or f32.
    pub dout: TensorRef<'a>,
    /// With respect to the log-sum-exp, f32 `[batch, heads_q, n_q, 1]`; absent means 0.
    pub dlse: Option<TensorRef<'a>>,
    /// With respect to the queries, shaped as they are: q's type or f32.
    pub dq: TensorMut<'a>,
    /// With respect to the keys, shaped as they are, summed over the query heads that share a head: k's type or f32.
    pub dk: TensorMut<'a>,
    /// With respect to the values, as [`Self::dk`].
    pub dv: TensorMut<'a>,
}

/// The layouts of [`Gradients`].
#[derive(Debug, Clone, Copy)]
pub struct GradientLayouts {
    /// See [`Gradients::dout`].
    pub dout: TensorLayout,
    /// See [`Gradients::dlse`].
    pub dlse: Option<TensorLayout>,
    /// See [`Gradients::dq`].
    pub dq: TensorLayout,
    /// See [`Gradients::dk`].
    pub dk: TensorLayout,
    /// See [`Gradients::dv`].
    pub dv: TensorLayout,
}

impl Gradients<'_> {
    /// The layouts alone.
    pub fn layouts(&self) -> GradientLayouts {
        GradientLayouts {
            dout: *self.dout.layout(),
            dlse: self.dlse.as_ref().map(|dlse| *dlse.layout()),
            dq: *self.dq.layout(),
            dk: *self.dk.layout(),
            dv: *self.dv.layout(),
        }
    }

    /// dq, dk and dv overlap neither each other nor what the call reads.
    pub(crate) fn check_overlap(&self, tensors: &Tensors<'_>) -> Result<()> {
        fn place<'t>(name: &'static str, view: &'t TensorRef<'_>) -> Place<'t> {
            Place { name, address: view.address(), layout: view.layout() }
        }
        let out = tensors.out.reborrow();
        let lse = tensors.lse.as_ref().map(TensorMut::reborrow);
        let required = [
            place("q", &tensors.q),
            place("k", &tensors.k),
            place("v", &tensors.v),
            place("out", &out),
            place("dout", &self.dout),
        ];
        let outputs = [("dq", self.dq.reborrow()), ("dk", self.dk.reborrow()), ("dv", self.dv.reborrow())];
        let outputs = outputs.each_ref().map(|(name, view)| Some(place(name, view)));
        check_overlap(&required, &outputs)?;
        for optional in [
            lse.as_ref().map(|lse| place("lse", lse)),
            tensors.mask.as_ref().map(|mask| place("tensors.mask", mask)),
            self.dlse.as_ref().map(|dlse| place("dlse", dlse)),
        ] {
            check_overlap(optional.as_slice(), &outputs)?;
        }
        Ok(())
    }
}

impl GradientLayouts {
    /// Checks shapes, types and strides against those of the tensors, which are checked.
    pub fn check(&self, layouts: &Layouts<'_>) -> Result<()> {
        check_lse(layouts)?;
        for (name, layout, of_name, of) in [
            ("dout", &self.dout, "out", &layouts.out),
            ("dq", &self.dq, "q", &layouts.q),
            ("dk", &self.dk, "k", &layouts.k),
            ("dv", &self.dv, "v", &layouts.v),
        ] {
            layout.check(name)?;
            check_shape((name, layout), (of_name, of))?;
            // The output of f32 may have the gradient in its queries' type.
            let of = if of_name == "out" { layouts.q.dtype } else { of.dtype };
            if layout.dtype != of && layout.dtype != DType::F32 {
                let of_name = if of_name == "out" { "q" } else { of_name };
                invalid!(
                    "{name}.dtype = {:?} but {of_name}.dtype = {of:?}; {name} has the dtype of {of_name}, or F32",
                    layout.dtype
                );
            }
        }
        for (name, layout) in [("dq", &self.dq), ("dk", &self.dk), ("dv", &self.dv)] {
            check_output(name, layout)?;
        }
        if let (Some(dlse), Some(lse)) = (&self.dlse, &layouts.lse) {
            dlse.check("dlse")?;
            if dlse.dtype != DType::F32 {
                invalid!("dlse.dtype = {:?} must be F32", dlse.dtype);
            }
            check_shape(("dlse", dlse), ("lse", lse))?;
        }
        Ok(())
    }
}

/// The forward call's lse is there.
pub(crate) fn check_lse(layouts: &Layouts<'_>) -> Result<()> {
    if layouts.lse.is_none() {
        invalid!("lse is absent, but backward needs the lse that forward wrote");
    }
    Ok(())
}

fn check_shape((name, layout): (&str, &TensorLayout), (of_name, of): (&str, &TensorLayout)) -> Result<()> {
    for dim in 0..4 {
        if layout.shape[dim] != of.shape[dim] {
            invalid!(
                "{name}.shape[{dim}] = {} but {of_name}.shape[{dim}] = {}",
                layout.shape[dim],
                of.shape[dim]
            );
        }
    }
    Ok(())
}
