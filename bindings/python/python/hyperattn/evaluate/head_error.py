"""The error of a head: Frobenius norm of the difference to exact attention, over that of exact attention."""

import torch

import hyperattn


def relative_errors(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """[..., heads, tokens, head_dim] twice -> [..., heads] in double precision."""
    difference = (out.float() - exact.float()).flatten(-2)
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in (difference, exact.float().flatten(-2))]
    return norms[0] / norms[1]


def exact_output(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, scale: float | None, threads: int
) -> torch.Tensor:
    """EXACT on the same inputs, in single precision."""
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32)
    return hyperattn.forward(q, k, v, method="exact", mask=mask, scale=scale, threads=threads, out=out)
