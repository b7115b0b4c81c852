//! A GPU, its memory, streams and events by the CUDA driver's functions, which are looked for at run time.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;

use cudarc::driver::sys;

/// A CUresult, whatever its number.
type Code = c_uint;

/// Contexts, streams and events.
type Handle = *mut c_void;

/// Numbers of cuda.h.
const SUCCESS: Code = 0;
const COMPUTE_CAPABILITY: [c_int; 2] = [75, 76];
const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_DEFAULT: c_uint = 0;

/// A table of the driver's functions.
macro_rules! functions {
    ($($field:ident = $symbol:literal($($argument:ty),*);)+) => {
        /// The driver's functions.
        pub struct Driver {
            $($field: unsafe extern "system" fn($($argument),*) -> Code,)+
        }

        impl Driver {
            fn load() -> Result<Self, String> {
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
    init = "cuInit"(c_uint);
    error_name = "cuGetErrorName"(Code, *mut *const c_char);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device_get = "cuDeviceGet"(*mut c_int, c_int);
    device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
    device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    context_retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
    context_set = "cuCtxSetCurrent"(Handle);
    context_synchronize = "cuCtxSynchronize"();
    memory_allocate = "cuMemAlloc_v2"(*mut u64, usize);
    memory_free = "cuMemFree_v2"(u64);
    memory_fill = "cuMemsetD8_v2"(u64, u8, usize);
    copy_to_device = "cuMemcpyHtoD_v2"(u64, *const c_void, usize);
    copy_to_host = "cuMemcpyDtoH_v2"(*mut c_void, u64, usize);
    stream_create = "cuStreamCreate"(*mut Handle, c_uint);
    stream_synchronize = "cuStreamSynchronize"(Handle);
    stream_destroy = "cuStreamDestroy_v2"(Handle);
    event_create = "cuEventCreate"(*mut Handle, c_uint);
    event_record = "cuEventRecord"(Handle, Handle);
    event_elapsed = "cuEventElapsedTime"(*mut f32, Handle, Handle);
    event_destroy = "cuEventDestroy_v2"(Handle);
}

/// One function of the driver's library, which is there.
///
/// # Safety
/// `F` is the type of that function.
unsafe fn symbol<F: Copy>(name: &str) -> Result<F, String> {
    // SAFETY: the library has been found, and loading it runs the driver's initialisers only.
    let library = unsafe { sys::culib() };
    // SAFETY: the caller's contract.
    let function = unsafe { library.get::<F>(name.as_bytes()) };
    function.map(|function| *function).map_err(|_| format!("the CUDA driver has no {name}"))
}

/// The driver, loaded and initialised.
///
/// # Errors
/// Why it cannot be had.
pub fn driver() -> Result<&'static Driver, String> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    DRIVER.get_or_init(start).as_ref().map_err(Clone::clone)
}

fn start() -> Result<Driver, String> {
    // SAFETY: opening the driver's library runs its initialisers only.
    if !unsafe { sys::is_culib_present() } {
        return Err("no CUDA driver on this machine".to_string());
    }
    let driver = Driver::load()?;
    // SAFETY: 0 is the only legal argument.
    driver.check(unsafe { (driver.init)(0) }, "cuInit")?;
    Ok(driver)
}

impl Driver {
    fn check(&self, code: Code, what: &str) -> Result<(), String> {
        if code == SUCCESS {
            return Ok(());
        }
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: `name` is writable. What it gets is a static string, or stays NULL for a number that is unknown.
        let name = unsafe {
            (self.error_name)(code, &mut name);
            if name.is_null() { c"unknown error" } else { CStr::from_ptr(name) }
        };
        Err(format!("{what} failed: {} ({code})", name.to_string_lossy()))
    }

    /// The first device.
    ///
    /// # Errors
    /// When there is none.
    pub fn first_device(&self) -> Result<c_int, String> {
        let (mut count, mut device) = (0, 0);
        // SAFETY: `count` is writable.
        self.check(unsafe { (self.device_count)(&mut count) }, "cuDeviceGetCount")?;
        if count < 1 {
            return Err("no CUDA device on this machine".to_string());
        }
        // SAFETY: `device` is writable.
        self.check(unsafe { (self.device_get)(&mut device, 0) }, "cuDeviceGet")?;
        Ok(device)
    }

    /// Makes the primary context of a device current on this thread, for the life of the process.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn make_current(&self, device: c_int) -> Result<(), String> {
        let mut context = null_mut();
        // SAFETY: `context` is writable.
        self.check(unsafe { (self.context_retain)(&mut context, device) }, "cuDevicePrimaryCtxRetain")?;
        // SAFETY: the context lives: it has just been retained.
        self.check(unsafe { (self.context_set)(context) }, "cuCtxSetCurrent")
    }

    /// Its two numbers.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn compute_capability(&self, device: c_int) -> Result<[c_int; 2], String> {
        let mut numbers = [0; 2];
        for (number, attribute) in numbers.iter_mut().zip(COMPUTE_CAPABILITY) {
            // SAFETY: `number` is writable.
            let code = unsafe { (self.device_attribute)(number, attribute, device) };
            self.check(code, "cuDeviceGetAttribute")?;
        }
        Ok(numbers)
    }

    /// The name of a device.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn device_name(&self, device: c_int) -> Result<String, String> {
        let mut name = [0u8; 128];
        // SAFETY: as many characters as said are writable.
        let code = unsafe { (self.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, device) };
        self.check(code, "cuDeviceGetName")?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        Ok(name.to_string_lossy().into_owned())
    }

    /// Waits for everything in the current context.
    fn synchronize(&self) -> Result<(), String> {
        // SAFETY: nothing is passed.
        self.check(unsafe { (self.context_synchronize)() }, "cuCtxSynchronize")
    }
}

