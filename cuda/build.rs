//! Embeds the device code: its source in one piece, and where nvcc is found, a fat binary made of it.
//!
//! nvcc is HYPERATTN_NVCC, else the one on PATH, else that of CUDA_HOME or CUDA_PATH. HYPERATTN_NVCC=none builds without.
//! Nothing of CUDA is needed otherwise, and nothing is downloaded.

use std::collections::HashSet;
use std::env;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the fat binary has: instruction sets, by the virtual architectures that nvcc makes them from. Each of these is a pass
/// of its compiler. What is not for sm_90a alone uses nothing that architectures after the first one add; other devices
/// compile its PTX for themselves.
const TARGETS: [(&str, &[&str]); 2] =
    [("compute_80", &["sm_80", "sm_100", "compute_80"]), ("compute_90a", &["sm_90a"])];

/// How every kernel begins.
const KERNEL: &str = "extern \"C\" __global__";
/// How it begins in the source for NVRTC, which then compiles the kernels that it is asked for and no others.
const KERNEL_ON_DEMAND: &str = "template <int> __global__";

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let kernels = here.join("kernels");
    println!("cargo::rerun-if-changed=build.rs");
    // The folder's own change tells of new files.
    println!("cargo::rerun-if-changed={}", kernels.display());

    let mut source = String::new();
    flatten(&kernels, Path::new("entry.cu"), &mut HashSet::new(), &mut source);
    write_if_changed(&out.join("kernels.cu"), source.as_bytes());
    let mut terminated = compact(&source).replace(KERNEL, KERNEL_ON_DEMAND).into_bytes();
    terminated.push(0);
    write_if_changed(&out.join("kernels.cu.0"), &terminated);

    let built = match nvcc() {
        Some(nvcc) => compile(&nvcc, &out),
        None => None,
    };
    let mut embedded = String::from(
        "pub(super) const SOURCE: &std::ffi::CStr =\n\
         \x20   match std::ffi::CStr::from_bytes_with_nul(include_bytes!(concat!(env!(\"OUT_DIR\"), \"/kernels.cu.0\"))) {\n\
         \x20       Ok(source) => source,\n\
         \x20       Err(_) => panic!(\"the source has a 0 in it\"),\n\
         \x20   };\n",
    );
    embedded.push_str(match built {
        Some(()) => {
            "static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!(\"OUT_DIR\"), \"/kernels.fatbin\")));\n\
             pub(super) const BUILT: Option<&Aligned<[u8]>> = Some(IMAGE);\n"
        }
        None => "pub(super) const BUILT: Option<&Aligned<[u8]>> = None;\n",
    });
    write_if_changed(&out.join("embedded.rs"), embedded.as_bytes());
}

/// Appends `file` with its includes in their places, each once.
fn flatten(root: &Path, file: &Path, done: &mut HashSet<PathBuf>, to: &mut String) {
    let path = root.join(file);
    println!("cargo::rerun-if-changed={}", path.display());
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let folder = file.parent().unwrap_or(Path::new(""));
    let line = |to: &mut String, number: usize| {
        writeln!(to, "#line {number} \"{}\"", file.display()).expect("a string grows");
    };
    line(to, 1);
    for (index, text) in text.lines().enumerate() {
        let directive = text.trim();
        if let Some(name) = included_by(directive) {
            let included = folder.join(name);
            if done.insert(included.clone()) {
                flatten(root, &included, done, to);
                line(to, index + 2);
            } else {
                to.push('\n');
            }
        } else if directive == "#pragma once" {
            to.push('\n');
        } else {
            to.push_str(text);
            to.push('\n');
        }
    }
}

/// Without comments, empty lines and spaces that separate nothing, two fifths of the source: what NVRTC gets is in every
/// library.
fn compact(source: &str) -> String {
    let lines = source.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//"));
    let mut to = String::with_capacity(source.len());
    for line in lines {
        // There spaces count.
        if line.starts_with('#') || line.contains(['"', '\'']) {
            to.push_str(line);
        } else {
            push_tokens(&mut to, line);
        }
        to.push('\n');
    }
    to
}

