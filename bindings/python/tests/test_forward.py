"""forward and merge on NumPy arrays, against double precision."""

import numpy
import pytest
from reference import attention, relative_error, visible

import hyperattn


@pytest.mark.parametrize("mask", ["none", "causal", "causal_top_left"])
@pytest.mark.parametrize("n_q, n_k", [(70, 70), (13, 90), (90, 13), (1, 50)])
def test_exact_is_attention(random, mask, n_q, n_k):
    q, k, v = random(2, 6, n_q, 32), random(2, 2, n_k, 32), random(2, 2, n_k, 24)
    out, lse = hyperattn.forward(q, k, v, method="exact", mask=mask, return_lse=True)
    wanted_out, wanted_lse = attention(q, k, v, mask)
    assert out.shape == (2, 6, n_q, 24) and out.dtype == numpy.float32
    assert relative_error(out, wanted_out) < 1e-5
    seen = visible(n_q, n_k, mask).any(axis=1)
    numpy.testing.assert_allclose(lse[..., seen], wanted_lse[..., seen], rtol=1e-5, atol=1e-5)
    assert numpy.all(lse[..., ~seen] == -numpy.inf) and numpy.all(out[..., ~seen, :] == 0)


def test_scale(random):
    q, k, v = random(1, 2, 30, 16), random(1, 2, 30, 16), random(1, 2, 30, 16)
    got = hyperattn.forward(q, k, v, method="exact", scale=0.7)
    assert relative_error(got, attention(q, k, v, scale=0.7)[0]) < 1e-5


def test_half_precision(random):
    q, k, v = (random(1, 4, 60, 32).astype(numpy.float16) for _ in range(3))
    out = hyperattn.forward(q, k, v, method="exact", mask="causal")
    assert out.dtype == numpy.float16
    assert relative_error(out, attention(q, k, v, "causal")[0]) < 1e-3
    wide = numpy.empty(out.shape, numpy.float32)
    assert hyperattn.forward(q.astype(numpy.float32), k, v, method="exact", mask="causal", out=wide) is wide
    assert relative_error(wide, attention(q, k, v, "causal")[0]) < 1e-5


def test_ml_dtypes_bfloat16(random):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, k, v = (random(1, 4, 60, 32).astype(ml_dtypes.bfloat16) for _ in range(3))
    out = hyperattn.forward(q, k, v, method="exact")
    assert out.dtype == ml_dtypes.bfloat16
    assert relative_error(out, attention(q, k, v)[0]) < 1e-2


def test_layouts_and_strides(random):
    q, k, v = random(2, 4, 40, 16), random(2, 2, 50, 16), random(2, 2, 50, 16)
    wanted, wanted_lse = hyperattn.forward(q, k, v, method="exact", return_lse=True)
    by_token = [numpy.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v)]
    out, lse = hyperattn.forward(*by_token, method="exact", layout="bshd", return_lse=True)
    assert out.shape == (2, 40, 4, 16) and lse.shape == (2, 40, 4)
    numpy.testing.assert_array_equal(out.swapaxes(1, 2), wanted)
    numpy.testing.assert_array_equal(lse.swapaxes(1, 2), wanted_lse)
    # Views of the other layout's memory, a slice of a larger output, rows backwards.
    views = [x.swapaxes(1, 2) for x in by_token]
    room = numpy.full((2, 4, 40, 20), 7, numpy.float32)
    hyperattn.forward(*views, method="exact", out=room[..., 2:18])
    numpy.testing.assert_array_equal(room[..., 2:18], wanted)
    assert numpy.all(room[..., :2] == 7) and numpy.all(room[..., 18:] == 7)
    backwards = hyperattn.forward(q[:, :, ::-1], k, v, method="exact")
    assert relative_error(backwards[:, :, ::-1], wanted) < 1e-6


