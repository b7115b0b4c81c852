//! Links the program without the C runtime and without any library.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = std::env::var("TARGET").expect("cargo sets TARGET for build scripts");
    assert!(
        target.starts_with("x86_64-") && target.contains("-linux-"),
        "the program makes system calls of x86-64 Linux and cannot be built for {target}"
    );
    // Nothing would apply the relocations of a position-independent program: there is no loader.
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
