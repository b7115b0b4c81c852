//! Every C and C++ example of include/README.md compiles without a warning, and those that can run here do.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use hyperattn_c_tests::{WARNINGS, build, c_program, folder, run_ok};
use hyperattn_link::{Language, Program};

const GUIDE: &str = include_str!("../../../include/README.md");

/// A fenced block: the number of its first line in the guide, and its text.
struct Block {
    line: usize,
    text: String,
}

impl Block {
    /// Compilers then name the guide's own lines.
    fn source(&self) -> String {
        format!("#line {} \"include/README.md\"\n{}", self.line, self.text)
    }

    fn is_program(&self) -> bool {
        self.text.lines().any(|line| line.starts_with("int main("))
    }
}

fn blocks(language: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut current: Option<Block> = None;
    for (at, line) in GUIDE.lines().enumerate() {
        match &mut current {
            None if line == format!("```{language}") => {
                current = Some(Block { line: at + 2, text: String::new() });
            }
            Some(_) if line == "```" => found.extend(current.take()),
            Some(block) => writeln!(block.text, "{line}").expect("a string takes it"),
            None => {}
        }
    }
    assert!(current.is_none(), "a block of include/README.md does not end");
    found
}

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("guide").join(name)
}

fn write(name: &str, text: &str) -> PathBuf {
    std::fs::create_dir_all(temporary("")).expect("the temporary directory is writable");
    std::fs::write(temporary(name), text).expect("the temporary directory is writable");
    temporary(name)
}

fn programs(language: &str, standard: Language, extension: &str) {
    let programs: Vec<Block> = blocks(language).into_iter().filter(Block::is_program).collect();
    assert!(!programs.is_empty(), "include/README.md has no program in {language}");
    for block in programs {
        let name = format!("line{}", block.line);
        let source = write(&format!("{name}.{extension}"), &block.source());
        let program = Program::new(standard, [source]).flags(WARNINGS);
        assert_eq!(run_ok(&build(&program, &temporary(&name)), &[]), "out[0] = 1\n", "{name}");
    }
}

#[test]
fn c_programs() {
    programs("c", Language::C99, "c");
}

#[test]
fn cpp_programs() {
    programs("cpp", Language::Cpp17, "cpp");
}

/// A function of the guide that `programs/guide` does not call is an unused function: a warning, and so an error.
#[test]
fn c_examples() {
    let examples: Vec<String> =
        blocks("c").iter().filter(|block| !block.is_program()).map(Block::source).collect();
    write("guide_examples.h", &examples.concat());
    let program = c_program("guide").include(folder().join("programs/guide")).include(temporary(""));
    print!("{}", run_ok(&build(&program, &temporary("examples")), &[]));
}

#[test]
fn cpp_examples_are_programs() {
    assert!(blocks("cpp").iter().all(Block::is_program), "nothing compiles a C++ example without main");
}
