"""Keyword arguments as a hyperattn_params: its fields are the header's."""

from typing import Any

from ._library import constants, ffi, lib

# Shorter names for what is wanted most.
_ALIASES = {"mask": {"causal": "causal_bottom_right"}}
_NOT_KEYWORDS = ("struct_size", "flags")


def fields() -> list[str]:
    """The names that `forward` takes as keywords of the method."""
    return [name for name, _ in ffi.typeof("hyperattn_params").fields if name not in _NOT_KEYWORDS]


def _initialised() -> Any:
    params = ffi.new("hyperattn_params *")
    lib.hyperattn_params_init(params, ffi.sizeof("hyperattn_params"))
    return params


def defaults() -> dict[str, float | int]:
    """The library's defaults, by field. Fields that choose (method, mask, residual) are given as numbers."""
    params = _initialised()
    return {name: getattr(params, name) for name in fields()}


def _number(field: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    names = constants(field.upper())
    wanted = _ALIASES.get(field, {}).get(value, value)
    if wanted not in names:
        known = [*_ALIASES.get(field, {}), *names]
        raise ValueError(f"{field}={value!r}: one of {', '.join(known)}" if known else f"{field}={value!r}: a number")
    return names[wanted]


def build(values: dict[str, Any]) -> Any:
    """A hyperattn_params with the defaults, overridden by what is given and not None."""
    params = _initialised()
    known = fields()
    for name, value in values.items():
        if name not in known:
            raise TypeError(f"no parameter {name!r}: one of {', '.join(known)}")
        if value is not None:
            setattr(params, name, _number(name, value))
    return params
