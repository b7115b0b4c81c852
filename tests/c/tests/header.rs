//! The header alone compiles without a warning under every language standard, by each compiler of the machine.

use std::path::Path;

use hyperattn_c_tests::{WARNINGS, has_tool, skip};
use hyperattn_link::{Language, Program};

fn header_compiles(compiler: &str, cpp: bool) {
    if !has_tool(compiler) {
        skip(&format!("no {compiler} on this machine"));
        return;
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("header").join(compiler);
    std::fs::create_dir_all(&directory).expect("the temporary directory is writable");
    let source = directory.join(if cpp { "header.cpp" } else { "header.c" });
    // Twice: the include guard has to work.
    std::fs::write(&source, "#include <hyperattn/hyperattn.h>\n#include <hyperattn/hyperattn.h>\n")
        .expect("the temporary directory is writable");
    for language in Language::ALL.into_iter().filter(|language| language.is_cpp() == cpp) {
        let mut program = Program::new(language, [&source]).compiler(compiler).flags(WARNINGS);
        if !cpp {
            program = program.flags(["-Wstrict-prototypes", "-Wmissing-prototypes"]);
        }
        let object = directory.join(language.name()).with_extension("o");
        program.compile_only(&object).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn gcc() {
    header_compiles("gcc", false);
}

#[test]
fn gxx() {
    header_compiles("g++", true);
}

#[test]
fn clang() {
    header_compiles("clang", false);
}

#[test]
fn clangxx() {
    header_compiles("clang++", true);
}
