//! Builds the libraries as they are shipped: optimised across crates, and the same bytes in every directory.

use std::path::Path;

use hyperattn_link::{Library, LibraryBuild};

use crate::options::Options;
use crate::packages::Packages;
use crate::toolchain;

/// Cargo's separator in CARGO_ENCODED_RUSTFLAGS; paths may have spaces.
const SEPARATOR: &str = "\u{1f}";

/// Runs cargo. The shared library gets `soname`.
pub fn build(options: &Options, packages: &Packages, soname: &str) -> Result<Library, String> {
    let mut flags = callers_flags();
    for (from, to) in renamed_paths(options, packages)? {
        flags.push(format!("--remap-path-prefix={from}={to}"));
    }
    // Reaches no build script, because the target is named.
    flags.push(format!("-Clink-arg=-Wl,-soname,{soname}"));
    LibraryBuild::new()
        .target(&options.target)
        .target_dir(&options.target_dir)
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join(SEPARATOR))
        .build()
        .map_err(|error| error.to_string())
}

fn callers_flags() -> Vec<String> {
    let split = |name: &str, separator: &str| {
        let flags = std::env::var(name).ok()?;
        Some(flags.split(separator).filter(|flag| !flag.is_empty()).map(String::from).collect())
    };
    split("CARGO_ENCODED_RUSTFLAGS", SEPARATOR).or_else(|| split("RUSTFLAGS", " ")).unwrap_or_default()
}

/// Panics name their source file: what those paths begin with on this machine, and what stands for it. The last
/// match counts, so the inner directories come last.
fn renamed_paths(options: &Options, packages: &Packages) -> Result<Vec<(String, String)>, String> {
    let text = |path: &Path| path.display().to_string();
    let mut renamed = vec![(text(hyperattn_link::workspace_dir()), "hyperattn".to_string())];
    renamed.extend(packages.directories().iter().map(|directory| (text(directory), "crates".to_string())));
    renamed.push((text(&options.target_dir), "target".to_string()));
    // Where the sources of the standard library are installed, the compiler names those instead of its own.
    let rust = toolchain::rust()?;
    renamed.push((text(&rust.sysroot.join("lib/rustlib/src/rust")), format!("/rustc/{}", rust.commit)));
    Ok(renamed)
}
