//! Compiles the C and C++ programs of this folder and runs them; the tests beside it say which and how.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use hyperattn_link::{Language, Program};

/// What every program of this folder and the public header must compile under.
pub const WARNINGS: [&str; 5] = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"];

/// The folder that holds `programs` and `support`.
pub fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The C99 program `programs/NAME.c`, or all of `programs/NAME/`, with everything in `support`.
pub fn c_program(name: &str) -> Program {
    c_sources(sources_of(name).into_iter().chain(support_files()))
}

/// `support`, compiled once for many programs.
pub struct Support {
    objects: Vec<PathBuf>,
    configure: fn(Program) -> Program,
}

impl Support {
    /// Compiles into `directory`. `configure` adds flags, to the programs' own files too.
    pub fn compile(directory: &Path, configure: fn(Program) -> Program) -> Self {
        let compile = |file: PathBuf| {
            let object = directory.join(file.file_name().expect("a file has a name")).with_extension("o");
            let compiled = configure(c_sources([file])).compile_only(&object);
            compiled.unwrap_or_else(|error| panic!("{error}"))
        };
        Self { objects: support_files().into_iter().map(compile).collect(), configure }
    }

    /// The program that [`c_program`] gives, with these objects.
    pub fn program(&self, name: &str) -> Program {
        (self.configure)(c_sources(sources_of(name).into_iter().chain(self.objects.iter().cloned())))
    }
}

fn c_sources(sources: impl IntoIterator<Item = PathBuf>) -> Program {
    Program::new(Language::C99, sources).include(folder().join("support")).flags(WARNINGS)
}

fn sources_of(name: &str) -> Vec<PathBuf> {
    let file = folder().join("programs").join(name).with_extension("c");
    if file.exists() { vec![file] } else { c_files(&folder().join("programs").join(name)) }
}

fn support_files() -> Vec<PathBuf> {
    c_files(&folder().join("support"))
}

/// The C++ program of all of `programs/NAME/`.
pub fn cpp_folder(name: &str, language: Language) -> Program {
    let sources = files(&folder().join("programs").join(name), "cpp");
    Program::new(language, sources).flags(WARNINGS)
}

/// The C++ program `programs/NAME.cpp`.
pub fn cpp_program(name: &str, language: Language) -> Program {
    let source = folder().join("programs").join(name).with_extension("cpp");
    Program::new(language, [source]).flags(WARNINGS)
}

fn c_files(directory: &Path) -> Vec<PathBuf> {
    files(directory, "c")
}

fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a directory entry").path()).collect();
    files.retain(|file| file.extension().is_some_and(|found| found == extension));
    files.sort();
    files
}

/// Compiles and links, or fails the test with the compiler's messages.
pub fn build(program: &Program, executable: &Path) -> PathBuf {
    program.compile(executable).unwrap_or_else(|error| panic!("{error}"))
}

/// Runs to the end, whatever that is.
pub fn run(executable: &Path, environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(executable);
    // Set only where a test says so, never by whoever started the tests.
    command.env_remove("HYPERATTN_MAX_ISA").envs(environment.iter().copied());
    command.output().unwrap_or_else(|error| panic!("{}: {error}", executable.display()))
}

/// Runs and returns standard output; the test fails with all output when the program does.
pub fn run_ok(executable: &Path, environment: &[(&str, &str)]) -> String {
    let output = run(executable, environment);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{} with {environment:?}: {}\n{stdout}{stderr}",
        executable.display(),
        output.status
    );
    stdout
}

/// Says that a check did not run and why; fails instead where `HYPERATTN_REQUIRE_TOOLS=1`.
pub fn skip(reason: &str) {
    let required = std::env::var("HYPERATTN_REQUIRE_TOOLS").is_ok_and(|value| value == "1");
    assert!(!required, "HYPERATTN_REQUIRE_TOOLS=1, but: {reason}");
    // Past the test runner's capture, which would hide the line of a passing test.
    writeln!(std::io::stdout(), "SKIPPED: {reason}").expect("standard output");
}

/// True when `tool --version` runs.
pub fn has_tool(tool: &str) -> bool {
    Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success())
}
