//! Which backward kernels run lists of tiles, and their launches.

use std::ffi::CStr;

use hyperattn_core::{DType, Result};

use crate::abi::{BackwardParams, element_type};
use crate::attend::{Family, MOST, aligned};
use crate::driver::Device;
use crate::launch::{Queue, args};

/// How a kernel is launched, and what it is called for f16 and bf16, or for all types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Launch {
    block: u32,
    shared_bytes: u32,
    /// Of dq.
    queries: [&'static CStr; 2],
    /// Of dk and dv together, or of each.
    keys: [&'static [&'static CStr]; 2],
}

/// Sizes of head_dim and value_dim that kernels are made for; each serves the smaller ones too.
const DIMS: [usize; 3] = [64, 128, 256];

/// Launches of a family's kernels, for each of [`DIMS`], or those of them that it has. entry.cu states the same
/// numbers.
const WGMMA: [Launch; 2] = [
    Launch {
        block: 384,
        shared_bytes: 176_944,
        queries: [c"backward_wgmma_queries_f16_64", c"backward_wgmma_queries_bf16_64"],
        keys: [&[c"backward_wgmma_keys_f16_64"], &[c"backward_wgmma_keys_bf16_64"]],
    },
    Launch {
        block: 384,
        shared_bytes: 206_640,
        queries: [c"backward_wgmma_queries_f16_128", c"backward_wgmma_queries_bf16_128"],
        keys: [&[c"backward_wgmma_keys_f16_128"], &[c"backward_wgmma_keys_bf16_128"]],
    },
];
const MMA: [Launch; 3] = [
    Launch {
        block: 256,
        shared_bytes: 69_296,
        queries: [c"backward_mma_queries_f16_64", c"backward_mma_queries_bf16_64"],
        keys: [&[c"backward_mma_keys_f16_64"], &[c"backward_mma_keys_bf16_64"]],
    },
    Launch {
        block: 256,
        shared_bytes: 134_832,
        queries: [c"backward_mma_queries_f16_128", c"backward_mma_queries_bf16_128"],
        keys: [&[c"backward_mma_keys_f16_128"], &[c"backward_mma_keys_bf16_128"]],
    },
    Launch {
        block: 256,
        shared_bytes: 166_576,
        queries: [c"backward_mma_queries_f16_256", c"backward_mma_queries_bf16_256"],
        keys: [
            &[c"backward_mma_keys_f16_256", c"backward_mma_values_f16_256"],
            &[c"backward_mma_keys_bf16_256", c"backward_mma_values_bf16_256"],
        ],
    },
];
const ANY: [Launch; 3] = [
    Launch {
        block: 256,
        shared_bytes: 72_368,
        queries: [c"backward_any_queries_64"; 2],
        keys: [&[c"backward_any_keys_64"]; 2],
    },
    Launch {
        block: 256,
        shared_bytes: 79_536,
        queries: [c"backward_any_queries_128"; 2],
        keys: [&[c"backward_any_keys_128"]; 2],
    },
    Launch {
        block: 256,
        shared_bytes: 71_344,
        queries: [c"backward_any_queries_256"; 2],
        keys: [&[c"backward_any_keys_256"]; 2],
    },
];

/// Rows of the thread blocks of backward_samples.cuh, for each of [`DIMS`].
const SAMPLES_ROWS: [usize; 3] = [64, 32, 16];

/// How the kernels of samples that are met apart are launched (backward_samples.cuh).
#[derive(Debug, Clone, Copy)]
pub(crate) struct SamplesLaunch {
    pub(crate) block: u32,
    pub(crate) shared_bytes: u32,
    /// Rows of a thread block.
    pub(crate) rows: usize,
    pub(crate) queries: &'static CStr,
    pub(crate) keys: &'static CStr,
}

/// The kernels for the larger one of head_dim and value_dim.
pub(crate) fn samples_launch(dim: usize) -> SamplesLaunch {
    let size = size_of_dim(dim);
    let (queries, keys) = [
        (c"backward_samples_queries_64", c"backward_samples_keys_64"),
        (c"backward_samples_queries_128", c"backward_samples_keys_128"),
        (c"backward_samples_queries_256", c"backward_samples_keys_256"),
    ][size];
    let Launch { block, shared_bytes, .. } = ANY[size];
    SamplesLaunch { block, shared_bytes, rows: SAMPLES_ROWS[size], queries, keys }
}

/// Number of the kernels' size.
fn size_of_dim(dim: usize) -> usize {
    DIMS.iter().position(|&most| dim <= most).unwrap_or(DIMS.len() - 1)
}

