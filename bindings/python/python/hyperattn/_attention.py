"""The calls: forward, merge, diagnose."""

import functools
from collections import namedtuple
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, Unpack, overload

from . import _params
from ._call import Call, cpu_execution
from ._dlpack import SupportsDLPack
from ._inputs import BlockMask, Layout, Numbers, Options, add_choices, tensors_of
from ._library import check, ffi, lib
from ._params import Mask, Method, Parameters

Array = TypeVar("Array", bound=SupportsDLPack)
Other = TypeVar("Other", bound=SupportsDLPack)


@overload
def forward(
    q: Array,
    k: SupportsDLPack,
    v: SupportsDLPack,
    *,
    out: None = ...,
    return_lse: Literal[False] = ...,
    return_error: Literal[False] = ...,
    **options: Unpack[Options],
) -> Array: ...
@overload
def forward(
    q: SupportsDLPack,
    k: SupportsDLPack,
    v: SupportsDLPack,
    *,
    out: Other,
    return_lse: Literal[False] = ...,
    return_error: Literal[False] = ...,
    **options: Unpack[Options],
) -> Other: ...
@overload
def forward(
    q: Array,
    k: SupportsDLPack,
    v: SupportsDLPack,
    *,
    out: None = ...,
    return_lse: bool = ...,
    return_error: bool = ...,
    **options: Unpack[Options],
) -> tuple[Array, ...]: ...
@overload
def forward(
    q: SupportsDLPack,
    k: SupportsDLPack,
    v: SupportsDLPack,
    *,
    out: SupportsDLPack,
    return_lse: bool = ...,
    return_error: bool = ...,
    **options: Unpack[Options],
) -> tuple[Any, ...]: ...
def forward(
    q: Any,
    k: Any,
    v: Any,
    *,
    method: Method | int = "auto",
    mask: Mask | int = "none",
    scale: float | None = None,
    out: Any = None,
    return_lse: bool = False,
    return_error: bool = False,
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
    """softmax(scale * q k^T) v under the mask.

    q: [batch, heads_q, n_q, head_dim]; k: [batch, heads_kv, n_k, head_dim]; v: [batch, heads_kv, n_k, value_dim], with
        layout "bshd" [batch, n, heads, dim]; the batch dimension may be missing in all. Anything with `__dlpack__`, on
        the CPU or on one CUDA device; float32, float16 or bfloat16, one type for k and v, q the same or float32; any
        strides with unit stride in the last dimension. Nothing is copied. heads_q must be a multiple of heads_kv; head
        h of q uses KV head h / (heads_q / heads_kv). head_dim and value_dim are 1 to 256.
    method: "auto", "exact", "paper" or "refined". mask: "none", "causal" (the last query sees every key) or
        "causal_top_left" (query i sees keys 0 to i). scale: factor on q k^T, None = 1/sqrt(head_dim).
    out: where to write, [batch, heads_q, n_q, value_dim] in the layout, q's type or float32; None = a new array of q's
        library and type.
    return_lse: also the natural log of each row's sum of exp(logit), float32, out's shape without value_dim.
    return_error: also the estimated relative error of each head's output, float32 [batch, heads_q]: a share of 1.
    threads: of the CPU; 0 = all cores, 1 = the calling thread.
    stream: a CUstream or cudaStream_t as a number, for CUDA arrays. None = CuPy's current stream, else the legacy
        default one. PyTorch's current stream is always taken. On CUDA the call returns before the result is complete.
    additive_mask: added to scale * q k^T, on top of `mask`: [batch or 1, heads_q or 1, n_q or 1, n_k] in this order in
        every layout, leading dimensions may be missing; float32, float16 or bfloat16. -inf hides a key. For "exact" on
        the CPU, which "auto" then takes.
    block_mask: see `BlockMask`.
    head_methods: a method for each head of q, instead of `method`.
    cu_seqlens_q, cu_seqlens_k: sequences of different lengths, one after the other in the rows of q and of k and v; the
        batch is 1 or missing. Ascending row numbers from 0 to n_q and to n_k, one more than there are sequences. Each
        is computed as if it were alone. cu_seqlens_k: None = cu_seqlens_q. The error is then [sequences, heads_q].
    params: the other fields of the C struct hyperattn_params, see `Parameters`; `hyperattn.defaults()` lists them.
    Returns out, or a tuple (out, lse, error) of what was asked for.
    Raises HyperAttnError (InvalidArgument, Unsupported, OutOfMemory, DeviceUnavailable) with the library's sentence;
        TypeError and ValueError for arguments that are no arrays or whose names are not known. Outputs are untouched.
    """
    struct = _params.build(method, mask, scale, params)
    with Call("q", q, layout, stream) as call:
        tensors = tensors_of(call, q, k, v, block_mask)
        add_choices(call, struct, tensors, additive_mask, head_methods, cu_seqlens_q, cu_seqlens_k)
        made = [] if out is not None else [call.empty((*q.shape[:-1], v.shape[-1]))]
        call.fill(tensors.out, "out", made[0] if made else out, written=True)
        if return_lse:
            made.append(call.empty(tuple(q.shape[:-1]), "float32"))
            call.fill(tensors.lse, "lse", made[-1], written=True, per_row=True)
        if return_error:
            groups = (tensors.num_sequences,) if tensors.num_sequences else q.shape[:-3]
            made.append(call.empty((*groups, tensors.q.shape[1]), "float32"))
            call.fill(tensors.error, "error", made[-1], written=True, per_head=True)
        call.run("forward", threads, struct, tensors)
        results = [call.result(array) for array in made]
    results = results if out is None else [out, *results]
    return results[0] if len(results) == 1 else tuple(results)


def merge(out_a: Array, lse_a: Other, out_b: Any, lse_b: Any, *, layout: Layout = "bhsd") -> tuple[Array, Other]:
    """Joins two partial results over disjoint keys into out_a and lse_a, in place, and returns these two.

    out_a, out_b: [batch, heads, n, value_dim] in the layout, of any element types; lse_a, lse_b: float32 without the
    last dimension; a row whose lse is -inf counts as empty. On the CPU only.
    """
    with Call("out_a", out_a, layout) as call:
        call.on_cpu_only("merge")
        views = []
        for name, array, written, per_row in (
            ("out_a", out_a, True, False),
            ("lse_a", lse_a, True, True),
            ("out_b", out_b, False, False),
            ("lse_b", lse_b, False, True),
        ):
            view = ffi.new("hyperattn_tensor *")
            call.fill(view, name, array, written=written, per_row=per_row)
            views.append(view)
        check(lib.hyperattn_merge(*views))
    return out_a, lse_a


@functools.cache
def _diagnosis() -> Any:
    names = [name for name, _ in ffi.typeof("hyperattn_diagnosis").fields if name != "struct_size"]
    return namedtuple("Diagnosis", names)


def diagnose(
    q: SupportsDLPack,
    k: SupportsDLPack,
    v: SupportsDLPack,
    *,
    method: Method | int = "auto",
    mask: Mask | int = "none",
    scale: float | None = None,
    true_error: bool = False,
    layout: Layout = "bhsd",
    threads: int = 0,
    **params: Unpack[Parameters],
) -> list[list[Any]]:
    """How well the method does on these inputs: [batch][head] named tuples with the fields of hyperattn_diagnosis.

    true_error: compare with exact attention too, which takes its time. The other arguments are those of `forward`.
    On the CPU only.
    """
    struct = _params.build(method, mask, scale, params)
    with Call("q", q, layout) as call:
        call.on_cpu_only("diagnose")
        tensors = tensors_of(call, q, k, v, None)
        # The shape of an output that is not wanted.
        tensors.out = tensors.q
        tensors.out.data = ffi.NULL
        tensors.out.shape[3] = tensors.v.shape[3]
        batch, heads = tensors.q.shape[0], tensors.q.shape[1]
        answers = ffi.new("hyperattn_diagnosis[]", batch * heads)
        for answer in answers:
            answer.struct_size = ffi.sizeof("hyperattn_diagnosis")
        flags = lib.HYPERATTN_DIAGNOSE_TRUE_ERROR if true_error else 0
        check(lib.hyperattn_diagnose(struct, tensors, cpu_execution(threads), flags, answers, len(answers)))
    record = _diagnosis()
    rows = [record(*(getattr(answer, name) for name in record._fields)) for answer in answers]
    return [rows[item * heads : (item + 1) * heads] for item in range(batch)]
