//! Borrowed strided views of `[batch, heads, sequence, head_dim]` tensors.

use core::marker::PhantomData;
use core::ops::Range;

use half::{bf16, f16};

use crate::element::{DType, Element};
use crate::error::{Result, invalid};
use crate::simd::{Kernels, MaskSurvey, Packing, leading_zeros, prefetch};

/// Longest sequence supported: positions are kept in 32 bits.
pub const MAX_SEQUENCE: i64 = i32::MAX as i64;

/// Element type, extents and strides (in elements) of `[batch, heads, sequence, head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorLayout {
    /// Element type.
    pub dtype: DType,
    /// Extents; batch, heads and head_dim at least 1, sequence at least 0.
    pub shape: [i64; 4],
    /// Distances between neighbours in each dimension, in elements; the last is 1.
    pub stride: [i64; 4],
}

impl TensorLayout {
    /// A packed `[batch, heads, sequence, head_dim]` tensor.
    pub fn contiguous(dtype: DType, shape: [i64; 4]) -> Self {
        let [_, h, s, d] = shape;
        let (row, head) = (d, d.saturating_mul(s));
        TensorLayout { dtype, shape, stride: [head.saturating_mul(h), head, row, 1] }
    }

    /// Batch, heads, sequence, head_dim as sizes. Only after [`Self::check`].
    pub(crate) fn extents(&self) -> [usize; 4] {
        self.shape.map(|extent| extent as usize)
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Offsets in bytes of the first and one past the last byte that the view may touch.
    fn span(&self) -> Option<(i64, i64)> {
        let (mut low, mut high) = (0i64, 0i64);
        for (extent, stride) in self.shape.into_iter().zip(self.stride) {
            let reach = (extent - 1).checked_mul(stride)?;
            if reach < 0 {
                low = low.checked_add(reach)?;
            } else {
                high = high.checked_add(reach)?;
            }
        }
        let size = self.dtype.size() as i64;
        Some((low.checked_mul(size)?, high.checked_add(1)?.checked_mul(size)?))
    }

    /// Errors that concern this tensor alone; `name` is what the sentence calls it.
    pub fn check(&self, name: &str) -> Result<()> {
        self.check_dimensions(name, [("batch", 1), ("heads", 1), ("sequence", 0), ("head_dim", 1)])
    }

    /// [`Self::check`] for a mask `[batch, heads, queries, keys]`.
    pub fn check_mask(&self, name: &str) -> Result<()> {
        self.check_dimensions(name, [("batch", 1), ("heads", 1), ("queries", 0), ("keys", 0)])
    }

    /// [`Self::check`], where the dimensions have these names and these least extents.
    fn check_dimensions(&self, name: &str, dimensions: [(&str, i64); 4]) -> Result<()> {
        for (dim, (what, least)) in dimensions.into_iter().enumerate() {
            if self.shape[dim] < least {
                invalid!("{name}.shape[{dim}] ({what}) = {} must be at least {least}", self.shape[dim]);
            }
        }
        for dim in [2, 3] {
            if self.shape[dim] > MAX_SEQUENCE {
                invalid!(
                    "{name}.shape[{dim}] ({}) = {} is beyond the supported maximum {MAX_SEQUENCE}",
                    dimensions[dim].0,
                    self.shape[dim]
                );
            }
        }
        if self.stride[3] != 1 && self.shape[3] != 1 {
            invalid!("{name}.stride[3] = {} must be 1", self.stride[3]);
        }
        if self.shape.into_iter().try_fold(1i64, |n, extent| n.checked_mul(extent)).is_none() {
            invalid!("{name}.shape = {:?}: the number of elements overflows", self.shape);
        }
        let fits = |(low, high): (i64, i64)| {
            isize::try_from(low).is_ok() && isize::try_from(high).is_ok() && high.checked_sub(low).is_some()
        };
        if !self.is_empty() && !self.span().is_some_and(fits) {
            invalid!(
                "{name}.shape = {:?} with {name}.stride = {:?}: the extent in bytes overflows",
                self.shape,
                self.stride
            );
        }
        Ok(())
    }

    /// Of these batch items, heads and rows alone, none of which is beyond the extents; and how many bytes after the
    /// whole tensor's first element the part's lies.
    pub fn part(&self, batches: &Range<usize>, heads: &Range<usize>, rows: &Range<usize>) -> (Self, isize) {
        let [batch, head, row, _] = self.extents();
        assert!(batches.end <= batch && heads.end <= head && rows.end <= row);
        let [batch, head, row] = [batches, heads, rows].map(|range| range.len() as i64);
        let part = TensorLayout { shape: [batch, head, row, self.shape[3]], ..*self };
        // Without elements there need not be memory, nor strides that mean anything.
        let offset = if part.is_empty() { 0 } else { self.offset(batches.start, heads.start, rows.start) };
        (part, offset)
    }

    /// [`Self::part`] of a mask, where an extent of 1 serves all, for some of its columns.
    pub fn mask_part(&self, ranges: [&Range<usize>; 3], columns: &Range<usize>) -> (Self, isize) {
        let whole = 0..1;
        let extents = self.extents();
        let of = |dim: usize| if extents[dim] == 1 { &whole } else { ranges[dim] };
        let (part, offset) = self.part(of(0), of(1), of(2));
        assert!(columns.end <= extents[3]);
        let [batch, head, row, _] = part.shape;
        let part = TensorLayout { shape: [batch, head, row, columns.len() as i64], ..part };
        let first_column = (columns.start * self.dtype.size()) as isize;
        (part, if part.is_empty() { 0 } else { offset + first_column })
    }

    fn offset(&self, batch: usize, head: usize, row: usize) -> isize {
        let [b, h, s, _] = self.stride.map(|stride| stride as isize);
        (batch as isize * b + head as isize * h + row as isize * s) * self.dtype.size() as isize
    }
}

/// Whether `slice` of `len` elements holds the whole of `layout` when its first element is `[0, 0, 0, 0]`.
fn check_slice(layout: &TensorLayout, len: usize) -> Result<()> {
    layout.check("tensor")?;
    let size = layout.dtype.size() as i64;
    if let Some((low, high)) = layout.span()
        && !layout.is_empty()
        && (low < 0 || high / size > len as i64)
    {
        invalid!("tensor.shape = {:?} reaches past a slice of {len} elements", layout.shape);
    }
    Ok(())
}

/// A tensor to read.
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    data: *const u8,
    layout: TensorLayout,
    owner: PhantomData<&'a [u8]>,
}

