"""Softmax attention in double precision, as the definition says it."""

import numpy


def visible(n_q, n_k, mask):
    """[n_q, n_k] booleans."""
    i, j = numpy.arange(n_q)[:, None], numpy.arange(n_k)[None, :]
    return {
        "none": numpy.ones((n_q, n_k), dtype=bool),
        "causal": j <= i + (n_k - n_q),
        "causal_top_left": j <= i,
    }[mask]


def attention(q, k, v, mask="none", scale=None, added=0.0):
    """(out, lse) for arrays [batch, heads, sequence, head_dim]."""
    q, k, v = (numpy.asarray(x, dtype=numpy.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = numpy.repeat(k, group, axis=1), numpy.repeat(v, group, axis=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = numpy.where(visible(q.shape[2], k.shape[2], mask), scale * q @ k.swapaxes(2, 3) + added, -numpy.inf)
    top = logits.max(axis=-1, keepdims=True)
    top = numpy.where(numpy.isfinite(top), top, 0)
    weights = numpy.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    with numpy.errstate(divide="ignore"):
        lse = (top + numpy.log(total))[..., 0]
    return weights @ v / numpy.where(total == 0, 1, total), lse


def relative_error(got, wanted):
    """Frobenius norm of the difference over that of what is wanted."""
    got, wanted = (numpy.asarray(x, dtype=numpy.float64) for x in (got, wanted))
    return numpy.linalg.norm(got - wanted) / numpy.linalg.norm(wanted)
