"""Conan 2 package of hyperattn, built from this source tree: conan create bindings/conan."""

import os
import re

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.files import copy, load

# What the libraries and their installer are built from.
SOURCES = ["Cargo.toml", "Cargo.lock", "LICENSE-*", ".cargo/*", "include/*", "core/*", "cuda/*", "ffi/*"]
SOURCES += ["bindings/cpp/link/*", "bindings/install/*"]
# Cargo wants to see all members of the workspace, though it does not build them.
SOURCES += ["bindings/*/Cargo.toml", "bindings/*.rs", "tests/*/Cargo.toml", "tests/*.rs"]
TRIPLES = {
    "x86_64": "x86_64-unknown-linux-gnu",
    "armv8": "aarch64-unknown-linux-gnu",
    "riscv64": "riscv64gc-unknown-linux-gnu",
}


class HyperattnConan(ConanFile):
    """Runs the installer of the workspace; needs cargo on PATH."""

    name = "hyperattn"
    description = "Exact attention and HyperAttention for C and C++ programs"
    license = "Apache-2.0 OR MIT"
    package_type = "library"
    settings = "os", "arch"
    options = {"shared": [True, False]}
    default_options = {"shared": False}

    @property
    def _root(self):
        return os.path.normpath(os.path.join(self.recipe_folder, "..", ".."))

    def set_version(self):
        manifest = load(self, os.path.join(self._root, "Cargo.toml"))
        self.version = re.search(r'^version = "(.+)"$', manifest, re.MULTILINE).group(1)

    def export_sources(self):
        for pattern in SOURCES:
            copy(self, pattern, self._root, self.export_sources_folder, excludes="*/target/*")

    def validate(self):
        if str(self.settings.os) != "Linux" or str(self.settings.arch) not in TRIPLES:
            raise ConanInvalidConfiguration("hyperattn's installer knows Linux on " + ", ".join(TRIPLES))

    def package(self):
        self.run(
            "cargo run --quiet --locked --package hyperattn-install --"
            f' --prefix "{self.package_folder}" --licensedir licenses'
            f" --target {TRIPLES[str(self.settings.arch)]}"
            f" --libraries {'shared' if self.options.shared else 'static'}"
            f' --target-dir "{os.path.join(self.build_folder, "cargo")}"',
            cwd=self.source_folder,
        )

    def package_info(self):
        self.cpp_info.libs = ["hyperattn"]
        self.cpp_info.set_property("pkg_config_name", "hyperattn")
        self.cpp_info.set_property("cmake_file_name", "hyperattn")
        self.cpp_info.set_property("cmake_target_name", "hyperattn::hyperattn")
        if self.options.shared:
            self.cpp_info.set_property("cmake_target_aliases", ["hyperattn::shared"])
        else:
            self.cpp_info.system_libs = ["pthread", "dl", "m"]
