//! Doxygen has nothing to complain about in the public headers: everything is documented.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use hyperattn_c_tests::{folder, has_tool, skip};

const SETTINGS: &str = include_str!("../../../include/Doxyfile");

/// Runs with `include/Doxyfile` and `more`, in the root of the workspace.
fn doxygen(more: &str) -> Output {
    let mut child = Command::new("doxygen")
        .arg("-")
        .current_dir(folder().join("../.."))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("doxygen runs");
    let settings = format!("{SETTINGS}\n{more}\n");
    child.stdin.take().expect("it is piped").write_all(settings.as_bytes()).expect("doxygen reads it");
    child.wait_with_output().expect("doxygen ends")
}

fn temporary(name: &str) -> String {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("doxygen").join(name).display().to_string()
}

#[test]
fn the_headers_are_documented() {
    if !has_tool("doxygen") {
        skip("no doxygen on this machine");
        return;
    }
    std::fs::create_dir_all(temporary("")).expect("the temporary directory is writable");
    let output = doxygen(&format!("OUTPUT_DIRECTORY = {}", temporary("reference")));
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{messages}");
    let page = std::fs::read_to_string(temporary("reference/html/hyperattn_8h.html"))
        .expect("a page for the C header");
    assert!(page.contains("hyperattn_forward_workspace"), "the C functions are not in it");

    // Settings that let everything pass would look like success.
    let header = temporary("header.h");
    std::fs::write(&header, "/// Documented.\nint one(void);\nint two(void);\n")
        .expect("the directory is writable");
    let output = doxygen(&format!("OUTPUT_DIRECTORY = {}\nINPUT = {header}", temporary("incomplete")));
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && messages.contains("Member two"), "{messages}");
    assert!(!messages.contains("Member one"), "{messages}");
}