/// Memory of the current context's device.
pub struct Memory {
    driver: &'static Driver,
    address: u64,
    size: usize,
}

impl Memory {
    /// `size` bytes.
    ///
    /// # Errors
    /// When the device has not so many.
    pub fn new(driver: &'static Driver, size: usize) -> Result<Self, String> {
        let mut address = 0;
        // SAFETY: `address` is writable.
        let code = unsafe { (driver.memory_allocate)(&mut address, size.max(1)) };
        driver.check(code, &format!("allocating {size} bytes on the device"))?;
        Ok(Memory { driver, address, size })
    }

    /// `size` bytes of this value.
    ///
    /// # Errors
    /// When the device has not so many.
    pub fn filled(driver: &'static Driver, size: usize, value: u8) -> Result<Self, String> {
        let memory = Self::new(driver, size)?;
        if size > 0 {
            // SAFETY: the memory has as many bytes.
            driver.check(unsafe { (driver.memory_fill)(memory.address, value, size) }, "cuMemsetD8")?;
            // The default stream does not wait for others, nor they for it.
            driver.synchronize()?;
        }
        Ok(memory)
    }

    /// Device address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Copies as many bytes to the device.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn write(&self, bytes: &[u8]) -> Result<(), String> {
        assert_eq!(bytes.len(), self.size);
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: both sides have as many bytes.
        let code = unsafe { (self.driver.copy_to_device)(self.address, bytes.as_ptr().cast(), bytes.len()) };
        self.driver.check(code, "cuMemcpyHtoD")?;
        // Its last part may still be on its way.
        self.driver.synchronize()
    }

    /// Copies as many bytes from the device, after everything that it still computes.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn read(&self, bytes: &mut [u8]) -> Result<(), String> {
        assert_eq!(bytes.len(), self.size);
        if bytes.is_empty() {
            return Ok(());
        }
        self.driver.synchronize()?;
        let to = bytes.as_mut_ptr().cast();
        // SAFETY: both sides have as many bytes.
        let code = unsafe { (self.driver.copy_to_host)(to, self.address, bytes.len()) };
        self.driver.check(code, "cuMemcpyDtoH")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was allocated and is not used again.
        unsafe { (self.driver.memory_free)(self.address) };
    }
}

/// A stream that does not wait for the default stream.
pub struct Stream {
    driver: &'static Driver,
    handle: Handle,
}

impl Stream {
    /// In the current context.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn new(driver: &'static Driver) -> Result<Self, String> {
        let mut handle = null_mut();
        // SAFETY: `handle` is writable.
        let code = unsafe { (driver.stream_create)(&mut handle, STREAM_NON_BLOCKING) };
        driver.check(code, "cuStreamCreate")?;
        Ok(Stream { driver, handle })
    }

    /// As the library takes it.
    pub fn raw(&self) -> *mut c_void {
        self.handle
    }

    /// Waits until it is empty.
    ///
    /// # Errors
    /// What went wrong in it.
    pub fn synchronize(&self) -> Result<(), String> {
        // SAFETY: the stream lives.
        self.driver.check(unsafe { (self.driver.stream_synchronize)(self.handle) }, "cuStreamSynchronize")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: it was created and is not used again.
        unsafe { (self.driver.stream_destroy)(self.handle) };
    }
}

/// A point of a stream whose time the device writes down.
pub struct Event {
    driver: &'static Driver,
    handle: Handle,
}

impl Event {
    /// In the current context.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn new(driver: &'static Driver) -> Result<Self, String> {
        let mut handle = null_mut();
        // SAFETY: `handle` is writable.
        driver.check(unsafe { (driver.event_create)(&mut handle, EVENT_DEFAULT) }, "cuEventCreate")?;
        Ok(Event { driver, handle })
    }

    /// Puts it behind what is in the stream.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn record(&self, stream: &Stream) -> Result<(), String> {
        // SAFETY: both live, in the same context.
        let code = unsafe { (self.driver.event_record)(self.handle, stream.handle) };
        self.driver.check(code, "cuEventRecord")
    }

    /// The time between two points that the device has passed.
    ///
    /// # Errors
    /// What the driver answers, also when it has not passed them.
    pub fn seconds_until(&self, later: &Event) -> Result<f64, String> {
        let mut milliseconds = 0.0;
        // SAFETY: `milliseconds` is writable, and both events live.
        let code = unsafe { (self.driver.event_elapsed)(&mut milliseconds, self.handle, later.handle) };
        self.driver.check(code, "cuEventElapsedTime")?;
        Ok(f64::from(milliseconds) * 1e-3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: it was created and is not used again.
        unsafe { (self.driver.event_destroy)(self.handle) };
    }
}
