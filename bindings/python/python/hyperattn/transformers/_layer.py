"""How a layer is computed, and what is recorded of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from hyperattn._params import Mask, Method

# The attribute of an attention module that says how its layer is computed.
LAYER_ATTRIBUTE = "_hyperattn_layer"


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a replaced layer's method: what an observer gets."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    mask: Mask
    scale: float | None
    threads: int
    seconds: float
    error: torch.Tensor | None


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
