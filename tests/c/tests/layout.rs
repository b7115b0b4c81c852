//! The structs as a C compiler lays them out, against the contract written a second time in Rust.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::mem::{align_of, offset_of, size_of};
use std::path::Path;

use hyperattn_c_tests::{build, c_program, run_ok};

macro_rules! contract {
    ($(struct $name:ident { $($field:ident: $kind:ty,)* })*) => {
        $(
            #[allow(non_camel_case_types, dead_code)]
            #[repr(C)]
            struct $name { $($field: $kind,)* }
        )*

        /// "struct field" to (offset, size); "struct -" to (size, alignment).
        fn contract() -> BTreeMap<String, (usize, usize)> {
            let mut table = BTreeMap::new();
            $(
                table.insert(concat!(stringify!($name), " -").to_string(), (size_of::<$name>(), align_of::<$name>()));
                $(
                    let key = concat!(stringify!($name), " ", stringify!($field)).to_string();
                    table.insert(key, (offset_of!($name, $field), size_of::<$kind>()));
                )*
            )*
            table
        }
    };
}

type NumThreads = Option<unsafe extern "C" fn(*mut c_void) -> u32>;
type Task = Option<unsafe extern "C" fn(*mut c_void, usize)>;
type ParallelFor = Option<unsafe extern "C" fn(*mut c_void, usize, Task, *mut c_void)>;

contract! {
    struct hyperattn_params {
        struct_size: usize,
        method: u32,
        mask: u32,
        scale: f32,
        residual: u32,
        lsh_num_projs: u32,
        block_size: u32,
        sample_size: u32,
        flags: u32,
        min_seq_len: i64,
        seed: u64,
        offset: u64,
        approx_d_epsilon: f32,
        approx_d_kappa: f32,
        budget: u32,
        num_first_keys: u32,
        band: u32,
        target_error: f32,
        head_methods: *const u32,
    }
    struct hyperattn_tensor {
        data: *mut c_void,
        dtype: u32,
        reserved: u32,
        shape: [i64; 4],
        stride: [i64; 4],
    }
    struct hyperattn_block_mask {
        struct_size: usize,
        query_block: u32,
        key_block: u32,
        num_query_blocks: i64,
        num_key_blocks: i64,
        row_offsets: *const i64,
        columns: *const i32,
        row_offsets_head_stride: i64,
    }
    struct hyperattn_tensors {
        struct_size: usize,
        q: hyperattn_tensor,
        k: hyperattn_tensor,
        v: hyperattn_tensor,
        out: hyperattn_tensor,
        lse: hyperattn_tensor,
        block_mask: *const hyperattn_block_mask,
        error: hyperattn_tensor,
        mask: hyperattn_tensor,
        num_sequences: i64,
        cu_seqlens_q: *const i32,
        cu_seqlens_k: *const i32,
    }
    struct hyperattn_grads {
        struct_size: usize,
        dout: hyperattn_tensor,
        dq: hyperattn_tensor,
        dk: hyperattn_tensor,
        dv: hyperattn_tensor,
        dlse: hyperattn_tensor,
    }
    struct hyperattn_diagnosis {
        struct_size: usize,
        alpha: f64,
        kappa: f64,
        captured_mass: f64,
        estimated_error: f64,
        true_error: f64,
        keys_per_query: f64,
    }
    struct hyperattn_layout {
        size: usize,
        align: usize,
    }
    struct hyperattn_buffer {
        data: *mut c_void,
        size: usize,
    }
    struct hyperattn_threadpool {
        struct_size: usize,
        ctx: *mut c_void,
        num_threads: NumThreads,
        parallel_for: ParallelFor,
    }
    struct hyperattn_cpu_exec {
        struct_size: usize,
        workspace: hyperattn_buffer,
        num_threads: u32,
        reserved: u32,
        pool: *const hyperattn_threadpool,
    }
    struct hyperattn_cuda_exec {
        struct_size: usize,
        workspace: hyperattn_buffer,
        stream: *mut c_void,
    }
}

/// No field of the contract was lost, and none was added in a place other than the end.
#[test]
fn c_and_contract_agree() {
    let executable = Path::new(env!("CARGO_TARGET_TMPDIR")).join("layout").join("layout");
    let printed = run_ok(&build(&c_program("layout"), &executable), &[]);
    let number = |text: &str| text.parse::<usize>().expect("a number");
    let c: BTreeMap<String, (usize, usize)> = printed
        .lines()
        .map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [name, field, a, b] => (format!("{name} {field}"), (number(a), number(b))),
            _ => panic!("layout.c printed {line:?}"),
        })
        .collect();
    assert_eq!(c, contract());
}

/// The numbers themselves on the machines that the library is built for.
#[test]
#[cfg(target_pointer_width = "64")]
fn sizes_on_64_bit_machines() {
    let sizes = [
        size_of::<hyperattn_params>(),
        size_of::<hyperattn_tensor>(),
        size_of::<hyperattn_block_mask>(),
        size_of::<hyperattn_tensors>(),
        size_of::<hyperattn_grads>(),
        size_of::<hyperattn_diagnosis>(),
        size_of::<hyperattn_threadpool>(),
        size_of::<hyperattn_cpu_exec>(),
        size_of::<hyperattn_cuda_exec>(),
    ];
    assert_eq!(sizes, [96, 80, 56, 600, 408, 56, 32, 40, 32]);
}
