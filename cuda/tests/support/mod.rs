//! What the tests on a device share.

// Every test program is compiled with all of it and uses a part.
#![allow(dead_code)]

pub mod call;
pub mod device;
pub mod expect;
pub mod gradients;
pub mod graph;
pub mod problem;
pub mod refined;
pub mod tensor;
pub mod timed;
