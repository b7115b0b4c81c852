"""Which layers: the model's attention modules, and how a user names some of them."""

from collections.abc import Iterator, Sequence

import torch


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that call transformers' attention interface, in the model's order: layer i is the i-th of them."""
    return [module for module in model.modules() if hasattr(module, "is_causal") and not list(_nested(module))]


def _nested(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (child for child in module.modules() if child is not module and hasattr(child, "is_causal"))


def select_layers(layers: str | Sequence[int], count: int) -> list[int]:
    """Layer numbers from "all", "none", "first:K", "last:K", "every:K" (0, K, 2 K, ...), "3,5,20" or a list.

    Negative numbers count from the last layer.
    """
    if isinstance(layers, str):
        kind, _, number = layers.partition(":")
        try:
            if kind in ("all", "none") and not number:
                return list(range(count if kind == "all" else 0))
            if kind in ("first", "last", "every"):
                k = int(number)
                if k < 1 or (kind != "every" and k > count):
                    raise ValueError
                return list({"first": range(k), "last": range(count - k, count), "every": range(0, count, k)}[kind])
            layers = [int(number) for number in layers.split(",")]
        except ValueError:
            raise ValueError(
                f"layers={layers!r} of {count}: all, none, first:K, last:K, every:K or numbers with commas"
            ) from None
    chosen = sorted({layer + count if layer < 0 else layer for layer in layers})
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        raise ValueError(f"layers={list(layers)}: the model has {count} attention layers")
    return chosen
