"""The calls: forward, merge, diagnose."""

import dataclasses
import functools
from collections import namedtuple
from typing import Any

from . import _params
from ._arrays import arrays_of, axes, fill_view, pointer_of
from ._library import check, ffi, has_field, lib


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Exact blocks that the caller chooses instead of sortLSH, for method "paper" (hyperattn_block_mask in the header).

    `row_offsets` is int64, [num_query_blocks + 1] for all heads or [batch * heads_q, num_query_blocks + 1];
    `columns` is int32: the key blocks of each row, ascending.
    """

    query_block: int
    key_block: int
    row_offsets: Any
    columns: Any

    def fill(self, struct: Any, n_q: int, n_k: int) -> None:
        """Writes the C struct; it points into this object's arrays."""
        struct.struct_size = ffi.sizeof("hyperattn_block_mask")
        struct.query_block = self.query_block
        struct.key_block = self.key_block
        struct.num_query_blocks = -(-n_q // max(self.query_block, 1))
        struct.num_key_blocks = -(-n_k // max(self.key_block, 1))
        if self.row_offsets.shape[-1] != struct.num_query_blocks + 1:
            raise ValueError(
                f"row_offsets: {self.row_offsets.shape[-1]} entries a head, not {struct.num_query_blocks + 1}"
            )
        struct.row_offsets = pointer_of("row_offsets", self.row_offsets, "int64", "int64_t *")
        struct.columns = pointer_of("columns", self.columns, "int32", "int32_t *")
        struct.row_offsets_head_stride = 0 if self.row_offsets.ndim == 1 else self.row_offsets.shape[-1]


def _tensors(q: Any, k: Any, v: Any, layout: str, block_mask: BlockMask | None, kept: list) -> Any:
    tensors = ffi.new("hyperattn_tensors *")
    tensors.struct_size = ffi.sizeof("hyperattn_tensors")
    for name, array in (("q", q), ("k", k), ("v", v)):
        fill_view(getattr(tensors, name), name, array, layout)
    if block_mask is not None:
        struct = ffi.new("hyperattn_block_mask *")
        block_mask.fill(struct, tensors.q.shape[2], tensors.k.shape[2])
        kept.append(struct)
        tensors.block_mask = struct
    return tensors


def _execution(threads: int) -> Any:
    execution = ffi.new("hyperattn_cpu_exec *")
    execution.struct_size = ffi.sizeof("hyperattn_cpu_exec")
    execution.num_threads = threads
    return execution


def forward(
    q: Any,
    k: Any,
    v: Any,
    *,
    method: str | int = "auto",
    mask: str | int = "none",
    scale: float | None = None,
    out: Any = None,
    return_lse: bool = False,
    return_error: bool = False,
    layout: str = "bhsd",
    threads: int = 0,
    block_mask: BlockMask | None = None,
    **params: Any,
) -> Any:
    """softmax(scale * q k^T) v under the mask.

    q, k, v: NumPy arrays or PyTorch CPU tensors [batch, heads, sequence, head_dim] (layout "bshd": [batch, sequence,
        heads, head_dim]), the batch dimension may be missing; float32, float16 or bfloat16; any strides with unit
        stride in the last dimension. Nothing is copied. heads of q must be a multiple of the heads of k and v.
    method: "auto", "exact", "paper" or "refined". mask: "none", "causal" (the last query sees every key) or
        "causal_top_left". scale: None = 1/sqrt(head_dim).
    out: where to write; None = a new array of q's type.
    params: every other field of the C struct hyperattn_params (`hyperattn.defaults()` lists them), for example
        min_seq_len=1024, block_size=128, residual="row_norm", seed=1.
    Returns out, or a tuple (out, lse, error) of what was asked for. lse has the layout of out without its last
    dimension; error is the estimated relative error of each head's output [batch, heads].
    """
    struct = _params.build({"method": method, "mask": mask, "scale": scale, **params})
    kept: list = []
    tensors = _tensors(q, k, v, layout, block_mask, kept)
    arrays = arrays_of("q", q)
    if out is None:
        out = arrays.empty((*q.shape[:-1], v.shape[-1]), q, float32=False)
    fill_view(tensors.out, "out", out, layout, written=True)
    results = [out]
    if return_lse:
        lse = arrays.empty(tuple(q.shape[:-1]), q, float32=True)
        fill_view(tensors.lse, "lse", lse, layout, written=True, per_row=True)
        results.append(lse)
    if return_error:
        if not has_field("hyperattn_tensors", "error"):
            raise NotImplementedError("this version of the library does not estimate errors")
        heads = axes(layout)[1] - (4 - q.ndim)
        error = arrays.empty((*q.shape[: q.ndim - 3], q.shape[heads], 1), q, float32=True)
        fill_view(tensors.error, "error", error, "bhsd", written=True, per_row=True)
        results.append(error[..., 0])
    check(lib.hyperattn_forward(struct, tensors, _execution(threads)))
    return results[0] if len(results) == 1 else tuple(results)


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, layout: str = "bhsd") -> tuple[Any, Any]:
    """Joins two partial results over disjoint keys into out_a and lse_a, in place, and returns these two."""
    views = []
    for name, array, written, per_row in (
        ("out_a", out_a, True, False),
        ("lse_a", lse_a, True, True),
        ("out_b", out_b, False, False),
        ("lse_b", lse_b, False, True),
    ):
        view = ffi.new("hyperattn_tensor *")
        fill_view(view, name, array, layout, written=written, per_row=per_row)
        views.append(view)
    check(lib.hyperattn_merge(*views))
    return out_a, lse_a


@functools.cache
def _diagnosis() -> Any:
    names = [name for name, _ in ffi.typeof("hyperattn_diagnosis").fields if name != "struct_size"]
    return namedtuple("Diagnosis", names)


def diagnose(
    q: Any,
    k: Any,
    v: Any,
    *,
    method: str | int = "auto",
    mask: str | int = "none",
    scale: float | None = None,
    true_error: bool = False,
    layout: str = "bhsd",
    threads: int = 0,
    **params: Any,
) -> list[list[Any]]:
    """How well the method does on these inputs: [batch][head] named tuples with the fields of hyperattn_diagnosis.

    true_error: compare with exact attention too, which takes its time. The other arguments are those of `forward`.
    """
    if not hasattr(lib, "hyperattn_diagnose"):
        raise NotImplementedError("this version of the library does not diagnose")
    struct = _params.build({"method": method, "mask": mask, "scale": scale, **params})
    tensors = _tensors(q, k, v, layout, None, [])
    # The shape of an output that is not wanted.
    tensors.out = tensors.q
    tensors.out.data = ffi.NULL
    tensors.out.shape[3] = tensors.v.shape[3]
    batch, heads = tensors.q.shape[0], tensors.q.shape[1]
    answers = ffi.new("hyperattn_diagnosis[]", batch * heads)
    for answer in answers:
        answer.struct_size = ffi.sizeof("hyperattn_diagnosis")
    flags = lib.HYPERATTN_DIAGNOSE_TRUE_ERROR if true_error else 0
    check(lib.hyperattn_diagnose(struct, tensors, _execution(threads), flags, answers, len(answers)))
    record = _diagnosis()
    rows = [record(*(getattr(answer, name) for name in record._fields)) for answer in answers]
    return [rows[item * heads : (item + 1) * heads] for item in range(batch)]
