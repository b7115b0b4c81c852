//! The CUDA driver: loaded where it is, called through pointers of our own.
//!
//! The bindings' own functions are not called: they panic where the library or a symbol is missing, and they return
//! results as a Rust enum, in which a code that a later driver adds would be undefined behaviour. Only their loader and
//! types are used. No context is created, and the current one stays what it is.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;
use hyperattn_core::{Error, ErrorKind, Result};

pub(crate) use sys::{CUcontext, CUfunction, CUmodule, CUstream};

/// A CUresult, whatever its number.
pub(crate) type Code = c_uint;

/// Numbers of cuda.h.
const SUCCESS: Code = 0;
const OUT_OF_MEMORY: Code = 2;
const NOT_FOUND: Code = 500;
const ATTRIBUTE_MULTIPROCESSOR_COUNT: c_int = 16;
const ATTRIBUTE_L2_CACHE_SIZE: c_int = 38;
const ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: c_int = 76;
const ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: c_int = 97;
const FUNCTION_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;
const STREAM_CAPTURE_MODE_RELAXED: c_uint = 2;

/// Codes that say that there is nothing to run on: stub library, no or busy or unsuitable device, not initialised, no
/// valid context, driver and kernel module that do not fit each other.
const UNAVAILABLE: [Code; 11] = [3, 4, 34, 46, 100, 101, 102, 201, 802, 803, 804];

/// Codes that say that an image is not for this device or driver: no binary, invalid or too new PTX, no or disabled
/// compiler for it, unsupported toolchain.
const UNSUITABLE_IMAGE: [Code; 6] = [200, 209, 218, 221, 222, 223];

/// A table of the driver's functions.
macro_rules! functions {
    ($($field:ident = $symbol:literal($($argument:ty),*);)+) => {
        /// The driver's functions.
        pub(crate) struct Driver {
            $($field: unsafe extern "system" fn($($argument),*) -> Code,)+
        }

        impl Driver {
            fn load() -> Result<Self> {
                Ok(Driver {
                    $(
                        // SAFETY: the type is that of the symbol in cuda.h, but for the result: an enum of 32 bits.
                        $field: unsafe { symbol($symbol) }?,
                    )+
                })
            }
        }
    };
}

functions! {
    error_name = "cuGetErrorName"(Code, *mut *const c_char);
    driver_version = "cuDriverGetVersion"(*mut c_int);
    context_current = "cuCtxGetCurrent"(*mut CUcontext);
    context_id = "cuCtxGetId"(CUcontext, *mut u64);
    context_device = "cuCtxGetDevice"(*mut c_int);
    device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    module_load = "cuModuleLoadData"(*mut CUmodule, *const c_void);
    module_function = "cuModuleGetFunction"(*mut CUfunction, CUmodule, *const c_char);
    function_set_attribute = "cuFuncSetAttribute"(CUfunction, c_int, c_int);
    function_occupancy = "cuOccupancyMaxActiveBlocksPerMultiprocessor"(*mut c_int, CUfunction, c_int, usize);
    exchange_capture_mode = "cuThreadExchangeStreamCaptureMode"(*mut c_uint);
    launch = "cuLaunchKernel"(
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void
    );
    memory_allocate = "cuMemAllocAsync"(*mut u64, usize, CUstream);
    memory_free = "cuMemFreeAsync"(u64, CUstream);
    memory_fill = "cuMemsetD32Async"(u64, c_uint, usize, CUstream);
    encode_tiled = "cuTensorMapEncodeTiled"(
        *mut c_void, c_int, u32, u64, *const u64, *const u64, *const u32, *const u32, c_int, c_int, c_int, c_int
    );
}

/// One function of the driver's library, which is there.
///
/// # Safety
/// `F` is the type of that function.
unsafe fn symbol<F: Copy>(name: &str) -> Result<F> {
    // SAFETY: `present` has found the library, and loading it runs the driver's initialisers only.
    let library = unsafe { sys::culib() };
    // SAFETY: the caller's contract.
    match unsafe { library.get::<F>(name.as_bytes()) } {
        Ok(function) => Ok(*function),
        Err(_) => Err(unavailable(format_args!(
            "the CUDA driver on this machine has no {name}; a driver for CUDA 12.0 or later is needed"
        ))),
    }
}

