"""The attention function that transformers calls for every layer."""

import time
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hyperattn
from hyperattn import torch as operator

from ._layer import LAYER_ATTRIBUTE, Call, Layer

# Arguments that change the softmax in ways the library does not have.
_NOT_OFFERED = ("softcap", "s_aux")


def _is_causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    if is_causal is not None:
        return is_causal
    config = getattr(module, "config", None)
    return getattr(module, "is_causal", True) and getattr(config, "is_causal", True)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
    """The output, a view of [batch, tokens, heads, head_dim] memory, and the error estimate, if asked for."""
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if recorded and kwargs.get("return_error"):
        raise ValueError("estimate_errors: not while gradients are recorded; use torch.no_grad()")
    if recorded or (torch.compiler.is_compiling() and not kwargs.get("return_error")):
        # One node of the graph, where the call below would not be recorded, or would break what is compiled.
        out, _ = operator.forward(*(x.transpose(1, 2) for x in (q, k, v)), layout="bshd", **kwargs)
        return out.transpose(1, 2), None
    batch, heads, tokens, _ = q.shape
    out = torch.empty((batch, tokens, heads, v.shape[-1]), dtype=q.dtype, device=q.device).transpose(1, 2)
    result = hyperattn.forward(q, k, v, out=out, **kwargs)
    return (out, result[1]) if kwargs.get("return_error") else (out, None)


def _why_not(attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> str | None:
    if attention_mask is not None:
        return "a mask that is neither causal nor full (padding, a window, a static cache)"
    if kwargs.get("position_bias") is not None:
        return "a position bias"
    return None


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [batch, heads, n_q, d], key and value [batch, heads_kv, n_k, d] -> [batch, n_q, heads, d].

    A single query, a layer that was not replaced and what the library cannot do are exact; the last through sdpa,
    which is counted, or refused where `replace` was told to be strict.
    """
    for name in _NOT_OFFERED:
        if kwargs.get(name) is not None:
            raise ValueError(f"hyperattn has no {name}: choose another attn_implementation for this model")
    if dropout:
        raise ValueError(
            f"hyperattn has no dropout, but attention has one of {dropout}: call model.eval(), or set it to 0 to train"
        )
    layer: Layer | None = getattr(module, LAYER_ATTRIBUTE, None)
    causal = _is_causal(module, is_causal)

    def sdpa() -> tuple[torch.Tensor, None]:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, is_causal=causal, **kwargs
        )
        return out, None

    reason = _why_not(attention_mask, kwargs)
    if reason is not None:
        if layer is not None:
            layer.declined(reason)
        return sdpa()

    n_q, n_k = query.shape[2], key.shape[2]
    common: dict[str, Any] = {
        "mask": "causal" if causal and n_q > 1 else "none",
        "scale": scaling,
        "threads": 0 if layer is None else layer.threads,
    }
    if layer is None or not layer.replaced or n_q == 1:
        # Without a mask, sdpa's causal pattern begins at the first key, ours ends at the last.
        if layer is not None and layer.exact == "sdpa" and (n_q in (1, n_k) or not causal):
            return sdpa()
        out, _ = _forward(query, key, value, method="exact", **common)
        return out.transpose(1, 2), None

    started = time.perf_counter()
    settings = {"return_error": True} if layer.estimate_errors else {}
    out, error = _forward(query, key, value, method=layer.method, **layer.params, **common, **settings)
    call = Call(layer.index, query, key, value, out, **common, seconds=time.perf_counter() - started, error=error)
    layer.finished(call)
    return out.transpose(1, 2), None
