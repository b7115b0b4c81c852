//! Scratch memory: one buffer from the caller, carved into typed slices. Nothing is allocated.

use core::marker::PhantomData;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Size and alignment of the workspace that a call needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layout {
    /// Bytes.
    pub size: usize,
    /// Alignment of the first byte, a power of two.
    pub align: usize,
}

/// Alignment of the workspace and of every slice in it: one cache line.
pub const WORKSPACE_ALIGN: usize = 64;

mod sealed {
    /// # Safety
    /// Every bit pattern is a value, alignment is at most [`super::WORKSPACE_ALIGN`], and there is no padding.
    pub unsafe trait Plain: Copy + Send + Sync + 'static {}
    // SAFETY: numbers without invalid bit patterns.
    unsafe impl Plain for u8 {}
    // SAFETY: as above.
    unsafe impl Plain for u32 {}
    // SAFETY: as above.
    unsafe impl Plain for f32 {}
    // SAFETY: as above.
    unsafe impl Plain for f64 {}
}
pub(crate) use sealed::Plain;

/// Hands out slices from the front of a buffer. Without a buffer it only counts, so that one
/// function both measures and carves; the slices are empty then and must not be indexed.
pub(crate) struct Carver<'a> {
    rest: Option<&'a mut [u8]>,
    used: usize,
    overflow: bool,
}

impl<'a> Carver<'a> {
    pub(crate) fn measuring() -> Self {
        Carver { rest: None, used: 0, overflow: false }
    }

    /// `buffer` starts at a multiple of [`WORKSPACE_ALIGN`].
    pub(crate) fn new(buffer: &'a mut [u8]) -> Self {
        debug_assert_eq!(buffer.as_ptr() as usize % WORKSPACE_ALIGN, 0);
        Carver { rest: Some(buffer), used: 0, overflow: false }
    }

    /// `len` elements with unspecified values; panics when the buffer was measured for less.
    pub(crate) fn take<T: Plain>(&mut self, len: usize) -> &'a mut [T] {
        let bytes = len.checked_mul(size_of::<T>()).and_then(|b| b.checked_next_multiple_of(WORKSPACE_ALIGN));
        let Some(total) = bytes.and_then(|b| b.checked_add(self.used)) else {
            self.overflow = true;
            return &mut [];
        };
        let bytes = total - self.used;
        self.used = total;
        let Some(rest) = self.rest.take() else { return &mut [] };
        let (slice, rest) = rest.split_at_mut(bytes);
        self.rest = Some(rest);
        // SAFETY: the slice holds len elements, is aligned, and is borrowed for 'a by nobody else;
        // T is Plain, so whatever bytes are there are values.
        unsafe { core::slice::from_raw_parts_mut(slice.as_mut_ptr().cast::<T>(), len) }
    }

    /// Bytes handed out so far, or `None` when their count does not fit a `usize`.
    pub(crate) fn used(&self) -> Option<usize> {
        if self.overflow { None } else { Some(self.used) }
    }
}

/// Equal parts of a buffer, one for each task that runs at the same time.
pub(crate) struct Lanes<'a> {
    buffer: &'a mut [u8],
    lane_size: usize,
    count: usize,
}

impl<'a> Lanes<'a> {
    /// `count` lanes of `lane_size` bytes (a multiple of the alignment) from the front of `buffer`.
    pub(crate) fn new(buffer: &'a mut [u8], lane_size: usize, count: usize) -> Self {
        assert!(lane_size.is_multiple_of(WORKSPACE_ALIGN) && lane_size * count <= buffer.len());
        Lanes { buffer, lane_size, count }
    }

    /// The lanes, to be claimed by tasks.
    pub(crate) fn share(&mut self) -> SharedLanes<'_> {
        SharedLanes(Chunks::new(&mut self.buffer[..self.lane_size * self.count], self.lane_size))
    }
}

/// Lanes that tasks claim, each at most once.
pub(crate) struct SharedLanes<'a>(Chunks<'a, u8>);

impl SharedLanes<'_> {
    pub(crate) fn count(&self) -> usize {
        self.0.count()
    }

    pub(crate) fn claim(&self) -> Option<&mut [u8]> {
        self.0.claim().map(|(_, lane)| lane)
    }
}

/// Consecutive chunks of a slice that tasks claim, each once, in order.
pub(crate) struct Chunks<'a, T> {
    data: *mut T,
    len: usize,
    chunk_len: usize,
    next: AtomicUsize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: a chunk is handed to one task only, so sharing the chunks sends disjoint &mut [T].
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

impl<'a, T> Chunks<'a, T> {
    /// Chunks of `chunk_len` elements; the last may be shorter.
    pub(crate) fn new(slice: &'a mut [T], chunk_len: usize) -> Self {
        let chunk_len = chunk_len.max(1);
        Chunks {
            data: slice.as_mut_ptr(),
            len: slice.len(),
            chunk_len,
            next: AtomicUsize::new(0),
            owner: PhantomData,
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.len.div_ceil(self.chunk_len)
    }

    /// The next chunk that nobody has, with its index.
    #[expect(clippy::mut_from_ref, reason = "the counter hands out each chunk once")]
    pub(crate) fn claim(&self) -> Option<(usize, &mut [T])> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        if index >= self.count() {
            return None;
        }
        let start = index * self.chunk_len;
        let len = self.chunk_len.min(self.len - start);
        // SAFETY: start + len <= self.len, and the counter gives every index to one caller only,
        // so no two of these slices overlap while the exclusive borrow in `owner` lasts.
        Some((index, unsafe { core::slice::from_raw_parts_mut(self.data.add(start), len) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Aligned([u8; 512]);

    fn carve<'a>(carver: &mut Carver<'a>) -> (&'a mut [u32], &'a mut [f64]) {
        (carver.take::<u32>(17), carver.take::<f64>(3))
    }

    #[test]
    fn measuring_and_carving_agree() {
        let mut measuring = Carver::measuring();
        carve(&mut measuring);
        assert_eq!(measuring.used(), Some(128 + 64));
        let mut buffer = Aligned([0xff; 512]);
        let mut carver = Carver::new(&mut buffer.0[..192]);
        let (a, b) = carve(&mut carver);
        assert_eq!((a.len(), b.len()), (17, 3));
        assert_eq!(b.as_ptr() as usize % WORKSPACE_ALIGN, 0);
    }

    #[test]
    fn overflow_is_reported() {
        let mut measuring = Carver::measuring();
        measuring.take::<f64>(usize::MAX / 4);
        assert_eq!(measuring.used(), None);
    }

    #[test]
    fn a_chunk_is_claimed_once() {
        let mut data = [1u32; 10];
        let chunks = Chunks::new(&mut data, 4);
        let lens: [usize; 3] = core::array::from_fn(|_| chunks.claim().unwrap().1.len());
        assert_eq!(lens, [4, 4, 2]);
        assert!(chunks.claim().is_none());
    }
}
