"""The mask function: no mask in memory where causal or full attention is meant."""

from typing import Any

import torch
from transformers.masking_utils import sdpa_mask


def _nothing_is_padded(padding: torch.Tensor | None, kv_length: int, kv_offset: int) -> bool:
    if padding is None:
        return True
    seen = padding[:, kv_offset : kv_offset + kv_length]
    return seen.shape[-1] == kv_length and bool(seen.all())


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """None when every query sees all keys up to its own position (or simply all keys); else transformers' 4-D mask.

    transformers allows one of the two skips when it has added nothing to the plain causal or full pattern. A cache
    with room for more keys, padding and a local window that is in reach are not plain.
    """
    plain = allow_is_causal_skip or allow_is_bidirectional_skip
    complete = int(q_offset) + q_length == kv_offset + kv_length or not allow_is_causal_skip
    unlimited = local_size is None or kv_length < local_size
    if plain and complete and unlimited and _nothing_is_padded(attention_mask, kv_length, kv_offset):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )
