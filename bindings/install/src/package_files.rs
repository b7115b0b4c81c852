//! The files by which pkg-config and CMake find the installed tree.

use std::path::Path;

use crate::options::{Libraries, Options};

/// What the templates are filled with.
pub struct Values<'a> {
    pub options: &'a Options,
    pub version: &'a str,
    /// The shared library's file and the name that programs load it by.
    pub shared_file: &'a str,
    pub soname: &'a str,
}

impl Values<'_> {
    /// `hyperattn.pc`, for a directory below the prefix.
    pub fn pkg_config(&self, directory: &Path) -> String {
        // A shared library has these in itself.
        let (shown, hidden) = match self.options.libraries {
            Libraries::Both => ("", "Libs.private: -lpthread -ldl -lm\n"),
            Libraries::Static => (" -lpthread -ldl -lm", ""),
            Libraries::Shared => ("", ""),
        };
        self.fill(include_str!("../templates/hyperattn.pc.in"), directory)
            .replace("@libs@", &format!("-lhyperattn{shown}"))
            .replace("@libs_private@", hidden)
    }

    /// `hyperattnConfig.cmake`.
    pub fn cmake_config(&self) -> String {
        let static_targets = include_str!("../templates/static.cmake.in");
        let shared_targets = include_str!("../templates/shared.cmake.in");
        // With one library only, its users need not know which.
        let alias = include_str!("../templates/shared_alias.cmake.in");
        let (targets, components) = match self.options.libraries {
            Libraries::Both => ([static_targets, shared_targets].concat(), "static|shared"),
            Libraries::Static => (static_targets.to_string(), "static"),
            Libraries::Shared => ([shared_targets, alias].concat(), "shared"),
        };
        let template = include_str!("../templates/hyperattnConfig.cmake.in")
            .replace("@targets@\n", &targets)
            .replace("@components@", components);
        self.fill(&template, &self.options.cmakedir)
    }

    /// `hyperattnConfigVersion.cmake`.
    pub fn cmake_version(&self) -> String {
        self.fill(include_str!("../templates/hyperattnConfigVersion.cmake.in"), &self.options.cmakedir)
    }

    fn fill(&self, template: &str, directory: &Path) -> String {
        let up = vec![".."; directory.components().count()].join("/");
        let pointer_size = match self.options.target.split('-').next().unwrap_or("") {
            architecture if architecture.contains("64") || architecture == "s390x" => "8",
            _ => "4",
        };
        template
            .replace("@up@", &up)
            .replace("@version@", self.version)
            .replace("@major@", self.version.split('.').next().unwrap_or(""))
            .replace("@pointer_size@", pointer_size)
            .replace("@libdir@", &self.options.libdir.display().to_string())
            .replace("@includedir@", &self.options.includedir.display().to_string())
            .replace("@shared_file@", self.shared_file)
            .replace("@soname@", self.soname)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(libraries: &str) -> [String; 3] {
        let arguments = ["--prefix", "/p", "--libdir", "lib/a", "--libraries", libraries].map(String::from);
        let options = Options::parse(&arguments).unwrap();
        let values = Values {
            options: &options,
            version: "1.2.3",
            shared_file: "libhyperattn.so.1.2.3",
            soname: "name",
        };
        [values.pkg_config(Path::new("lib/a/pkgconfig")), values.cmake_config(), values.cmake_version()]
    }

    #[test]
    fn every_place_is_filled() {
        for libraries in ["both", "static", "shared"] {
            for file in files(libraries) {
                assert!(!file.contains('@'), "{file}");
            }
        }
    }

    #[test]
    fn system_libraries_are_named_where_the_archive_needs_them() {
        assert!(
            files("both")[0].contains("Libs: -L${libdir} -lhyperattn\nLibs.private: -lpthread -ldl -lm\n")
        );
        assert!(files("static")[0].contains("Libs: -L${libdir} -lhyperattn -lpthread -ldl -lm\n"));
        assert!(!files("shared")[0].contains("pthread"));
    }

    #[test]
    fn the_prefix_is_found_from_below() {
        let [pkg_config, cmake, version] = files("both");
        assert!(pkg_config.contains("prefix=${pcfiledir}/../../..\n"));
        assert!(cmake.contains("${CMAKE_CURRENT_LIST_DIR}/../../../..\""), "{cmake}");
        assert!(version.contains("\"1.2.3\""));
    }
}
