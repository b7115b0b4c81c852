//! One call: its tensors in the device's memory, checked.

use hyperattn_core::device::{Place, Problem, check_overlap};
use hyperattn_core::{
    BlockMask, DType, Error, ErrorKind, Layouts, Mask, Method, Params, Result, TensorLayout,
};

use crate::abi::{AttendParams, SEGMENT_LIMITED, View, element_type};
use crate::workspace::Pointer;

/// A tensor in the device's memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceTensor {
    /// Device address of element `[0, 0, 0, 0]`.
    pub address: u64,
    /// Element type, extents and strides.
    pub layout: TensorLayout,
}

impl DeviceTensor {
    /// The tensor as the kernels see it.
    pub(crate) fn view(&self) -> View {
        let [batch_stride, head_stride, row_stride] = [0, 1, 2].map(|dim| self.byte_stride(dim));
        View { data: self.address, batch_stride, head_stride, row_stride }
    }

    /// Bytes from one index of a dimension to the next, 0 where there is only one: its stride may be anything.
    fn byte_stride(&self, dim: usize) -> i64 {
        let size = self.layout.dtype.size() as i64;
        if self.layout.shape[dim] > 1 { self.layout.stride[dim].wrapping_mul(size) } else { 0 }
    }
}

/// Exact blocks that the caller chooses, see [`BlockMask`]. The arrays are in the device's memory, and what they hold is not
/// checked.
#[derive(Debug, Clone, Copy)]
pub struct DeviceBlockMask {
    /// Queries per block, at least 1.
    pub query_block: usize,
    /// Keys per block, at least 1.
    pub key_block: usize,
    /// `ceil(n_q / query_block)`.
    pub num_query_blocks: usize,
    /// `ceil(n_k / key_block)`.
    pub num_key_blocks: usize,
    /// Device address of the offsets into the columns, 64-bit numbers.
    pub row_offsets: u64,
    /// Device address of the key-block indices, 32-bit numbers.
    pub columns: u64,
    /// Distance in the offsets from one head's pattern to the next; 0 shares one pattern.
    pub head_stride: usize,
}

impl DeviceBlockMask {
    /// The numbers without the arrays.
    pub fn counts(&self) -> BlockMask<'static> {
        BlockMask {
            query_block: self.query_block,
            key_block: self.key_block,
            num_query_blocks: self.num_query_blocks,
            num_key_blocks: self.num_key_blocks,
            row_offsets: &[],
            columns: &[],
            head_stride: self.head_stride,
        }
    }
}

/// The tensors of one forward call. Shapes and element types are those of [`hyperattn_core::Tensors`].
#[derive(Debug, Clone, Copy)]
pub struct DeviceTensors {
    /// Queries.
    pub q: DeviceTensor,
    /// Keys.
    pub k: DeviceTensor,
    /// Values.
    pub v: DeviceTensor,
    /// Output.
    pub out: DeviceTensor,
    /// Natural log-sum-exp of the scaled logits, when wanted.
    pub lse: Option<DeviceTensor>,
    /// Exact blocks for [`Method::Paper`] instead of sortLSH.
    pub block_mask: Option<DeviceBlockMask>,
    /// Estimate of the relative error of each head's output, when wanted.
    pub error: Option<DeviceTensor>,
    /// Keys and columns that a query of each head met on average, when wanted.
    pub keys_per_query: Option<DeviceTensor>,
}

impl DeviceTensors {
    /// The tensors of every call, without any that is optional.
    pub fn new(q: DeviceTensor, k: DeviceTensor, v: DeviceTensor, out: DeviceTensor) -> Self {
        DeviceTensors { q, k, v, out, lse: None, block_mask: None, error: None, keys_per_query: None }
    }

