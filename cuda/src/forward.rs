//! The forward pass: checks, scratch memory, and the method.

use std::ffi::c_void;

use hyperattn_core::{Division, Error, ErrorKind, Layout, Params, Result};

use crate::call::{Call, DeviceTensors};
use crate::divided::Parts;
use crate::driver::{CUstream, Driver, driver};
use crate::kernels::{Loaded, loaded};
use crate::launch::Queue;
use crate::method::Run;
use crate::workspace::{Carver, WORKSPACE_ALIGN};
use crate::{exact, paper, refined};

/// Size and alignment of the workspace that [`forward`] needs for these options and tensors. Needs no device, and no
/// address is looked at. Every error that does not concern addresses, contents or the device is reported here too.
pub fn forward_workspace(params: &Params, tensors: &DeviceTensors) -> Result<Layout> {
    forward_divided_workspace(params, &Division::default(), tensors)
}

/// [`forward_workspace`] of [`forward_divided`].
pub fn forward_divided_workspace(
    params: &Params,
    division: &Division<'_>,
    tensors: &DeviceTensors,
) -> Result<Layout> {
    Ok(Layout { size: most_size(&Parts::new(params, division, tensors)?)?, align: WORKSPACE_ALIGN })
}

/// Loads the kernels into the calling thread's current context, so that no later call there has to. Where the build has
/// none for its device, finds out whether NVRTC can compile them; it compiles each when a call first needs it.
pub fn prepare() -> Result<()> {
    loaded(driver()?).map(|_| ())
}

/// Attention of tensors in the device's memory, enqueued on `stream` of the calling thread's current context; it has not
/// been computed when this returns.
///
/// With `workspace` (address and bytes, see [`forward_workspace`]) nothing is allocated on the device, so that the call can be
/// captured in a graph; without, memory is allocated and freed in the stream's order. Nothing waits for the device. The
/// first call in a context loads code, which takes a while; where NVRTC has to compile it, so does the first call that
/// needs a kernel: some tenths of a second to 5 s for each.
///
/// On an error of the arguments or the device's absence nothing has been enqueued.
///
/// # Safety
/// `stream` is a stream of the current context or NULL, its default stream. From the call's turn in the stream until it is
/// done, the tensors that `tensors` describe are memory of the context's device, their elements readable, those of the
/// outputs writable and used by nobody else; a block mask's arrays hold what [`hyperattn_core::BlockMask`] says; the
/// workspace's memory is the call's alone.
pub unsafe fn forward(
    params: &Params,
    tensors: &DeviceTensors,
    workspace: Option<(u64, usize)>,
    stream: *mut c_void,
) -> Result<()> {
    // SAFETY: the caller's contract.
    unsafe { forward_divided(params, &Division::default(), tensors, workspace, stream) }
}

/// [`forward`] of a call that is divided: its parts are enqueued one after the other and use the same workspace.
///
/// # Safety
/// As for [`forward`].
pub unsafe fn forward_divided(
    params: &Params,
    division: &Division<'_>,
    tensors: &DeviceTensors,
    workspace: Option<(u64, usize)>,
    stream: *mut c_void,
) -> Result<()> {
    let parts = Parts::new(params, division, tensors)?;
    let need = most_size(&parts)?;
    tensors.check_addresses()?;
    if let Some((address, size)) = workspace {
        check_workspace(address, size, need)?;
    }
    let driver = driver()?;
    let loaded = loaded(driver)?;
    let stream: CUstream = stream.cast();
    let run_parts = |address: u64| {
        (0..parts.count()).try_for_each(|index| {
            let part = parts.part(index)?;
            // SAFETY: the caller's contract; the workspace suffices for every part, and the stream is through with
            // the part before.
            unsafe { run(driver, &loaded, stream, &part.call()?, address) }
        })
    };
    // SAFETY: the stream is of the current context (contract).
    unsafe { with_workspace(driver, stream, workspace, need, run_parts) }
}

/// Runs `body` with the address of the caller's workspace, or of memory for `need` bytes that is there for what it enqueues.
///
/// # Safety
/// `stream` is of the current context, and `body` enqueues on it alone.
pub(crate) unsafe fn with_workspace(
    driver: &Driver,
    stream: CUstream,
    workspace: Option<(u64, usize)>,
    need: usize,
    body: impl FnOnce(u64) -> Result<()>,
) -> Result<()> {
    if let Some((address, _)) = workspace {
        return body(address);
    }
    // SAFETY: the caller's contract.
    let address = unsafe { driver.allocate(need.max(1), stream) }?;
    let result = body(address);
    // SAFETY: it was allocated on this stream, and all its uses are enqueued.
    let freed = unsafe { driver.free(address, stream) };
    result.and(freed)
}

/// Bytes of the workspace that suffices for every part.
fn most_size(parts: &Parts<'_>) -> Result<usize> {
    (0..parts.count()).try_fold(0, |most: usize, index| Ok(size(&parts.part(index)?.call()?)?.max(most)))
}

pub(crate) fn check_workspace(address: u64, size: usize, need: usize) -> Result<()> {
    let too_small =
        |sentence: std::fmt::Arguments<'_>| Err(Error::new(ErrorKind::WorkspaceTooSmall, sentence));
    if !address.is_multiple_of(WORKSPACE_ALIGN as u64) {
        return too_small(format_args!(
            "workspace.data = {address:#x} is not a multiple of {WORKSPACE_ALIGN}"
        ));
    }
    if size < need {
        return too_small(format_args!("workspace.size = {size} bytes but {need} are needed"));
    }
    Ok(())
}

/// The parts of the workspace.
enum Buffers {
    Exact(exact::Buffers),
    Paper(paper::Buffers),
    Refined(refined::Buffers),
}

impl Buffers {
    fn carve(call: &Call<'_>, carver: &mut Carver) -> Result<Self> {
        Ok(match Run::of(call) {
            Run::Exact => Buffers::Exact(exact::carve(call, carver)?),
            Run::Paper => Buffers::Paper(paper::carve(call, carver)?),
            Run::Refined => Buffers::Refined(refined::carve(call, carver)?),
        })
    }
}

/// Bytes of the workspace.
fn size(call: &Call<'_>) -> Result<usize> {
    let mut carver = Carver::measuring();
    Buffers::carve(call, &mut carver)?;
    measured(&carver)
}

/// What a carver has measured.
pub(crate) fn measured(carver: &Carver) -> Result<usize> {
    carver.used().ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidArgument,
            format_args!("the shapes need more scratch memory than an address space holds"),
        )
    })
}

/// Enqueues the call with the workspace at `address`.
///
/// # Safety
/// As for [`forward`]; the workspace has as many bytes as [`size`] says, at a multiple of [`WORKSPACE_ALIGN`].
unsafe fn run(
    driver: &Driver,
    loaded: &Loaded,
    stream: CUstream,
    call: &Call<'_>,
    address: u64,
) -> Result<()> {
    let buffers = Buffers::carve(call, &mut Carver::new(address))?;
    // SAFETY: what is loaded is the current context's; the stream is the caller's contract.
    let queue = unsafe { Queue::new(driver, loaded, stream) };
    // SAFETY: the caller's contract.
    unsafe {
        match &buffers {
            Buffers::Exact(buffers) => exact::run(&queue, call, buffers),
            Buffers::Paper(buffers) => paper::run(&queue, call, buffers),
            Buffers::Refined(buffers) => refined::run(&queue, call, buffers),
        }
    }
}
