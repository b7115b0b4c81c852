//! The functions that the header declares, the archive defines and the shared library exports are the same.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use hyperattn_c_tests::{build, c_program, folder, has_tool, run_ok, skip};

/// The C text without comments and preprocessor lines.
fn code_of(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("/*") {
        code.push_str(&rest[..start]);
        code.push(' ');
        let end = rest[start..].find("*/").expect("comments end");
        rest = &rest[start + end + 2..];
    }
    code.push_str(rest);
    let lines = code.lines().map(|line| line.split("//").next().unwrap_or(""));
    lines.filter(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n")
}

/// The identifiers `hyperattn_...` that an opening parenthesis follows.
fn functions_in(code: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("hyperattn_") {
        if code[..at].ends_with(is_name) {
            continue;
        }
        let name: String = code[at..].chars().take_while(|&c| is_name(c)).collect();
        if code[at + name.len()..].trim_start().starts_with('(') {
            found.insert(name);
        }
    }
    found
}

fn declared() -> BTreeSet<String> {
    let header = hyperattn_link::include_dir().join("hyperattn/hyperattn.h");
    let text = std::fs::read_to_string(&header).unwrap_or_else(|e| panic!("{}: {e}", header.display()));
    functions_in(&code_of(&text))
}

#[test]
fn parser() {
    let text = "/* hyperattn_no(x) */\n#define M hyperattn_no2(1)\nint hyperattn_a(void); // hyperattn_no3()\n\
                T *hyperattn_b\n  (int (*xhyperattn_no4)(void), hyperattn_type t);\nhyperattn_type x;";
    let expected = ["hyperattn_a", "hyperattn_b"].map(String::from);
    assert_eq!(functions_in(&code_of(text)), BTreeSet::from(expected));
}

#[test]
fn every_declared_function_is_in_the_archive() {
    let declared = declared();
    assert!(declared.contains("hyperattn_forward"), "{declared:?}");

    let text = std::fs::read_to_string(folder().join("programs/symbols.c")).expect("symbols.c is readable");
    let listed: BTreeSet<String> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("SYMBOL("))
        .filter_map(|line| line.split(')').next())
        .map(String::from)
        .collect();
    assert_eq!(listed, declared, "programs/symbols.c and the header differ");

    let executable = Path::new(env!("CARGO_TARGET_TMPDIR")).join("symbols").join("symbols");
    let printed = run_ok(&build(&c_program("symbols"), &executable), &[]);
    assert_eq!(printed.lines().map(String::from).collect::<BTreeSet<_>>(), declared);
}

#[test]
fn the_shared_library_exports_exactly_the_declared_functions() {
    if !has_tool("nm") || !cfg!(target_os = "linux") {
        skip("no nm for ELF on this machine");
        return;
    }
    let library = hyperattn_link::shared_library().unwrap_or_else(|error| panic!("{error}"));
    let output = Command::new("nm").args(["-D", "--defined-only"]).arg(&library).output().expect("nm starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let exported: BTreeSet<String> =
        text.lines().filter_map(|line| line.split_whitespace().last()).map(String::from).collect();
    assert_eq!(exported, declared(), "exported by {} and declared", library.display());
}
