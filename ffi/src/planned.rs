//! What a plan keeps of the arguments that it was made with, and whether a run's tensors are like them.

use hyperattn_core::{BlockMask, Division, Layouts, Method, Sequences, TensorLayout};

use crate::error::{Failure, Result};
use crate::memory::copied;
use crate::params::Options;

/// See the module.
pub(crate) struct Planned {
    /// Without methods of heads.
    pub(crate) options: Options,
    head_methods: Option<Vec<Method>>,
    sequences: Option<OwnedSequences>,
    /// Strides are those that the plan was made with, and a block mask is without its arrays.
    pub(crate) layouts: Layouts<'static>,
}

struct OwnedSequences {
    cu_seqlens_q: Vec<i32>,
    cu_seqlens_k: Vec<i32>,
}

// SAFETY: the only pointer in it is NULL.
unsafe impl Send for Planned {}
// SAFETY: as above.
unsafe impl Sync for Planned {}

impl Planned {
    /// Copies the arguments of a call, which have been checked.
    pub(crate) fn new(options: Options, division: &Division<'_>, layouts: Layouts<'_>) -> Result<Self> {
        let own = |sequences: Sequences<'_>| -> Result<OwnedSequences> {
            Ok(OwnedSequences {
                cu_seqlens_q: copied(sequences.cu_seqlens_q)?,
                cu_seqlens_k: copied(sequences.cu_seqlens_k)?,
            })
        };
        let mask = layouts.block_mask.map(|mask| BlockMask { row_offsets: &[], columns: &[], ..mask });
        Ok(Planned {
            options: Options { head_methods: std::ptr::null(), ..options },
            head_methods: division.head_methods.map(copied).transpose()?,
            sequences: division.sequences.map(own).transpose()?,
            layouts: Layouts { block_mask: mask, ..layouts },
        })
    }

    pub(crate) fn division(&self) -> Division<'_> {
        Division {
            sequences: self.sequences.as_ref().map(|owned| Sequences {
                cu_seqlens_q: &owned.cu_seqlens_q,
                cu_seqlens_k: &owned.cu_seqlens_k,
            }),
            head_methods: self.head_methods.as_deref(),
        }
    }

    /// Whether a run's tensors and sequences are those of the plan; strides and blocks may be others.
    pub(crate) fn check(&self, given: &Layouts<'_>, sequences: Option<&Sequences<'_>>) -> Result<()> {
        let planned = &self.layouts;
        for (name, planned, given) in [
            ("q", &planned.q, &given.q),
            ("k", &planned.k, &given.k),
            ("v", &planned.v, &given.v),
            ("out", &planned.out, &given.out),
        ] {
            check_shape(name, planned, given)?;
        }
        for (name, planned, given) in
            [("lse", &planned.lse, &given.lse), ("error", &planned.error, &given.error)]
        {
            match (planned, given) {
                (Some(planned), Some(given)) => check_shape(name, planned, given)?,
                (None, Some(given)) => {
                    return Err(Failure::invalid(format_args!(
                        "{name} of shape {:?} is given, but the plan was made with {name}.dtype = 0",
                        given.shape
                    )));
                }
                (_, None) => {}
            }
        }
        self.check_block_mask(given.block_mask.as_ref())?;
        self.check_sequences(sequences)
    }

    fn check_block_mask(&self, given: Option<&BlockMask<'_>>) -> Result<()> {
        let numbers = |mask: Option<&BlockMask<'_>>| {
            mask.map_or([0; 5], |mask| {
                [
                    mask.query_block,
                    mask.key_block,
                    mask.num_query_blocks,
                    mask.num_key_blocks,
                    mask.head_stride,
                ]
            })
        };
        let names =
            ["query_block", "key_block", "num_query_blocks", "num_key_blocks", "row_offsets_head_stride"];
        let planned = numbers(self.layouts.block_mask.as_ref());
        for ((name, planned), given) in names.into_iter().zip(planned).zip(numbers(given)) {
            if planned != given {
                return Err(Failure::invalid(format_args!(
                    "block_mask.{name} = {given} but the plan was made for {planned} (0: no block_mask)"
                )));
            }
        }
        Ok(())
    }

    fn check_sequences(&self, given: Option<&Sequences<'_>>) -> Result<()> {
        let planned = self.division().sequences;
        let count = |sequences: Option<&Sequences<'_>>| sequences.map_or(0, Sequences::count);
        let (planned_count, given_count) = (count(planned.as_ref()), count(given));
        if planned_count != given_count {
            return Err(Failure::invalid(format_args!(
                "num_sequences = {given_count} but the plan was made for {planned_count}"
            )));
        }
        let (Some(planned), Some(given)) = (planned, given) else { return Ok(()) };
        for (name, planned, given) in [
            ("cu_seqlens_q", planned.cu_seqlens_q, given.cu_seqlens_q),
            ("cu_seqlens_k", planned.cu_seqlens_k, given.cu_seqlens_k),
        ] {
            if let Some(at) = planned.iter().zip(given).position(|(planned, given)| planned != given) {
                return Err(Failure::invalid(format_args!(
                    "{name}[{at}] = {} but the plan was made for {}",
                    given[at], planned[at]
                )));
            }
        }
        Ok(())
    }
}

/// A run's tensor has the plan's element type and extents.
fn check_shape(name: &str, planned: &TensorLayout, given: &TensorLayout) -> Result<()> {
    if planned.dtype != given.dtype {
        return Err(Failure::invalid(format_args!(
            "{name}.dtype = {:?} but the plan was made for {:?}",
            given.dtype, planned.dtype
        )));
    }
    if let Some(dim) = (0..4).find(|&dim| planned.shape[dim] != given.shape[dim]) {
        return Err(Failure::invalid(format_args!(
            "{name}.shape[{dim}] = {} but the plan was made for {}",
            given.shape[dim], planned.shape[dim]
        )));
    }
    Ok(())
}
