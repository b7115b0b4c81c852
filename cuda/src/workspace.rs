//! Carving the device's scratch memory. Nothing here touches it: addresses are numbers.

use std::marker::PhantomData;

/// Alignment of the workspace and of every part of it, in bytes.
pub(crate) const WORKSPACE_ALIGN: usize = 256;

/// The address of elements in the device's memory.
#[repr(transparent)]
pub(crate) struct Pointer<T> {
    address: u64,
    to: PhantomData<*const T>,
}

impl<T> Clone for Pointer<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Pointer<T> {}

impl<T> std::fmt::Debug for Pointer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.address)
    }
}

impl<T> Pointer<T> {
    /// No memory.
    pub(crate) const NULL: Self = Pointer::new(0);

    pub(crate) const fn new(address: u64) -> Self {
        Pointer { address, to: PhantomData }
    }

    pub(crate) const fn address(self) -> u64 {
        self.address
    }

    /// Of elements whose type the device is told.
    pub(crate) const fn bytes(self) -> Pointer<u8> {
        Pointer::new(self.address)
    }

    /// Moved on by `len` elements.
    pub(crate) fn after(self, len: usize) -> Self {
        Self::new(self.address.wrapping_add((len * size_of::<T>()) as u64))
    }

    /// Moved back by `len` elements: what is there is never touched.
    pub(crate) fn before(self, len: usize) -> Self {
        Self::new(self.address.wrapping_sub((len * size_of::<T>()) as u64))
    }
}

/// Hands out parts of the workspace, or with [`Carver::measuring`] finds out how long it has to be. Both run the same
/// code of a method, so that they agree.
#[derive(Debug)]
pub(crate) struct Carver {
    base: u64,
    used: usize,
    overflow: bool,
}

impl Carver {
    /// Hands out offsets.
    pub(crate) fn measuring() -> Self {
        Self::new(0)
    }

    /// `base` is a multiple of [`WORKSPACE_ALIGN`], and as much memory is there as was measured.
    pub(crate) fn new(base: u64) -> Self {
        Carver { base, used: 0, overflow: false }
    }

    /// `len` elements with unspecified values.
    pub(crate) fn take<T>(&mut self, len: usize) -> Pointer<T> {
        let start = self.used;
        let end = len
            .checked_mul(size_of::<T>())
            .and_then(|bytes| bytes.checked_next_multiple_of(WORKSPACE_ALIGN))
            .and_then(|bytes| bytes.checked_add(start));
        match end {
            Some(end) => self.used = end,
            None => self.overflow = true,
        }
        Pointer::new(self.base.wrapping_add(start as u64))
    }

    /// Bytes handed out so far, or `None` when no address space holds them.
    pub(crate) fn used(&self) -> Option<usize> {
        (!self.overflow && isize::try_from(self.used).is_ok()).then_some(self.used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_apart() {
        let mut carver = Carver::new(0x1000);
        assert_eq!(carver.take::<u32>(3).address(), 0x1000);
        assert_eq!(carver.take::<u8>(0).address(), 0x1100);
        assert_eq!(carver.take::<u64>(33).address(), 0x1100);
        assert_eq!(carver.take::<u8>(1).address(), 0x1300);
        assert_eq!(carver.used(), Some(0x400));
        let mut measured = Carver::measuring();
        measured.take::<u32>(3);
        measured.take::<u64>(33);
        measured.take::<u8>(1);
        assert_eq!(measured.used(), carver.used());
    }

    #[test]
    fn sizes_beyond_the_address_space_are_noticed() {
        let mut carver = Carver::measuring();
        carver.take::<u64>(usize::MAX / 4);
        assert_eq!(carver.used(), None);
        carver.take::<u8>(1);
        assert_eq!(carver.used(), None);
        let mut carver = Carver::measuring();
        carver.take::<u8>(isize::MAX as usize);
        assert_eq!(carver.used(), None);
    }
}