/// An error of [`ErrorKind::DeviceUnavailable`].
pub(crate) fn unavailable(sentence: std::fmt::Arguments<'_>) -> Error {
    Error::new(ErrorKind::DeviceUnavailable, sentence)
}

/// The driver, loaded and initialised; the same answer for the life of the process.
pub(crate) fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
    DRIVER.get_or_init(start).as_ref().map_err(Clone::clone)
}

fn start() -> Result<Driver> {
    // SAFETY: opening the driver's library runs its initialisers only.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable(format_args!("no CUDA driver on this machine: libcuda is not found")));
    }
    // Asked first: a library without a device need not have anything else.
    // SAFETY: that is the type of cuInit, and 0 its only legal argument; it may be called any number of times.
    let code = unsafe { symbol::<unsafe extern "system" fn(c_uint) -> Code>("cuInit")?(0) };
    if code != SUCCESS {
        let why = match code {
            100 => "no CUDA device is found",
            34 => "the CUDA driver is a stub",
            803 | 804 => "the CUDA driver does not fit the kernel's driver or the device",
            _ => "the CUDA driver does not start",
        };
        return Err(unavailable(format_args!("{why}: cuInit answers {code}")));
    }
    Driver::load()
}

/// A context by its address and its number, which no other context of this process ever has: an address alone may be that
/// of an earlier context, since destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Context {
    pub(crate) handle: usize,
    pub(crate) id: u64,
}

/// What the choice of kernels and their launches depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Device {
    /// Compute capability.
    pub(crate) major: u32,
    /// See `major`.
    pub(crate) minor: u32,
    pub(crate) multiprocessors: u32,
    /// Shared memory of a block, at most, in bytes.
    pub(crate) shared_bytes: u32,
    pub(crate) l2_bytes: usize,
}

impl Driver {
    /// `code` as a result; `what` names the call in the sentence.
    pub(crate) fn check(&self, code: Code, what: &str) -> Result<()> {
        if code == SUCCESS { Ok(()) } else { Err(self.error(code, what)) }
    }

    fn error(&self, code: Code, what: &str) -> Error {
        let kind = match code {
            OUT_OF_MEMORY => ErrorKind::OutOfMemory,
            code if UNAVAILABLE.contains(&code) || code == 209 => ErrorKind::DeviceUnavailable,
            _ => ErrorKind::Device,
        };
        Error::new(kind, format_args!("{what} failed: {} ({code})", self.name(code)))
    }

