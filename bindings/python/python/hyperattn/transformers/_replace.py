"""Chosen layers of a model with a chosen method."""

from collections.abc import Callable, Sequence
from typing import Any

from hyperattn._params import Method

from ._layer import LAYER_ATTRIBUTE, Call, Layer
from ._layers import attention_modules, select_layers


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
