//! Hands the host and target triples to the library: at run time, outside a build script, cargo does not say them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for name in ["HOST", "TARGET"] {
        let triple = std::env::var(name).expect("cargo sets HOST and TARGET for build scripts");
        println!("cargo::rustc-env=HYPERATTN_LINK_{name}={triple}");
    }
}
