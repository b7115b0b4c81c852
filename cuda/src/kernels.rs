//! What a context has loaded: the device code, and kernels of it by name.

use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::{Arc, Mutex};

use hyperattn_core::{Error, ErrorKind, Result};

use crate::driver::{CUfunction, Context, Device, Driver};
use crate::image::{Code, lock};

/// What a context has loaded.
pub(crate) struct Loaded {
    context: Context,
    pub(crate) device: Device,
    pub(crate) kernels: Kernels,
}

/// The module of the current context, loaded at its first call.
///
/// What is kept of a context that has been destroyed is small and is not used again: its number never comes back. It goes
/// when a new context has its address.
pub(crate) fn loaded(driver: &Driver) -> Result<Arc<Loaded>> {
    static LOADED: Mutex<Vec<Arc<Loaded>>> = Mutex::new(Vec::new());
    let context = driver.current()?;
    // Held while loading, so that several threads' first calls load once.
    let mut all = lock(&LOADED);
    if let Some(found) = all.iter().find(|loaded| loaded.context == context) {
        return Ok(found.clone());
    }
    let device = driver.device()?;
    let code = driver.outside_capture(|| Code::load(driver, &device))?;
    all.retain(|loaded| loaded.context.handle != context.handle);
    let new = Arc::new(Loaded { context, device, kernels: Kernels::new(code) });
    all.push(new.clone());
    Ok(new)
}

/// The kernels of a context, looked up when first used.
pub(crate) struct Kernels {
    code: Code,
    known: Mutex<HashMap<&'static CStr, Kernel>>,
}

pub(crate) struct Kernel {
    pub(crate) function: usize,
    /// Dynamic shared memory that its blocks may have.
    shared_bytes: u32,
    /// (threads of a block, dynamic shared memory) and the blocks that one multiprocessor runs at a time.
    pub(crate) occupancy: Vec<((u32, u32), u32)>,
}

impl Kernels {
    /// The kernels of what was loaded for a context.
    fn new(code: Code) -> Self {
        Kernels { code, known: Mutex::new(HashMap::new()) }
    }

    /// Kernel `name`, ready for blocks with `shared_bytes` of dynamic shared memory, and what `body` reads of it.
    ///
    /// # Safety
    /// The code was loaded for the current context.
    pub(crate) unsafe fn with<T>(
        &self,
        driver: &Driver,
        name: &'static CStr,
        shared_bytes: u32,
        body: impl FnOnce(&mut Kernel) -> Result<T>,
    ) -> Result<T> {
        let mut known = lock(&self.known);
        if !known.contains_key(name) {
            let find = || {
                // SAFETY: the caller's contract.
                unsafe { self.code.function(driver, name) }
            };
            let function = driver.outside_capture(find)?;
            let kernel = Kernel {
                function: function as usize,
                // What a block may have without asking depends on its static shared memory.
                shared_bytes: 0,
                occupancy: Vec::new(),
            };
            known.insert(name, kernel);
        }
        let Some(kernel) = known.get_mut(name) else {
            return Err(Error::new(ErrorKind::Device, format_args!("{name:?} is lost")));
        };
        if shared_bytes > kernel.shared_bytes {
            // SAFETY: as above.
            driver.outside_capture(|| unsafe {
                driver.allow_shared(kernel.function as CUfunction, shared_bytes)
            })?;
            kernel.shared_bytes = shared_bytes;
        }
        body(kernel)
    }
}