    /// The layouts that core checks. A block mask's arrays cannot be read here, so it is left out.
    pub fn layouts(&self) -> Layouts<'static> {
        Layouts {
            q: self.q.layout,
            k: self.k.layout,
            v: self.v.layout,
            out: self.out.layout,
            lse: self.lse.map(|lse| lse.layout),
            block_mask: None,
            error: self.error.map(|error| error.layout),
            keys_per_query: self.keys_per_query.map(|keys| keys.layout),
            mask: None,
        }
    }

    fn inputs(&self) -> [(&'static str, &DeviceTensor); 3] {
        [("q", &self.q), ("k", &self.k), ("v", &self.v)]
    }

    fn outputs(&self) -> [(&'static str, Option<&DeviceTensor>); 4] {
        [
            ("out", Some(&self.out)),
            ("lse", self.lse.as_ref()),
            ("error", self.error.as_ref()),
            ("keys_per_query", self.keys_per_query.as_ref()),
        ]
    }

    /// Elements lie at multiples of their size, and outputs have memory of their own.
    pub(crate) fn check_addresses(&self) -> Result<()> {
        let outputs = self.outputs();
        let present = outputs.iter().filter_map(|&(name, tensor)| Some((name, tensor?)));
        for (name, tensor) in self.inputs().into_iter().chain(present) {
            check_alignment(name, tensor)?;
        }
        fn place<'t>(name: &'static str, tensor: &'t DeviceTensor) -> Place<'t> {
            Place { name, address: tensor.address as usize, layout: &tensor.layout }
        }
        check_overlap(
            &self.inputs().map(|(name, tensor)| place(name, tensor)),
            &outputs.map(|(name, tensor)| Some(place(name, tensor?))),
        )
    }
}

/// Elements lie at multiples of their size.
pub(crate) fn check_alignment(name: &str, tensor: &DeviceTensor) -> Result<()> {
    let size = tensor.layout.dtype.size();
    if !tensor.layout.is_empty() && !tensor.address.is_multiple_of(size as u64) {
        return Err(invalid(format_args!(
            "{name}.data = {:#x} is not a multiple of its elements' {size} bytes",
            tensor.address
        )));
    }
    Ok(())
}

pub(crate) fn invalid(sentence: std::fmt::Arguments<'_>) -> Error {
    Error::new(ErrorKind::InvalidArgument, sentence)
}

/// The options, sizes and tensors of one call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) params: &'a Params,
    pub(crate) problem: Problem,
    pub(crate) tensors: DeviceTensors,
}

impl<'a> Call<'a> {
    /// Checks everything but addresses.
    pub(crate) fn new(params: &'a Params, tensors: &DeviceTensors) -> Result<Self> {
        let problem = Problem::new(params, &tensors.layouts())?;
        for (name, extent) in
            [("batch", problem.batch), ("heads_q", problem.heads_q), ("heads_kv", problem.heads_kv)]
        {
            if u32::try_from(extent).is_err() {
                return Err(invalid(format_args!("{name} = {extent} is more than CUDA's grids hold")));
            }
        }
        if let Some(mask) = &tensors.block_mask {
            check_block_mask(params, mask, &problem)?;
        }
        Ok(Call { params, problem, tensors: *tensors })
    }

    /// SEGMENT_LIMITED where a mask limits what queries see, else 0.
    pub(crate) fn limited(&self) -> u32 {
        if self.problem.mask == Mask::None { 0 } else { SEGMENT_LIMITED }
    }

    /// Row i sees the first i + this keys, within 0..n_k, under a causal mask.
    pub(crate) fn visible(&self) -> i32 {
        let visible = match self.problem.mask {
            // Not used.
            Mask::None => 0,
            Mask::CausalTopLeft => 1,
            Mask::CausalBottomRight => 1 + self.problem.n_k as i64 - self.problem.n_q as i64,
        };
        // Sequences are shorter than 2^31; only without queries is this beyond the range.
        visible.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32
    }

    /// What an attention kernel needs to know of the call; tiles, segments and what they refer to are still missing.
    pub(crate) fn attend_params(&self) -> AttendParams {
        let (problem, tensors) = (&self.problem, &self.tensors);
        AttendParams {
            q: tensors.q.view(),
            k: tensors.k.view(),
            v: tensors.v.view(),
            out: tensors.out.view(),
            lse: tensors.lse.map_or(View::NULL, |lse| lse.view()),
            q_type: element_type(tensors.q.layout.dtype),
            kv_type: element_type(tensors.k.layout.dtype),
            out_type: element_type(tensors.out.layout.dtype),
            heads_q: problem.heads_q as u32,
            group: problem.group as u32,
            n_q: problem.n_q as u32,
            n_k: problem.n_k as u32,
            head_dim: problem.head_dim as u32,
            value_dim: problem.value_dim as u32,
            visible: self.visible(),
            scale_log2: problem.scale_log2,
            tile_count: 0,
            tiles: Pointer::NULL,
            segments: Pointer::NULL,
            positions: Pointer::NULL,
            query_order: Pointer::NULL,
            key_order: Pointer::NULL,
            listed_rows: Pointer::NULL,
            extra_keys: Pointer::NULL,
            extra_values: Pointer::NULL,
            state_max: Pointer::NULL,
            state_sum: Pointer::NULL,
            state_accumulated: Pointer::NULL,
            partial_values: Pointer::NULL,
            partial_lse: Pointer::NULL,
            next_tile: Pointer::NULL,
            order_heads: 0,
            partial_rows: 0,
        }
    }

    /// Bytes of an element of k and v.
    pub(crate) fn kv_size(&self) -> usize {
        DType::size(self.tensors.k.layout.dtype)
    }
}

/// What can be checked without reading the arrays.
fn check_block_mask(params: &Params, mask: &DeviceBlockMask, problem: &Problem) -> Result<()> {
    for (method, name) in [(Method::Exact, "EXACT"), (Method::Refined, "REFINED")] {
        if params.method == method {
            return Err(invalid(format_args!(
                "block_mask is given but params.method = {name} does not use one; pass NULL"
            )));
        }
    }
    mask.counts().check_counts(problem.n_q as i64, problem.n_k as i64)
}
