//! Machines without a driver, or with one that finds no device: a status and a sentence, never a panic. The cases run in
//! child processes of this test, so that the answer does not depend on what this machine has.

use std::path::{Path, PathBuf};
use std::process::Command;

use hyperattn_core::{DType, Error, ErrorKind, Mask, Method, Params, TensorLayout};
use hyperattn_cuda::{DeviceBlockMask, DeviceTensor, DeviceTensors};

/// Set in a child process: what the sentence has to contain.
const EXPECTED: &str = "HYPERATTN_TEST_EXPECTED_SENTENCE";

fn tensors() -> DeviceTensors {
    let tensor = |address, heads, rows, dim| DeviceTensor {
        address,
        layout: TensorLayout::contiguous(DType::BF16, [2, heads, rows, dim]),
    };
    DeviceTensors::new(
        tensor(0x10_0000, 4, 300, 64),
        tensor(0x20_0000, 2, 400, 64),
        tensor(0x30_0000, 2, 400, 128),
        tensor(0x40_0000, 4, 300, 128),
    )
}

fn params(method: Method) -> Params {
    Params { method, mask: Mask::CausalBottomRight, ..Params::default() }
}

fn forward(params: &Params, tensors: &DeviceTensors, workspace: Option<(u64, usize)>) -> Error {
    // SAFETY: without a device nothing is enqueued, and the addresses are not followed.
    unsafe { hyperattn_cuda::forward(params, tensors, workspace, std::ptr::null_mut()) }
        .expect_err("there is no device")
}

#[test]
fn workspaces_are_known_without_a_device() {
    for method in [Method::Exact, Method::Auto] {
        let need = hyperattn_cuda::forward_workspace(&params(method), &tensors()).unwrap();
        assert_eq!(need.align, 256);
        // 24 tiles of 32 bytes, and segments of 24.
        assert_eq!(need.size, 24 * 32 + 768 + 256);
    }
}

#[test]
fn wrong_arguments_are_told_before_the_device_is_looked_for() {
    let exact = params(Method::Exact);
    let invalid = |error: Error, part: &str| {
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.message().contains(part), "{error}");
    };
    let mut wrong = tensors();
    wrong.k.layout.shape[3] = 80;
    invalid(forward(&exact, &wrong, None), "k.shape[3]");
    invalid(hyperattn_cuda::forward_workspace(&exact, &wrong).unwrap_err(), "k.shape[3]");
    let mut wrong = tensors();
    wrong.v.address += 1;
    invalid(forward(&exact, &wrong, None), "v.data");
    let mut wrong = tensors();
    wrong.out.address = wrong.q.address + 64;
    invalid(forward(&exact, &wrong, None), "overlap");
    let mut wrong = tensors();
    wrong.block_mask = Some(DeviceBlockMask {
        query_block: 64,
        key_block: 64,
        num_query_blocks: 5,
        num_key_blocks: 7,
        row_offsets: 0x50_0000,
        columns: 0x60_0000,
        head_stride: 0,
    });
    invalid(forward(&exact, &wrong, None), "block_mask");
    if let Some(mask) = &mut wrong.block_mask {
        mask.num_key_blocks = 6;
    }
    invalid(forward(&params(Method::Paper), &wrong, None), "num_key_blocks");

    let need = hyperattn_cuda::forward_workspace(&exact, &tensors()).unwrap().size;
    for (workspace, part) in
        [((0x70_0000, need - 1), "size"), ((0x70_0080, need), "multiple"), ((0, 0), "size")]
    {
        let error = forward(&exact, &tensors(), Some(workspace));
        assert_eq!(error.kind(), ErrorKind::WorkspaceTooSmall, "{error}");
        assert!(error.message().contains(part), "{error}");
    }
}

