//! The types of the C interface: names, field order and meanings are a contract.

use core::ffi::c_void;

/// What a call answers: one of HYPERATTN_STATUS_*. Numbers never change meaning. On anything but
/// HYPERATTN_STATUS_OK no output has been written, and hyperattn_last_error() has a sentence that
/// names the argument and the values.
pub type hyperattn_status = i32;

/// The call did what it says.
pub const HYPERATTN_STATUS_OK: i32 = 0;
/// An argument is NULL, out of range, or inconsistent with another argument.
pub const HYPERATTN_STATUS_INVALID_ARGUMENT: i32 = 1;
/// The request is valid, but this build or machine cannot do it.
pub const HYPERATTN_STATUS_UNSUPPORTED: i32 = 2;
/// No usable CUDA device, driver or kernel image.
pub const HYPERATTN_STATUS_DEVICE_UNAVAILABLE: i32 = 3;
/// Scratch memory could not be allocated.
pub const HYPERATTN_STATUS_OUT_OF_MEMORY: i32 = 4;
/// The workspace is too small or misaligned, or none was given with HYPERATTN_FLAG_NO_ALLOC.
pub const HYPERATTN_STATUS_WORKSPACE_TOO_SMALL: i32 = 5;
/// The CUDA driver or NVRTC reported an error.
pub const HYPERATTN_STATUS_CUDA: i32 = 6;
/// A struct_size does not fit this library.
pub const HYPERATTN_STATUS_ABI_MISMATCH: i32 = 7;
/// A bug in the library, caught at its boundary.
pub const HYPERATTN_STATUS_INTERNAL: i32 = 99;

/// Element type: one of HYPERATTN_DTYPE_*. 0 is invalid, so a zero-filled view is rejected.
pub type hyperattn_dtype = u32;

/// IEEE 754 binary32.
pub const HYPERATTN_DTYPE_F32: u32 = 1;
/// IEEE 754 binary16.
pub const HYPERATTN_DTYPE_F16: u32 = 2;
/// bfloat16, the upper half of a binary32.
pub const HYPERATTN_DTYPE_BF16: u32 = 3;

/// Which keys a query sees: one of HYPERATTN_MASK_*. i counts queries and j keys, both from 0.
pub type hyperattn_mask = u32;

/// Every query sees every key.
pub const HYPERATTN_MASK_NONE: u32 = 0;
/// Key j is visible to query i when j <= i + (n_k - n_q): a chunk of queries at the end of a KV cache.
pub const HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT: u32 = 1;
/// Key j is visible to query i when j <= i.
pub const HYPERATTN_MASK_CAUSAL_TOP_LEFT: u32 = 2;

/// How the output is computed: one of HYPERATTN_METHOD_*.
pub type hyperattn_method = u32;

/// Exact while that is the faster choice for the shape on this machine, else REFINED; else PAPER where a
/// block_mask is given.
pub const HYPERATTN_METHOD_AUTO: u32 = 0;
/// Softmax attention without approximation, any length. Time grows with n_q * n_k.
pub const HYPERATTN_METHOD_EXACT: u32 = 1;
/// HyperAttention as published (arXiv 2310.05869): sortLSH blocks and a sampled residual. Near-linear
/// time. On the attention of trained language models the published estimator is often far off (relative
/// errors of 0.2 to 0.8 of the output were measured): check it on your model before you rely on it.
pub const HYPERATTN_METHOD_PAPER: u32 = 2;
/// Exact over the first keys, under a causal mask a band of the latest keys, and the keys that a tile of queries
/// weighs most, about `budget` keys in all; one weighted column stands for the rest. With a target_error above 0
/// each head's error is estimated first: a head that stays well within the target may get by with less than its
/// budget, one that misses the target gets more and in the end is computed exactly. Near-linear time, except
/// for heads that come out exact. Up to min_seq_len or budget keys the whole call is exact.
pub const HYPERATTN_METHOD_REFINED: u32 = 3;

/// How METHOD_PAPER treats what its blocks do not cover: one of HYPERATTN_RESIDUAL_*. METHOD_REFINED knows NONE,
/// which leaves the column for the rest out, and takes the others alike.
pub type hyperattn_residual = u32;

