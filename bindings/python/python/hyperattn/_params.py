"""Keyword arguments as a hyperattn_params: its fields are the header's."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from ._library import constants, ffi, lib

Method = Literal["auto", "exact", "paper", "refined"]
Mask = Literal["none", "causal", "causal_bottom_right", "causal_top_left"]


class Parameters(TypedDict, total=False):
    """The keyword arguments of a method: the fields of hyperattn_params that are not arguments of their own.

    Ranges and defaults are the header's. None takes the default.
    """

    #: How "paper" treats what its blocks do not cover; "refined" knows "none". Default "uniform".
    residual: Literal["uniform", "row_norm", "none"] | int | None
    #: Hyperplanes of the angular hash, 1 to 24; 0 leaves queries and keys in their order. Default 7.
    lsh_num_projs: int | None
    #: Keys of a sorted block; 0 means residual only. Default 256.
    block_size: int | None
    #: Sampled keys of a sub-problem; 0 means blocks only. Default 256.
    sample_size: int | None
    #: Sub-problems, under "refined" calls, with at most this many keys are exact. Default 4096.
    min_seq_len: int | None
    #: Key of the random numbers: the same seed gives the same bits. Default 0.
    seed: int | None
    #: Stream of the random numbers, for example the layer number. Default 0.
    offset: int | None
    #: Epsilon of Algorithm 2, positive, for residual "row_norm". Default 0.5.
    approx_d_epsilon: float | None
    #: Kappa of Algorithm 2, positive, for residual "row_norm". Default 1e4.
    approx_d_kappa: float | None
    #: About as many keys as a query meets under "refined", at least 64. Default 1024.
    budget: int | None
    #: Leading keys that every query meets under "refined". Default 16.
    num_first_keys: int | None
    #: Latest visible keys that every query meets under "refined" and a causal mask. Default 128.
    band: int | None
    #: Relative error of a head's output that "refined" aims to stay within; 0 keeps the budget. Default 0.05.
    target_error: float | None
    #: Whether gradients have the same bits in every call. False permits sums of dq in any order where that is faster,
    #: which is on a GPU only (HYPERATTN_FLAG_NONDETERMINISTIC). Default True.
    deterministic: bool | None


# Shorter names for what is wanted most.
_ALIASES = {"mask": {"causal": "causal_bottom_right"}}
_NOT_KEYWORDS = ("struct_size", "flags", "head_methods")


def fields() -> list[str]:
    """The names that `forward` takes as keywords of the method."""
    return [name for name, _ in ffi.typeof("hyperattn_params").fields if name not in _NOT_KEYWORDS] + ["deterministic"]


def _get(params: Any, field: str) -> float | int:
    """Its value. `deterministic` is the opposite of a bit of `flags`."""
    if field == "deterministic":
        return not params.flags & lib.HYPERATTN_FLAG_NONDETERMINISTIC
    value: float | int = getattr(params, field)
    return value


def _set(params: Any, field: str, value: float | int) -> None:
    if field != "deterministic":
        setattr(params, field, value)
    elif value:
        params.flags &= ~lib.HYPERATTN_FLAG_NONDETERMINISTIC
    else:
        params.flags |= lib.HYPERATTN_FLAG_NONDETERMINISTIC


def _initialised() -> Any:
    params = ffi.new("hyperattn_params *")
    lib.hyperattn_params_init(params, ffi.sizeof("hyperattn_params"))
    return params


def defaults() -> dict[str, float | int]:
    """The library's defaults, by field. Fields that choose (method, mask, residual) are given as numbers."""
    params = _initialised()
    return {name: _get(params, name) for name in fields()}


def _number(field: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    names = constants(field.upper())
    wanted = _ALIASES.get(field, {}).get(value, value)
    if wanted not in names:
        known = [*_ALIASES.get(field, {}), *names]
        raise ValueError(f"{field}={value!r}: one of {', '.join(known)}" if known else f"{field}={value!r}: a number")
    return names[wanted]


def build(method: Method | int, mask: Mask | int, scale: float | None, params: Parameters) -> Any:
    """A hyperattn_params with the defaults, overridden by what is given and not None."""
    struct = _initialised()
    known = fields()
    for name, value in {"method": method, "mask": mask, "scale": scale, **params}.items():
        if name not in known:
            raise TypeError(f"no parameter {name!r}: one of {', '.join(known)}")
        if value is not None:
            _set(struct, name, _number(name, value))
    return struct


def methods(names: Sequence[Method | int]) -> Any:
    """An array of hyperattn_method."""
    return ffi.new("hyperattn_method[]", [_number("method", name) for name in names])
