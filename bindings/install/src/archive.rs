//! Makes an archive that defines the public functions and nothing else, so that it can be linked beside other Rust
//! libraries: each brings a standard library of its own, and some of its names are the same in all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::toolchain::{output, utility};

/// Joins the members of `archive` to one object with `symbols` as its only global definitions; the result is
/// `directory/libhyperattn.a`.
pub fn localise(
    archive: &Path,
    symbols: &[String],
    target: &str,
    directory: &Path,
) -> Result<PathBuf, String> {
    let say = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    fs::create_dir_all(directory).map_err(|error| say(directory, error))?;
    let object = directory.join("hyperattn.o");
    let list = directory.join("symbols.txt");
    let script = directory.join("merge.ld");
    let localised = directory.join("libhyperattn.a");
    fs::write(&list, symbols.join("\n") + "\n").map_err(|error| say(&list, error))?;
    fs::write(&script, include_str!("../templates/merge.ld")).map_err(|error| say(&script, error))?;

    let mut link = Command::new(utility("LD", "ld", target)?);
    // Groups would be merged with those of the same name elsewhere, in spite of being local.
    link.args(["-r", "--force-group-allocation", "--gc-sections", "-T"]).arg(&script);
    link.args(symbols.iter().flat_map(|symbol| ["-u", symbol]));
    output(link.arg("-o").arg(&object).arg(archive))?;

    let mut hide = Command::new(utility("OBJCOPY", "objcopy", target)?);
    hide.args(["--strip-unneeded", "--remove-section=.llvmbc", "--remove-section=.llvmcmd"]);
    output(hide.arg(format!("--keep-global-symbols={}", list.display())).arg(&object))?;

    // ar would add to an archive that is there.
    if localised.exists() {
        fs::remove_file(&localised).map_err(|error| say(&localised, error))?;
    }
    output(Command::new(utility("AR", "ar", target)?).arg("rcsD").arg(&localised).arg(&object))?;
    Ok(localised)
}
