//! Which attention kernel runs a list of tiles, and its launch.

use std::ffi::CStr;
use std::sync::LazyLock;

use hyperattn_core::{DType, Result};

use crate::abi::{AttendParams, View, element_type};
use crate::call::Call;
use crate::driver::{Device, TensorElement};
use crate::launch::{Queue, args};
use crate::tensor_map::{self, Shape};

/// The families of attention kernels, from the most general to the fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    /// Any element types, sizes and alignment; f32 arithmetic.
    Any,
    /// 16-bit elements on the tensor cores of sm_80 and later.
    Mma,
    /// 16-bit elements on those of sm_90, fed by its copy engine.
    Wgmma,
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Launch {
    /// Threads of a block.
    block: u32,
    /// Dynamic shared memory of a block.
    shared_bytes: u32,
    /// Keys that are copied at a time, which is how many rows a tensor map's box has; 0 without maps.
    keys: u32,
}

/// Sizes of head_dim and value_dim that kernels of 16-bit elements are made for; each serves the smaller ones too.
const DIMS: [usize; 5] = [64, 96, 128, 192, 256];
/// Those that the general kernels are made for.
const ANY_DIMS: [usize; 3] = [64, 128, 256];

/// Names of a family's kernels for each of [`DIMS`].
macro_rules! names {
    ($family:literal) => {
        [names!($family, "_f16"), names!($family, "_bf16")]
    };
    ($family:literal, $element:literal) => {
        [
            names!($family, $element, "_64"),
            names!($family, $element, "_96"),
            names!($family, $element, "_128"),
            names!($family, $element, "_192"),
            names!($family, $element, "_256"),
        ]
    };
    ($family:literal, $element:literal, $dim:literal) => {
        match CStr::from_bytes_with_nul(concat!("attend_", $family, $element, $dim, "\0").as_bytes()) {
            Ok(name) => name,
            Err(_) => panic!("a name has one 0, at its end"),
        }
    };
}

const WGMMA: [[&CStr; 5]; 2] = names!("wgmma");
const MMA: [[&CStr; 5]; 2] = names!("mma");
const ANY: [&CStr; 3] = [c"attend_any_64", c"attend_any_128", c"attend_any_256"];

/// The environment variable HYPERATTN_CUDA_KERNELS = any or mma holds the choice down to a family, to compare them. Read
/// once.
pub(crate) static MOST: LazyLock<Family> =
    LazyLock::new(|| match std::env::var("HYPERATTN_CUDA_KERNELS").as_deref() {
        Ok("any") => Family::Any,
        Ok("mma") => Family::Mma,
        _ => Family::Wgmma,
    });

/// Launches of a family's kernels, for each of [`DIMS`] or [`ANY_DIMS`]. entry.cu states the same numbers.
const WGMMA_LAUNCHES: [Launch; 5] = [
    Launch { block: 384, shared_bytes: 172_688, keys: 128 },
    Launch { block: 384, shared_bytes: 203_312, keys: 128 },
    Launch { block: 384, shared_bytes: 203_312, keys: 128 },
    Launch { block: 384, shared_bytes: 202_112, keys: 96 },
    Launch { block: 384, shared_bytes: 201_600, keys: 64 },
];
const MMA_LAUNCHES: [Launch; 5] = [
    Launch { block: 128, shared_bytes: 34_976, keys: 0 },
    Launch { block: 128, shared_bytes: 51_360, keys: 0 },
    Launch { block: 128, shared_bytes: 67_744, keys: 0 },
    Launch { block: 256, shared_bytes: 100_512, keys: 0 },
    Launch { block: 256, shared_bytes: 100_000, keys: 0 },
];
const ANY_LAUNCHES: [Launch; 3] = [
    Launch { block: 256, shared_bytes: 85_152, keys: 0 },
    Launch { block: 256, shared_bytes: 85_152, keys: 0 },
    Launch { block: 256, shared_bytes: 48_288, keys: 0 },
];

