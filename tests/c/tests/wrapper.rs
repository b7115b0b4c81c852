//! hyperattn.hpp: compiles under C++17, 20 and 23 by each compiler, with and without exceptions, and does what
//! `programs/wrapper` says, on its own and where files of different standards and error models are linked together.

use std::path::{Path, PathBuf};
use std::process::Command;

use hyperattn_c_tests::{WARNINGS, build, cpp_folder, folder, has_tool, run, run_ok, skip};
use hyperattn_link::{Language, Program};

const COMPILERS: [&str; 2] = ["g++", "clang++"];
const STANDARDS: [Language; 3] = [Language::Cpp17, Language::Cpp20, Language::Cpp23];
/// Exceptions; none in the compiler; none in the wrapper although the compiler has them.
const ERROR_MODELS: [&[&str]; 3] = [&[], &["-fno-exceptions"], &["-DHYPERATTN_NO_EXCEPTIONS"]];
const STRICT: [&str; 5] =
    ["-Wconversion", "-Wsign-conversion", "-Wold-style-cast", "-Wnon-virtual-dtor", "-fno-rtti"];

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("wrapper").join(name)
}

fn write(name: &str, text: &str) -> PathBuf {
    let path = temporary(name);
    std::fs::create_dir_all(temporary("")).expect("the temporary directory is writable");
    std::fs::write(&path, text).expect("the temporary directory is writable");
    path
}

/// False after a SKIPPED line.
fn has_compiler(compiler: &str) -> bool {
    let found = has_tool(compiler);
    if !found {
        skip(&format!("no {compiler} on this machine"));
    }
    found
}

