"""The error of a head: Frobenius norm of the difference to exact attention, over that of exact attention."""

import statistics
from typing import Any

import torch

import hyperattn
from hyperattn._params import Mask

# An estimate is good when the true error is at most this factor away, either way.
NEAR = 1.5
# Below this an error in single precision is rounding, and any estimate as small is good.
ROUNDING = 1e-5


def relative_errors(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """[..., heads, tokens, head_dim] twice -> [..., heads] in double precision."""
    difference = (out.float() - exact.float()).flatten(-2)
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in (difference, exact.float().flatten(-2))]
    return norms[0] / norms[1]


def exact_output(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: Mask, scale: float | None, threads: int
) -> torch.Tensor:
    """EXACT on the same inputs, in single precision."""
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32)
    return hyperattn.forward(q, k, v, method="exact", mask=mask, scale=scale, threads=threads, out=out)


def _agree(estimate: float, error: float, rounding: float) -> bool:
    return max(estimate, error) <= max(NEAR * min(estimate, error), rounding)


def summary(heads: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Over rows with a true_error and perhaps an estimated_error: the table's columns. `dtype` is the outputs'."""
    rounding = max(ROUNDING, torch.finfo(dtype).eps)
    true = [head["true_error"] for head in heads]
    columns = {"error_mean": statistics.fmean(true), "error_median": statistics.median(true), "error_worst": max(true)}
    pairs = [(head["estimated_error"], head["true_error"]) for head in heads if "estimated_error" in head]
    if pairs:
        near = sum(_agree(estimate, error, rounding) for estimate, error in pairs)
        columns[f"estimate_within_{NEAR}x"] = near / len(pairs)
    return columns