/// The family's kernel for these sizes and the element type of q, k and v, and its launch.
fn kernel(family: Family, half: bool, dim: usize) -> (&'static CStr, Launch) {
    let size = |dims: &[usize]| dims.iter().position(|&most| dim <= most).unwrap_or(dims.len() - 1);
    match family {
        Family::Wgmma => (WGMMA[usize::from(!half)][size(&DIMS)], WGMMA_LAUNCHES[size(&DIMS)]),
        Family::Mma => (MMA[usize::from(!half)][size(&DIMS)], MMA_LAUNCHES[size(&DIMS)]),
        Family::Any => (ANY[size(&ANY_DIMS)], ANY_LAUNCHES[size(&ANY_DIMS)]),
    }
}

/// Rows of 16-bit elements that 16 bytes at a time can be read from and written to. Distances that are never walked are 0.
pub(crate) fn aligned(view: &View) -> bool {
    let strides = [view.batch_stride, view.head_stride, view.row_stride];
    view.data.is_multiple_of(16) && strides.iter().all(|stride| stride % 16 == 0)
}

/// The fastest family that can run these tensors on this device.
fn choose(device: &Device, params: &AttendParams) -> Family {
    let sixteen_bits = params.q_type == params.kv_type && params.kv_type != element_type(DType::F32);
    let whole = params.head_dim.is_multiple_of(8) && params.value_dim.is_multiple_of(8);
    if !(sixteen_bits && whole && [&params.q, &params.k, &params.v, &params.out].into_iter().all(aligned)) {
        return Family::Any;
    }
    if (device.major, device.minor) == (9, 0) { Family::Wgmma } else { Family::Mma }
}