/// A line's tokens, without the spaces that separate none, and without a comment behind them.
fn push_tokens(to: &mut String, line: &str) {
    let alone = |c: char| "(){}[],;".contains(c);
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    // Not signs, which numbers may go on with.
    let operator = |c: char| "=<>!&|*/%?:^~".contains(c);
    let mut before = ';';
    let line = line.split(" // ").next().unwrap_or_default();
    for (at, c) in line.char_indices() {
        let after = line[at + c.len_utf8()..].chars().next().unwrap_or(';');
        let divides_none = alone(before)
            || alone(after)
            || (word(before) && operator(after))
            || (operator(before) && word(after));
        if c != ' ' || !divides_none {
            to.push(c);
            before = c;
        }
    }
}

/// The name in `#include "name"`.
fn included_by(directive: &str) -> Option<&str> {
    directive.strip_prefix("#include \"")?.split_once('"').map(|(name, _)| name)
}

/// Keeps the time of a file that stays the same.
fn write_if_changed(path: &Path, bytes: &[u8]) {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return;
    }
    fs::write(path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// A compiler, and whether the caller has asked for this one.
struct Nvcc {
    path: PathBuf,
    asked: bool,
}

fn nvcc() -> Option<Nvcc> {
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    // Only what decides: a PATH that changes would build anew also where nvcc is named.
    let variable = |name: &str| {
        println!("cargo::rerun-if-env-changed={name}");
        env::var_os(name)
    };
    if let Some(path) = variable("HYPERATTN_NVCC").filter(|path| !path.is_empty()) {
        return (path != "none").then(|| Nvcc { path: path.into(), asked: true });
    }
    let on_path = variable("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>());
    let homes = ["CUDA_HOME", "CUDA_PATH"].map(variable).into_iter().flatten();
    let folders = on_path.into_iter().flatten().chain(homes.map(|home| Path::new(&home).join("bin")));
    let found = folders.map(|folder| folder.join(&name)).find(|path| path.is_file());
    found.map(|path| Nvcc { path, asked: false })
}

/// Makes kernels.fatbin, and ptxas.txt with the registers and spills of every kernel. Where nvcc cannot, the build fails if
/// it was asked for by name; otherwise it goes on without.
fn compile(nvcc: &Nvcc, out: &Path) -> Option<()> {
    let fail = |what: &str| {
        if nvcc.asked {
            panic!("{}: {what}", nvcc.path.display());
        }
        println!("cargo::warning={}: {what}; no device code is built in", nvcc.path.display());
        None
    };
    let known = match Command::new(&nvcc.path).arg("--list-gpu-code").output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(output) => return fail(String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => return fail(&error.to_string()),
    };
    let mut command = Command::new(&nvcc.path);
    // The architectures are compiled beside each other.
    command.args(["-fatbin", "-std=c++17", "-O3", "-Xptxas", "-v", "--threads", "0"]);
    for (architecture, codes) in TARGETS {
        // The list has no variants of an instruction set, and no virtual architectures.
        let is_known = |code: &&str| {
            let is_virtual = *code == architecture;
            is_virtual || known.split_whitespace().any(|name| name == code.trim_end_matches('a'))
        };
        let (codes, unknown): (Vec<&str>, Vec<&str>) = codes.iter().copied().partition(is_known);
        for code in unknown {
            println!("cargo::warning={} does not know {code}", nvcc.path.display());
        }
        if !codes.is_empty() {
            command.arg("-gencode").arg(format!("arch={architecture},code=[{}]", codes.join(",")));
        }
    }
    let output = command.arg("-o").arg(out.join("kernels.fatbin")).arg(out.join("kernels.cu")).output();
    match output {
        Ok(output) if output.status.success() => {
            fs::write(out.join("ptxas.txt"), &output.stderr).expect("the build's folder is writable");
            Some(())
        }
        Ok(output) => fail(&format!(
            "{}\n{}",
            String::from_utf8_lossy(&output.stdout).trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => fail(&error.to_string()),
    }
}