    fn name(&self, code: Code) -> &'static str {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: `name` is writable. What it gets is a static string, or stays NULL for a number that is unknown.
        let text = unsafe {
            (self.error_name)(code, &mut name);
            if name.is_null() { None } else { Some(CStr::from_ptr(name)) }
        };
        text.and_then(|text| text.to_str().ok()).unwrap_or("unknown error")
    }

    /// The calling thread's current context.
    pub(crate) fn current(&self) -> Result<Context> {
        let mut handle: CUcontext = std::ptr::null_mut();
        // SAFETY: `handle` is writable.
        self.check(unsafe { (self.context_current)(&mut handle) }, "cuCtxGetCurrent")?;
        if handle.is_null() {
            return Err(unavailable(format_args!(
                "no CUDA context is current on the calling thread: make one current (cuCtxSetCurrent), or the device's \
                 by any call of the CUDA runtime (cudaSetDevice)"
            )));
        }
        let mut id = 0;
        // SAFETY: the context is current, so it lives; `id` is writable.
        self.check(unsafe { (self.context_id)(handle, &mut id) }, "cuCtxGetId")?;
        Ok(Context { handle: handle as usize, id })
    }

    /// The device of the current context.
    pub(crate) fn device(&self) -> Result<Device> {
        let mut device = 0;
        // SAFETY: `device` is writable.
        self.check(unsafe { (self.context_device)(&mut device) }, "cuCtxGetDevice")?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: `value` is writable.
            let code = unsafe { (self.device_attribute)(&mut value, attribute, device) };
            self.check(code, "cuDeviceGetAttribute")?;
            Ok(value.max(0) as u32)
        };
        Ok(Device {
            major: attribute(ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: attribute(ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            multiprocessors: attribute(ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
            shared_bytes: attribute(ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            l2_bytes: attribute(ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        })
    }

    /// Version of CUDA that the driver is for: 1000 major + 10 minor; 0 where it does not say.
    pub(crate) fn version(&self) -> u32 {
        let mut version = 0;
        // SAFETY: `version` is writable.
        let code = unsafe { (self.driver_version)(&mut version) };
        if code == SUCCESS { version.max(0) as u32 } else { 0 }
    }

    /// The code in `image` as a module of the current context; `None` where it is not for this device or driver.
    ///
    /// # Safety
    /// `image` is a fat binary, a cubin or terminated PTX.
    pub(crate) unsafe fn load_module(&self, image: &[u8]) -> Result<Option<CUmodule>> {
        let mut module: CUmodule = std::ptr::null_mut();
        // SAFETY: `module` is writable; the image is the caller's contract, and says itself how long it is.
        let code = unsafe { (self.module_load)(&mut module, image.as_ptr().cast()) };
        if UNSUITABLE_IMAGE.contains(&code) {
            return Ok(None);
        }
        self.check(code, "cuModuleLoadData")?;
        Ok(Some(module))
    }

    /// A kernel of a module.
    ///
    /// # Safety
    /// `module` is a module of the current context.
    pub(crate) unsafe fn function(&self, module: CUmodule, name: &CStr) -> Result<CUfunction> {
        let mut function: CUfunction = std::ptr::null_mut();
        // SAFETY: `function` is writable, `name` terminated; the module is the caller's contract.
        let code = unsafe { (self.module_function)(&mut function, module, name.as_ptr()) };
        if code == NOT_FOUND {
            return Err(Error::new(
                ErrorKind::Device,
                format_args!("the device code has no kernel {}", name.to_string_lossy()),
            ));
        }
        self.check(code, "cuModuleGetFunction")?;
        Ok(function)
    }

    /// Lets blocks of `function` have `bytes` of dynamic shared memory.
    ///
    /// # Safety
    /// `function` is of the current context.
    pub(crate) unsafe fn allow_shared(&self, function: CUfunction, bytes: u32) -> Result<()> {
        let attribute = FUNCTION_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the caller's contract.
        let code = unsafe { (self.function_set_attribute)(function, attribute, bytes as c_int) };
        self.check(code, "cuFuncSetAttribute")
    }

    /// Blocks of `function` that one multiprocessor runs at a time.
    ///
    /// # Safety
    /// `function` is of the current context.
    pub(crate) unsafe fn occupancy(
        &self,
        function: CUfunction,
        block: u32,
        shared_bytes: u32,
    ) -> Result<u32> {
        let mut blocks = 0;
        // SAFETY: `blocks` is writable; the function is the caller's contract.
        let code = unsafe {
            (self.function_occupancy)(&mut blocks, function, block as c_int, shared_bytes as usize)
        };
        self.check(code, "cuOccupancyMaxActiveBlocksPerMultiprocessor")?;
        Ok(blocks.max(0) as u32)
    }

    /// Enqueues a kernel.
    ///
    /// # Safety
    /// `function` and `stream` are of the current context, and `arguments` points to the addresses of values of the types
    /// of the kernel's parameters, all of them, which let it touch nothing but what it may.
    pub(crate) unsafe fn launch(
        &self,
        function: CUfunction,
        [x, y, z]: [u32; 3],
        block: u32,
        shared_bytes: u32,
        stream: CUstream,
        arguments: *mut *mut c_void,
    ) -> Code {
        // SAFETY: the caller's contract; the arguments are read before the call returns.
        unsafe {
            (self.launch)(
                function,
                x,
                y,
                z,
                block,
                1,
                1,
                shared_bytes,
                stream,
                arguments,
                std::ptr::null_mut(),
            )
        }
    }

    /// Memory of the current context's device, there from this point of `stream` on.
    ///
    /// # Safety
    /// `stream` is of the current context.
    pub(crate) unsafe fn allocate(&self, bytes: usize, stream: CUstream) -> Result<u64> {
        let mut address = 0;
        // SAFETY: `address` is writable; the stream is the caller's contract.
        let code = unsafe { (self.memory_allocate)(&mut address, bytes, stream) };
        if code == OUT_OF_MEMORY {
            return Err(Error::new(
                ErrorKind::OutOfMemory,
                format_args!("{bytes} bytes of scratch memory could not be allocated on the device"),
            ));
        }
        self.check(code, "cuMemAllocAsync")?;
        Ok(address)
    }

    /// Gives memory back, at this point of `stream`.
    ///
    /// # Safety
    /// `address` is from [`Self::allocate`] on the same stream, and nothing enqueued later uses it.
    pub(crate) unsafe fn free(&self, address: u64, stream: CUstream) -> Result<()> {
        // SAFETY: the caller's contract.
        self.check(unsafe { (self.memory_free)(address, stream) }, "cuMemFreeAsync")
    }

    /// Fills `words` words of 4 bytes.
    ///
    /// # Safety
    /// They are memory of the device that this call may write, at a multiple of 4; `stream` is of the current context.
    pub(crate) unsafe fn fill(&self, address: u64, value: u32, words: usize, stream: CUstream) -> Result<()> {
        // SAFETY: the caller's contract.
        self.check(unsafe { (self.memory_fill)(address, value, words, stream) }, "cuMemsetD32Async")
    }

    /// Encodes a tensor map of four dimensions without interleaving; what is outside reads as 0.
    pub(crate) fn encode_tiled(
        &self,
        map: &mut sys::CUtensorMap,
        element: TensorElement,
        address: u64,
        extents: &[u64; 4],
        strides: &[u64; 3],
        box_extents: &[u32; 4],
    ) -> Result<()> {
        const NO_INTERLEAVE: c_int = 0;
        const SWIZZLE_128B: c_int = 3;
        const L2_PROMOTION_256B: c_int = 3;
        const FILL_WITH_ZEROS: c_int = 0;
        // SAFETY: the pointers are to as many numbers as four dimensions need; the address is kept, not followed.
        let code = unsafe {
            (self.encode_tiled)(
                std::ptr::from_mut(map).cast(),
                element as c_int,
                4,
                address,
                extents.as_ptr(),
                strides.as_ptr(),
                box_extents.as_ptr(),
                [1; 4].as_ptr(),
                NO_INTERLEAVE,
                SWIZZLE_128B,
                L2_PROMOTION_256B,
                FILL_WITH_ZEROS,
            )
        };
        self.check(code, "cuTensorMapEncodeTiled")
    }

    /// Runs `body` where calls that a stream's capture forbids are allowed, as they are for what does not concern the
    /// captured work: loading code.
    pub(crate) fn outside_capture<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut mode = STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: `mode` is writable.
        self.check(unsafe { (self.exchange_capture_mode)(&mut mode) }, "cuThreadExchangeStreamCaptureMode")?;
        let result = body();
        // SAFETY: as above; this puts back what was there.
        self.check(unsafe { (self.exchange_capture_mode)(&mut mode) }, "cuThreadExchangeStreamCaptureMode")?;
        result
    }
}

/// CUtensorMapDataType of the types that have maps.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TensorElement {
    F16 = 6,
    F32 = 7,
    Bf16 = 9,
}

impl TensorElement {
    /// Bytes.
    pub(crate) const fn size(self) -> u32 {
        match self {
            TensorElement::F32 => 4,
            TensorElement::F16 | TensorElement::Bf16 => 2,
        }
    }
}