/// One uniform sample of keys serves the row sums and the product with V: the paper's practical variant.
pub const HYPERATTN_RESIDUAL_UNIFORM: u32 = 0;
/// Algorithms 2 and 3: capped row-sum estimate, and columns sampled by the row norms of V. The cap of the
/// default constants suits inputs whose unmasked row sums differ by much; on diffuse or real attention it cuts
/// most of the sum away and the output comes out far too large. Raise approx_d_epsilon and lower approx_d_kappa
/// there, or use UNIFORM.
pub const HYPERATTN_RESIDUAL_ROW_NORM: u32 = 1;
/// Blocks only.
pub const HYPERATTN_RESIDUAL_NONE: u32 = 2;

/// Something that a build may have: one of HYPERATTN_FEATURE_*.
pub type hyperattn_feature = u32;

/// This build has the bodies of the CUDA entry points. Whether there is a device they tell themselves.
pub const HYPERATTN_FEATURE_CUDA: u32 = 1;
/// It has CUDA kernels that were compiled at build time. Without them NVRTC compiles each when a process first needs
/// it, where that library is found.
pub const HYPERATTN_FEATURE_CUDA_AOT: u32 = 2;
/// The library can run its own threads.
pub const HYPERATTN_FEATURE_THREADS: u32 = 3;

/// hyperattn_params.flags: fail with HYPERATTN_STATUS_WORKSPACE_TOO_SMALL rather than allocate scratch.
pub const HYPERATTN_FLAG_NO_ALLOC: u32 = 1;
/// hyperattn_params.flags: permits hyperattn_cuda_backward() to add sums of gradients in any order where that is
/// faster. dq may then differ from call to call, by rounding errors of f32 sums. Everything else keeps its bits: dk and
/// dv, what is not faster in any order, the forward pass, the CPU.
pub const HYPERATTN_FLAG_NONDETERMINISTIC: u32 = 2;

/// What to compute. Fill with hyperattn_params_init(), then override; that stays right when later
/// versions append fields.
///
/// struct_size, here and in every struct that begins with it, is the caller's sizeof. A shorter struct
/// comes from an older header: the missing fields keep their defaults. A longer one is accepted while the
/// part this library does not know is zero, else HYPERATTN_STATUS_ABI_MISMATCH.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_params {
    /// sizeof(hyperattn_params).
    pub struct_size: usize,
    /// Default AUTO.
    pub method: hyperattn_method,
    /// Default NONE.
    pub mask: hyperattn_mask,
    /// Factor on the logits; must be finite. Default 0, which means 1/sqrt(head_dim).
    pub scale: f32,
    /// Default UNIFORM.
    pub residual: hyperattn_residual,
    /// Hyperplanes of the angular hash, 1..24. Default 7. 0 leaves queries and keys in their order:
    /// blocks are then neighbours in the sequence.
    pub lsh_num_projs: u32,
    /// Keys per sorted block. Default 256. 0 means residual only.
    pub block_size: u32,
    /// Sampled keys per sub-problem. Default 256. 0 means blocks only; not both may be 0.
    pub sample_size: u32,
    /// HYPERATTN_FLAG_*. Default 0.
    pub flags: u32,
    /// Sub-problems with at most this many keys are exact; under METHOD_REFINED, calls with so few. At least 0,
    /// default 4096.
    pub min_seq_len: i64,
    /// Key of the counter-based random numbers: the same seed gives the same bits. Default 0.
    pub seed: u64,
    /// Stream of the random numbers, for example the layer number. Default 0.
    pub offset: u64,
    /// Epsilon of Algorithm 2, positive. Default 0.5. Used by RESIDUAL_ROW_NORM only.
    pub approx_d_epsilon: f32,
    /// Kappa of Algorithm 2, positive. Default 1e4. Used by RESIDUAL_ROW_NORM only.
    pub approx_d_kappa: f32,
    /// About as many keys as a query meets under METHOD_REFINED, at least 64. The first keys and the band count, but are
    /// met also where the budget is less. With a target_error a head may get as little as a quarter, or more. Default 1024.
    pub budget: u32,
    /// Leading keys that every query meets under METHOD_REFINED, as far as it sees them. Default 16.
    pub num_first_keys: u32,
    /// Latest visible keys that every query meets under METHOD_REFINED and a causal mask. Default 128.
    pub band: u32,
    /// Relative error of a head's output that METHOD_REFINED aims to stay within, judged by the rows that
    /// hyperattn_tensors.error comes from. Finite, at least 0, default 0.05. 0 keeps the budget, whatever the error.
    pub target_error: f32,
    /// A method for each of the heads_q query heads instead of `method`, for example exact ones where an estimate is
    /// too far off. Each head gets the bits that it would get if all had its method. A block_mask then concerns the
    /// heads whose method is PAPER or AUTO. Default NULL: `method` is that of all heads.
    pub head_methods: *const hyperattn_method,
}

