//! The C ABI of hyperattn: `libhyperattn.a`, `libhyperattn.so` and, through cbindgen,
//! `include/hyperattn/hyperattn.h`.
//!
//! Every entry point reads its arguments into the core's types, runs inside `boundary::guard`, and
//! answers a status. The documentation of the items here is what a C reader finds in the header.
#![allow(non_camel_case_types)]
// The documentation of the C items is a C reader's: brackets there are subscripts.
#![allow(rustdoc::broken_intra_doc_links)]

mod backward;
mod block_mask;
mod boundary;
mod call;
mod cpu;
mod cuda;
mod cuda_backward;
mod cuda_plan;
mod diagnose;
mod error;
mod executor;
mod memory;
mod params;
mod plan;
mod planned;
mod sized;
mod status;
mod tensor;
pub mod types;
mod version;
