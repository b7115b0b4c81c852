//! Tensor memory of a chosen element type and arrangement.

use hyperattn_core::{DType, TensorLayout, TensorMut, TensorRef, bf16, f16};

/// Numbers as a tensor holds them.
#[derive(Clone, Debug)]
pub enum Storage {
    /// binary32
    F32(Vec<f32>),
    /// binary16
    F16(Vec<f16>),
    /// bfloat16
    BF16(Vec<bf16>),
}

impl Storage {
    /// `values` rounded to `dtype`.
    pub fn new(values: &[f32], dtype: DType) -> Self {
        match dtype {
            DType::F32 => Storage::F32(values.to_vec()),
            DType::F16 => Storage::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            DType::BF16 => Storage::BF16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }

    /// The numbers, widened.
    pub fn widened(&self) -> Vec<f32> {
        match self {
            Storage::F32(values) => values.clone(),
            Storage::F16(values) => values.iter().map(|x| x.to_f32()).collect(),
            Storage::BF16(values) => values.iter().map(|x| x.to_f32()).collect(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Storage::F32(values) => values.len(),
            Storage::F16(values) => values.len(),
            Storage::BF16(values) => values.len(),
        }
    }

    fn dtype(&self) -> DType {
        match self {
            Storage::F32(_) => DType::F32,
            Storage::F16(_) => DType::F16,
            Storage::BF16(_) => DType::BF16,
        }
    }

    fn pointer(&mut self) -> *mut u8 {
        match self {
            Storage::F32(values) => values.as_mut_ptr().cast(),
            Storage::F16(values) => values.as_mut_ptr().cast(),
            Storage::BF16(values) => values.as_mut_ptr().cast(),
        }
    }
}

/// How `[batch, heads, sequence, head_dim]` lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// Packed in the order of the extents.
    Packed,
    /// `[batch, sequence, heads, head_dim]`: one token's heads are neighbours.
    TokensFirst,
    /// Packed with unused elements after every row, head and batch item.
    Padded,
    /// The last token, head and batch item come first: negative strides.
    Reversed,
    /// One row for all tokens: stride 0. Inputs only.
    OneRow,
    /// One head for all heads and batch items: strides 0. Inputs only.
    OneHead,
}

/// A tensor and the memory around it.
#[derive(Clone, Debug)]
pub struct Tensor {
    storage: Storage,
    origin: usize,
    layout: TensorLayout,
}

/// Element `index` of a packed tensor as `[batch, head, row, column]`.
fn unravel(shape: [i64; 4], index: usize) -> [i64; 4] {
    let [_, h, s, d] = shape;
    let index = index as i64;
    [index / (h * s * d), index / (s * d) % h, index / d % s, index % d]
}

impl Tensor {
    /// `values` (packed) in `arrangement`. Elements that no index reaches hold `filler`. Where a stride is
    /// 0, the last of the values that share an element stays.
    pub fn new(values: &[f32], shape: [i64; 4], dtype: DType, arrangement: Arrangement, filler: f32) -> Self {
        let [b, h, s, d] = shape;
        let stride = match arrangement {
            Arrangement::Packed => [h * s * d, s * d, d, 1],
            Arrangement::TokensFirst => [s * h * d, d, h * d, 1],
            Arrangement::Padded => {
                let row = d + 3;
                let head = s * row + 5;
                [h * head + 7, head, row, 1]
            }
            Arrangement::Reversed => [-h * s * d, -s * d, -d, 1],
            Arrangement::OneRow => [h * d, d, 0, 1],
            Arrangement::OneHead => [0, 0, d, 1],
        };
        let reach = |extent: i64, stride: i64| (extent - 1).max(0) * stride;
        let reaches = [reach(b, stride[0]), reach(h, stride[1]), reach(s, stride[2]), reach(d, 1)];
        let origin: i64 = -reaches.iter().filter(|&&r| r < 0).sum::<i64>();
        let end = origin + reaches.iter().filter(|&&r| r > 0).sum::<i64>() + 1;
        // Some elements before and after the view, so that a step beyond it is seen.
        let margin = 9;
        let mut memory = vec![filler; (end + 2 * margin) as usize];
        let origin = (origin + margin) as usize;
        let mut tensor = Tensor {
            storage: Storage::F32(Vec::new()),
            origin,
            layout: TensorLayout { dtype, shape, stride },
        };
        for (index, &value) in values.iter().enumerate() {
            memory[tensor.offset(index)] = value;
        }
        tensor.storage = Storage::new(&memory, dtype);
        tensor
    }

    /// Where element `index` of the packed order lies.
    fn offset(&self, index: usize) -> usize {
        let steps = unravel(self.layout.shape, index).into_iter().zip(self.layout.stride);
        (self.origin as i64 + steps.map(|(i, stride)| i * stride).sum::<i64>()) as usize
    }

    fn count(&self) -> usize {
        self.layout.shape.into_iter().product::<i64>() as usize
    }

    /// The elements in packed order, widened.
    pub fn values(&self) -> Vec<f32> {
        let memory = self.storage.widened();
        (0..self.count()).map(|index| memory[self.offset(index)]).collect()
    }

    /// The bits, widened to f32, of the elements that no index reaches.
    pub fn gaps(&self) -> Vec<u32> {
        let memory = self.storage.widened();
        let mut reached = vec![false; memory.len()];
        (0..self.count()).for_each(|index| reached[self.offset(index)] = true);
        let gaps = memory.iter().zip(reached).filter(|(_, reached)| !reached);
        gaps.map(|(x, _)| x.to_bits()).collect()
    }

    /// Asserts that every element lies in the memory: what the views below rely on.
    fn check(&self) {
        assert_eq!(self.layout.dtype, self.storage.dtype());
        let corners = (0..self.count()).map(|index| self.offset(index));
        assert!(corners.max().is_none_or(|last| last < self.storage.len()));
    }

    /// A view to read.
    pub fn view(&mut self) -> TensorRef<'_> {
        self.check();
        let (layout, origin) = (self.layout, self.origin * self.layout.dtype.size());
        // SAFETY: every element lies in the storage (checked; offsets are not negative), which is
        // borrowed for as long as the view.
        unsafe { TensorRef::from_raw(self.storage.pointer().add(origin), layout) }
    }

    /// A view to write.
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        self.check();
        let (layout, origin) = (self.layout, self.origin * self.layout.dtype.size());
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { TensorMut::from_raw(self.storage.pointer().add(origin), layout) }
    }
}