/// A borrowed view of a tensor [batch, heads, sequence, head_dim]. The library neither frees nor keeps
/// the memory. hyperattn_tensor_bhsd() and hyperattn_tensor_bshd() fill one for packed memory.
///
/// Strides count elements, not bytes; stride[3] must be 1 (or shape[3] == 1). A stride of 0 broadcasts an
/// input, and negative strides are allowed; outputs must not overlap themselves, each other or an input.
/// Extents of batch, heads and head_dim are at least 1, head_dim is at most 256; the sequence extent is
/// 0..2147483647, and a tensor without elements needs no memory (data may be NULL). Elements need no
/// alignment beyond their type's. This struct is frozen: it has no struct_size and will not grow.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_tensor {
    /// Address of element [0, 0, 0, 0].
    pub data: *mut c_void,
    /// HYPERATTN_DTYPE_*.
    pub dtype: hyperattn_dtype,
    /// Must be 0.
    pub reserved: u32,
    /// Extents of batch, heads, sequence and head_dim.
    pub shape: [i64; 4],
    /// Distance to the next batch item, head, row and element, in elements.
    pub stride: [i64; 4],
}

/// Exact blocks that the caller chooses, instead of sortLSH (the paper's predefined mask), for
/// METHOD_PAPER. Compressed rows over blocks of query_block queries: a row lists the key blocks that its
/// queries meet exactly, ascending and unique; the residual stands for all other keys.
///
/// Under a causal mask the pattern chooses among the keys of each sub-problem that is estimated.
///
/// For the CPU both arrays are in host memory, and what they hold is checked. For CUDA this struct is in host memory and
/// both arrays are in device memory; they are read in the stream's order and what they hold is not checked.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_block_mask {
    /// sizeof(hyperattn_block_mask).
    pub struct_size: usize,
    /// Queries per block, at least 1.
    pub query_block: u32,
    /// Keys per block, at least 1.
    pub key_block: u32,
    /// ceil(n_q / query_block).
    pub num_query_blocks: i64,
    /// ceil(n_k / key_block).
    pub num_key_blocks: i64,
    /// For (batch, query head): num_query_blocks + 1 ascending offsets into columns, beginning at entry
    /// (batch * heads_q + head) * row_offsets_head_stride.
    pub row_offsets: *const i64,
    /// Indices of key blocks.
    pub columns: *const i32,
    /// Entries from one head's offsets to the next head's. 0 = one pattern for all heads.
    pub row_offsets_head_stride: i64,
}

