//! Tensors in the device's memory, in chosen arrangements.

use hyperattn_core::{DType, TensorLayout, bf16, f16};
use hyperattn_cuda::DeviceTensor;

use super::device::Memory;

/// How `[batch, heads, sequence, head_dim]` lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// Packed in the order of the extents.
    Packed,
    /// `[batch, sequence, heads, head_dim]`: one token's heads are neighbours.
    TokensFirst,
    /// Unused elements after every row, head and batch item, as many as keep 16-byte steps of 16-bit elements.
    PaddedBy8,
    /// Unused elements after every row, head and batch item, so that steps are odd.
    PaddedBy3,
    /// The last token, head and batch item come first: negative strides.
    Reversed,
    /// One head for all heads and batch items: strides 0. Inputs only.
    OneHead,
}

/// A tensor and the memory around it.
pub struct Tensor {
    memory: Memory,
    origin: usize,
    layout: TensorLayout,
}

/// What memory holds before anything is written.
pub const POISON: u8 = 0xff;

/// Elements before and after the view, so that a step beyond it is seen; a multiple of 16 bytes.
const MARGIN: i64 = 24;

fn round(value: f32, dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
    }
}

fn widen(bytes: &[u8], dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes(bytes.try_into().expect("four bytes")),
        DType::F16 => f16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32(),
        DType::BF16 => bf16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32(),
    }
}

/// Numbers as an element type holds them.
pub fn rounded(values: &[f32], dtype: DType) -> Vec<f32> {
    values.iter().map(|&value| widen(&round(value, dtype), dtype)).collect()
}

fn layout(shape: [i64; 4], dtype: DType, arrangement: Arrangement) -> TensorLayout {
    let [_, h, s, d] = shape;
    let padded = |row: i64, head: i64, item: i64| {
        let (row, head) = (d + row, s * (d + row) + head);
        [h * head + item, head, row, 1]
    };
    let stride = match arrangement {
        Arrangement::Packed => [h * s * d, s * d, d, 1],
        Arrangement::TokensFirst => [s * h * d, d, h * d, 1],
        Arrangement::PaddedBy8 => padded(8, 16, 24),
        Arrangement::PaddedBy3 => padded(3, 5, 7),
        Arrangement::Reversed => [-h * s * d, -s * d, -d, 1],
        Arrangement::OneHead => [0, 0, d, 1],
    };
    TensorLayout { dtype, shape, stride }
}

impl Tensor {
    /// Poisoned memory for a tensor.
    pub fn poisoned(shape: [i64; 4], dtype: DType, arrangement: Arrangement) -> Self {
        let layout = layout(shape, dtype, arrangement);
        let reaches = || shape.iter().zip(layout.stride).map(|(extent, stride)| (extent - 1).max(0) * stride);
        let before: i64 = -reaches().filter(|&reach| reach < 0).sum::<i64>();
        let after: i64 = reaches().filter(|&reach| reach > 0).sum();
        let elements = before + after + 1 + 2 * MARGIN;
        let memory = Memory::filled(elements as usize * dtype.size(), POISON);
        Tensor { memory, origin: (before + MARGIN) as usize, layout }
    }

    /// `values` (packed) on the device. What no index reaches is NaN. Where a stride is 0,
    /// the last of the values that share an element stays.
    pub fn new(values: &[f32], shape: [i64; 4], dtype: DType, arrangement: Arrangement) -> Self {
        let tensor = Self::poisoned(shape, dtype, arrangement);
        tensor.write(values);
        tensor
    }

    /// Writes other values.
    pub fn write(&self, values: &[f32]) {
        let mut bytes = self.memory.read(0, self.memory.size());
        let size = self.layout.dtype.size();
        for (index, &value) in values.iter().enumerate() {
            bytes[self.offset(index) * size..][..size].copy_from_slice(&round(value, self.layout.dtype));
        }
        self.memory.write(0, &bytes);
    }

    /// Where element `index` of the packed order lies.
    fn offset(&self, index: usize) -> usize {
        let [_, h, s, d] = self.layout.shape;
        let index = index as i64;
        let place = [index / (h * s * d), index / (s * d) % h, index / d % s, index % d];
        let steps: i64 = place.iter().zip(self.layout.stride).map(|(i, stride)| i * stride).sum();
        (self.origin as i64 + steps) as usize
    }

    fn count(&self) -> usize {
        self.layout.shape.iter().product::<i64>() as usize
    }

    /// The elements in packed order, after a check that nothing around them has changed and, for `written`, that all of
    /// them have.
    pub fn values(&self, written: bool) -> Vec<f32> {
        let bytes = self.memory.read(0, self.memory.size());
        let size = self.layout.dtype.size();
        let mut reached = vec![false; bytes.len() / size];
        let values = (0..self.count())
            .map(|index| {
                let offset = self.offset(index);
                reached[offset] = true;
                let element = &bytes[offset * size..][..size];
                assert!(
                    !written || element.iter().any(|&byte| byte != POISON),
                    "element {index} is not written"
                );
                widen(element, self.layout.dtype)
            })
            .collect();
        for (element, reached) in bytes.chunks(size).zip(reached) {
            assert!(
                reached || element.iter().all(|&byte| byte == POISON),
                "memory around the tensor has changed"
            );
        }
        values
    }

    /// The tensor as the library takes it.
    pub fn view(&self) -> DeviceTensor {
        let address = self.memory.address() + (self.origin * self.layout.dtype.size()) as u64;
        DeviceTensor { address, layout: self.layout }
    }
}