// SAFETY: it is a shared borrow of plain numbers.
unsafe impl Send for TensorRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorRef<'_> {}

impl<'a> TensorRef<'a> {
    /// A view of `slice`, whose first element is `[0, 0, 0, 0]`.
    pub fn new<T: Element>(slice: &'a [T], shape: [i64; 4], stride: [i64; 4]) -> Result<Self> {
        let layout = TensorLayout { dtype: T::DTYPE, shape, stride };
        check_slice(&layout, slice.len())?;
        Ok(TensorRef { data: slice.as_ptr().cast(), layout, owner: PhantomData })
    }

    /// A packed view of `slice`.
    pub fn contiguous<T: Element>(slice: &'a [T], shape: [i64; 4]) -> Result<Self> {
        Self::new(slice, shape, TensorLayout::contiguous(T::DTYPE, shape).stride)
    }

    /// The numbers `columns` of each row of `rows`, one head of one batch item; rows are `stride` numbers apart and
    /// whole.
    pub(crate) fn of_rows(rows: &'a [f32], stride: usize, columns: Range<usize>) -> Self {
        assert!(!columns.is_empty() && columns.end <= stride && rows.len().is_multiple_of(stride));
        let shape = [1, 1, (rows.len() / stride) as i64, columns.len() as i64];
        let first = &rows[columns.start.min(rows.len())..];
        let stride = [0, 0, stride as i64, 1];
        let layout = TensorLayout { dtype: DType::F32, shape, stride };
        TensorRef { data: first.as_ptr().cast(), layout, owner: PhantomData }
    }

