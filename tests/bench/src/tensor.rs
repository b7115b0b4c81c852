//! Tensors of any element type, aligned as allocators of tensor libraries do it.

use hyperattn_core::{DType, Element, Result, TensorLayout, TensorMut, TensorRef, bf16, f16};
use hyperattn_reference::Generator;
use rayon::prelude::*;

use crate::problem::MemoryOrder;

/// Bytes.
const ALIGN: usize = 64;

/// Numbers drawn from one generator; any number of threads draws the same.
const CHUNK: usize = 1 << 14;

/// Rows that one thread converts at a time, at least.
const ROWS: usize = 1 << 8;

/// An element type with its conversions.
trait Number: Element + Send + Sync {
    fn from_f32(x: f32) -> Self;
    fn to_f64(self) -> f64;
}

impl Number for f32 {
    fn from_f32(x: f32) -> Self {
        x
    }
    fn to_f64(self) -> f64 {
        self.into()
    }
}

impl Number for f16 {
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn to_f64(self) -> f64 {
        f16::to_f64(self)
    }
}

impl Number for bf16 {
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn to_f64(self) -> f64 {
        bf16::to_f64(self)
    }
}

/// Aligned memory.
struct Buffer<T> {
    memory: Vec<T>,
    start: usize,
}

impl<T: Number> Buffer<T> {
    /// `len` numbers, written once and by all threads, as large ones take longer to touch than to compute. `numbers(i)`
    /// makes those of chunk i, a pair at a time.
    fn filled<I: FnMut() -> [f32; 2]>(len: usize, numbers: impl Fn(usize) -> I + Sync) -> Self {
        let mut memory: Vec<T> = Vec::with_capacity(len + ALIGN / size_of::<T>());
        let start = memory.as_ptr().align_offset(ALIGN);
        let spare = &mut memory.spare_capacity_mut()[..start + len];
        let (before, aligned) = spare.split_at_mut(start);
        for to in before {
            to.write(T::from_f32(f32::NAN));
        }
        aligned.par_chunks_mut(CHUNK).enumerate().for_each(|(index, chunk)| {
            let mut pair = numbers(index);
            for to in chunk.chunks_mut(2) {
                for (to, number) in to.iter_mut().zip(pair()) {
                    to.write(T::from_f32(number));
                }
            }
        });
        // SAFETY: the elements before `start` and the `len` behind them have just been written.
        unsafe { memory.set_len(start + len) };
        Buffer { memory, start }
    }

    /// `len` NaNs.
    fn nans(len: usize) -> Self {
        Self::filled(len, |_| || [f32::NAN; 2])
    }

    /// `len` standard normal numbers.
    fn normals(len: usize, seed: u64) -> Self {
        let seed = Generator::new(seed).next_u64();
        Self::filled(len, |chunk| {
            let mut generator = Generator::new(seed ^ chunk as u64);
            move || normal_pair(generator.next_u64())
        })
    }

    /// `len` numbers, each by its place.
    fn by_place(len: usize, number: impl Fn(usize) -> f32 + Sync) -> Self {
        Self::filled(len, |chunk| {
            let mut place = chunk * CHUNK;
            let number = &number;
            move || {
                // The second of the last pair may be none.
                let pair = [place, (place + 1).min(len - 1)].map(number);
                place += 2;
                pair
            }
        })
    }

    fn numbers(&self) -> &[T] {
        &self.memory[self.start..]
    }

    fn numbers_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..]
    }

    fn bytes(&self) -> &[u8] {
        let numbers = self.numbers();
        // SAFETY: numbers without padding are bytes, as many as said.
        unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let numbers = self.numbers_mut();
        // SAFETY: as above, and any bytes are a number of each type.
        unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
    }
}

/// Two independent standard normal numbers (Box-Muller) from 64 uniform bits.
fn normal_pair(bits: u64) -> [f32; 2] {
    const STEP: f32 = 1.0 / (1u64 << 32) as f32;
    let radius = (-2.0 * (((bits >> 32) as f32 + 0.5) * STEP).ln()).sqrt();
    let (sin, cos) = (std::f32::consts::TAU * (bits as u32 as f32 * STEP)).sin_cos();
    // A first factor that rounds to 1 has a radius of -0 squared, not of a negative number.
    [radius * cos, radius * sin]
}

enum Numbers {
    F32(Buffer<f32>),
    F16(Buffer<f16>),
    BF16(Buffer<bf16>),
}

