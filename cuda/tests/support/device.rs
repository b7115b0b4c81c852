//! A device, its memory and streams, by the driver's own functions.

use std::io::Write;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use cudarc::driver::sys::{self, CUcontext, CUresult, CUstream};

/// Calls a function of the driver, which must succeed.
macro_rules! cuda {
    ($name:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: the driver is there (`Device::first`), and the tests pass handles and memory that live.
        let result = unsafe { cudarc::driver::sys::$name($($argument),*) };
        assert_eq!(result, cudarc::driver::sys::CUresult::CUDA_SUCCESS, stringify!($name));
    }};
}
pub(crate) use cuda;

/// Held by every test that uses the device; alone by one that captures, as capture forbids others to wait for the device.
static IN_USE: RwLock<()> = RwLock::new(());

/// The first device of the machine.
pub struct Device {
    ordinal: i32,
    _guard: Guard,
}

enum Guard {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Alone { _guard: RwLockWriteGuard<'static, ()> },
}

/// Says why a test does not run, which HYPERATTN_REQUIRE_DEVICE=1 makes a failure.
pub fn skip(reason: &str) {
    let required = std::env::var_os("HYPERATTN_REQUIRE_DEVICE").is_some_and(|value| value == "1");
    assert!(!required, "HYPERATTN_REQUIRE_DEVICE=1, but: {reason}");
    // Past the test runner's capture, which would hide the line of a passing test.
    writeln!(std::io::stdout(), "SKIPPED: {reason}").expect("standard output");
}

impl Device {
    /// The device with its primary context current on this thread. `None` where there is none, which
    /// HYPERATTN_REQUIRE_DEVICE=1 makes a failure.
    pub fn first() -> Option<Self> {
        let guard = IN_USE.read().unwrap_or_else(PoisonError::into_inner);
        Self::with(Guard::Shared { _guard: guard })
    }

    /// The same, used by no other test meanwhile.
    pub fn alone() -> Option<Self> {
        let guard = IN_USE.write().unwrap_or_else(PoisonError::into_inner);
        Self::with(Guard::Alone { _guard: guard })
    }

    fn with(guard: Guard) -> Option<Self> {
        let Some(ordinal) = find() else {
            skip("no CUDA device");
            return None;
        };
        let device = Device { ordinal, _guard: guard };
        device.make_current();
        Some(device)
    }

    /// Makes the primary context current on this thread.
    pub fn make_current(&self) {
        let mut context: CUcontext = std::ptr::null_mut();
        cuda!(cuDevicePrimaryCtxRetain(&mut context, self.ordinal));
        cuda!(cuCtxSetCurrent(context));
    }

    /// A context of its own, current on this thread on top of what was.
    pub fn push_new_context(&self) -> Context {
        let mut context: CUcontext = std::ptr::null_mut();
        cuda!(cuCtxCreate_v4(&mut context, std::ptr::null_mut(), 0, self.ordinal));
        Context(context)
    }
}

fn find() -> Option<i32> {
    // SAFETY: opening the driver's library runs its initialisers only.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    // SAFETY: the library is there.
    if unsafe { sys::cuInit(0) } != CUresult::CUDA_SUCCESS {
        return None;
    }
    let mut count = 0;
    cuda!(cuDeviceGetCount(&mut count));
    let mut ordinal = 0;
    (count > 0).then(|| {
        cuda!(cuDeviceGet(&mut ordinal, 0));
        ordinal
    })
}

/// A context that a test has made.
pub struct Context(CUcontext);

impl Context {
    /// Takes it off this thread and destroys it.
    pub fn destroy(self) {
        cuda!(cuCtxDestroy_v2(self.0));
    }

    /// Address of the context.
    pub fn address(&self) -> usize {
        self.0 as usize
    }
}

/// The context that is current on this thread.
pub fn current_context() -> usize {
    let mut context: CUcontext = std::ptr::null_mut();
    cuda!(cuCtxGetCurrent(&mut context));
    context as usize
}

/// Waits for everything in the current context.
pub fn synchronize() {
    cuda!(cuCtxSynchronize());
}

/// Memory of the device.
pub struct Memory {
    address: u64,
    size: usize,
}

impl Memory {
    /// `size` bytes of this value, or `None` where the device has not so many.
    pub fn try_filled(size: usize, value: u8) -> Option<Self> {
        let mut address = 0;
        // SAFETY: `address` is writable.
        if unsafe { sys::cuMemAlloc_v2(&mut address, size.max(1)) } != CUresult::CUDA_SUCCESS {
            return None;
        }
        cuda!(cuMemsetD8_v2(address, value, size.max(1)));
        // The default stream does not wait for others, nor they for it.
        synchronize();
        Some(Memory { address, size })
    }

    /// `size` bytes of this value.
    pub fn filled(size: usize, value: u8) -> Self {
        Self::try_filled(size, value).expect("memory of the device")
    }

    /// Device address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Copies bytes to the device.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.size);
        if !bytes.is_empty() {
            cuda!(cuMemcpyHtoD_v2(self.address + at as u64, bytes.as_ptr().cast(), bytes.len()));
            synchronize();
        }
    }

    /// Copies bytes from the device.
    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.size);
        let mut bytes = vec![0; len];
        if len > 0 {
            synchronize();
            cuda!(cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), self.address + at as u64, len));
        }
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was allocated and is not used again. A test that fails may have destroyed its context.
        unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// A stream.
pub struct Stream(CUstream);

impl Stream {
    /// A stream that does not wait for the default stream.
    pub fn new() -> Self {
        const NON_BLOCKING: u32 = 1;
        let mut stream: CUstream = std::ptr::null_mut();
        cuda!(cuStreamCreate(&mut stream, NON_BLOCKING));
        Stream(stream)
    }

    /// As the library takes it.
    pub fn raw(&self) -> *mut std::ffi::c_void {
        self.0.cast()
    }

    /// The driver's handle.
    pub fn handle(&self) -> CUstream {
        self.0
    }

    /// Milliseconds that what `body` enqueues takes.
    pub fn time(&self, body: &dyn Fn()) -> f32 {
        let mut events = [std::ptr::null_mut(); 2];
        events.iter_mut().for_each(|event| cuda!(cuEventCreate(event, 0)));
        cuda!(cuEventRecord(events[0], self.0));
        body();
        cuda!(cuEventRecord(events[1], self.0));
        self.synchronize();
        let mut milliseconds = 0.0;
        cuda!(cuEventElapsedTime_v2(&mut milliseconds, events[0], events[1]));
        events.iter().for_each(|&event| cuda!(cuEventDestroy_v2(event)));
        milliseconds
    }

    /// Waits until it is empty.
    pub fn synchronize(&self) {
        cuda!(cuStreamSynchronize(self.0));
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: it was created and is not used again.
        unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}
