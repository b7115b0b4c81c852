"""Chosen layers of a model with a chosen method."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hyperattn._params import Method

from ._attention import LAYER_ATTRIBUTE, Call
from ._layers import attention_modules, select_layers


@dataclasses.dataclass
class Layer:
    """How a layer is computed, and what has been recorded of it."""

    index: int
    replaced: bool
    method: Method
    params: dict[str, Any]
    exact: str
    strict: bool
    threads: int
    estimate_errors: bool
    observer: Callable[[Call], None] | None
    #: Calls in which the method ran, and the time they took.
    calls: int = 0
    seconds: float = 0.0
    #: The estimated relative errors [batch, heads] of each call, when asked for.
    errors: list[torch.Tensor] = dataclasses.field(default_factory=list)
    #: Calls that sdpa computed instead, by reason.
    fallbacks: dict[str, int] = dataclasses.field(default_factory=dict)

    def declined(self, reason: str) -> None:
        """sdpa is about to compute a call because of `reason`."""
        if self.strict:
            raise ValueError(f"layer {self.index}: hyperattn does not compute attention with {reason}")
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1

    def finished(self, call: Call) -> None:
        """The method has computed a call."""
        self.calls += 1
        self.seconds += call.seconds
        if call.error is not None:
            self.errors.append(call.error)
        if self.observer is not None:
            self.observer(call)


class Replacement:
    """A model whose layers are computed as `replace` says, until `restore` or the end of the with block."""

    def __init__(self, model: Any, layers: list[Layer]) -> None:
        self.layers = layers
        self._model = model
        self._modules = attention_modules(model)
        self._before = model.config._attn_implementation
        if any(hasattr(module, LAYER_ATTRIBUTE) for module in self._modules):
            raise RuntimeError("layers of this model are replaced already: restore them first")
        model.set_attn_implementation("hyperattn")
        if model.config._attn_implementation != "hyperattn":
            raise ValueError(f"{type(model).__name__} does not use transformers' attention interface")
        for module, layer in zip(self._modules, layers):
            setattr(module, LAYER_ATTRIBUTE, layer)

    def restore(self) -> None:
        """Gives the model back the attention implementation it had. May be called again."""
        if self._model is None:
            return
        for module in self._modules:
            delattr(module, LAYER_ATTRIBUTE)
        self._model.set_attn_implementation(self._before)
        self._model = None

    def __enter__(self) -> "Replacement":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def replace(
    model: Any,
    layers: str | Sequence[int] = "all",
    method: Method = "auto",
    *,
    exact: str = "hyperattn",
    strict: bool = False,
    threads: int = 0,
    estimate_errors: bool = False,
    observer: Callable[[Call], None] | None = None,
    **params: Any,
) -> Replacement:
    """Computes the chosen layers of a transformers model with a method of hyperattn, the others exactly.

    layers: "all", "none", "first:K", "last:K", "every:K", "3,5,20" or a list of numbers.
    method, params: as for `hyperattn.forward`. The random numbers of layer i use offset + i.
    exact: what computes the other layers, and single queries (decoding): "hyperattn" or "sdpa".
    strict: refuse masks that the library does not have (padding, windows), instead of leaving such calls to sdpa.
    estimate_errors: keep the library's estimates of each head's error in `Layer.errors`.
    observer: called after every call of the method with a `Call`.
    """
    if exact not in ("hyperattn", "sdpa"):
        raise ValueError(f"exact={exact!r}: hyperattn or sdpa")
    modules = attention_modules(model)
    chosen = set(select_layers(layers, len(modules)))
    first = params.pop("offset", 0)
    states = [
        Layer(
            index=index,
            replaced=index in chosen,
            method=method,
            params={**params, "offset": first + index},
            exact=exact,
            strict=strict,
            threads=threads,
            estimate_errors=estimate_errors,
            observer=observer,
        )
        for index in range(len(modules))
    ]
    return Replacement(model, states)
