//! Measures the library on lists of problems: time, work rate beside the machine's own peak, error, memory.
//! `README.md` says how to run it and what every column means.

pub mod accuracy;
pub mod cpu;
pub mod csv;
pub mod cuda;
pub mod device;
pub mod driver;
pub mod executor;
pub mod gradients;
pub mod group;
pub mod inputs;
pub mod load;
pub mod memory;
pub mod model;
pub mod options;
pub mod peak;
pub mod peer;
pub mod plot;
pub mod problem;
pub mod problem_list;
pub mod series;
pub mod statistics;
pub mod table;
pub mod tensor;
pub mod timing;
pub mod workspace;