/// Runs the tiles of `params`. Its k and v are `[batch, heads_kv, n_k]` of the call, the caller's or copies.
///
/// # Safety
/// What `params` points to is there, for as many tiles as it says; the outputs and states of the tiles' rows are this
/// launch's to write; `next_tile` is one word of the workspace.
pub(crate) unsafe fn attend(queue: &Queue<'_>, call: &Call<'_>, params: &AttendParams) -> Result<()> {
    if params.tile_count == 0 {
        return Ok(());
    }
    let dim = params.head_dim.max(params.value_dim) as usize;
    let half = params.kv_type == element_type(DType::F16);
    let mut family = choose(queue.device, params).min(*MOST);
    // Devices differ in how much shared memory a block may have.
    while family > Family::Any && kernel(family, half, dim).1.shared_bytes > queue.device.shared_bytes {
        family = if family == Family::Wgmma { Family::Mma } else { Family::Any };
    }
    let (name, Launch { block, shared_bytes, keys }) = kernel(family, half, dim);
    // SAFETY: next_tile is the workspace's (contract).
    unsafe { queue.zero(params.next_tile.address(), 1) }?;
    let tiles = params.tile_count;
    if family == Family::Wgmma {
        let element = if half { TensorElement::F16 } else { TensorElement::Bf16 };
        let map = |view: &View, dim: u32| {
            let shape = Shape {
                batch: call.problem.batch,
                heads: (params.heads_q / params.group) as usize,
                rows: params.n_k as usize,
                dim: dim as usize,
            };
            tensor_map::encode(queue.driver(), element, view, &shape, keys)
        };
        let (k, v) = (map(&params.k, params.head_dim)?, map(&params.v, params.value_dim)?);
        // SAFETY: the parameters are (AttendParams, TensorMap, TensorMap); the rest is the caller's contract.
        return unsafe { queue.launch_persistent(name, tiles, block, shared_bytes, args![*params, k, v]) };
    }
    // SAFETY: the one parameter is AttendParams; the rest is the caller's contract.
    unsafe { queue.launch_persistent(name, tiles, block, shared_bytes, args![*params]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{DeviceTensor, DeviceTensors};
    use hyperattn_core::{Params, TensorLayout};

    const HOPPER: Device =
        Device { major: 9, minor: 0, multiprocessors: 132, shared_bytes: 232_448, l2_bytes: 50 << 20 };
    const AMPERE: Device = Device { major: 8, minor: 0, ..HOPPER };

    fn tensors(dtype: DType, dim: i64) -> DeviceTensors {
        let tensor = |heads| DeviceTensor {
            address: 0x10000,
            layout: TensorLayout::contiguous(dtype, [2, heads, 300, dim]),
        };
        let out = DeviceTensor { address: 0x1000000, ..tensor(4) };
        DeviceTensors::new(tensor(4), tensor(2), tensor(2), out)
    }

    fn chosen(device: &Device, tensors: &DeviceTensors) -> Family {
        let params = Params::default();
        let call = Call::new(&params, tensors).unwrap();
        choose(device, &call.attend_params())
    }

    #[test]
    fn each_family_gets_what_it_can_do() {
        let packed = tensors(DType::BF16, 80);
        assert_eq!(chosen(&HOPPER, &packed), Family::Wgmma);
        assert_eq!(chosen(&AMPERE, &packed), Family::Mma);
        assert_eq!(chosen(&Device { major: 10, ..HOPPER }, &packed), Family::Mma);
        assert_eq!(chosen(&HOPPER, &tensors(DType::F32, 64)), Family::Any);
        assert_eq!(chosen(&HOPPER, &tensors(DType::F16, 60)), Family::Any);
        let mut changed = packed;
        changed.q.address += 2;
        assert_eq!(chosen(&HOPPER, &changed), Family::Any);
        let mut changed = packed;
        changed.out.layout.dtype = DType::F32;
        changed.q.layout.dtype = DType::F32;
        assert_eq!(chosen(&HOPPER, &changed), Family::Any);
        let mut changed = packed;
        changed.k.layout.stride[0] = 0;
        assert_eq!(chosen(&HOPPER, &changed), Family::Wgmma);
        changed.k.layout.stride[2] += 1;
        assert_eq!(chosen(&HOPPER, &changed), Family::Any);
    }

    #[test]
    fn sizes_between_take_the_next_larger_kernel() {
        for (dim, name) in [
            (1, c"attend_mma_bf16_64"),
            (64, c"attend_mma_bf16_64"),
            (80, c"attend_mma_bf16_96"),
            (129, c"attend_mma_bf16_192"),
            (256, c"attend_mma_bf16_256"),
        ] {
            assert_eq!(kernel(Family::Mma, false, dim).0, name);
        }
        assert_eq!(kernel(Family::Wgmma, true, 128).0, c"attend_wgmma_f16_128");
        assert_eq!(kernel(Family::Any, true, 65).0, c"attend_any_128");
    }

    /// The compiler of the device code checks the numbers in entry.cu; this checks that they are the ones here.
    #[test]
    fn launches_are_those_that_the_device_code_states() {
        let entry = include_str!("../kernels/entry.cu");
        let states = |what: String, family: &str| {
            let line = format!("static_assert(hyperattn::{what}, \"attend_{family}\");");
            assert!(entry.contains(&line), "{line}");
        };
        for (dim, launch) in DIMS.iter().zip(WGMMA_LAUNCHES) {
            states(format!("hopper::THREADS == {}", launch.block), "wgmma");
            states(format!("hopper::Shape<{dim}>::SHARED_BYTES == {}", launch.shared_bytes), "wgmma");
            states(format!("hopper::Shape<{dim}>::KEYS == {}", launch.keys), "wgmma");
        }
        for (dim, launch) in DIMS.iter().zip(MMA_LAUNCHES) {
            states(format!("mma::Shape<{dim}>::THREADS == {}", launch.block), "mma");
            states(format!("mma::Shape<{dim}>::SHARED_BYTES == {}", launch.shared_bytes), "mma");
        }
        for (dim, launch) in ANY_DIMS.iter().zip(ANY_LAUNCHES) {
            states(format!("simt::THREADS == {}", launch.block), "any");
            states(format!("simt::Shape<{dim}>::SHARED_BYTES == {}", launch.shared_bytes), "any");
        }
    }
}