/// The tensors of a forward call.
///
/// k and v share one dtype. q has that dtype or f32: f32 queries may meet f16 or bf16 keys and values. out
/// has q's dtype or f32.
///
/// heads_q must be a multiple of heads_kv: query head h uses KV head h / (heads_q / heads_kv). head_dim
/// and value_dim are 1..256 and need not be equal. n_q = 0 and n_k = 0 are legal; a query that sees no
/// key gets output 0 and lse -inf.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_tensors {
    /// sizeof(hyperattn_tensors).
    pub struct_size: usize,
    /// Queries [batch, heads_q, n_q, head_dim].
    pub q: hyperattn_tensor,
    /// Keys [batch, heads_kv, n_k, head_dim].
    pub k: hyperattn_tensor,
    /// Values [batch, heads_kv, n_k, value_dim].
    pub v: hyperattn_tensor,
    /// Output [batch, heads_q, n_q, value_dim].
    pub out: hyperattn_tensor,
    /// Natural log of the sum of exp(logit) over the visible keys, f32 [batch, heads_q, n_q, 1]. With
    /// data NULL it is not wanted and its other fields are not looked at.
    pub lse: hyperattn_tensor,
    /// Exact blocks for METHOD_PAPER; NULL = sortLSH chooses.
    pub block_mask: *const hyperattn_block_mask,
    /// Estimated relative error of each head's output, f32 [batch, heads_q, 1, 1], for every method: the Frobenius norm
    /// of (out - exact) over that of exact, over some rows that are computed exactly besides and compared with out.
    /// 0 where the head is computed exactly. With data NULL it is not wanted and its other fields are not looked at.
    /// With num_sequences above 0 it is [num_sequences, heads_q, 1, 1].
    pub error: hyperattn_tensor,
    /// Added to the logits: softmax(scale * q k^T + mask). Any dtype, [batch or 1, heads_q or 1, n_q or 1, n_k], where
    /// an extent of 1 (or a stride of 0) serves all; stride[3] must be 1. With data NULL there is none and its other
    /// fields are not looked at. A key is seen where params.mask shows it and this is not -inf; less than -2^127
    /// (-1.7e38) counts as -inf. What a hidden key and its value hold, NaN too, does not touch the row. NaN or +inf in
    /// the mask makes its row NaN, where params.mask shows the key.
    ///
    /// For METHOD_EXACT on the CPU, which METHOD_AUTO then takes; HYPERATTN_STATUS_UNSUPPORTED with another method,
    /// with hyperattn_diagnose() and on CUDA. Keys that no query of a tile sees are not computed. A mask of 0 and -inf
    /// that hides the last keys of each row, more or fewer of them, costs little beside reading it.
    pub mask: hyperattn_tensor,
    /// Sequences of different lengths, one after the other in the rows of the tensors, whose batch is then 1. Each is
    /// computed as if it were alone, with its own mask, and gets the same bits as alone. 0: all rows of a batch item
    /// are one sequence. Not together with a block_mask.
    pub num_sequences: i64,
    /// num_sequences + 1 numbers that ascend from 0 to n_q: sequence i has the queries from cu_seqlens_q[i] up to,
    /// but not including, cu_seqlens_q[i + 1]. In host memory, for CUDA too. Not looked at when num_sequences is 0.
    pub cu_seqlens_q: *const i32,
    /// The same for keys, up to n_k.
    pub cu_seqlens_k: *const i32,
}

/// The gradients of a backward call: of a loss, with respect to what the forward call wrote (inputs) and with respect
/// to what it read (outputs). Each has the shape of what it belongs to, and strides of its own; none may be left out but
/// dlse. Of the outputs none may overlap itself, another one, an input or a tensor of the call.
///
///     hyperattn_grads g = { .struct_size = sizeof g };
///     g.dout = hyperattn_tensor_bhsd(dout, HYPERATTN_DTYPE_F32, 1, 8, n, 64);
///     g.dq   = hyperattn_tensor_bhsd(dq,   HYPERATTN_DTYPE_F32, 1, 8, n, 64);
///     g.dk   = hyperattn_tensor_bhsd(dk,   HYPERATTN_DTYPE_F32, 1, 2, n, 64);
///     g.dv   = hyperattn_tensor_bhsd(dv,   HYPERATTN_DTYPE_F32, 1, 2, n, 64);
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_grads {
    /// sizeof(hyperattn_grads).
    pub struct_size: usize,
    /// With respect to out: an input [batch, heads_q, n_q, value_dim], q's dtype or f32.
    pub dout: hyperattn_tensor,
    /// With respect to q: an output [batch, heads_q, n_q, head_dim], q's dtype or f32.
    pub dq: hyperattn_tensor,
    /// With respect to k: an output [batch, heads_kv, n_k, head_dim], k's dtype or f32. The sum over the query heads
    /// that share a KV head, and only over these: where k is broadcast with a stride of 0, add up the copies' gradients.
    pub dk: hyperattn_tensor,
    /// With respect to v: an output [batch, heads_kv, n_k, value_dim], v's dtype or f32. As dk.
    pub dv: hyperattn_tensor,
    /// With respect to lse: an input, f32 [batch, heads_q, n_q, 1], for a loss that depends on lse too. With data NULL it
    /// is 0 and its other fields are not looked at.
    pub dlse: hyperattn_tensor,
}

/// hyperattn_diagnose(): compute the heads exactly as well, and look at every row. Time is quadratic.
pub const HYPERATTN_DIAGNOSE_TRUE_ERROR: u32 = 1;

