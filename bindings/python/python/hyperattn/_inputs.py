"""What the calls read: the arguments that forward and backward share, as the structs of the C header."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from . import _params
from ._call import Call
from ._dlpack import SupportsDLPack
from ._library import ffi
from ._params import Mask, Method, Parameters

Layout = Literal["bhsd", "bshd"]
# Whole numbers: a list, or an array that has `tolist`.
Numbers = Sequence[int] | SupportsDLPack


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Exact blocks that the caller chooses instead of sortLSH, for method "paper" (hyperattn_block_mask in the header).

    Queries are taken in blocks of `query_block`, keys in blocks of `key_block`. `row_offsets` is int64,
    [num_query_blocks + 1] for all heads or [batch * heads_q, num_query_blocks + 1]: where a block of queries begins and
    ends in `columns`, int32: the key blocks that it meets, ascending. Both are contiguous and where q is; on CUDA what
    they hold is not checked.
    """

    query_block: int
    key_block: int
    row_offsets: Any
    columns: Any

    def fill(self, call: Call, struct: Any, n_q: int, n_k: int) -> None:
        """Writes the C struct; it points into this object's arrays."""
        struct.struct_size = ffi.sizeof("hyperattn_block_mask")
        struct.query_block = self.query_block
        struct.key_block = self.key_block
        struct.num_query_blocks = -(-n_q // max(self.query_block, 1))
        struct.num_key_blocks = -(-n_k // max(self.key_block, 1))
        per_head = self.row_offsets.shape[-1]
        if per_head != struct.num_query_blocks + 1:
            raise ValueError(f"row_offsets: {per_head} entries a head, not {struct.num_query_blocks + 1}")
        struct.row_offsets = call.pointer("row_offsets", self.row_offsets, "int64", "int64_t *")
        struct.columns = call.pointer("columns", self.columns, "int32", "int32_t *")
        struct.row_offsets_head_stride = 0 if self.row_offsets.ndim == 1 else per_head


class Options(Parameters, total=False):
    """The keyword arguments of `forward` and `backward` on which the type of the result does not depend."""

    method: Method | int
    mask: Mask | int
    scale: float | None
    layout: Layout
    threads: int
    stream: int | None
    additive_mask: SupportsDLPack | None
    block_mask: BlockMask | None
    head_methods: Sequence[Method | int] | None
    cu_seqlens_q: Numbers | None
    cu_seqlens_k: Numbers | None


def tensors_of(call: Call, q: Any, k: Any, v: Any, block_mask: BlockMask | None) -> Any:
    """A hyperattn_tensors with the inputs that every call has."""
    tensors = ffi.new("hyperattn_tensors *")
    tensors.struct_size = ffi.sizeof("hyperattn_tensors")
    for name, array in (("q", q), ("k", k), ("v", v)):
        call.fill(getattr(tensors, name), name, array)
    if block_mask is not None:
        tensors.block_mask = call.keep(ffi.new("hyperattn_block_mask *"))
        block_mask.fill(call, tensors.block_mask, tensors.q.shape[2], tensors.k.shape[2])
    return tensors


def add_choices(
    call: Call,
    params: Any,
    tensors: Any,
    additive_mask: Any,
    head_methods: Sequence[Method | int] | None,
    cu_seqlens_q: Numbers | None,
    cu_seqlens_k: Numbers | None,
) -> None:
    """The arguments of forward and backward that are not in every call, into both structs."""
    if additive_mask is not None:
        call.fill_mask(tensors.mask, "additive_mask", additive_mask)
    if head_methods is not None:
        heads = tensors.q.shape[1]
        if len(head_methods) != heads:
            raise ValueError(f"head_methods: {len(head_methods)} methods for {heads} heads")
        params.head_methods = call.keep(_params.methods(head_methods))
    if cu_seqlens_q is not None:
        _divide(call, tensors, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)
    elif cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k: given without cu_seqlens_q")


def _whole_numbers(numbers: Any) -> list[int]:
    return [int(number) for number in (numbers.tolist() if hasattr(numbers, "tolist") else numbers)]


def _divide(call: Call, tensors: Any, queries: Numbers, keys: Numbers) -> None:
    """The sequences' bounds: short arrays of the host, also where the tensors are on CUDA."""
    bounds = [_whole_numbers(queries), _whole_numbers(keys)]
    if len(bounds[0]) != len(bounds[1]) or len(bounds[0]) < 2:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k: {len(bounds[0])} and {len(bounds[1])} numbers, not 2 or more")
    tensors.num_sequences = len(bounds[0]) - 1
    tensors.cu_seqlens_q, tensors.cu_seqlens_k = (call.keep(ffi.new("int32_t[]", numbers)) for numbers in bounds)
