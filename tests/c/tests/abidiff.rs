//! What abidiff says of structs that change: with `appended_fields.abignore`, growing at the end is compatible where the
//! header allows it, and everything else is seen.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use hyperattn_c_tests::{folder, has_tool, skip};

/// abidiff's exit status is a set of bits: this one means that the interface is not the same.
const CHANGED: i32 = 4;

/// "typedef struct hyperattn_name {", and what comes before the closing "} hyperattn_name;".
fn structs(header: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    for part in header.split("typedef struct ").skip(1) {
        if let Some((name, rest)) = part.split_once(" {\n") {
            let (fields, _) = rest.split_once(&format!("}} {name};")).expect("a struct ends with its name");
            found.push((name, fields));
        }
    }
    found
}

/// The header with `line` put after the last field of `name`, or before it.
fn with_field(header: &str, name: &str, last: bool) -> String {
    let end = header.find(&format!("}} {name};")).expect("the struct is in the header");
    let at = if last { end } else { header[..end - 1].rfind('\n').expect("it has a field") + 1 };
    format!("{}    uint64_t added;\n{}", &header[..at], &header[at..])
}

/// A library with debug information whose one function takes every struct of `header`.
fn library(directory: &Path, name: &str, header: &str) -> PathBuf {
    let source = directory.join(name).with_extension("c");
    let parameters: Vec<String> =
        structs(header).iter().map(|(name, _)| format!("{name} *a_{name}")).collect();
    let unused: String = structs(header).iter().map(|(name, _)| format!("    (void)a_{name};\n")).collect();
    let function = format!("void take({});\nvoid take({0})\n{{\n{unused}}}\n", parameters.join(", "));
    std::fs::write(&source, format!("{header}\n{function}")).expect("the temporary directory is writable");
    let library = directory.join(name).with_extension("so");
    let output =
        Command::new("gcc").args(["-g", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output();
    let output = output.expect("gcc starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

/// abidiff's exit status.
fn abidiff(old: &Path, new: &Path, suppressed: bool) -> i32 {
    let mut command = Command::new("abidiff");
    if suppressed {
        command.arg("--suppressions").arg(folder().join("appended_fields.abignore"));
    }
    let output = command.arg(old).arg(new).output().expect("abidiff starts");
    output.status.code().expect("it ends by itself")
}

#[test]
fn appended_fields_and_no_others() {
    if !has_tool("abidiff") || !has_tool("gcc") {
        skip("no abidiff or no gcc on this machine");
        return;
    }
    let header = std::fs::read_to_string(hyperattn_link::include_dir().join("hyperattn/hyperattn.h"))
        .expect("the header is readable");
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("abidiff");
    std::fs::create_dir_all(&directory).expect("the temporary directory is writable");
    let sized = |fields: &str| fields.contains("size_t struct_size;");
    let (growing, frozen): (Vec<_>, Vec<_>) =
        structs(&header).into_iter().partition(|&(_, fields)| sized(fields));
    let growing: BTreeSet<_> = growing.into_iter().map(|(name, _)| name).collect();
    assert!(growing.contains("hyperattn_params") && !frozen.is_empty(), "{growing:?}, {frozen:?}");

    let old = library(&directory, "old", &header);
    assert_eq!(abidiff(&old, &old, false), 0);
    for &name in &growing {
        let new = library(&directory, "appended", &with_field(&header, name, true));
        assert_eq!(abidiff(&old, &new, false), CHANGED, "{name}");
        assert_eq!(abidiff(&old, &new, true), 0, "{name}");
        let new = library(&directory, "inserted", &with_field(&header, name, false));
        assert_ne!(abidiff(&old, &new, true) & CHANGED, 0, "{name}");
    }
    for (name, _) in frozen {
        let new = library(&directory, "frozen", &with_field(&header, name, true));
        assert_ne!(abidiff(&old, &new, true) & CHANGED, 0, "{name}");
    }
}