    /// A view of memory that the caller vouches for. Element alignment is not required.
    ///
    /// # Safety
    /// For `'a`, every element that `layout` describes is readable at its offset from `data` and not
    /// written by anyone else. An empty tensor needs no memory.
    pub unsafe fn from_raw(data: *const u8, layout: TensorLayout) -> Self {
        TensorRef { data, layout, owner: PhantomData }
    }

    /// Element type, extents and strides.
    pub fn layout(&self) -> &TensorLayout {
        &self.layout
    }

    /// A view of these batch items, heads and rows alone.
    pub(crate) fn part(&self, batches: &Range<usize>, heads: &Range<usize>, rows: &Range<usize>) -> Self {
        let (layout, offset) = self.layout.part(batches, heads, rows);
        TensorRef { data: self.data.wrapping_offset(offset), layout, owner: PhantomData }
    }

    /// See [`TensorLayout::mask_part`].
    pub(crate) fn mask_part(&self, ranges: [&Range<usize>; 3], columns: &Range<usize>) -> Self {
        let (layout, offset) = self.layout.mask_part(ranges, columns);
        TensorRef { data: self.data.wrapping_offset(offset), layout, owner: PhantomData }
    }

    /// Address of element `[0, 0, 0, 0]`.
    pub(crate) fn address(&self) -> usize {
        self.data as usize
    }

    /// Elements of a row.
    pub(crate) fn row_len(&self) -> usize {
        self.layout.extents()[3]
    }

    /// One row as the words that `packing` makes of it, where they lie in memory as such: elements of the
    /// right type, at a multiple of four bytes, and whole words.
    pub(crate) fn words(&self, packing: Packing, batch: usize, head: usize, row: usize) -> Option<&'a [u32]> {
        let [batches, heads, rows, head_dim] = self.layout.extents();
        assert!(batch < batches && head < heads && row < rows);
        let dtype = match packing {
            Packing::F32 => DType::F32,
            Packing::Bf16Pairs => DType::BF16,
        };
        if self.layout.dtype != dtype || !head_dim.is_multiple_of(packing.depth()) {
            return None;
        }
        // SAFETY: the indices are within the extents, so the row's head_dim consecutive elements are readable
        // for 'a (constructor contract), and nobody writes them; the address is checked before it is used.
        unsafe {
            let from = self.data.offset(self.layout.offset(batch, head, row)).cast::<u32>();
            from.is_aligned().then(|| core::slice::from_raw_parts(from, head_dim / packing.depth()))
        }
    }

    /// Asks for one row to be brought into the cache.
    pub(crate) fn prefetch_row(&self, batch: usize, head: usize, row: usize) {
        let from = self.data.wrapping_offset(self.layout.offset(batch, head, row));
        prefetch(from, self.row_len() * self.layout.dtype.size());
    }

    /// Widens one row into `to`, which has head_dim elements.
    pub(crate) fn read_row(&self, kernels: &Kernels, batch: usize, head: usize, row: usize, to: &mut [f32]) {
        assert!(to.len() == self.row_len());
        self.read_part(kernels, (batch, head, row), 0, to);
    }

    /// Widens the elements of one row from number `first` on into `to`.
    pub(crate) fn read_part(
        &self,
        kernels: &Kernels,
        (batch, head, row): (usize, usize, usize),
        first: usize,
        to: &mut [f32],
    ) {
        let from = self.address_of(batch, head, &(row..row + 1), &(first..first + to.len()));
        // SAFETY: `to.len()` elements are readable there, see `address_of`.
        unsafe { kernels.widen(self.layout.dtype, from, to) }
    }

    /// Address of the first of `columns` of the first of `rows`: all of them are readable for `'a`, rows at the
    /// tensor's stride and columns one after the other.
    fn address_of(
        &self,
        batch: usize,
        head: usize,
        rows: &Range<usize>,
        columns: &Range<usize>,
    ) -> *const u8 {
        let [batches, heads, extent, row_len] = self.layout.extents();
        assert!(
            batch < batches
                && head < heads
                && rows.start < rows.end
                && rows.end <= extent
                && columns.start <= columns.end
                && columns.end <= row_len
        );
        let offset = self.layout.offset(batch, head, rows.start);
        // SAFETY: the indices are within the extents, so the offset is within the memory of the tensor
        // (constructor contract).
        unsafe { self.data.offset(offset + (columns.start * self.layout.dtype.size()) as isize) }
    }

    /// This tensor with extents of 1 repeated to the extents of `shape`, which are its own in all other dimensions.
    pub(crate) fn expanded(mut self, shape: [usize; 4]) -> Self {
        for (dim, extent) in shape.into_iter().enumerate() {
            if self.layout.shape[dim] == 1 {
                self.layout.stride[dim] = if dim == 3 { 1 } else { 0 };
            } else {
                assert!(self.layout.shape[dim] == extent as i64);
            }
            self.layout.shape[dim] = extent as i64;
        }
        self
    }

    /// What all elements of a part of one head of a mask say.
    pub(crate) fn survey_mask(
        &self,
        kernels: &Kernels,
        (batch, head): (usize, usize),
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> MaskSurvey {
        let from = self.address_of(batch, head, &rows, &columns);
        let stride = self.layout.stride[2] as isize * self.layout.dtype.size() as isize;
        // SAFETY: these rows and columns are readable there, see `address_of`.
        unsafe { kernels.survey_mask(self.layout.dtype, from, (rows.len(), stride), columns.len()) }
    }

    /// How many of `columns` of one row of a mask are 0 before the first that is not, where all from there on hide
    /// their key; else nothing.
    pub(crate) fn leading_zeros(
        &self,
        (batch, head, row): (usize, usize, usize),
        columns: Range<usize>,
    ) -> Option<usize> {
        let from = self.address_of(batch, head, &(row..row + 1), &columns);
        // SAFETY: these elements are readable there, see `address_of`.
        unsafe { leading_zeros(self.layout.dtype, from, columns.len()) }
    }
}