/// What hyperattn_diagnose() finds out about one head. A figure that was not asked for or does not exist is NaN; a NaN
/// in the inputs may make any figure of its heads NaN.
///
/// The sampled rows of a head are min(n_q, 64) evenly spaced queries: the i-th of 64 is query
/// (2 i + 1) n_q / 128, rounded down. The keys that a row meets exactly are, of those that the mask shows it, under
/// METHOD_REFINED the first keys, the band and the chosen columns, but not the column that stands for the rest; under
/// METHOD_PAPER those of its block in each sub-problem and of the sub-problems that are exact, but not the samples; and all
/// where the row or the head is computed exactly.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_diagnosis {
    /// sizeof(hyperattn_diagnosis), set by the caller in every entry.
    pub struct_size: usize,
    /// The paper's alpha: n_q times the largest squared norm of a column of softmax(scale * q k^T) under the mask. Without a
    /// mask and with n_q = n_k it lies between 1 (all weights are equal) and n_q^2 (all queries look at one key only).
    ///
    /// With HYPERATTN_DIAGNOSE_TRUE_ERROR it comes from every row. Else it is an estimate: each column's sum of squares
    /// over the sampled rows times n_q over their number, and the largest of these. Good where the heaviest
    /// columns are heavy in most rows. Up to n_q / 64 times too high where every row has a heavy key of its own; too
    /// low where rows between the sampled ones alone weigh a column.
    pub alpha: f64,
    /// The paper's kappa over the sampled rows: each row's sum of exp(scale * q k) over the keys that the mask shows it and
    /// that it does not meet exactly; the largest of these sums over the smallest. Rows that meet every key that they see
    /// are left out: under a causal mask the early ones. What is left there are rows of different lengths, so that kappa
    /// is large for equal keys too; and METHOD_PAPER's recursion is taken as one selection, its sub-problems' sums together.
    ///
    /// 1 where all sampled rows meet every key that they see, as in an exact head. Infinite where the smallest sum is 0 and
    /// the largest is not: logits of -inf, or some 740 below the row's largest. NaN where all sums are 0.
    ///
    /// The sums are of f32 logits, added up key by key in f64: a share of 1e-12 is as precise as a large one.
    pub kappa: f64,
    /// Share of the softmax weight on the keys that a row meets exactly, averaged over the sampled rows. Rows that see no
    /// key, or logits of -inf only, are left out. 1 where all sampled rows meet every key that they see, as in an exact
    /// head.
    pub captured_mass: f64,
    /// What hyperattn_tensors.error gets for this head.
    pub estimated_error: f64,
    /// Frobenius norm of (out - exact) over that of exact, over all rows, with both outputs in f32. NaN without
    /// HYPERATTN_DIAGNOSE_TRUE_ERROR; infinite where exact is 0 and out is not.
    pub true_error: f64,
    /// Keys and weighted columns that a query meets, on average over the queries.
    pub keys_per_query: f64,
}

/// Size and alignment of a workspace, in bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_layout {
    /// Bytes.
    pub size: usize,
    /// Alignment of the first byte, a power of two.
    pub align: usize,
}

/// Memory that the caller lends for the length of a call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_buffer {
    /// First byte.
    pub data: *mut c_void,
    /// Bytes.
    pub size: usize,
}

/// The caller's own threads.
///
/// parallel_for runs task(task_ctx, i) once for every i in 0..n, on any threads and in any order, and
/// returns when all have returned. It may be called several times during one call, one after the other, always
/// from the thread that called the library. task does not throw, long-jump or call back.
///
///     static uint32_t count(void *ctx) { return engine_threads(ctx); }
///     static void run(void *ctx, size_t n, void (*task)(void *, size_t), void *task_ctx)
///     {
///         engine_parallel_for(ctx, n, task, task_ctx);
///     }
///     hyperattn_threadpool pool = { sizeof pool, engine, count, run };
///     hyperattn_cpu_exec exec = { .struct_size = sizeof exec, .pool = &pool };
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_threadpool {
    /// sizeof(hyperattn_threadpool).
    pub struct_size: usize,
    /// Passed to both functions as it is.
    pub ctx: *mut c_void,
    /// How many tasks can run at the same time, at least 1. Must answer the same for the workspace query and the call.
    pub num_threads: Option<unsafe extern "C" fn(ctx: *mut c_void) -> u32>,
    /// See above.
    pub parallel_for: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            n: usize,
            task: Option<unsafe extern "C" fn(task_ctx: *mut c_void, index: usize)>,
            task_ctx: *mut c_void,
        ),
    >,
}