def test_without_batch(random):
    q, k, v = random(4, 40, 16), random(2, 40, 16), random(2, 40, 16)
    out, lse = hyperattn.forward(q, k, v, method="exact", return_lse=True)
    assert out.shape == q.shape and lse.shape == (4, 40)
    numpy.testing.assert_array_equal(out, hyperattn.forward(q[None], k[None], v[None], method="exact")[0])
    by_token = hyperattn.forward(*(x.swapaxes(0, 1) for x in (q, k, v)), method="exact", layout="bshd")
    numpy.testing.assert_array_equal(by_token.swapaxes(0, 1), out)


def test_broadcast_input(random):
    q, k = random(1, 4, 20, 16), random(1, 1, 20, 16)
    shared = numpy.broadcast_to(k, (1, 4, 20, 16))
    got = hyperattn.forward(q, shared, shared, method="exact")
    numpy.testing.assert_array_equal(got, hyperattn.forward(q, k, k, method="exact"))


def test_paper(random, seed):
    q, k, v = random(1, 4, 600, 16), random(1, 2, 600, 16), random(1, 2, 600, 16) + 1
    exact = hyperattn.forward(q, k, v, method="exact", mask="causal")
    short = hyperattn.forward(q, k, v, method="paper", mask="causal", min_seq_len=600)
    numpy.testing.assert_array_equal(short, exact)
    settings = dict(method="paper", mask="causal", min_seq_len=128, block_size=64, sample_size=64)
    one = hyperattn.forward(q, k, v, seed=seed, **settings)
    assert 0 < relative_error(one, exact) < 0.5
    numpy.testing.assert_array_equal(one, hyperattn.forward(q, k, v, seed=seed, threads=1, **settings))
    assert not numpy.array_equal(one, hyperattn.forward(q, k, v, seed=seed, offset=1, **settings))
    by_norm = hyperattn.forward(q, k, v, seed=seed, residual="row_norm", **settings)
    assert not numpy.array_equal(one, by_norm)


def test_block_mask(random):
    """A pattern that lists every block is exact, one that lists the diagonal is not."""
    q, k, v = random(1, 2, 100, 16), random(1, 2, 100, 16), random(1, 2, 100, 16)
    blocks = 4
    settings = dict(method="paper", min_seq_len=0, residual="none")
    columns = numpy.arange(blocks, dtype=numpy.int32)
    full = hyperattn.BlockMask(25, 25, numpy.arange(0, blocks * blocks + 1, blocks), numpy.tile(columns, blocks))
    wanted = attention(q, k, v)[0]
    assert relative_error(hyperattn.forward(q, k, v, block_mask=full, **settings), wanted) < 1e-5
    offsets = numpy.tile(numpy.arange(blocks + 1), (2, 1))
    diagonal = hyperattn.BlockMask(25, 25, offsets, columns)
    got = hyperattn.forward(q, k, v, block_mask=diagonal, **settings)
    parts = [attention(q[:, :, s], k[:, :, s], v[:, :, s])[0] for s in (slice(i, i + 25) for i in range(0, 100, 25))]
    assert relative_error(got, numpy.concatenate(parts, axis=2)) < 1e-5


