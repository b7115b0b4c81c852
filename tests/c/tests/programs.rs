//! Every program of `programs/`, with the machine's best kernels and held down to each lesser table.

use std::path::{Path, PathBuf};
use std::sync::{LazyLock, OnceLock};

use hyperattn_c_tests::{Support, build, cpp_program, folder, run, run_ok, skip};
use hyperattn_link::{Language, Program};

const SCALAR: (&str, &str) = ("HYPERATTN_MAX_ISA", "scalar");
const AVX2: (&str, &str) = ("HYPERATTN_MAX_ISA", "avx2");
const AVX512: (&str, &str) = ("HYPERATTN_MAX_ISA", "avx512");
// Named, it is taken also where its bf16 products are slower than f32 ones.
const AVX512_BF16: (&str, &str) = ("HYPERATTN_MAX_ISA", "avx512_bf16");

fn executable(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("programs").join(name)
}

fn c_program(name: &str) -> Program {
    static SUPPORT: LazyLock<Support> =
        LazyLock::new(|| Support::compile(&executable("support"), |program| program));
    SUPPORT.program(name)
}

/// The table that `api_misc` says it got, with this in its environment.
fn chosen_table(api_misc: &Path, limit: Option<(&str, &str)>) -> String {
    let output = run_ok(api_misc, limit.as_slice());
    let table = output.lines().find_map(|line| line.strip_prefix("cpu_isa "));
    table.unwrap_or_else(|| panic!("no line cpu_isa: {output}")).to_string()
}

/// Limits that give each of the machine's tables once, the best one first.
fn limits() -> &'static [Option<(&'static str, &'static str)>] {
    static LIMITS: OnceLock<Vec<Option<(&str, &str)>>> = OnceLock::new();
    LIMITS.get_or_init(|| {
        let program = build(&c_program("api_misc"), &executable("tables"));
        let mut seen = Vec::new();
        let mut limits = vec![None, Some(AVX512_BF16), Some(AVX512), Some(AVX2), Some(SCALAR)];
        limits.retain(|&limit| {
            let table = chosen_table(&program, limit);
            let new = !seen.contains(&table);
            seen.push(table);
            new
        });
        limits
    })
}

fn run_with_every_table(executable: &Path) {
    for limit in limits() {
        print!("{}", run_ok(executable, limit.as_slice()));
    }
}

fn run_c(name: &str) {
    run_with_every_table(&build(&c_program(name), &executable(name)));
}

#[test]
fn exact() {
    run_c("exact");
}

#[test]
fn paper() {
    run_c("paper");
}

#[test]
fn refined() {
    run_c("refined");
}

#[test]
fn diagnose() {
    run_c("diagnose");
}

#[test]
fn plan() {
    run_c("plan");
}

#[test]
fn divided() {
    run_c("divided");
}

#[test]
fn additive_mask() {
    run_c("additive_mask");
}

#[test]
fn backward() {
    run_c("backward");
}

#[test]
fn block_mask() {
    run_c("block_mask");
}

#[test]
fn determinism() {
    run_c("determinism");
}

#[test]
fn bad_calls() {
    run_c("bad_calls");
}

#[test]
fn merge() {
    run_c("merge");
}

#[test]
fn nan_inf() {
    run_c("nan_inf");
}

#[test]
fn concurrency() {
    run_c("concurrency");
}

#[test]
fn old_caller() {
    run_c("old_caller");
}

#[test]
fn api_misc() {
    let executable = build(&c_program("api_misc"), &executable("api_misc"));
    print!("{}", run_ok(&executable, &[]));
    assert_eq!(chosen_table(&executable, Some(SCALAR)), "scalar");
    if cfg!(target_arch = "x86_64") {
        let table = chosen_table(&executable, Some(AVX2));
        assert!(matches!(table.as_str(), "avx2" | "scalar"), "{table}");
    }
}

#[test]
fn allocation() {
    if !cfg!(target_os = "linux") {
        skip("--wrap needs a linker that knows it; tried on Linux only");
        return;
    }
    let wrap = "-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=posix_memalign,--wrap=aligned_alloc";
    let program = c_program("allocation").link_argument(wrap);
    run_with_every_table(&build(&program, &executable("allocation")));
}

/// The machine may have a C compiler only, or a C++ compiler older than the standard.
fn compiles_cpp(language: Language) -> bool {
    let folder = executable("cpp_probe");
    std::fs::create_dir_all(&folder).expect("the temporary directory is writable");
    let source = folder.join(language.name()).with_extension("cpp");
    std::fs::write(&source, "#include <thread>\n#include <vector>\nint main() { return 0; }\n")
        .expect("the temporary directory is writable");
    let object = folder.join(language.name()).with_extension("o");
    match Program::new(language, [source]).compile_only(&object) {
        Ok(_) => true,
        Err(error) => {
            skip(&format!("no compiler for {}: {}", language.name(), error.output()));
            false
        }
    }
}

#[test]
fn harness_cpp() {
    for language in Language::ALL.into_iter().filter(|language| language.is_cpp()) {
        if !compiles_cpp(language) {
            continue;
        }
        let name = format!("harness-{}", language.name());
        run_with_every_table(&build(&cpp_program("harness", language), &executable(&name)));
    }
}

#[test]
fn example_cpp() {
    if compiles_cpp(Language::Cpp11) {
        run_with_every_table(&build(
            &cpp_program("example_cpp", Language::Cpp11),
            &executable("example_cpp"),
        ));
    }
}

/// The shared library does what the archive does.
#[test]
fn shared_library() {
    let library = hyperattn_link::shared_library().unwrap_or_else(|error| panic!("{error}"));
    let program = c_program("merge").archive(library);
    run_with_every_table(&build(&program, &executable("merge-shared")));
}

/// A program that checks nothing, or a driver that ignores its failures, would look like success.
#[test]
fn a_failing_program_is_noticed() {
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("failing_program.c");
    std::fs::write(&source, FAILING_PROGRAM).expect("the temporary directory is writable");
    let support = folder().join("support");
    let sources = [source, support.join("check.c")];
    let program = Program::new(Language::C99, sources).include(support);
    let output = run(&build(&program, &executable("failing_program")), &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("failing_program.c:6: FAILED: 1 + 1 == 3 [the case]: 2, expected 3"), "{text}");
    assert!(text.contains("3 checks, 2 failures"), "{text}");
}

const FAILING_PROGRAM: &str = r#"#include "check.h"
int main(int argc, char **argv)
{
    check_start("failing", argc, argv);
    check_case("the %s", "case");
    CHECK_INT(1 + 1, 3);
    CHECK_NEAR(0.0 / 0.0, 0.0, 1.0);
    CHECK_INT(1, 1);
    return check_finish();
}
"#;
