//! Builds hyperattn's static and shared library and compiles C and C++ programs against them.
//!
//! ```no_run
//! use hyperattn_link::{Language, Program};
//!
//! let program = Program::new(Language::C99, ["attention.c"]).flag("-Wall");
//! let executable = program.compile("target/attention".as_ref())?;
//! std::process::Command::new(executable).status().expect("the program starts");
//! # Ok::<(), hyperattn_link::Error>(())
//! ```

mod artifacts;
mod error;
mod library;
mod program;

pub use error::Error;
pub use library::{
    Library, LibraryBuild, include_dir, library, shared_library, static_library, workspace_dir,
};
pub use program::{Language, Program};

/// The triple that this crate, and so every program it compiles, is built for.
pub const TARGET: &str = env!("HYPERATTN_LINK_TARGET");

/// The triple of the machine that compiles.
pub const HOST: &str = env!("HYPERATTN_LINK_HOST");
