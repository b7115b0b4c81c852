//! The main job in one command: builds the static library, compiles a C program against the header and the
//! archive, runs it, and draws what it measured.

mod csv;
mod options;
mod plot;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use hyperattn_link::{Language, Program, static_library, workspace_dir};
use options::{Options, USAGE};

const SOURCES: [&str; 5] = ["demo.c", "inputs.c", "keys_per_query.c", "reference.c", "report.c"];
const DATA: &str = "tests/data/qwen2.5-coder-0.5b_novel_layer12";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let options = match Options::parse(&arguments) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            eprint!("{message}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let folder = target_dir().join("demo");
    fs::create_dir_all(&folder)?;
    let csv = folder.join("hyperattn.csv");
    let svg = folder.join("hyperattn.svg");

    eprintln!("building the static library");
    let archive = static_library()?;
    eprintln!("compiling the C program");
    let sources = SOURCES.map(|name| Path::new(env!("CARGO_MANIFEST_DIR")).join(name));
    let program = Program::new(Language::C99, sources).flags(["-Wall", "-Wextra", "-Wpedantic"]);
    let executable = program.compile(&folder.join("demo"))?;
    eprintln!("running {}", executable.display());
    let status = Command::new(&executable)
        .arg(workspace_dir().join(DATA))
        .arg(&csv)
        .arg(options.max_n.to_string())
        .status()?;
    if !status.success() {
        return Err(format!("{} ended with {status}", executable.display()).into());
    }

    let text = fs::read_to_string(&csv)?;
    let rows = csv::parse(&text).map_err(|e| format!("{}: {e}", csv.display()))?;
    plot::draw(&rows, &svg)?;
    println!("\nlibrary  {}", archive.display());
    println!("program  {}", executable.display());
    println!("table    {}", csv.display());
    println!("picture  {}", svg.display());
    Ok(())
}

/// Where cargo puts what it builds, and so the place for what the demo makes.
fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_dir().join("target"), PathBuf::from)
}