fn compiles_everywhere(compiler: &str) {
    if !has_compiler(compiler) {
        return;
    }
    let directory = folder().join("programs/wrapper");
    let everything: String = ["views", "calls", "threads", "workspace", "plans"]
        .map(|name| format!("#include \"{name}.cpp\"\n"))
        .concat();
    let source = write(&format!("everything-{compiler}.cpp"), &everything);
    for language in STANDARDS {
        for model in ERROR_MODELS {
            let program = Program::new(language, [&source]).compiler(compiler).include(&directory);
            let program = program.flags(WARNINGS).flags(STRICT).flags(model.iter().copied());
            // Unoptimised: the warnings are wanted, not the code.
            let object = temporary(&format!("everything-{compiler}.o"));
            program.flags(["-O0", "-g0"]).compile_only(&object).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

#[test]
fn gxx_compiles_it() {
    compiles_everywhere("g++");
}

#[test]
fn clangxx_compiles_it() {
    compiles_everywhere("clang++");
}

fn runs(compiler: &str, language: Language, model: usize) {
    if !has_compiler(compiler) {
        return;
    }
    let name = format!("run-{compiler}-{}-{model}", language.name());
    let program = cpp_folder("wrapper", language).compiler(compiler).flags(STRICT).flags(ERROR_MODELS[model]);
    // Half the time of the default -O2 -g.
    let program = program.flags(["-O1", "-g0"]);
    let printed = run_ok(&build(&program, &temporary(&name)), &[]);
    let expected = if model == 0 { "exceptions:" } else { "status:" };
    assert!(printed.contains(expected), "{printed}");
    print!("{printed}");
}

#[test]
fn oldest_standard_with_exceptions() {
    runs(COMPILERS[0], Language::Cpp17, 0);
}

#[test]
fn oldest_standard_with_statuses() {
    runs(COMPILERS[1], Language::Cpp17, 1);
}

#[test]
fn newest_standard_with_exceptions() {
    runs(COMPILERS[1], Language::Cpp23, 0);
}

#[test]
fn newest_standard_with_statuses() {
    runs(COMPILERS[0], Language::Cpp23, 2);
}

const WITH_EXCEPTIONS: &str = r#"
#include <hyperattn/hyperattn.hpp>
#include <cstdio>
hyperattn_status with_statuses(const hyperattn::params &params, const hyperattn::tensors &tensors);
int main()
{
    const hyperattn::params params;
    const hyperattn::tensors tensors;
    hyperattn_status thrown = HYPERATTN_STATUS_OK;
    try {
        hyperattn::forward(params, tensors);
    } catch (const hyperattn::error &error) {
        thrown = error.status();
    }
    const hyperattn_status returned = with_statuses(params, tensors);
    std::printf("%d %d\n", static_cast<int>(thrown), static_cast<int>(returned));
    return 0;
}
"#;

const WITH_STATUSES: &str = r"
#include <hyperattn/hyperattn.hpp>
hyperattn_status with_statuses(const hyperattn::params &params, const hyperattn::tensors &tensors);
hyperattn_status with_statuses(const hyperattn::params &params, const hyperattn::tensors &tensors)
{
    return hyperattn::forward(params, tensors);
}
";

/// Structs pass between files with exceptions and files without; each keeps its own functions.
#[test]
fn files_of_both_error_models_link() {
    let statuses = write("with_statuses.cpp", WITH_STATUSES);
    let exceptions = write("with_exceptions.cpp", WITH_EXCEPTIONS);
    let object = temporary("with_statuses.o");
    Program::new(Language::Cpp23, [statuses])
        .flags(WARNINGS)
        .flags(["-fno-exceptions", "-O0"])
        .compile_only(&object)
        .unwrap_or_else(|error| panic!("{error}"));
    // Unoptimised, so that functions stay functions and a double definition would be picked from either file.
    let program = Program::new(Language::Cpp17, [exceptions, object]).flags(WARNINGS).flag("-O0");
    assert_eq!(run_ok(&build(&program, &temporary("both_models")), &[]), "1 1\n");
}

const ESCAPING: &str = r#"
#include <hyperattn/hyperattn.hpp>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>
int main()
{
    std::set_terminate([] {
        std::puts("terminated");
        std::fflush(stdout);
        std::_Exit(7);
    });
    const std::vector<float> in(4 * 300 * 16);
    std::vector<float> out(in.size());
    const hyperattn::const_view input = hyperattn::bhsd(in, 1, 4, 300, 16);
    const hyperattn::tensors tensors(input, input, input, hyperattn::bhsd(out, 1, 4, 300, 16));
    const hyperattn::params params;
    hyperattn::thread_pool pool(2, [](std::size_t, hyperattn::task) { throw 1; });
    const hyperattn::cpu_exec exec(pool);
    try {
        static_cast<void>(CALL);
    } catch (...) {
        std::puts("crossed");
    }
    return 0;
}
"#;

/// Where a callable's exception cannot be passed on, the program ends before it reaches the library.
#[test]
fn exceptions_do_not_cross_the_boundary() {
    let source = write("escaping.cpp", ESCAPING);
    let c = "-DCALL=hyperattn_forward(&params,&tensors,&exec)";
    let wrapper = "-DCALL=hyperattn::forward(params,tensors,exec)";
    for (name, flags) in
        [("escaping-c", vec![c]), ("escaping-status", vec![wrapper, "-DHYPERATTN_NO_EXCEPTIONS"])]
    {
        let program = Program::new(Language::Cpp17, [&source]).flags(WARNINGS).flags(flags);
        let output = run(&build(&program, &temporary(name)), &[]);
        assert_eq!((output.status.code(), &*output.stdout), (Some(7), b"terminated\n".as_slice()), "{name}");
    }
}

/// What must not compile, and the part of the message that says why.
const REJECTED: [(&str, &str); 5] = [
    ("double x[1]; static_cast<void>(hyperattn::bhsd(x, 1, 1, 1, 1));", "specialise hyperattn::dtype_of"),
    ("static_cast<void>(hyperattn::bhsd(std::vector<float>(8), 1, 1, 2, 4));", "the container is gone"),
    ("hyperattn::view out = hyperattn::bhsd(static_cast<const float *>(nullptr), 1, 1, 1, 1);", "const_view"),
    ("hyperattn::cpu_exec exec(hyperattn::thread_pool(1, [](std::size_t, hyperattn::task) {}));", "deleted"),
    ("hyperattn::forward(hyperattn::params(), hyperattn::tensors());", "nodiscard"),
];

#[test]
fn mistakes_do_not_compile() {
    for (at, (statement, part)) in REJECTED.into_iter().enumerate() {
        let text = format!(
            "#include <hyperattn/hyperattn.hpp>\n#include <vector>\nvoid mistake();\nvoid mistake() {{ {statement} }}\n"
        );
        let source = write(&format!("mistake{at}.cpp"), &text);
        let program = Program::new(Language::Cpp17, [source]).flags(["-Werror", "-DHYPERATTN_NO_EXCEPTIONS"]);
        let Err(error) = program.compile_only(&temporary(&format!("mistake{at}.o"))) else {
            panic!("compiles: {statement}");
        };
        assert!(error.output().contains(part), "{statement}\n{}", error.output());
    }
}

const ONE_CALL: &str = r"
#include <hyperattn/hyperattn.hpp>
using hyperattn::const_view;
hyperattn_status call(const const_view &q, const const_view &k, const const_view &v, const hyperattn::view &out);
hyperattn_status call(const const_view &q, const const_view &k, const const_view &v, const hyperattn::view &out)
{
    hyperattn::params params;
    params.mask = HYPERATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    return hyperattn::forward(params, hyperattn::tensors(q, k, v, out));
}
";

/// The wrapper costs what C costs: optimised, all of it is inlined and what is called is the library.
#[test]
fn no_functions_of_its_own() {
    if !has_tool("nm") {
        skip("no nm on this machine");
        return;
    }
    let program =
        Program::new(Language::Cpp17, [write("one_call.cpp", ONE_CALL)]).flag("-DHYPERATTN_NO_EXCEPTIONS");
    let object = program.compile_only(&temporary("one_call.o")).unwrap_or_else(|error| panic!("{error}"));
    let output = Command::new("nm").arg(object).output().expect("nm runs");
    let symbols = String::from_utf8_lossy(&output.stdout);
    let functions: Vec<&str> = symbols.lines().filter(|line| line.contains("hyperattn")).collect();
    let called: Vec<&str> =
        functions.iter().filter_map(|line| line.trim_start().strip_prefix("U ")).collect();
    assert_eq!(called, ["hyperattn_forward", "hyperattn_params_init"], "{symbols}");
    // The third is call() itself.
    assert_eq!(functions.len(), 3, "{symbols}");
}