/// Evaluates an expression on the buffer, whatever its type.
macro_rules! on_buffer {
    ($numbers:expr, $buffer:ident => $result:expr) => {
        match $numbers {
            Numbers::F32($buffer) => $result,
            Numbers::F16($buffer) => $result,
            Numbers::BF16($buffer) => $result,
        }
    };
}

/// A `[batch, heads, sequence, head_dim]` tensor that owns its memory.
pub struct Tensor {
    numbers: Numbers,
    layout: TensorLayout,
}

impl Tensor {
    /// Full of NaN, so that what nobody writes is seen.
    pub fn new(dtype: DType, shape: [usize; 4], order: MemoryOrder) -> Self {
        let len = shape.iter().product();
        let numbers = match dtype {
            DType::F32 => Numbers::F32(Buffer::nans(len)),
            DType::F16 => Numbers::F16(Buffer::nans(len)),
            DType::BF16 => Numbers::BF16(Buffer::nans(len)),
        };
        Self::over(numbers, dtype, shape, order)
    }

    /// Independent standard normal numbers.
    pub fn normal(dtype: DType, shape: [usize; 4], order: MemoryOrder, seed: u64) -> Self {
        let len = shape.iter().product();
        let numbers = match dtype {
            DType::F32 => Numbers::F32(Buffer::normals(len, seed)),
            DType::F16 => Numbers::F16(Buffer::normals(len, seed)),
            DType::BF16 => Numbers::BF16(Buffer::normals(len, seed)),
        };
        Self::over(numbers, dtype, shape, order)
    }

    /// The numbers at `[batch, head, row, column]`.
    pub fn of(
        dtype: DType,
        shape: [usize; 4],
        order: MemoryOrder,
        number: impl Fn([usize; 4]) -> f32 + Sync,
    ) -> Self {
        let [_, heads, sequence, head_dim] = shape;
        let by_place = |place: usize| {
            let (row, column) = (place / head_dim, place % head_dim);
            let (batch, row) = (row / (heads * sequence), row % (heads * sequence));
            let (head, row) = match order {
                MemoryOrder::Bhsd => (row / sequence, row % sequence),
                MemoryOrder::Bshd => (row % heads, row / heads),
            };
            number([batch, head, row, column])
        };
        let len = shape.iter().product();
        let numbers = match dtype {
            DType::F32 => Numbers::F32(Buffer::by_place(len, by_place)),
            DType::F16 => Numbers::F16(Buffer::by_place(len, by_place)),
            DType::BF16 => Numbers::BF16(Buffer::by_place(len, by_place)),
        };
        Self::over(numbers, dtype, shape, order)
    }

    fn over(numbers: Numbers, dtype: DType, shape: [usize; 4], order: MemoryOrder) -> Self {
        let shape = shape.map(|extent| extent as i64);
        let [_, heads, sequence, head_dim] = shape;
        let mut layout = TensorLayout::contiguous(dtype, shape);
        if order == MemoryOrder::Bshd {
            layout.stride = [heads * sequence * head_dim, head_dim, heads * head_dim, 1];
        }
        Tensor { numbers, layout }
    }

    /// For reading.
    pub fn view(&self) -> Result<TensorRef<'_>> {
        let TensorLayout { shape, stride, .. } = self.layout;
        on_buffer!(&self.numbers, buffer => TensorRef::new(buffer.numbers(), shape, stride))
    }

    /// For writing.
    pub fn view_mut(&mut self) -> Result<TensorMut<'_>> {
        let TensorLayout { shape, stride, .. } = self.layout;
        on_buffer!(&mut self.numbers, buffer => TensorMut::new(buffer.numbers_mut(), shape, stride))
    }

    /// The memory, as it is copied to a device.
    pub fn bytes(&self) -> &[u8] {
        on_buffer!(&self.numbers, buffer => buffer.bytes())
    }

    /// The memory, as it is copied from a device.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        on_buffer!(&mut self.numbers, buffer => buffer.bytes_mut())
    }

    /// Element type, extents and strides.
    pub fn layout(&self) -> &TensorLayout {
        &self.layout
    }

    /// Row `row` of one head.
    pub fn row(&self, batch: usize, head: usize, row: usize) -> Vec<f64> {
        let mut to = vec![0.0; self.layout.shape[3] as usize];
        self.read_row(batch, head, row, &mut to);
        to
    }

    /// All rows of one head, one after another.
    pub fn head(&self, batch: usize, head: usize) -> Vec<f64> {
        let [_, _, rows, head_dim] = self.layout.shape.map(|extent| extent as usize);
        let mut to = vec![0.0; rows * head_dim];
        let rows = to.par_chunks_exact_mut(head_dim).with_min_len(ROWS).enumerate();
        rows.for_each(|(row, to)| self.read_row(batch, head, row, to));
        to
    }

    fn read_row(&self, batch: usize, head: usize, row: usize, to: &mut [f64]) {
        let [b, h, s, _] = self.layout.stride.map(|stride| stride as usize);
        let start = batch * b + head * h + row * s;
        on_buffer!(&self.numbers, buffer => {
            for (to, x) in to.iter_mut().zip(&buffer.numbers()[start..]) {
                *to = x.to_f64();
            }
        });
    }
}

