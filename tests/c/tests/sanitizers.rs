//! The C programs under AddressSanitizer and UndefinedBehaviorSanitizer, linked to an archive whose Rust code is
//! instrumented by the former. `allocation` is left out: it replaces the functions that the sanitizer replaces.

use std::path::{Path, PathBuf};
use std::sync::{LazyLock, OnceLock};

use hyperattn_c_tests::{Support, build, run, run_ok, skip};
use hyperattn_link::{Language, LibraryBuild, Program, TARGET, static_library};

/// The instrumented archive, and the run-time options that work here.
struct Instrumented {
    archive: PathBuf,
    options: &'static str,
}

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("sanitizers").join(name)
}

fn instrument(program: Program) -> Program {
    // One run-time library, the C compiler's, serves the C and the Rust code.
    program.sanitizer("address").sanitizer("undefined").flag("-fno-sanitize-recover=all")
}

/// Instrumented too. To be asked for once [`instrumented`] has found that this works here.
fn c_program(name: &str) -> Program {
    static SUPPORT: LazyLock<Support> = LazyLock::new(|| Support::compile(&temporary("support"), instrument));
    SUPPORT.program(name)
}

/// What a tool said in the end; the reason for skipping should stay one line.
fn last_line(error: &hyperattn_link::Error) -> &str {
    error.output().trim_end().lines().last().unwrap_or("no message")
}

fn prepare() -> Result<Instrumented, String> {
    let source = temporary("probe.c");
    std::fs::create_dir_all(temporary("")).map_err(|e| e.to_string())?;
    std::fs::write(&source, "int main(void) { return 0; }\n").map_err(|e| e.to_string())?;
    let archive = static_library().unwrap_or_else(|error| panic!("{error}"));
    let probe = instrument(Program::new(Language::C99, [source]))
        .archive(archive)
        .compile(&temporary("probe"))
        .map_err(|error| format!("the C compiler links no sanitizer: {}", last_line(&error)))?;
    // Leak detection needs ptrace, which some containers forbid.
    let candidates = ["detect_leaks=1", "detect_leaks=0"];
    let works = |options: &&str| run(&probe, &[("ASAN_OPTIONS", *options)]).status.success();
    let options = candidates.into_iter().find(works).ok_or("a program with sanitizers does not start")?;

    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    let library = LibraryBuild::new()
        .target(TARGET)
        .target_dir(temporary("library"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", format!("{flags} -Zsanitizer=address"))
        // So that a report names lines.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "line-tables-only")
        .build()
        .map_err(|error| format!("rustc builds no instrumented library: {}", last_line(&error)))?;
    Ok(Instrumented { archive: library.static_library, options })
}

/// The archive, or `None` after a SKIPPED line.
fn instrumented() -> Option<&'static Instrumented> {
    static PREPARED: OnceLock<Result<Instrumented, String>> = OnceLock::new();
    match PREPARED.get_or_init(prepare) {
        Ok(instrumented) => Some(instrumented),
        Err(reason) => {
            skip(reason);
            None
        }
    }
}

fn run_sanitized(name: &str) {
    let Some(Instrumented { archive, options }) = instrumented() else { return };
    let program = c_program(name).archive(archive);
    let executable = build(&program, &temporary(name));
    print!("{}", run_ok(&executable, &[("ASAN_OPTIONS", options)]));
}

#[test]
fn exact() {
    run_sanitized("exact");
}

#[test]
fn paper() {
    run_sanitized("paper");
}

#[test]
fn refined() {
    run_sanitized("refined");
}

#[test]
fn diagnose() {
    run_sanitized("diagnose");
}

#[test]
fn plan() {
    run_sanitized("plan");
}

#[test]
fn divided() {
    run_sanitized("divided");
}

#[test]
fn additive_mask() {
    run_sanitized("additive_mask");
}

#[test]
fn backward() {
    run_sanitized("backward");
}

#[test]
fn block_mask() {
    run_sanitized("block_mask");
}

#[test]
fn determinism() {
    run_sanitized("determinism");
}

#[test]
fn bad_calls() {
    run_sanitized("bad_calls");
}

#[test]
fn merge() {
    run_sanitized("merge");
}

#[test]
fn nan_inf() {
    run_sanitized("nan_inf");
}

#[test]
fn concurrency() {
    run_sanitized("concurrency");
}

#[test]
fn old_caller() {
    run_sanitized("old_caller");
}

#[test]
fn api_misc() {
    run_sanitized("api_misc");
}

/// An archive without instrumentation would pass everything above.
#[test]
fn the_library_is_watched() {
    let Some(Instrumented { archive, options }) = instrumented() else { return };
    let executable = build(&c_program("out_of_bounds").archive(archive), &temporary("out_of_bounds"));
    for isa in [Some("scalar"), Some("avx2"), None] {
        let mut environment = vec![("ASAN_OPTIONS", *options)];
        environment.extend(isa.map(|isa| ("HYPERATTN_MAX_ISA", isa)));
        let output = run(&executable, &environment);
        let report = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{isa:?}: {}", String::from_utf8_lossy(&output.stdout));
        assert!(report.contains("heap-buffer-overflow"), "{isa:?}: {report}");
    }
}