/// Runs in a child process only.
#[test]
fn child() {
    let Ok(expected) = std::env::var(EXPECTED) else { return };
    let exact = params(Method::Exact);
    let need = hyperattn_cuda::forward_workspace(&exact, &tensors()).unwrap().size;
    // Asked again, the answer is the same.
    for _ in 0..2 {
        for workspace in [None, Some((0x70_0000, need))] {
            let error = forward(&exact, &tensors(), workspace);
            assert_eq!(error.kind(), ErrorKind::DeviceUnavailable, "{error}");
            assert!(error.message().contains(&expected), "{error} does not contain {expected:?}");
        }
    }
}

/// Runs [`child`] with this folder in front of the loader's path.
fn in_child(libraries: &Path, expected: &str) {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "child", "--nocapture"]).env(EXPECTED, expected);
    let output = command.env("LD_LIBRARY_PATH", libraries).output().expect("this program starts");
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// A library of this C source, or `None` where there is no compiler.
fn library(folder: &str, source: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(folder);
    std::fs::create_dir_all(&folder).expect("the temporary directory is writable");
    let file = folder.join("driver.c");
    std::fs::write(&file, source).expect("the temporary directory is writable");
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    // Every name under which the driver is looked for, so that this machine's own is not found.
    for name in ["libcuda.so", "libcuda.so.1"] {
        let output = Command::new(&compiler)
            .args(["-shared", "-fPIC", "-o"])
            .arg(folder.join(name))
            .arg(&file)
            .output();
        match output {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
            Err(error) => {
                println!("SKIPPED: {compiler:?}: {error}");
                return None;
            }
        }
    }
    Some(folder)
}

#[test]
fn no_driver_on_the_machine() {
    let found = Command::new("ldconfig").arg("-p").output();
    let has_driver = |text: &[u8]| String::from_utf8_lossy(text).contains("libcuda.so");
    if found.is_ok_and(|output| has_driver(&output.stdout))
        || std::env::var_os("HYPERATTN_REQUIRE_DEVICE").is_some()
    {
        println!("SKIPPED: this machine has a CUDA driver");
        return;
    }
    in_child(Path::new("/nonexistent"), "no CUDA driver");
}

#[test]
fn a_driver_without_a_device() {
    if let Some(folder) = library("no_device", "int cuInit(unsigned flags) { (void)flags; return 100; }\n") {
        in_child(&folder, "no CUDA device");
    }
}

#[test]
fn a_driver_that_is_broken() {
    // A code that no header has: only its number can be told.
    if let Some(folder) = library("odd_code", "int cuInit(unsigned flags) { (void)flags; return 123456; }\n")
    {
        in_child(&folder, "123456");
    }
    if let Some(folder) = library("no_symbols", "int something_else;\n") {
        in_child(&folder, "cuInit");
    }
}

#[test]
fn a_driver_that_is_too_old() {
    if let Some(folder) = library("too_old", "int cuInit(unsigned flags) { (void)flags; return 0; }\n") {
        in_child(&folder, "12.0 or later");
    }
}

/// Everything answers, but no context is current.
#[test]
fn a_driver_without_a_context() {
    let functions = [
        "cuGetErrorName",
        "cuDriverGetVersion",
        "cuCtxGetId",
        "cuCtxGetDevice",
        "cuDeviceGetAttribute",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuOccupancyMaxActiveBlocksPerMultiprocessor",
        "cuThreadExchangeStreamCaptureMode",
        "cuLaunchKernel",
        "cuMemAllocAsync",
        "cuMemFreeAsync",
        "cuMemsetD32Async",
        "cuTensorMapEncodeTiled",
    ];
    let mut source = String::from(
        "int cuInit(unsigned flags) { (void)flags; return 0; }\n\
         int cuCtxGetCurrent(void **context) { *context = 0; return 0; }\n",
    );
    for function in functions {
        source.push_str(&format!("int {function}() {{ return 1; }}\n"));
    }
    if let Some(folder) = library("no_context", &source) {
        in_child(&folder, "no CUDA context is current");
    }
}
