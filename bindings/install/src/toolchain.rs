//! The compiler and the binary utilities of a target.

use std::path::PathBuf;
use std::process::Command;

/// What is asked of the Rust compiler.
pub struct Rust {
    pub sysroot: PathBuf,
    /// Of its source, as in the paths of the standard library.
    pub commit: String,
}

/// The Rust compiler that cargo uses.
pub fn rust() -> Result<Rust, String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let ask = |arguments: &[&str]| output(Command::new(&rustc).args(arguments));
    let version = ask(&["-vV"])?;
    let commit = version.lines().find_map(|line| line.strip_prefix("commit-hash: ")).unwrap_or("unknown");
    Ok(Rust { sysroot: ask(&["--print", "sysroot"])?.trim().into(), commit: commit.to_string() })
}

/// A binary utility for a target: the environment variable, else GNU's with the target in its name, else LLVM's, which
/// serves all targets.
pub fn utility(variable: &str, name: &str, target: &str) -> Result<String, String> {
    if let Some(chosen) = std::env::var(variable).ok().filter(|chosen| !chosen.is_empty()) {
        return Ok(chosen);
    }
    let mut candidates = Vec::new();
    if target == hyperattn_link::HOST {
        candidates.push(name.to_string());
    }
    let parts: Vec<&str> = target.split('-').collect();
    if let [architecture, _, system @ ..] = &parts[..] {
        candidates.push(format!("{architecture}-{}-{name}", system.join("-")));
    }
    candidates.push(match name {
        "ld" => "ld.lld".to_string(),
        _ => format!("llvm-{name}"),
    });
    let starts =
        |tool: &String| Command::new(tool).arg("--version").output().is_ok_and(|run| run.status.success());
    let found = candidates.iter().find(|tool| starts(tool)).cloned();
    found.ok_or_else(|| {
        format!("{target} needs one of {}; {variable} can name another", candidates.join(", "))
    })
}

/// Runs a command and returns what it prints; an unsuccessful one becomes its message.
pub fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        String::from_utf8(output.stdout).map_err(|error| format!("{name}: {error}"))
    } else {
        Err(format!("{name} ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
    }
}