/// A tensor to write.
#[derive(Debug)]
pub struct TensorMut<'a> {
    data: *mut u8,
    layout: TensorLayout,
    owner: PhantomData<&'a mut [u8]>,
}

// SAFETY: it is an exclusive borrow of plain numbers; shared use is limited to `write_row`, whose
// contract excludes races.
unsafe impl Send for TensorMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorMut<'_> {}

impl<'a> TensorMut<'a> {
    /// A view of `slice`, whose first element is `[0, 0, 0, 0]`.
    pub fn new<T: Element>(slice: &'a mut [T], shape: [i64; 4], stride: [i64; 4]) -> Result<Self> {
        let layout = TensorLayout { dtype: T::DTYPE, shape, stride };
        check_slice(&layout, slice.len())?;
        Ok(TensorMut { data: slice.as_mut_ptr().cast(), layout, owner: PhantomData })
    }

    /// A packed view of `slice`.
    pub fn contiguous<T: Element>(slice: &'a mut [T], shape: [i64; 4]) -> Result<Self> {
        Self::new(slice, shape, TensorLayout::contiguous(T::DTYPE, shape).stride)
    }

    /// A view of memory that the caller vouches for. Element alignment is not required.
    ///
    /// # Safety
    /// For `'a`, every element that `layout` describes is writable at its offset from `data` and not accessed by
    /// anyone else, but for the rows of other tasks than those that [`crate::run_tasks`] runs with this view. An
    /// empty tensor needs no memory.
    pub unsafe fn from_raw(data: *mut u8, layout: TensorLayout) -> Self {
        TensorMut { data, layout, owner: PhantomData }
    }

    /// Element type, extents and strides.
    pub fn layout(&self) -> &TensorLayout {
        &self.layout
    }