/// The fastest family that can run these tensors on this device.
pub(super) fn choose(device: &Device, params: &BackwardParams) -> Family {
    let attend = &params.attend;
    let kv = attend.kv_type;
    let sixteen_bits = kv != element_type(DType::F32) && attend.q_type == kv && params.dout_type == kv;
    let whole = attend.head_dim.is_multiple_of(8) && attend.value_dim.is_multiple_of(8);
    let views = [&attend.q, &attend.k, &attend.v, &attend.out, &params.dout, &params.dk, &params.dv];
    if !(sixteen_bits && whole && views.into_iter().all(aligned)) {
        return Family::Any;
    }
    if (device.major, device.minor) == (9, 0) { Family::Wgmma } else { Family::Mma }
}

/// The launch for these tensors on this device.
fn launch(device: &Device, params: &BackwardParams) -> Launch {
    let dim = params.attend.head_dim.max(params.attend.value_dim) as usize;
    let size = size_of_dim(dim);
    let most = choose(device, params).min(*MOST);
    let families = [(Family::Wgmma, WGMMA.get(size)), (Family::Mma, MMA.get(size))];
    // Devices differ in how much shared memory a block may have.
    families
        .into_iter()
        .filter(|(family, _)| *family <= most)
        .filter_map(|(_, launch)| launch.copied())
        .find(|launch| launch.shared_bytes <= device.shared_bytes)
        .unwrap_or(ANY[size])
}

/// Element type of sums of keys that go through memory between passes: that of the gradients where it is bf16, which
/// has the range of f32, and the kernels take it.
pub(crate) fn key_sums_type(device: &Device, params: &BackwardParams) -> u32 {
    let bf16 = element_type(DType::BF16);
    let of_gradients = params.dk_type == bf16 && params.dv_type == bf16;
    let dim = params.attend.head_dim.max(params.attend.value_dim) as usize;
    if of_gradients && WGMMA.get(size_of_dim(dim)) == Some(&launch(device, params)) {
        bf16
    } else {
        element_type(DType::F32)
    }
}

/// f16 kernels come first.
pub(super) fn element(params: &BackwardParams) -> usize {
    usize::from(params.attend.kv_type != element_type(DType::F16))
}

/// Runs one kernel on `tiles` tiles.
///
/// # Safety
/// As for [`queries`] and [`keys`].
unsafe fn run(queue: &Queue<'_>, params: &BackwardParams, name: &'static CStr, tiles: u32) -> Result<()> {
    if tiles == 0 {
        return Ok(());
    }
    let Launch { block, shared_bytes, .. } = launch(queue.device, params);
    // SAFETY: next_tile is the workspace's, and the one parameter is BackwardParams; the rest is the caller's contract.
    unsafe {
        queue.zero(params.attend.next_tile.address(), 1)?;
        queue.launch_persistent(name, tiles, block, shared_bytes, args![*params])
    }
}

/// dq of the tiles of queries.
///
/// # Safety
/// What `params` points to is there, for as many tiles as it says; the gradients and sums of the tiles' rows are this
/// launch's to write; `next_tile` is one word of the workspace.
pub(crate) unsafe fn queries(queue: &Queue<'_>, params: &BackwardParams) -> Result<()> {
    let name = launch(queue.device, params).queries[element(params)];
    // SAFETY: the caller's contract.
    unsafe { run(queue, params, name, params.attend.tile_count) }
}

/// dk and dv of the tiles of keys.
///
/// # Safety
/// As for [`queries`].
pub(crate) unsafe fn keys(queue: &Queue<'_>, params: &BackwardParams) -> Result<()> {
    for name in launch(queue.device, params).keys[element(params)] {
        // SAFETY: the caller's contract.
        unsafe { run(queue, params, name, params.key_tile_count) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The compiler of the device code checks the numbers in entry.cu; this checks that they are the ones here, and
    /// that the kernels' names are there.
    #[test]
    fn launches_are_those_that_the_device_code_states() {
        let entry = include_str!("../../kernels/entry.cu");
        for (family, space, launches) in [
            ("wgmma", "backward_hopper", &WGMMA[..]),
            ("mma", "backward_mma", &MMA),
            ("any", "backward_simt", &ANY),
        ] {
            for (dim, launch) in DIMS.iter().zip(launches) {
                let line = format!(
                    "static_assert(hyperattn::{space}::Shape<{dim}>::SHARED_BYTES == {}, \"backward_{family}\");",
                    launch.shared_bytes
                );
                assert!(entry.contains(&line), "{line}");
            }
        }
        for (dim, rows) in DIMS.iter().zip(SAMPLES_ROWS) {
            let line = format!("backward_simt::Shape<{dim}>::ROWS == {rows}, \"backward_samples\");");
            assert!(entry.contains(&line), "{line}");
        }
    }
}
