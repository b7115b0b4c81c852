//! The stream that a call enqueues kernels on.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;

use hyperattn_core::{Error, ErrorKind, Result};

use crate::abi::{AttendParams, BackwardParams, View};
use crate::driver::{CUfunction, CUstream, Device, Driver};
use crate::kernels::{Kernel, Kernels, Loaded};
use crate::tensor_map::TensorMap;
use crate::workspace::Pointer;

/// The caller's stream in the current context. What is enqueued runs in order; nothing here waits for the device or reads
/// its memory.
pub(crate) struct Queue<'a> {
    pub(crate) device: &'a Device,
    driver: &'a Driver,
    kernels: &'a Kernels,
    stream: CUstream,
}

impl<'a> Queue<'a> {
    /// # Safety
    /// `loaded` is of the current context, which stays current as long as the queue lives; `stream` is one of its streams.
    pub(crate) unsafe fn new(driver: &'a Driver, loaded: &'a Loaded, stream: CUstream) -> Self {
        Queue { device: &loaded.device, driver, kernels: &loaded.kernels, stream }
    }

    pub(crate) fn driver(&self) -> &'a Driver {
        self.driver
    }

    /// Enqueues kernel `name` in blocks of `block` threads with `shared_bytes` of dynamic shared memory; none for an empty
    /// grid. `arguments` come from [`args!`].
    ///
    /// # Safety
    /// `arguments` are of the types of the kernel's parameters, all of them, and let it touch nothing but what the call may.
    pub(crate) unsafe fn launch(
        &self,
        name: &'static CStr,
        grid: [u32; 3],
        block: u32,
        shared_bytes: u32,
        arguments: &[Slot<'_>],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let of_kernel = |kernel: &mut Kernel| Ok(kernel.function);
        // SAFETY: the code was loaded for the current context (contract of `new`).
        let function = unsafe { self.kernels.with(self.driver, name, shared_bytes, of_kernel) }?;
        // SAFETY: function and stream are of the current context; the rest is the caller's contract.
        let code = unsafe {
            let places = arguments.as_ptr().cast::<*mut c_void>().cast_mut();
            self.driver.launch(function as CUfunction, grid, block, shared_bytes, self.stream, places)
        };
        self.driver.check(code, name.to_str().unwrap_or("a kernel"))
    }

    /// [`Self::launch`] with as many blocks as run at a time, but no more than `work`: for kernels whose blocks take work
    /// until there is none.
    ///
    /// # Safety
    /// As for [`Self::launch`].
    pub(crate) unsafe fn launch_persistent(
        &self,
        name: &'static CStr,
        work: u32,
        block: u32,
        shared_bytes: u32,
        arguments: &[Slot<'_>],
    ) -> Result<()> {
        if work == 0 {
            return Ok(());
        }
        let occupancy = |kernel: &mut Kernel| {
            let key = (block, shared_bytes);
            if let Some(&(_, blocks)) = kernel.occupancy.iter().find(|(known, _)| *known == key) {
                return Ok(blocks);
            }
            let function = kernel.function as CUfunction;
            // It may load the code of the kernel, so it is not part of what is captured either.
            let blocks = self.driver.outside_capture(|| {
                // SAFETY: the function is of the current context.
                unsafe { self.driver.occupancy(function, block, shared_bytes) }
            })?;
            kernel.occupancy.push((key, blocks));
            Ok(blocks)
        };
        // SAFETY: the code was loaded for the current context (contract of `new`).
        let blocks = unsafe { self.kernels.with(self.driver, name, shared_bytes, occupancy) }?;
        if blocks == 0 {
            return Err(Error::new(
                ErrorKind::Device,
                format_args!(
                    "{}: a block of {block} threads and {shared_bytes} bytes of shared memory does not fit the device",
                    name.to_string_lossy()
                ),
            ));
        }
        let grid = work.min(blocks.saturating_mul(self.device.multiprocessors));
        // SAFETY: the caller's contract.
        unsafe { self.launch(name, [grid, 1, 1], block, shared_bytes, arguments) }
    }

    /// Sets `words` words of 4 bytes to 0.
    ///
    /// # Safety
    /// They are memory of the device that the call may write, at a multiple of 4.
    pub(crate) unsafe fn zero(&self, address: u64, words: usize) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.fill(address, 0, words) }
    }

    /// Sets `words` words of 4 bytes to `value`.
    ///
    /// # Safety
    /// As for [`Self::zero`].
    pub(crate) unsafe fn fill(&self, address: u64, value: u32, words: usize) -> Result<()> {
        if words == 0 {
            return Ok(());
        }
        // SAFETY: the caller's contract; the stream is of the current context.
        unsafe { self.driver.fill(address, value, words, self.stream) }
    }
}

/// A type that a kernel's parameter may have.
///
/// # Safety
/// Its bytes are what the kernel's parameter is made of: a number of the same width, or a `repr(C)` mirror of the struct.
pub(crate) unsafe trait Argument: Copy {}

/// Implements [`Argument`].
macro_rules! argument {
    ($($type:ty),+) => {
        $(
            // SAFETY: a number of this width, or a mirror whose layout abi.rs states.
            unsafe impl Argument for $type {}
        )+
    };
}
argument!(u32, i32, u64, i64, f32, View, AttendParams, BackwardParams, TensorMap);

// SAFETY: a device address.
unsafe impl<T> Argument for Pointer<T> {}

/// Where the driver finds an argument: a borrow of it.
#[repr(transparent)]
pub(crate) struct Slot<'a> {
    place: *mut c_void,
    value: PhantomData<&'a ()>,
}

impl<'a> Slot<'a> {
    pub(crate) fn new<T: Argument>(value: &'a T) -> Self {
        Slot { place: std::ptr::from_ref(value).cast_mut().cast(), value: PhantomData }
    }
}

/// The arguments of a launch, in the order of the kernel's parameters; for use inside the call of [`Queue::launch`], as it
/// borrows the values.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::launch::Slot::new(&$value)),*] };
}
pub(crate) use args;