    /// A view of these batch items, heads and rows alone.
    ///
    /// # Safety
    /// While the view lives nobody else reads or writes the rows that are written through it.
    pub(crate) unsafe fn part(
        &self,
        batches: &Range<usize>,
        heads: &Range<usize>,
        rows: &Range<usize>,
    ) -> TensorMut<'_> {
        let TensorRef { data, layout, .. } = self.reborrow().part(batches, heads, rows);
        TensorMut { data: data.cast_mut(), layout, owner: PhantomData }
    }

    /// A view for reading the same memory.
    pub(crate) fn reborrow(&self) -> TensorRef<'_> {
        TensorRef { data: self.data, layout: self.layout, owner: PhantomData }
    }

    /// Asks for one row to be brought into the cache.
    pub(crate) fn prefetch_row(&self, batch: usize, head: usize, row: usize) {
        self.reborrow().prefetch_row(batch, head, row);
    }

    /// Narrows `from` (head_dim elements) into one row.
    ///
    /// # Safety
    /// While this runs nobody else reads or writes the row.
    pub(crate) unsafe fn write_row(&self, batch: usize, head: usize, row: usize, from: &[f32]) {
        let [batches, heads, rows, head_dim] = self.layout.extents();
        assert!(batch < batches && head < heads && row < rows && from.len() == head_dim);
        // SAFETY: the indices are within the extents, so the row's head_dim consecutive elements are
        // writable (constructor contract), and the caller excludes races.
        unsafe {
            let to = self.data.offset(self.layout.offset(batch, head, row));
            match self.layout.dtype {
                DType::F32 => core::ptr::copy_nonoverlapping(from.as_ptr().cast::<u8>(), to, from.len() * 4),
                DType::F16 => narrow(from, to, |x| f16::from_f32(x).to_bits()),
                DType::BF16 => narrow(from, to, |x| bf16::from_f32(x).to_bits()),
            }
        }
    }
}

/// Writes `from` as 16-bit numbers.
///
/// # Safety
/// `2 * from.len()` bytes are writable at `to`.
unsafe fn narrow(from: &[f32], to: *mut u8, bits: impl Fn(f32) -> u16) {
    for (i, &x) in from.iter().enumerate() {
        // SAFETY: i < from.len(), see the contract.
        unsafe { to.cast::<u16>().add(i).write_unaligned(bits(x)) };
    }
}

/// The bits of `numbers`.
pub(crate) fn words_of(numbers: &[f32]) -> &[u32] {
    // SAFETY: the same bytes with the same alignment, every pattern of which is a u32.
    unsafe { core::slice::from_raw_parts(numbers.as_ptr().cast::<u32>(), numbers.len()) }
}

/// Rows of f32 numbers that tasks update, each row by one task at a time.
pub(crate) struct Rows<'a> {
    data: *mut f32,
    rows: usize,
    width: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: access goes through `row`, whose contract excludes races.
unsafe impl Sync for Rows<'_> {}

impl<'a> Rows<'a> {
    /// `slice` as rows of `width` numbers.
    pub(crate) fn new(slice: &'a mut [f32], width: usize) -> Self {
        let rows = slice.len().checked_div(width).unwrap_or(0);
        Rows { data: slice.as_mut_ptr(), rows, width, owner: PhantomData }
    }

    /// Asks for one row to be brought into the cache.
    pub(crate) fn prefetch(&self, row: usize) {
        prefetch(self.data.wrapping_add(row * self.width).cast::<u8>(), self.width * size_of::<f32>());
    }

    /// One row.
    ///
    /// # Safety
    /// While the result lives nobody else uses the row.
    #[expect(clippy::mut_from_ref, reason = "the caller vouches that the row is its own")]
    pub(crate) unsafe fn row(&self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: the row lies within the slice, and the caller excludes other users.
        unsafe { core::slice::from_raw_parts_mut(self.data.add(row * self.width), self.width) }
    }
}
