//! Compiles one C or C++ program with the machine's compiler and links it to the library.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, run};
use crate::library::{include_dir, static_library};
use crate::{HOST, TARGET};

/// A language standard that the header supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Language {
    C99,
    C11,
    C17,
    Cpp11,
    Cpp14,
    Cpp17,
    Cpp20,
    Cpp23,
}

impl Language {
    /// Every standard, C first.
    pub const ALL: [Language; 8] =
        [Self::C99, Self::C11, Self::C17, Self::Cpp11, Self::Cpp14, Self::Cpp17, Self::Cpp20, Self::Cpp23];

    /// True for the C++ standards.
    pub fn is_cpp(self) -> bool {
        matches!(self, Self::Cpp11 | Self::Cpp14 | Self::Cpp17 | Self::Cpp20 | Self::Cpp23)
    }

    /// The name that `-std=` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::C99 => "c99",
            Self::C11 => "c11",
            Self::C17 => "c17",
            Self::Cpp11 => "c++11",
            Self::Cpp14 => "c++14",
            Self::Cpp17 => "c++17",
            Self::Cpp20 => "c++20",
            // The name that compilers of its time of drafting know, and later ones too.
            Self::Cpp23 => "c++2b",
        }
    }
}

/// What to compile, and how.
#[derive(Clone, Debug)]
pub struct Program {
    sources: Vec<PathBuf>,
    language: Language,
    compiler: Option<PathBuf>,
    include_dirs: Vec<PathBuf>,
    flags: Vec<OsString>,
    link_arguments: Vec<OsString>,
    sanitizers: Vec<String>,
    archive: Option<PathBuf>,
}

impl Program {
    /// A program of these sources, all in one language, to be linked to the default static library.
    pub fn new<P: Into<PathBuf>>(language: Language, sources: impl IntoIterator<Item = P>) -> Self {
        Self {
            sources: sources.into_iter().map(Into::into).collect(),
            language,
            compiler: None,
            include_dirs: vec![include_dir()],
            flags: Vec::new(),
            link_arguments: Vec::new(),
            sanitizers: Vec::new(),
            archive: None,
        }
    }

    /// Uses this compiler instead of the one that `CC`, `CXX` or the machine's default names.
    pub fn compiler(mut self, compiler: impl Into<PathBuf>) -> Self {
        self.compiler = Some(compiler.into());
        self
    }

    /// Adds a directory to search for headers, after the library's own.
    pub fn include(mut self, directory: impl Into<PathBuf>) -> Self {
        self.include_dirs.push(directory.into());
        self
    }

    /// Adds an argument for the compiler.
    pub fn flag(mut self, flag: impl Into<OsString>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// Adds arguments for the compiler.
    pub fn flags<F: Into<OsString>>(mut self, flags: impl IntoIterator<Item = F>) -> Self {
        self.flags.extend(flags.into_iter().map(Into::into));
        self
    }

    /// Adds an argument for the linker, behind the static library.
    pub fn link_argument(mut self, argument: impl Into<OsString>) -> Self {
        self.link_arguments.push(argument.into());
        self
    }

    /// Instruments the program's own code and links the compiler's run-time library, as `-fsanitize=NAME` does.
    pub fn sanitizer(mut self, name: impl Into<String>) -> Self {
        self.sanitizers.push(name.into());
        self
    }

    /// Links this library instead of the default static one; a shared library is found again at run time by its path.
    pub fn archive(mut self, archive: impl Into<PathBuf>) -> Self {
        self.archive = Some(archive.into());
        self
    }

    /// Compiles and links; returns the path of the executable.
    ///
    /// # Errors
    /// When the library, the program or the link fails; the error carries the tool's messages.
    pub fn compile(&self, executable: &Path) -> Result<PathBuf, Error> {
        let archive = match &self.archive {
            Some(path) => path.clone(),
            None => static_library()?,
        };
        let mut command = self.command(executable)?;
        command.args(&self.sources).arg("-o").arg(executable).arg(archive);
        // The documented link line: nothing else may be needed.
        command.args(["-lpthread", "-ldl", "-lm"]).args(&self.link_arguments);
        run(&mut command)?;
        Ok(executable.to_path_buf())
    }

    /// Compiles the one source to an object file, without the library and without a link.
    ///
    /// # Errors
    /// When the compiler fails; the error carries its messages.
    pub fn compile_only(&self, object: &Path) -> Result<PathBuf, Error> {
        let mut command = self.command(object)?;
        command.arg("-c").args(&self.sources).arg("-o").arg(object);
        run(&mut command)?;
        Ok(object.to_path_buf())
    }

    /// The compiler with every argument but the files to read and to write.
    fn command(&self, output: &Path) -> Result<Command, Error> {
        let directory = output.parent().unwrap_or_else(|| Path::new("."));
        std::fs::create_dir_all(directory)
            .map_err(|e| Error::new(format!("create {}", directory.display()), e.to_string()))?;

        let mut build = cc::Build::new();
        build.target(TARGET).host(HOST).opt_level(2).debug(true).out_dir(directory);
        // Not warnings(false): that adds -w, which silences whatever warnings the caller asks for.
        build.cargo_output(false).cargo_metadata(false).cargo_warnings(false).cpp(self.language.is_cpp());
        if let Some(compiler) = &self.compiler {
            build.compiler(compiler);
        }
        let tool = build.try_get_compiler().map_err(|e| Error::new("find a compiler", e.to_string()))?;
        if tool.is_like_msvc() {
            let why = format!("{} takes other arguments than this crate gives", tool.path().display());
            return Err(Error::new("find a compiler", why));
        }
        let mut command = tool.to_command();
        command.arg(format!("-std={}", self.language.name())).args(&self.flags);
        for directory in &self.include_dirs {
            command.arg("-I").arg(directory);
        }
        if !self.sanitizers.is_empty() {
            command.arg(format!("-fsanitize={}", self.sanitizers.join(",")));
        }
        Ok(command)
    }
}
