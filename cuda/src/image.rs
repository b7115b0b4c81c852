//! The device code: which image of it, and a kernel of it by name.
//!
//! An image compiled at build time, where it is for the device; else the source, of which NVRTC compiles for exactly
//! this device each kernel that a process first asks for, where NVRTC is found; else there is none.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use cudarc::nvrtc::sys;
use hyperattn_core::{Error, ErrorKind, Result};

use crate::driver::{CUfunction, CUmodule, Device, Driver, unavailable};

mod embedded {
    //! What the build script found and made.

    /// The driver reads numbers of up to 8 bytes at the start of an image.
    #[repr(align(64))]
    pub(super) struct Aligned<T: ?Sized>(pub(super) T);

    include!(concat!(env!("OUT_DIR"), "/embedded.rs"));
}

/// Whether an image was compiled at build time.
pub(crate) const COMPILED_AT_BUILD: bool = embedded::BUILT.is_some();

/// Where the kernels of a context come from.
pub(crate) enum Code {
    /// This module, which has all of them.
    Built(usize),
    /// NVRTC, for this architecture.
    Compiled(String),
}

impl Code {
    /// For the current context, which is of `device`.
    pub(crate) fn load(driver: &Driver, device: &Device) -> Result<Code> {
        if device.major < 8 {
            return Err(unavailable(format_args!(
                "the device has compute capability {}.{}; 8.0 or later is needed",
                device.major, device.minor
            )));
        }
        if let Some(image) = embedded::BUILT
            && !*COMPILE_ALWAYS
        {
            // SAFETY: the image is nvcc's fat binary.
            if let Some(module) = unsafe { driver.load_module(&image.0) }? {
                return Ok(Code::Built(module as usize));
            }
        }
        let code = Code::Compiled(architecture(device));
        // Whether NVRTC and the driver can is found out here, before anything of a call is enqueued: by a small kernel.
        // SAFETY: the context is the current one.
        unsafe { code.function(driver, c"fill_heads") }?;
        Ok(code)
    }

