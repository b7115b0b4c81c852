//! The command line.

use std::path::{Component, Path, PathBuf};

/// What `--help` prints.
pub const HELP: &str = "\
Builds libhyperattn.a and libhyperattn.so and installs them with headers, pkg-config and CMake files and licences.

cargo install-library --prefix DIR [OPTION VALUE]...

--prefix DIR        where everything goes; the installed tree can be moved
--destdir DIR       put it below DIR first, for packages: DIR/prefix
--libraries WHICH   both (default), static or shared
--target TRIPLE     build for this target (default: the host); *-linux-gnu* only
--libdir DIR        below the prefix, default lib
--includedir DIR    below the prefix, default include
--cmakedir DIR      below the prefix, default LIBDIR/cmake/hyperattn
--licensedir DIR    below the prefix, default share/licenses/hyperattn
--target-dir DIR    where cargo builds, default target/install
";

/// Which libraries are installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Libraries {
    /// The static and the shared library.
    Both,
    /// `libhyperattn.a` alone.
    Static,
    /// `libhyperattn.so` alone.
    Shared,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Where files are written: the prefix, below the staging directory if there is one.
    pub root: PathBuf,
    pub libraries: Libraries,
    pub target: String,
    /// Directories below the prefix.
    pub libdir: PathBuf,
    pub includedir: PathBuf,
    pub cmakedir: PathBuf,
    pub licensedir: PathBuf,
    pub target_dir: PathBuf,
}

impl Options {
    /// Reads `--name value` and `--name=value`.
    pub fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut prefix = None;
        let mut destdir = None;
        let mut cmakedir = None;
        let mut options = Self {
            root: PathBuf::new(),
            libraries: Libraries::Both,
            target: hyperattn_link::HOST.to_string(),
            libdir: "lib".into(),
            includedir: "include".into(),
            cmakedir: PathBuf::new(),
            licensedir: "share/licenses/hyperattn".into(),
            target_dir: hyperattn_link::workspace_dir().join("target/install"),
        };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let (name, value) = match argument.split_once('=') {
                Some((name, value)) => (name, value.to_string()),
                None => (argument.as_str(), rest.next().cloned().unwrap_or_default()),
            };
            if value.is_empty() {
                return Err(format!("{name} needs a value; --help lists the options"));
            }
            match name {
                "--prefix" => prefix = Some(absolute(&value)?),
                "--destdir" => destdir = Some(absolute(&value)?),
                "--libraries" => options.libraries = libraries(&value)?,
                "--target" => options.target = value,
                "--libdir" => options.libdir = below_prefix(name, &value)?,
                "--includedir" => options.includedir = below_prefix(name, &value)?,
                "--cmakedir" => cmakedir = Some(below_prefix(name, &value)?),
                "--licensedir" => options.licensedir = below_prefix(name, &value)?,
                "--target-dir" => options.target_dir = absolute(&value)?,
                _ => return Err(format!("unknown option {name}; --help lists the options")),
            }
        }
        let prefix = prefix.ok_or("--prefix DIR is missing; --help lists the options")?;
        options.root = match destdir {
            Some(destdir) => destdir.join(prefix.strip_prefix("/").unwrap_or(&prefix)),
            None => prefix,
        };
        options.cmakedir = cmakedir.unwrap_or_else(|| options.libdir.join("cmake/hyperattn"));
        if options.target.contains("-linux-gnu") {
            Ok(options)
        } else {
            Err(format!(
                "{} is not supported: the installer knows Linux with the GNU C library only",
                options.target
            ))
        }
    }
}

fn absolute(path: &str) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|error| format!("{path}: {error}"))
}

fn libraries(value: &str) -> Result<Libraries, String> {
    match value {
        "both" => Ok(Libraries::Both),
        "static" => Ok(Libraries::Static),
        "shared" => Ok(Libraries::Shared),
        _ => Err(format!("--libraries {value}: both, static or shared")),
    }
}

/// Package files find the prefix from where they lie, so nothing may lie elsewhere.
fn below_prefix(name: &str, value: &str) -> Result<PathBuf, String> {
    let path = Path::new(value);
    if path.components().all(|component| matches!(component, Component::Normal(_))) {
        Ok(path.to_path_buf())
    } else {
        Err(format!("{name} {value}: a directory below the prefix, such as lib/x86_64-linux-gnu"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(&line.split_whitespace().map(String::from).collect::<Vec<_>>())
    }

    #[test]
    fn directories_follow_each_other() {
        let options =
            parse("--prefix /usr --destdir=/stage --libdir lib/a --target x86_64-unknown-linux-gnu").unwrap();
        assert_eq!(options.root, Path::new("/stage/usr"));
        assert_eq!(options.cmakedir, Path::new("lib/a/cmake/hyperattn"));
        assert_eq!(options.libraries, Libraries::Both);
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        for (line, part) in [
            ("--libdir lib", "--prefix"),
            ("--prefix", "needs a value"),
            ("--prefix /p --libdir ../lib", "below the prefix"),
            ("--prefix /p --libdir /lib", "below the prefix"),
            ("--prefix /p --libraries some", "both, static or shared"),
            ("--prefix /p --target x86_64-pc-windows-msvc", "not supported"),
            ("--prefix /p --nonsense 1", "unknown option --nonsense"),
        ] {
            let message = parse(line).unwrap_err();
            assert!(message.contains(part), "{line}: {message}");
        }
    }
}
