"""The call of the backward pass."""

from collections.abc import Sequence
from typing import Any, TypeVar, Unpack, overload

from . import _params
from ._arrays import arrays_of
from ._call import Call
from ._dlpack import SupportsDLPack
from ._inputs import BlockMask, Layout, Numbers, Options, add_choices, tensors_of
from ._library import ffi
from ._params import Mask, Method, Parameters

Query = TypeVar("Query", bound=SupportsDLPack)
Key = TypeVar("Key", bound=SupportsDLPack)
Value = TypeVar("Value", bound=SupportsDLPack)


@overload
def backward(
    q: Query,
    k: Key,
    v: Value,
    out: SupportsDLPack,
    lse: SupportsDLPack,
    dout: SupportsDLPack,
    *,
    dlse: SupportsDLPack | None = ...,
    gradients: None = ...,
    **options: Unpack[Options],
) -> tuple[Query, Key, Value]: ...
@overload
def backward(
    q: SupportsDLPack,
    k: SupportsDLPack,
    v: SupportsDLPack,
    out: SupportsDLPack,
    lse: SupportsDLPack,
    dout: SupportsDLPack,
    *,
    dlse: SupportsDLPack | None = ...,
    gradients: tuple[Query, Key, Value],
    **options: Unpack[Options],
) -> tuple[Query, Key, Value]: ...
def backward(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dout: Any,
    *,
    dlse: Any = None,
    gradients: Any = None,
    method: Method | int = "auto",
    mask: Mask | int = "none",
    scale: float | None = None,
    layout: Layout = "bhsd",
    threads: int = 0,
    stream: int | None = None,
    additive_mask: SupportsDLPack | None = None,
    block_mask: BlockMask | None = None,
    head_methods: Sequence[Method | int] | None = None,
    cu_seqlens_q: Numbers | None = None,
    cu_seqlens_k: Numbers | None = None,
    **params: Unpack[Parameters],
) -> Any:
    """(dq, dk, dv): the gradients of a loss with respect to q, k and v.

    q, k, v, out, lse: what `forward` read and, with return_lse, what it wrote. For a row that `merge` made of several
        parts, one call for each part with the merged out and lse: dq is the sum over the parts.
    dout: the gradient with respect to out, shaped like it; q's type or float32, last dimension contiguous.
    dlse: the gradient with respect to lse, float32, shaped like it; None = the loss does not depend on lse.
    gradients: three arrays to write to, shaped like q, k and v, of their types or float32; None = new arrays like q, k
        and v. Where several query heads share a KV head, dk and dv are sums over these.
    The other arguments are those of the forward call, seed and offset too: the same keys are then found again.
    Raises what `forward` raises. Nothing is written then.

    For an estimator this is the gradient of what it computed, with its selection of keys held fixed, and not an
    estimate of the exact gradient. NaN stays with the rows and keys that see it. additive_mask has no gradient.
    """
    struct = _params.build(method, mask, scale, params)
    with Call("q", q, layout, stream) as call:
        tensors = tensors_of(call, q, k, v, block_mask)
        add_choices(call, struct, tensors, additive_mask, head_methods, cu_seqlens_q, cu_seqlens_k)
        call.fill(tensors.out, "out", out)
        call.fill(tensors.lse, "lse", lse, per_row=True)
        grads = ffi.new("hyperattn_grads *")
        grads.struct_size = ffi.sizeof("hyperattn_grads")
        call.fill(grads.dout, "dout", dout)
        if dlse is not None:
            call.fill(grads.dlse, "dlse", dlse, per_row=True)
        inputs = {"q": q, "k": k, "v": v}
        makers = [arrays_of(name, array) for name, array in inputs.items()]
        written = gradients
        if gradients is None:
            written = [maker.empty(tuple(x.shape), x, None) for maker, x in zip(makers, inputs.values())]
        for name, array in zip(("dq", "dk", "dv"), written, strict=True):
            call.fill(getattr(grads, name), name, array, written=True)
        call.run("backward", threads, struct, tensors, grads)
        if gradients is None:
            return tuple(maker.result(array, x) for maker, array, x in zip(makers, written, inputs.values()))
    return tuple(gradients)
