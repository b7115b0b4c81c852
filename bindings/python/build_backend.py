"""Builds the wheel with maturin, on the C header that is in the tree.

maturin's cffi bindings parse `header.h` in cargo's target directory when there is one. It is written here from
include/hyperattn/hyperattn.h, without the preprocessor's lines that cffi does not read.
"""

import os
import pathlib
import re

import maturin

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADER = ROOT / "include" / "hyperattn" / "hyperattn.h"

get_requires_for_build_wheel = maturin.get_requires_for_build_wheel
get_requires_for_build_editable = maturin.get_requires_for_build_editable
prepare_metadata_for_build_wheel = maturin.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = maturin.prepare_metadata_for_build_editable


def declarations(header: str) -> str:
    """The header's declarations and integer constants: no includes, guards or C++ parts."""
    header = re.sub(r"^#ifdef __cplusplus$.*?^#endif.*?$", "", header, flags=re.MULTILINE | re.DOTALL)
    lines = []
    for line in header.splitlines():
        if not line.startswith("#") or re.fullmatch(r"#define \w+ \d+", line):
            lines.append(line)
    return "\n".join(lines) + "\n"


def write_declarations() -> None:
    target = pathlib.Path(os.environ.setdefault("CARGO_TARGET_DIR", str(ROOT / "target")))
    target.mkdir(parents=True, exist_ok=True)
    (target / "header.h").write_text(declarations(HEADER.read_text()))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    write_declarations()
    # Without a value: the platform tag says which glibc the library needs, where maturin would not look at it.
    config_settings = {"build-args": "--compatibility", **(config_settings or {})}
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    write_declarations()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)
