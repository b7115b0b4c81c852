//! The packages whose code goes into the library: where they lie, and under which licences.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::toolchain::output;

/// The packages of others, sorted by name.
pub struct Packages(Vec<Package>);

struct Package {
    name: String,
    version: String,
    license: String,
    directory: PathBuf,
}

impl Packages {
    /// Asks cargo, which downloads what is missing.
    pub fn read(target: &str) -> Result<Self, String> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.current_dir(hyperattn_link::workspace_dir());
        command.args(["metadata", "--locked", "--format-version", "1", "--filter-platform", target]);
        let metadata: Value = serde_json::from_str(&output(&mut command)?)
            .map_err(|error| format!("cargo metadata: {error}"))?;
        Self::linked(&metadata).ok_or_else(|| "cargo metadata: not in the form that is known".to_string())
    }

    /// What the library depends on, directly or not, leaving out what only builds or tests it.
    fn linked(metadata: &Value) -> Option<Self> {
        let packages = metadata["packages"].as_array()?;
        let nodes = metadata["resolve"]["nodes"].as_array()?;
        let ffi = packages.iter().find(|package| package["name"] == "hyperattn-ffi")?;
        let mut open = vec![&ffi["id"]];
        let mut seen: Vec<&Value> = Vec::new();
        while let Some(id) = open.pop() {
            if seen.contains(&id) {
                continue;
            }
            seen.push(id);
            let node = nodes.iter().find(|node| node["id"] == *id)?;
            for dependency in node["deps"].as_array()? {
                if dependency["dep_kinds"].as_array()?.iter().any(|kind| kind["kind"].is_null()) {
                    open.push(&dependency["pkg"]);
                }
            }
        }
        let mut linked = Vec::new();
        // The packages of this workspace have no source.
        for package in
            packages.iter().filter(|package| seen.contains(&&package["id"]) && !package["source"].is_null())
        {
            linked.push(Package {
                name: package["name"].as_str()?.to_string(),
                version: package["version"].as_str()?.to_string(),
                license: package["license"].as_str().unwrap_or("see its files").to_string(),
                directory: Path::new(package["manifest_path"].as_str()?).parent()?.to_path_buf(),
            });
        }
        linked.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
        Some(Self(linked))
    }

    /// The directories that hold the packages' own.
    pub fn directories(&self) -> BTreeSet<&Path> {
        self.0.iter().filter_map(|package| package.directory.parent()).collect()
    }

    /// Every package with the texts that its licence asks to be passed on.
    pub fn notices(&self) -> Result<String, String> {
        let mut text = String::from(
            "The libraries contain code of the Rust standard library (MIT OR Apache-2.0, https://www.rust-lang.org)\n\
             and of these packages:\n",
        );
        for package in &self.0 {
            text +=
                &format!("\n{}\n{} {}: {}\n", "=".repeat(80), package.name, package.version, package.license);
            for file in license_files(&package.directory)? {
                let bytes = fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                text += &format!("\n--- {name}\n\n{}\n", String::from_utf8_lossy(&bytes).trim_end());
            }
        }
        Ok(text)
    }
}

fn license_files(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|file| {
        let name = file.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        file.is_file()
            && ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE"]
                .iter()
                .any(|word| name.starts_with(word))
    });
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_of_tests_and_of_others_are_left_out() {
        let package = |name: &str, source: Value| {
            serde_json::json!({"name": name, "id": name, "version": "1.0.0", "source": source,
                "license": "MIT", "manifest_path": format!("/crates/{name}-1.0.0/Cargo.toml")})
        };
        let depends =
            |name: &str, kind: Value| serde_json::json!({"pkg": name, "dep_kinds": [{"kind": kind}]});
        let metadata = serde_json::json!({
            "packages": [package("hyperattn-ffi", Value::Null), package("b", "registry".into()),
                package("a", "registry".into()), package("tested", "registry".into()),
                package("other", "registry".into())],
            "resolve": {"nodes": [
                {"id": "hyperattn-ffi", "deps": [depends("b", Value::Null), depends("tested", "dev".into())]},
                {"id": "b", "deps": [depends("a", Value::Null)]},
                {"id": "a", "deps": []}, {"id": "tested", "deps": []}, {"id": "other", "deps": []}]}
        });
        let linked = Packages::linked(&metadata).unwrap();
        assert_eq!(linked.0.iter().map(|package| package.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(linked.directories(), BTreeSet::from([Path::new("/crates")]));
    }
}