@pytest.mark.parametrize("shape", [(2, 4, 40, 50), (4, 40, 50), (40, 50), (2, 1, 1, 50)])
@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float16])
def test_additive_mask(random, shape, dtype):
    """On top of the causal mask; every fifth key is hidden."""
    q, k, v = random(2, 4, 40, 16), random(2, 2, 50, 16), random(2, 2, 50, 16)
    added = random(*shape).astype(dtype)
    added[..., ::5] = -numpy.inf
    wanted, wanted_lse = attention(q, k, v, "causal", added=added.astype(numpy.float64))
    settings = dict(mask="causal", additive_mask=added, return_lse=True)
    out, lse = hyperattn.forward(q, k, v, **settings)
    assert relative_error(out, wanted) < 1e-5
    numpy.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    by_token = hyperattn.forward(*(x.swapaxes(1, 2) for x in (q, k, v)), layout="bshd", **settings)
    numpy.testing.assert_array_equal(by_token[0].swapaxes(1, 2), out)
    for wrong, error, sentence in (
        (added[None, None, None], ValueError, "dimensions, more than 4"),
        (added > 0, TypeError, "additive_mask: dtype bool"),
    ):
        with pytest.raises(error, match=sentence):
            hyperattn.forward(q, k, v, additive_mask=wrong)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_sequences(random, layout, mask):
    """Each sequence gets the bits that it gets alone; one has keys but no queries."""
    q_ends, k_ends = [0, 30, 30, 70], numpy.array([0, 40, 45, 90])
    q, k, v = random(1, 4, 70, 16), random(1, 2, 90, 16), random(1, 2, 90, 16)
    arrays = [x if layout == "bhsd" else x.swapaxes(1, 2) for x in (q, k, v)]
    settings = dict(method="exact", mask=mask)
    out, lse, error = hyperattn.forward(
        *arrays, layout=layout, cu_seqlens_q=q_ends, cu_seqlens_k=k_ends, return_lse=True, return_error=True, **settings
    )
    assert error.shape == (3, 4)
    if layout == "bshd":
        out, lse = out.swapaxes(1, 2), lse.swapaxes(1, 2)
    for i in (0, 2):
        rows, keys = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        alone = hyperattn.forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], return_lse=True, **settings)
        numpy.testing.assert_array_equal(out[:, :, rows], alone[0])
        numpy.testing.assert_array_equal(lse[:, :, rows], alone[1])
    self = hyperattn.forward(q, q[:, :2], q[:, :2], cu_seqlens_q=q_ends, **settings)
    wanted = hyperattn.forward(q[:, :, 30:], q[:, :2, 30:], q[:, :2, 30:], **settings)
    numpy.testing.assert_array_equal(self[:, :, 30:], wanted)


def test_sequences_that_do_not_fit(random):
    q = random(1, 2, 20, 16)
    for wrong, sentence in (
        (dict(cu_seqlens_q=[0, 20], cu_seqlens_k=[0, 10, 20]), "2 and 3 numbers"),
        (dict(cu_seqlens_q=[]), "0 and 0 numbers"),
        (dict(cu_seqlens_k=[0, 20]), "without cu_seqlens_q"),
        (dict(cu_seqlens_q=[0, 19]), "cu_seqlens_q"),
    ):
        with pytest.raises(ValueError, match=sentence):
            hyperattn.forward(q, q, q, **wrong)


def test_head_methods(random):
    """A head gets the bits that it gets when all have its method."""
    q, k, v = random(1, 4, 300, 16), random(1, 2, 300, 16), random(1, 2, 300, 16)
    settings = dict(mask="causal", min_seq_len=64, block_size=32, sample_size=32)
    methods = ["exact", "paper", "paper", "exact"]
    got = hyperattn.forward(q, k, v, head_methods=methods, **settings)
    for head, method in enumerate(methods):
        wanted = hyperattn.forward(q, k, v, method=method, **settings)
        numpy.testing.assert_array_equal(got[:, head], wanted[:, head])
    with pytest.raises(ValueError, match="3 methods for 4 heads"):
        hyperattn.forward(q, k, v, head_methods=methods[:3])
    with pytest.raises(ValueError, match="method='best'"):
        hyperattn.forward(q, k, v, head_methods=["best"] * 4)


def test_merge(random):
    q, k, v = random(1, 4, 30, 16), random(1, 2, 80, 16), random(1, 2, 80, 16)
    wanted, wanted_lse = attention(q, k, v)
    halves = [
        hyperattn.forward(q, k[:, :, s], v[:, :, s], method="exact", return_lse=True)
        for s in (slice(0, 33), slice(33, 80))
    ]
    out, lse = hyperattn.merge(*halves[0], *halves[1])
    assert out is halves[0][0] and lse is halves[0][1]
    assert relative_error(out, wanted) < 1e-5
    assert relative_error(lse, wanted_lse) < 1e-5


def test_threads_give_the_same_bits(random):
    q, k, v = random(1, 4, 300, 32), random(1, 4, 300, 32), random(1, 4, 300, 32)
    one, two = (hyperattn.forward(q, k, v, method="exact", threads=threads) for threads in (1, 2))
    numpy.testing.assert_array_equal(one, two)
