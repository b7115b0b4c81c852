"""What a type checker sees of the calls: read by mypy, not run."""

from typing import Any, assert_type

import numpy
from numpy.typing import NDArray

import hyperattn

Floats = NDArray[numpy.float32]


def calls(q: Floats, k: Floats, v: Floats, other: NDArray[numpy.float16]) -> None:
    assert_type(hyperattn.forward(q, k, v, method="exact", mask="causal", seed=1, residual="row_norm"), Floats)
    assert_type(hyperattn.forward(q, k, v, out=other), NDArray[numpy.float16])
    assert_type(hyperattn.forward(q, k, v, return_lse=True), tuple[Floats, ...])
    assert_type(hyperattn.forward(q, k, v, out=other, return_error=True), tuple[Any, ...])
    half = hyperattn.backward(q, other, other, q, q, q, method="exact", mask="causal", seed=1, deterministic=False)
    assert_type(half, tuple[Floats, NDArray[numpy.float16], NDArray[numpy.float16]])
    assert_type(hyperattn.backward(q, other, other, q, q, q, gradients=(q, k, v)), tuple[Floats, Floats, Floats])
    assert_type(hyperattn.merge(other, q, other, q), tuple[NDArray[numpy.float16], Floats])


def mistakes(q: Floats) -> None:
    """Each of these is an error: mypy reports an ignore that is not needed."""
    hyperattn.forward(q, q, [1.0])  # type: ignore[call-overload]
    hyperattn.forward(q, q, q, method="best")  # type: ignore[call-overload]
    hyperattn.forward(q, q, q, blok_size=3)  # type: ignore[call-overload]
    hyperattn.forward(q, q, q, block_size="3")  # type: ignore[call-overload]
    hyperattn.backward(q, q, q, q, q)  # type: ignore[call-overload]
    hyperattn.backward(q, q, q, q, q, q, gradients=(q, q))  # type: ignore[arg-type]