    /// Kernel `name`.
    ///
    /// # Safety
    /// The code was loaded for the current context.
    pub(crate) unsafe fn function(&self, driver: &Driver, name: &'static CStr) -> Result<CUfunction> {
        let architecture = match self {
            Code::Built(module) => {
                // SAFETY: the module is of the current context (contract).
                return unsafe { driver.function(*module as CUmodule, name) };
            }
            Code::Compiled(architecture) => architecture,
        };
        let image = compiled(architecture, name)?;
        // SAFETY: the image is NVRTC's cubin.
        let module = unsafe { driver.load_module(&image.cubin) }?.ok_or_else(|| {
            unavailable(format_args!(
                "the code that NVRTC {} made for {architecture} is not for this driver, which is for CUDA {}.{}",
                nvrtc().map_or_else(|_| String::from("?"), |nvrtc| nvrtc.version()),
                driver.version() / 1000,
                driver.version() % 1000 / 10
            ))
        })?;
        // SAFETY: the module was just loaded into the current context.
        unsafe { driver.function(module, &image.kernel) }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the mutexes here guard is whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The environment variable HYPERATTN_CUDA_IMAGE = nvrtc passes over the image of the build, to try NVRTC's. Read once.
static COMPILE_ALWAYS: LazyLock<bool> =
    LazyLock::new(|| std::env::var_os("HYPERATTN_CUDA_IMAGE").is_some_and(|value| value == "nvrtc"));

/// What NVRTC calls the device's own instruction set; that of 9.0 has tensor core instructions that later ones lack.
fn architecture(device: &Device) -> String {
    match (device.major, device.minor) {
        (9, 0) => String::from("sm_90a"),
        (major, minor) => format!("sm_{major}{minor}"),
    }
}

/// A kernel that NVRTC has compiled.
struct Image {
    cubin: Vec<u8>,
    /// What the kernel is called there.
    kernel: CString,
}

/// A kernel compiled for `architecture`, once in a process; an error is kept too, as trying again takes seconds.
fn compiled(architecture: &str, kernel: &'static CStr) -> Result<Arc<Image>> {
    type Key = (String, &'static CStr);
    static COMPILED: Mutex<Vec<(Key, Result<Arc<Image>>)>> = Mutex::new(Vec::new());
    let mut all = lock(&COMPILED);
    let key = (architecture.to_owned(), kernel);
    if let Some((_, image)) = all.iter().find(|(known, _)| *known == key) {
        return image.clone();
    }
    let image = compile(embedded::SOURCE, architecture, Some(kernel)).map(Arc::new);
    all.push((key, image.clone()));
    image
}

type NvrtcCode = c_uint;
type Program = *mut c_void;

/// NVRTC's functions. Loaded like the driver's, and for the same reasons.
struct Nvrtc {
    version: unsafe extern "system" fn(*mut c_int, *mut c_int) -> NvrtcCode,
    create: unsafe extern "system" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> NvrtcCode,
    add_name: unsafe extern "system" fn(Program, *const c_char) -> NvrtcCode,
    compile: unsafe extern "system" fn(Program, c_int, *const *const c_char) -> NvrtcCode,
    lowered_name: unsafe extern "system" fn(Program, *const c_char, *mut *const c_char) -> NvrtcCode,
    log_size: unsafe extern "system" fn(Program, *mut usize) -> NvrtcCode,
    log: unsafe extern "system" fn(Program, *mut c_char) -> NvrtcCode,
    cubin_size: unsafe extern "system" fn(Program, *mut usize) -> NvrtcCode,
    cubin: unsafe extern "system" fn(Program, *mut c_char) -> NvrtcCode,
    destroy: unsafe extern "system" fn(*mut Program) -> NvrtcCode,
}

fn nvrtc() -> Result<Nvrtc> {
    // SAFETY: opening the library runs its initialisers only.
    if !unsafe { sys::is_culib_present() } {
        let built = match COMPILED_AT_BUILD {
            true => "that of the build is not for this device and driver",
            false => "there was no nvcc at build time",
        };
        return Err(unavailable(format_args!(
            "no device code: {built}, and libnvrtc is not found to compile it now"
        )));
    }
    // SAFETY: the types are those of the symbols in nvrtc.h, but for the result: an enum of 32 bits.
    unsafe {
        Ok(Nvrtc {
            version: symbol("nvrtcVersion")?,
            create: symbol("nvrtcCreateProgram")?,
            add_name: symbol("nvrtcAddNameExpression")?,
            compile: symbol("nvrtcCompileProgram")?,
            lowered_name: symbol("nvrtcGetLoweredName")?,
            log_size: symbol("nvrtcGetProgramLogSize")?,
            log: symbol("nvrtcGetProgramLog")?,
            cubin_size: symbol("nvrtcGetCUBINSize")?,
            cubin: symbol("nvrtcGetCUBIN")?,
            destroy: symbol("nvrtcDestroyProgram")?,
        })
    }
}

/// One function of NVRTC's library, which is there.
///
/// # Safety
/// `F` is the type of that function.
unsafe fn symbol<F: Copy>(name: &str) -> Result<F> {
    // SAFETY: the library has been found.
    let library = unsafe { sys::culib() };
    // SAFETY: the caller's contract.
    match unsafe { library.get::<F>(name.as_bytes()) } {
        Ok(function) => Ok(*function),
        Err(_) => Err(unavailable(format_args!("the NVRTC on this machine has no {name}; it is too old"))),
    }
}

impl Nvrtc {
    fn version(&self) -> String {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both are writable.
        unsafe { (self.version)(&mut major, &mut minor) };
        format!("{major}.{minor}")
    }

    fn check(&self, code: NvrtcCode, what: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Device,
            format_args!("{what} of NVRTC {} failed with code {code}", self.version()),
        ))
    }

    /// The first error of a compilation.
    fn complaint(&self, program: Program) -> String {
        let mut size = 0;
        // SAFETY: the program lives; `size` is writable.
        if unsafe { (self.log_size)(program, &mut size) } != 0 {
            return String::new();
        }
        let mut log = vec![0u8; size + 1];
        // SAFETY: the log has `size` bytes, its terminator among them, and there is room for one more.
        unsafe { (self.log)(program, log.as_mut_ptr().cast()) };
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
        log.lines().find(|line| line.contains("error")).unwrap_or(log.trim()).to_owned()
    }

    /// The program's code with `kernel`, where it is named: an instance of a template.
    fn image_of(&self, program: Program, architecture: &str, kernel: Option<&CStr>) -> Result<Image> {
        let expression =
            kernel.map(|kernel| CString::new([kernel.to_bytes(), b"<0>"].concat()).unwrap_or_default());
        if let Some(expression) = &expression {
            // SAFETY: the program lives and has not been compiled; the name is terminated.
            self.check(unsafe { (self.add_name)(program, expression.as_ptr()) }, "nvrtcAddNameExpression")?;
        }
        const INVALID_OPTION: NvrtcCode = 5;
        let option = CString::new(format!("--gpu-architecture={architecture}")).unwrap_or_default();
        let options = [option.as_ptr(), c"--std=c++17".as_ptr(), c"--define-macro=HYPERATTN_NVRTC".as_ptr()];
        // SAFETY: the program lives, and there are as many terminated options as said.
        let code = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        if code == INVALID_OPTION {
            return Err(unavailable(format_args!(
                "no device code: NVRTC {} cannot compile for {architecture}",
                self.version()
            )));
        }
        if code != 0 {
            return Err(Error::new(
                ErrorKind::Device,
                format_args!("NVRTC {} for {architecture}: {}", self.version(), self.complaint(program)),
            ));
        }
        let mut size = 0;
        // SAFETY: the program lives; `size` is writable.
        self.check(unsafe { (self.cubin_size)(program, &mut size) }, "nvrtcGetCUBINSize")?;
        let mut cubin = vec![0u8; size];
        // SAFETY: the cubin has `size` bytes.
        self.check(unsafe { (self.cubin)(program, cubin.as_mut_ptr().cast()) }, "nvrtcGetCUBIN")?;
        let mut kernel = CString::default();
        if let Some(expression) = &expression {
            let mut name = std::ptr::null();
            // SAFETY: the program lives and has been compiled with this name; `name` is writable.
            let code = unsafe { (self.lowered_name)(program, expression.as_ptr(), &mut name) };
            self.check(code, "nvrtcGetLoweredName")?;
            // SAFETY: a terminated string that lives as long as the program.
            kernel = unsafe { CStr::from_ptr(name) }.to_owned();
        }
        Ok(Image { cubin, kernel })
    }
}

/// The machine code of `source` for a device's own instruction set.
fn compile(source: &CStr, architecture: &str, kernel: Option<&CStr>) -> Result<Image> {
    let nvrtc = nvrtc()?;
    let mut program: Program = std::ptr::null_mut();
    // SAFETY: `program` is writable, the strings are terminated, and there are no headers.
    let code = unsafe {
        (nvrtc.create)(
            &mut program,
            source.as_ptr(),
            c"hyperattn.cu".as_ptr(),
            0,
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    nvrtc.check(code, "nvrtcCreateProgram")?;
    let image = nvrtc.image_of(program, architecture, kernel);
    // SAFETY: the program was created above, and is not used again.
    unsafe { (nvrtc.destroy)(&mut program) };
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How the build script makes a kernel begin.
    const ON_DEMAND: &str = "template <int> __global__";

    fn compile_error(source: &CStr, architecture: &str, kernel: Option<&CStr>) -> Error {
        match compile(source, architecture, kernel) {
            Ok(image) => panic!("{architecture}: {} bytes", image.cubin.len()),
            Err(error) => error,
        }
    }

    /// All kernels at once, which takes two to three minutes, and one alone.
    fn assert_compiles(architecture: &str) {
        if let Err(error) = nvrtc() {
            println!("SKIPPED: {error}");
            return;
        }
        let source = embedded::SOURCE.to_str().expect("the kernels are text");
        let all = CString::new(source.replace(ON_DEMAND, "extern \"C\" __global__"))
            .expect("the source has no 0 in it");
        let all = compile(&all, architecture, None).unwrap_or_else(|error| panic!("{error:?}"));
        let one = compile(embedded::SOURCE, architecture, Some(c"attend_mma_bf16_64"));
        let one = one.unwrap_or_else(|error| panic!("{error:?}"));
        let kernel = one.kernel.to_bytes();
        for (cubin, kernel) in [(&all.cubin, &b"attend_mma_bf16_64"[..]), (&one.cubin, kernel)] {
            assert!(cubin.starts_with(b"\x7fELF"), "{architecture}: {} bytes", cubin.len());
            assert!(cubin.windows(kernel.len()).any(|name| name == kernel), "{architecture}");
        }
        let other = |cubin: &[u8]| cubin.windows(10).any(|name| name == b"attend_any");
        assert!(other(&all.cubin) && !other(&one.cubin), "{architecture}: a kernel is compiled alone");
    }

    #[test]
    fn the_source_compiles_for_ampere() {
        assert_compiles("sm_80");
    }

    #[test]
    fn the_source_compiles_for_hopper() {
        assert_compiles("sm_90a");
    }

    #[test]
    fn the_source_compiles_for_blackwell() {
        assert_compiles("sm_100");
    }

    #[test]
    fn an_error_of_the_source_is_told() {
        if let Err(error) = nvrtc() {
            println!("SKIPPED: {error}");
            return;
        }
        let error = compile_error(c"__global__ void broken() { undeclared(); }", "sm_80", None);
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.message().contains("undeclared"), "{error}");
        let error = compile_error(c"__global__ void fine() {}", "sm_1", None);
        assert_eq!(error.kind(), ErrorKind::DeviceUnavailable, "{error}");
        let error = compile_error(embedded::SOURCE, "sm_80", Some(c"no_such_kernel"));
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.message().contains("no_such_kernel"), "{error}");
    }

    #[test]
    fn the_source_stands_alone() {
        let source = embedded::SOURCE.to_str().expect("the kernels are text");
        assert!(source.contains("exact_tiles"));
        // Another beginning would have NVRTC find no kernel.
        assert!(source.matches(ON_DEMAND).count() > 50 && !source.contains("extern \"C\""));
        let mut lines = source.lines().map(str::trim);
        assert!(lines.all(|line| !line.starts_with("#include") && !line.starts_with("#pragma once")));
    }

    #[test]
    fn devices_have_their_own_architecture() {
        let device = |major, minor| Device { major, minor, multiprocessors: 1, shared_bytes: 0, l2_bytes: 0 };
        for (device, name) in [
            (device(8, 0), "sm_80"),
            (device(8, 9), "sm_89"),
            (device(9, 0), "sm_90a"),
            (device(12, 0), "sm_120"),
        ] {
            assert_eq!(architecture(&device), name);
        }
    }
}
