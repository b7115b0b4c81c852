//! Builds the library itself with cargo.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::artifacts::filenames;
use crate::error::{Error, command_line, run};
use crate::{HOST, TARGET};

/// Where one build of the library lies.
#[derive(Clone, Debug)]
pub struct Library {
    /// `libhyperattn.a`.
    pub static_library: PathBuf,
    /// `libhyperattn.so`, or what the target calls it; `None` where the target has no shared libraries.
    pub shared_library: Option<PathBuf>,
}

/// A build of the library that differs from the default one.
#[derive(Clone, Debug, Default)]
pub struct LibraryBuild {
    target: Option<String>,
    target_dir: Option<PathBuf>,
    environment: Vec<(String, String)>,
}

impl LibraryBuild {
    /// The default: release profile, this crate's target, the target directory of the workspace.
    pub fn new() -> Self {
        Self::default()
    }

    /// Builds for this triple, named to cargo even when it is the host: `RUSTFLAGS` then spare build scripts.
    pub fn target(mut self, triple: impl Into<String>) -> Self {
        self.target = Some(triple.into());
        self
    }

    /// Builds in this directory, so that other flags do not displace the default build.
    pub fn target_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.target_dir = Some(directory.into());
        self
    }

    /// Sets an environment variable of cargo, such as `RUSTFLAGS`.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Runs cargo and returns what it built.
    ///
    /// # Errors
    /// When cargo fails or builds no static library; the error carries the compiler's messages.
    pub fn build(&self) -> Result<Library, Error> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command
            .current_dir(workspace_dir())
            .args(["build", "--release", "--locked", "--package", "hyperattn-ffi"])
            .args(["--message-format", "json-render-diagnostics"]);
        let cross = (TARGET != HOST).then(|| TARGET.to_string());
        if let Some(triple) = self.target.clone().or(cross) {
            command.args(["--target", &triple]);
        }
        if let Some(directory) = &self.target_dir {
            command.arg("--target-dir").arg(directory);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));

        let output = run(&mut command)?;
        let messages = String::from_utf8_lossy(&output.stdout);
        let files = filenames(&messages);
        let find = |stem: &str, extensions: &[&str]| {
            files.iter().find(|file| {
                let extension = file.extension().and_then(|e| e.to_str());
                file.file_stem().is_some_and(|s| s == stem)
                    && extension.is_some_and(|e| extensions.contains(&e))
            })
        };
        let static_library = find("libhyperattn", &["a"]).or_else(|| find("hyperattn", &["lib"]));
        let shared_library = find("libhyperattn", &["so", "dylib"]).or_else(|| find("hyperattn", &["dll"]));
        match static_library {
            Some(path) => {
                Ok(Library { static_library: path.clone(), shared_library: shared_library.cloned() })
            }
            None => Err(Error::new(command_line(&command), format!("built no static library:\n{messages}"))),
        }
    }
}

/// The default build; cargo runs once per process.
///
/// # Errors
/// When the build fails; the error carries the compiler's messages.
pub fn library() -> Result<&'static Library, Error> {
    static LIBRARY: OnceLock<Result<Library, Error>> = OnceLock::new();
    LIBRARY.get_or_init(|| LibraryBuild::new().build()).as_ref().map_err(Error::clone)
}

/// The path of the static library of the default build.
///
/// # Errors
/// As [`library`].
pub fn static_library() -> Result<PathBuf, Error> {
    library().map(|library| library.static_library.clone())
}

/// The path of the shared library of the default build.
///
/// # Errors
/// As [`library`]; also when the target has no shared libraries.
pub fn shared_library() -> Result<PathBuf, Error> {
    let shared = library()?.shared_library.clone();
    shared.ok_or_else(|| Error::new("find the shared library", "the target builds none"))
}

/// The root of the workspace.
pub fn workspace_dir() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(3);
        root.expect("this crate lies three folders below the root of the workspace").to_path_buf()
    })
}

/// The directory to give to a compiler so that it finds `hyperattn/hyperattn.h`.
pub fn include_dir() -> PathBuf {
    workspace_dir().join("include")
}
