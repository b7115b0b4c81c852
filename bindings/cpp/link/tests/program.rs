//! Compiling and linking, and what is said when they fail.

use std::path::{Path, PathBuf};
use std::process::Command;

use hyperattn_link::{Language, Program};

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn source(name: &str, text: &str) -> PathBuf {
    let path = temporary(name);
    std::fs::write(&path, text).expect("the temporary directory is writable");
    path
}

#[test]
fn a_program_is_linked_to_the_library() {
    let text = "#include <hyperattn/hyperattn.h>\n\
                int main(void) { return hyperattn_abi_version() == HYPERATTN_ABI_VERSION ? 42 : 1; }\n";
    let program = Program::new(Language::C99, [source("version.c", text)]);
    let executable = program.compile(&temporary("version")).unwrap_or_else(|error| panic!("{error}"));
    let status = Command::new(executable).status().expect("the program starts");
    assert_eq!(status.code(), Some(42));
}

#[test]
fn warnings_reach_the_caller() {
    let text = "int main(void) { int never_used = 1; return 0; }\n";
    let program = Program::new(Language::C99, [source("warning.c", text)]).flags(["-Wall", "-Werror"]);
    let error = program.compile_only(&temporary("warning.o")).expect_err("-Werror");
    assert!(error.output().contains("never_used"), "{error}");
    assert!(error.step().contains("-Werror") && error.step().contains("warning.c"), "{error}");
    // The environment may hold what nobody wants in a log.
    assert!(!error.to_string().contains("CARGO_HOME="), "{error}");
}

#[test]
fn linker_messages_reach_the_caller() {
    let text =
        "int hyperattn_no_such_function(void);\nint main(void) { return hyperattn_no_such_function(); }\n";
    let error = Program::new(Language::C11, [source("undefined.c", text)])
        .compile(&temporary("undefined"))
        .expect_err("an undefined symbol");
    assert!(error.output().contains("hyperattn_no_such_function"), "{error}");
}

#[test]
fn the_language_is_the_one_asked_for() {
    for (language, version) in
        [(Language::C99, "199901L"), (Language::C11, "201112L"), (Language::C17, "201710L")]
    {
        let text = format!(
            "#if __STDC_VERSION__ != {version} || !defined __STRICT_ANSI__\n#error another\n#endif\nint x;\n"
        );
        let program = Program::new(language, [source(&format!("{}.c", language.name()), &text)]);
        program.compile_only(&temporary("language.o")).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_missing_compiler_is_an_error() {
    let program =
        Program::new(Language::C99, [source("any.c", "int x;\n")]).compiler("no-such-compiler-anywhere");
    let error = program.compile_only(&temporary("any.o")).expect_err("no compiler");
    assert!(error.to_string().contains("no-such-compiler-anywhere"), "{error}");
}