#[cfg(test)]
impl Tensor {
    /// Fills the memory in its own order.
    pub(crate) fn write(&mut self, from: &[f32]) {
        on_buffer!(&mut self.numbers, buffer => {
            for (to, &x) in buffer.numbers_mut().iter_mut().zip(from) {
                *to = Number::from_f32(x);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 200,000 draws; the bounds are 4.5 standard deviations (confidence above 0.99999 each).
    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let seed = 11;
        let tensor = Tensor::normal(DType::F32, [1, 2, 1000, 100], MemoryOrder::Bhsd, seed);
        let numbers: Vec<f64> = (0..2).flat_map(|head| tensor.head(0, head)).collect();
        let n = numbers.len() as f64;
        let moment = |power: i32| numbers.iter().map(|x| x.powi(power)).sum::<f64>() / n;
        let deviations = 4.5 / n.sqrt();
        assert!(moment(1).abs() < deviations, "seed {seed}: mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < deviations * 2f64.sqrt(), "seed {seed}: variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < deviations * 96f64.sqrt(), "seed {seed}: fourth {}", moment(4));
        let pairs = numbers.chunks_exact(2).map(|pair| pair[0] * pair[1]);
        let covariance = pairs.sum::<f64>() / (n / 2.0);
        assert!(covariance.abs() < deviations * 2f64.sqrt(), "seed {seed}: covariance {covariance}");
    }

    #[test]
    fn extreme_bits_are_finite() {
        for bits in [0, u64::MAX, u64::MAX << 32, u64::from(u32::MAX)] {
            assert!(normal_pair(bits).iter().all(|x| x.is_finite()), "{bits:x}");
        }
    }

    #[test]
    fn the_order_in_memory_decides_the_strides() {
        let shape = [2, 3, 5, 4];
        for (order, stride) in [(MemoryOrder::Bhsd, [60, 20, 4, 1]), (MemoryOrder::Bshd, [60, 4, 12, 1])] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let tensor = Tensor::normal(dtype, shape, order, 1);
                assert_eq!(tensor.layout().stride, stride);
                let head = tensor.head(1, 2);
                assert_eq!(head.len(), 20);
                assert_eq!(tensor.row(1, 2, 3), head[12..16]);
                assert!(head.iter().all(|x| x.is_finite()));
                tensor.view().expect("the view fits the memory");
            }
        }
        let empty = Tensor::new(DType::BF16, shape, MemoryOrder::Bhsd);
        assert!(empty.head(0, 0).iter().all(|x| x.is_nan()));
    }

    #[test]
    fn bytes_are_the_elements_and_nothing_else() {
        for (dtype, size) in [(DType::F32, 4), (DType::F16, 2), (DType::BF16, 2)] {
            let from = Tensor::normal(dtype, [1, 2, 3, 5], MemoryOrder::Bshd, 3);
            assert_eq!(from.bytes().len(), 30 * size);
            let mut to = Tensor::new(dtype, [1, 2, 3, 5], MemoryOrder::Bshd);
            assert_ne!(to.head(0, 1), from.head(0, 1));
            to.bytes_mut().copy_from_slice(from.bytes());
            assert_eq!(to.head(0, 1), from.head(0, 1));
        }
    }

    /// Chunks have generators of their own, so that no part of a tensor is another's copy.
    #[test]
    fn no_head_repeats_another() {
        let tensor = Tensor::normal(DType::BF16, [1, 4, 2 * CHUNK / 16, 16], MemoryOrder::Bhsd, 5);
        let heads: Vec<Vec<f64>> = (0..4).map(|head| tensor.head(0, head)).collect();
        for (index, head) in heads.iter().enumerate() {
            assert_ne!(head[..CHUNK], head[CHUNK..]);
            assert!(heads[..index].iter().all(|other| other[..CHUNK] != head[..CHUNK]));
        }
    }
}
