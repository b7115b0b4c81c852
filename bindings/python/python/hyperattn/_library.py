"""The shared library, loaded through the declarations of the C header."""

from typing import Any

from . import errors
from ._native import ffi as ffi
from ._native import lib as lib

_CLASSES = {
    "INVALID_ARGUMENT": errors.InvalidArgument,
    "UNSUPPORTED": errors.Unsupported,
    "DEVICE_UNAVAILABLE": errors.DeviceUnavailable,
    "OUT_OF_MEMORY": errors.OutOfMemory,
}


def constants(prefix: str) -> dict[str, int]:
    """The header's constants HYPERATTN_{prefix}_*, by what follows the prefix, in lower case."""
    start = f"HYPERATTN_{prefix}_"
    return {name[len(start) :].lower(): getattr(lib, name) for name in dir(lib) if name.startswith(start)}


def has_field(struct: str, field: str) -> bool:
    """Whether the header's struct has the field."""
    return any(name == field for name, _ in ffi.typeof(struct).fields)


def _text(string: Any) -> str:
    return str(ffi.string(string).decode())


def check(status: int) -> None:
    """Raises what belongs to a status, with the library's sentence."""
    if status == lib.HYPERATTN_STATUS_OK:
        return
    name = next((key.upper() for key, value in constants("STATUS").items() if value == status), str(status))
    raise _CLASSES.get(name, errors.HyperAttnError)(status, name, _text(lib.hyperattn_last_error()))


def version() -> str:
    """The library's version, "major.minor.patch"."""
    return _text(lib.hyperattn_version_string())


def abi_version() -> int:
    """The library's HYPERATTN_ABI_VERSION."""
    return int(lib.hyperattn_abi_version())


def isa() -> str:
    """The instruction set of the kernels that this process uses, for example "avx512_bf16"."""
    return _text(lib.hyperattn_cpu_isa())


def has_feature(name: str) -> bool:
    """Whether the library has "cuda", "cuda_aot" or "threads"."""
    features = constants("FEATURE")
    if name not in features:
        raise ValueError(f"no feature {name!r}: one of {', '.join(features)}")
    return bool(lib.hyperattn_has_feature(features[name]))


if abi_version() != lib.HYPERATTN_ABI_VERSION:
    raise ImportError(
        f"the library has ABI version {abi_version()}, the package was built for {lib.HYPERATTN_ABI_VERSION}"
    )