/// How to run on the CPU. NULL instead of a pointer to it means: allocate scratch, use all available cores.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_cpu_exec {
    /// sizeof(hyperattn_cpu_exec).
    pub struct_size: usize,
    /// Scratch memory of the size and alignment that the workspace query answers for the same
    /// arguments; its contents do not matter before and mean nothing after. {NULL, 0} lets the library allocate.
    pub workspace: hyperattn_buffer,
    /// 0 = all available cores, 1 = the calling thread only. More than the machine has counts as all.
    pub num_threads: u32,
    /// Must be 0.
    pub reserved: u32,
    /// The caller's threads; overrides num_threads. NULL = the library's threads, started at first use.
    pub pool: *const hyperattn_threadpool,
}

/// The CUDA runtime's stream object, known to this header by name only.
pub enum CUstream_st {}

/// How to run on CUDA: on a stream of the calling thread's current context. After any call of the CUDA runtime that is the
/// device's own. NULL instead of a pointer to it means: allocate scratch, use the legacy default stream.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hyperattn_cuda_exec {
    /// sizeof(hyperattn_cuda_exec).
    pub struct_size: usize,
    /// Device memory of the size and alignment that the workspace query answers for the same arguments; it is the call's
    /// until the stream has passed it. {NULL, 0} = stream-ordered allocation.
    pub workspace: hyperattn_buffer,
    /// A cudaStream_t or CUstream; NULL = the legacy default stream.
    pub stream: *mut CUstream_st,
}

/// The layout that compiled programs rely on, for targets with 64-bit pointers.
#[cfg(all(test, target_pointer_width = "64"))]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    /// Asserts the size of a struct and the offsets of its fields.
    macro_rules! layout {
        ($type:ident, $size:literal, { $($field:ident: $offset:literal),+ }) => {
            assert_eq!(size_of::<$type>(), $size, stringify!($type));
            $(assert_eq!(offset_of!($type, $field), $offset, concat!(stringify!($type), ".", stringify!($field)));)+
        };
    }

    #[test]
    fn nothing_has_moved() {
        layout!(hyperattn_params, 96, {
            struct_size: 0, method: 8, mask: 12, scale: 16, residual: 20, lsh_num_projs: 24, block_size: 28,
            sample_size: 32, flags: 36, min_seq_len: 40, seed: 48, offset: 56, approx_d_epsilon: 64,
            approx_d_kappa: 68, budget: 72, num_first_keys: 76, band: 80, target_error: 84,
            head_methods: 88
        });
        layout!(hyperattn_tensor, 80, { data: 0, dtype: 8, reserved: 12, shape: 16, stride: 48 });
        layout!(hyperattn_block_mask, 56, {
            struct_size: 0, query_block: 8, key_block: 12, num_query_blocks: 16, num_key_blocks: 24,
            row_offsets: 32, columns: 40, row_offsets_head_stride: 48
        });
        layout!(hyperattn_tensors, 600, {
            struct_size: 0, q: 8, k: 88, v: 168, out: 248, lse: 328, block_mask: 408, error: 416, mask: 496,
            num_sequences: 576, cu_seqlens_q: 584, cu_seqlens_k: 592
        });
        layout!(hyperattn_grads, 408, { struct_size: 0, dout: 8, dq: 88, dk: 168, dv: 248, dlse: 328 });
        layout!(hyperattn_diagnosis, 56, {
            struct_size: 0, alpha: 8, kappa: 16, captured_mass: 24, estimated_error: 32, true_error: 40,
            keys_per_query: 48
        });
        layout!(hyperattn_layout, 16, { size: 0, align: 8 });
        layout!(hyperattn_buffer, 16, { data: 0, size: 8 });
        layout!(hyperattn_threadpool, 32, { struct_size: 0, ctx: 8, num_threads: 16, parallel_for: 24 });
        layout!(hyperattn_cpu_exec, 40, { struct_size: 0, workspace: 8, num_threads: 24, reserved: 28, pool: 32 });
        layout!(hyperattn_cuda_exec, 32, { struct_size: 0, workspace: 8, stream: 24 });
    }
}
