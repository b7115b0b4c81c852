"""The operator `torch.ops.hyperattn.forward`, for autograd, torch.compile and torch.export.

    out, lse = hyperattn.torch.forward(q, k, v, method="exact", mask="causal")

Importing this module registers it and `torch.ops.hyperattn.backward`, with shapes and element types for tracing.
Gradients reach q, k and v from out and from lse; the backward pass keeps these five tensors and nothing else.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import library

from . import _attention, _params
from ._backward import backward as _gradients
from ._inputs import Layout
from ._params import Mask, Method, Parameters

__all__ = ["forward"]


def _schema(required: str, optional: str, results: int) -> str:
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
    tensors = [f"Tensor {name}" for name in required.split()] + [f"Tensor? {name}=None" for name in optional.split()]
    return f"({', '.join(tensors)}, *, {choices}, {', '.join(fields)}) -> ({', '.join(['Tensor'] * results)})"


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, additive_mask: torch.Tensor | None = None, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    # Autograd has its own registration, below.
    with torch.no_grad():
        out, lse = _attention.forward(q, k, v, additive_mask=additive_mask, return_lse=True, **arguments)
    return out, lse


def _forward_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, additive_mask: torch.Tensor | None = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_forward` returns, without contents."""
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    additive_mask: torch.Tensor | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if dout.stride(-1) != 1:
        # That of a sum, for example, is one number for all elements.
        dout = dout.clone(memory_format=torch.contiguous_format)
    with torch.no_grad():
        return _gradients(q, k, v, out, lse, dout, dlse=dlse, additive_mask=additive_mask, **arguments)


def _backward_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `_backward` returns, without contents."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_operator = library.custom_op(
    "hyperattn::forward", _forward, mutates_args=(), schema=_schema("q k v", "additive_mask", 2)
)
_backward_operator = library.custom_op(
    "hyperattn::backward", _backward, mutates_args=(), schema=_schema("q k v out lse dout", "dlse additive_mask", 3)
)


def _keep(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Saves what the backward pass needs."""
    ctx.save_for_backward(*inputs, *output)
    ctx.arguments = keyword_only_inputs
    # A loss of out alone gives no gradient for lse, rather than zeros.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the positional inputs."""
    if any(ctx.needs_input_grad[3:]):
        raise NotImplementedError("additive_mask: requires a gradient, but the library gives it none; detach it")
    if dout is None and dlse is None:
        return None, None, None, None
    q, k, v, additive_mask, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *_backward_operator(q, k, v, out, lse, dout, dlse, additive_mask, **ctx.arguments), None


_operator.register_fake(_forward_shapes)
_operator.register_autograd(_differentiate, setup_context=_keep)
_backward_operator.register_fake(_backward_shapes)


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
    """(out, lse) of `hyperattn.forward` as one operator, which autograd records and torch.compile and torch.export keep
    whole.

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
