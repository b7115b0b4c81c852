//! Puts every file in its place.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use hyperattn_link::{include_dir, workspace_dir};

use crate::options::{Libraries, Options};
use crate::package_files::Values;
use crate::packages::Packages;
use crate::{archive, build, symbols};

/// Builds and installs.
pub fn install(options: &Options) -> Result<(), String> {
    let version = env!("CARGO_PKG_VERSION");
    let major = version.split('.').next().unwrap_or("");
    let soname = format!("libhyperattn.so.{major}");
    let shared_file = format!("libhyperattn.so.{version}");

    let packages = Packages::read(&options.target)?;
    let library = build::build(options, &packages, &soname)?;
    let libdir = options.root.join(&options.libdir);
    if options.libraries != Libraries::Shared {
        let header = read(&include_dir().join("hyperattn/hyperattn.h"))?;
        let symbols = symbols::declared(&String::from_utf8_lossy(&header));
        let directory = options.target_dir.join("localised").join(&options.target);
        let localised = archive::localise(&library.static_library, &symbols, &options.target, &directory)?;
        write(&libdir.join("libhyperattn.a"), &read(&localised)?, 0o644)?;
    }
    if options.libraries != Libraries::Static {
        let built =
            library.shared_library.ok_or_else(|| format!("{} has no shared libraries", options.target))?;
        write(&libdir.join(&shared_file), &read(&built)?, 0o755)?;
        link(&libdir.join(&soname), &shared_file)?;
        link(&libdir.join("libhyperattn.so"), &soname)?;
    }

    let headers = options.root.join(&options.includedir).join("hyperattn");
    for header in files(&include_dir().join("hyperattn"))? {
        write(&headers.join(header.file_name().unwrap_or_default()), &read(&header)?, 0o644)?;
    }

    let values = Values { options, version, shared_file: &shared_file, soname: &soname };
    let pkgconfigdir = options.libdir.join("pkgconfig");
    let cmakedir = options.root.join(&options.cmakedir);
    let pkg_config = values.pkg_config(&pkgconfigdir);
    write(&options.root.join(pkgconfigdir).join("hyperattn.pc"), pkg_config.as_bytes(), 0o644)?;
    write(&cmakedir.join("hyperattnConfig.cmake"), values.cmake_config().as_bytes(), 0o644)?;
    write(&cmakedir.join("hyperattnConfigVersion.cmake"), values.cmake_version().as_bytes(), 0o644)?;

    let licensedir = options.root.join(&options.licensedir);
    for name in ["LICENSE-APACHE", "LICENSE-MIT"] {
        write(&licensedir.join(name), &read(&workspace_dir().join(name))?, 0o644)?;
    }
    write(&licensedir.join("THIRD-PARTY"), packages.notices()?.as_bytes(), 0o644)?;
    println!("installed hyperattn {version} for {} in {}", options.target, options.root.display());
    Ok(())
}

fn files(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    paths.collect::<Result<_, _>>().map_err(|error| format!("{}: {error}", directory.display()))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Leaves a file alone that is right already: what depends on it is not built anew.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), String> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let write = || {
        fs::create_dir_all(path.parent().unwrap_or(Path::new("")))?;
        // A program that runs keeps the file that it has mapped.
        if path.exists() {
            fs::remove_file(path)?;
        }
        fs::write(path, bytes)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    };
    write().map_err(|error| format!("{}: {error}", path.display()))
}

/// Makes `path` a symbolic link to a file beside it.
fn link(path: &Path, to: &str) -> Result<(), String> {
    if fs::read_link(path).is_ok_and(|old| old == Path::new(to)) {
        return Ok(());
    }
    let replace = || {
        if fs::symlink_metadata(path).is_ok() {
            fs::remove_file(path)?;
        }
        symlink(to, path)
    };
    replace().map_err(|error| format!("{}: {error}", path.display()))
}
