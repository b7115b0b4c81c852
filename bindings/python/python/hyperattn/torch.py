"""The operator `torch.ops.hyperattn.forward`, for torch.compile and torch.export.

    out, lse = hyperattn.torch.forward(q, k, v, method="exact", mask="causal")

Importing this module registers it, with shapes and element types for tracing. There are no gradients yet: an input may
require one, but `backward` through the operator raises NotImplementedError.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import library

from . import _attention, _params
from ._attention import Layout
from ._params import Mask, Method, Parameters

__all__ = ["forward"]

_NAME = "hyperattn::forward"


def _schema() -> str:
    """Every parameter of the C header is an argument; None takes the library's default."""
    own = ("method", "mask", "scale")
    fields = [
        f"{'str' if name == 'residual' else type(value).__name__}? {name}=None"
        for name, value in _params.defaults().items()
        if name not in own
    ]
    choices = "str method='auto', str mask='none', float? scale=None, str layout='bhsd', int threads=0"
    choices += ", str[]? head_methods=None, int[]? cu_seqlens_q=None, int[]? cu_seqlens_k=None"
    # Operators take tensors by position.
    tensors = "Tensor q, Tensor k, Tensor v, Tensor? additive_mask=None"
    return f"({tensors}, *, {choices}, {', '.join(fields)}) -> (Tensor, Tensor)"


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, additive_mask: torch.Tensor | None = None, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    # Autograd has its own registration, below.
    with torch.no_grad():
        out, lse = _attention.forward(q, k, v, additive_mask=additive_mask, return_lse=True, **arguments)
    return out, lse


def _shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, additive_mask: torch.Tensor | None = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_forward` returns, without contents."""
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward(context: Any, *gradients: torch.Tensor) -> None:
    raise NotImplementedError(
        "hyperattn::forward has no backward pass: hyperattn_backward() is not implemented in this version; "
        "run it under torch.no_grad(), or train with another attention"
    )


_operator = library.custom_op(_NAME, _forward, mutates_args=(), schema=_schema())
_operator.register_fake(_shapes)
_operator.register_autograd(_backward)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    method: Method = "auto",
    mask: Mask = "none",
    scale: float | None = None,
    layout: Layout = "bhsd",
    threads: int = 0,
    additive_mask: torch.Tensor | None = None,
    head_methods: Sequence[Method] | None = None,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    **params: Unpack[Parameters],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `hyperattn.forward` as one operator, which torch.compile and torch.export keep whole.

    Tensors are on the CPU or on one CUDA device, whose current stream is taken. The arguments are those of
    `hyperattn.forward`; names (method, mask, residual) must be strings, and numbers fit 64 bits with a sign.
    """
    choices = {"method": method, "mask": mask, "scale": scale, "layout": layout, "threads": threads}
    parts = {
        "head_methods": head_methods,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    result: tuple[torch.Tensor, torch.Tensor] = _operator(q, k, v, additive_mask, **choices, **parts, **params)
    return result
