"""Softmax attention and its gradients in double precision, as the definition says it."""

import numpy


def visible(n_q, n_k, mask):
    """[n_q, n_k] booleans."""
    i, j = numpy.arange(n_q)[:, None], numpy.arange(n_k)[None, :]
    return {
        "none": numpy.ones((n_q, n_k), dtype=bool),
        "causal": j <= i + (n_k - n_q),
        "causal_top_left": j <= i,
    }[mask]


def _logits(q, k, mask, scale, added):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * q @ k.swapaxes(2, 3) + added
    return numpy.where(visible(q.shape[2], k.shape[2], mask), logits, -numpy.inf), scale


def _double(q, k, v):
    """In double precision, with keys and values repeated for every query head."""
    q, k, v = (numpy.asarray(x, dtype=numpy.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    return q, numpy.repeat(k, group, axis=1), numpy.repeat(v, group, axis=1)


def attention(q, k, v, mask="none", scale=None, added=0.0):
    """(out, lse) for arrays [batch, heads, sequence, head_dim]."""
    q, k, v = _double(q, k, v)
    logits, _ = _logits(q, k, mask, scale, added)
    top = logits.max(axis=-1, keepdims=True)
    top = numpy.where(numpy.isfinite(top), top, 0)
    weights = numpy.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    with numpy.errstate(divide="ignore"):
        lse = (top + numpy.log(total))[..., 0]
    return weights @ v / numpy.where(total == 0, 1, total), lse


def gradients(q, k, v, dout, dlse=0.0, mask="none", scale=None, added=0.0):
    """(dq, dk, dv) of a loss with the gradients dout and dlse with respect to what `attention` returns."""
    heads = k.shape[1]
    out, lse = attention(q, k, v, mask, scale, added)
    q, k, v = _double(q, k, v)
    logits, scale = _logits(q, k, mask, scale, added)
    shares = numpy.exp(logits - numpy.where(numpy.isfinite(lse), lse, 0)[..., None])
    dout = numpy.asarray(dout, dtype=numpy.float64)
    delta = (dout * out).sum(axis=-1) - dlse
    dlogits = scale * shares * (dout @ v.swapaxes(2, 3) - delta[..., None])
    shared = dlogits.swapaxes(2, 3) @ q, shares.swapaxes(2, 3) @ dout
    return dlogits @ k, *(x.reshape(x.shape[0], heads, -1, *x.shape[2:]).sum(axis=2) for x in shared)


def relative_error(got, wanted):
    """Frobenius norm of the difference over that of what is wanted."""
    got, wanted = (numpy.asarray(x, dtype=numpy.float64) for x in (got, wanted))
    return numpy.linalg.norm(got - wanted) / numpy.linalg.norm(wanted)
