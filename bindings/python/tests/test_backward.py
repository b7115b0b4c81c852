"""backward on NumPy arrays and through DLPack, against double precision."""

import numpy
import pytest
from lender import Lender, Namespaced
from reference import attention, gradients, relative_error

import hyperattn

FEW = dict(min_seq_len=64, block_size=32, sample_size=32, budget=64, num_first_keys=4, band=16, target_error=0.0)


@pytest.fixture
def problem(random):
    """problem(n_q, n_k, **arguments of both calls) -> q, k, v, out, lse, dout."""

    def make(n_q, n_k, **arguments):
        q, k, v, dout = random(2, 4, n_q, 32), random(2, 2, n_k, 32), random(2, 2, n_k, 24), random(2, 4, n_q, 24)
        return q, k, v, *hyperattn.forward(q, k, v, return_lse=True, **arguments), dout

    return make


def distance(one, other):
    return numpy.linalg.norm(one.astype(numpy.float64) - other)


def near(got, wanted, bound=1e-5):
    for name, one, other in zip(("dq", "dk", "dv"), got, wanted):
        # A gradient may be 0: that of a query that sees one key.
        assert one.shape == other.shape and distance(one, other) < bound * max(numpy.linalg.norm(other), 1), name


@pytest.mark.parametrize("mask", ["none", "causal", "causal_top_left"])
@pytest.mark.parametrize("n_q, n_k", [(70, 70), (13, 90), (90, 13), (1, 50)])
def test_exact(problem, random, mask, n_q, n_k):
    """Also where rows see no key, and where the loss depends on lse."""
    arguments = dict(method="exact", mask=mask, scale=0.3)
    q, k, v, out, lse, dout = problem(n_q, n_k, **arguments)
    dlse = random(2, 4, n_q)
    got = hyperattn.backward(q, k, v, out, lse, dout, **arguments)
    near(got, gradients(q, k, v, dout, mask=mask, scale=0.3))
    assert all(x.dtype == numpy.float32 for x in got)
    got = hyperattn.backward(q, k, v, out, lse, dout, dlse=dlse, **arguments)
    near(got, gradients(q, k, v, dout, dlse, mask=mask, scale=0.3))


def test_half_precision(problem):
    q, k, v, _, _, dout = (x.astype(numpy.float16) for x in problem(60, 60, method="exact"))
    out, lse = hyperattn.forward(q, k, v, method="exact", mask="causal", return_lse=True)
    got = hyperattn.backward(q, k, v, out, lse, dout, method="exact", mask="causal")
    assert all(x.dtype == numpy.float16 for x in got)
    wanted = gradients(q, k, v, dout, mask="causal")
    near(got, wanted, 3e-3)
    wide = tuple(numpy.empty(x.shape, numpy.float32) for x in (q, k, v))
    assert hyperattn.backward(q, k, v, out, lse, dout, gradients=wide, method="exact", mask="causal") == wide
    near(wide, wanted, 3e-3)


def test_layouts_and_strides(problem):
    arguments = dict(method="exact", mask="causal")
    tensors = problem(40, 50, **arguments)
    wanted = hyperattn.backward(*tensors, **arguments)
    by_token = [numpy.ascontiguousarray(x.swapaxes(1, 2)) for x in tensors]
    got = hyperattn.backward(*by_token, layout="bshd", **arguments)
    for one, other in zip(got, wanted):
        numpy.testing.assert_array_equal(one.swapaxes(1, 2), other)
    # One batch item, written into a part of larger arrays.
    rooms = [numpy.full((*x.shape[1:-1], x.shape[-1] + 4), 7, numpy.float32) for x in tensors[:3]]
    views = tuple(room[..., 2:-2] for room in rooms)
    assert hyperattn.backward(*(x[1] for x in tensors), gradients=views, **arguments)[0] is views[0]
    for room, other in zip(rooms, wanted):
        numpy.testing.assert_array_equal(room[..., 2:-2], other[1])
        assert numpy.all(room[..., :2] == 7) and numpy.all(room[..., -2:] == 7)


def test_merged_parts(problem):
    """One call for each part of the keys, with what merge made of both."""
    q, k, v, _, _, dout = problem(30, 60, method="exact")
    cuts = slice(0, 20), slice(20, 60)
    parts = [hyperattn.forward(q, k[:, :, cut], v[:, :, cut], method="exact", return_lse=True) for cut in cuts]
    out, lse = hyperattn.merge(*parts[0], *parts[1])
    one, two = (hyperattn.backward(q, k[:, :, cut], v[:, :, cut], out, lse, dout, method="exact") for cut in cuts)
    joined = one[0] + two[0], *(numpy.concatenate(pair, axis=2) for pair in zip(one[1:], two[1:]))
    near(joined, gradients(q, k, v, dout))


def test_choices(problem, random):
    """The mask that is added, sequences, methods of heads: as in the forward."""
    mask = random(40, 40)
    q, k, v, out, lse, dout = problem(40, 40, additive_mask=mask)
    near(hyperattn.backward(q, k, v, out, lse, dout, additive_mask=mask), gradients(q, k, v, dout, added=mask))

    q, k, v, dout = (x[:1] for x in (q, k, v, dout))
    arguments = dict(head_methods=["exact"] * 4, cu_seqlens_q=[0, 15, 40], mask="causal")
    out, lse = hyperattn.forward(q, k, v, return_lse=True, **arguments)
    parts = [gradients(*(x[:, :, cut] for x in (q, k, v, dout)), mask="causal") for cut in (slice(15), slice(15, 40))]
    wanted = [numpy.concatenate(pair, axis=2) for pair in zip(*parts)]
    near(hyperattn.backward(q, k, v, out, lse, dout, **arguments), wanted)


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize(
    "method", [dict(method="paper"), dict(method="paper", residual="row_norm"), dict(method="refined")]
)
def test_estimators(problem, method, mask):
    """The same bits again and with any number of threads, other ones for another seed, and no exact gradient."""
    arguments = dict(mask=mask, seed=3, **method, **FEW)
    q, k, v, out, lse, dout = problem(300, 300, **arguments)
    got = hyperattn.backward(q, k, v, out, lse, dout, **arguments)
    for threads in (1, 2):
        again = hyperattn.backward(q, k, v, out, lse, dout, threads=threads, **arguments)
        assert all(numpy.array_equal(one, other) for one, other in zip(got, again))
    exact = gradients(q, k, v, dout, mask=mask)
    for one, other in zip(got, exact):
        assert numpy.isfinite(one).all() and relative_error(one, other) > 1e-3
    if method["method"] == "paper":
        other = hyperattn.backward(q, k, v, out, lse, dout, **{**arguments, "seed": 4})
        assert not numpy.array_equal(got[0], other[0])


def test_below_its_threshold_paper_is_exact(problem):
    arguments = dict(method="paper", mask="causal", min_seq_len=100)
    q, k, v, out, lse, dout = problem(100, 100, **arguments)
    near(hyperattn.backward(q, k, v, out, lse, dout, **arguments), gradients(q, k, v, dout, mask="causal"))


def test_dlpack(problem):
    """Read and written in place, given back once; results are of the library of q, k and v."""
    tensors = problem(20, 30, method="exact")
    wanted = hyperattn.backward(*tensors, method="exact")
    lenders = [Lender(x) for x in tensors]
    arrays = [numpy.empty_like(x) for x in tensors[:3]]
    targets = tuple(Lender(x) for x in arrays)
    assert hyperattn.backward(*lenders, gradients=targets, method="exact") == targets
    assert [lender.returned for lender in (*lenders, *targets)] == [1] * 9
    made = hyperattn.backward(*(Namespaced(x) for x in tensors[:3]), *tensors[3:], method="exact")
    for got in (arrays, made):
        assert all(numpy.array_equal(one, other) for one, other in zip(got, wanted))


def test_errors(problem):
    q, k, v, out, lse, dout = problem(20, 30, method="exact")
    targets = tuple(numpy.full_like(x, 7) for x in (q, k, v))

    def backward(*tensors, **arguments):
        return hyperattn.backward(*tensors, method="exact", **{"gradients": targets, **arguments})

    with pytest.raises(hyperattn.InvalidArgument, match=r"dout.shape\[2\] = 19"):
        backward(q, k, v, out, lse, dout[:, :, :19])
    with pytest.raises(hyperattn.InvalidArgument, match="dq and q overlap"):
        backward(q, k, v, out, lse, dout, gradients=(q, *targets[1:]))
    with pytest.raises(ValueError, match="dlse: 4 dimensions, not bhsd or hs"):
        backward(q, k, v, out, lse, dout, dlse=dout)
    with pytest.raises(ValueError, match="shorter"):
        backward(q, k, v, out, lse, dout, gradients=targets[:2])
    assert all((target == 7).all() for target in targets)


def test_reference(problem):
    """The reference's gradients against differences of the reference."""
    q, k, v, _, _, dout = problem(5, 7, method="exact")
    tensors = [x.astype(numpy.float64) for x in (q, k, v)]
    wanted = gradients(*tensors, dout, dlse=0.5, mask="causal")

    def loss(*tensors):
        out, lse = attention(*tensors, mask="causal")
        return (out * dout).sum() + 0.5 * lse.sum()

    for index, gradient in enumerate(wanted):
        around = []
        for step in (1e-5, -1e-5):
            moved = list(tensors)
            moved[index] = moved[index] + step * gradient
            around.append(loss(*moved))
        assert (around[0] - around[1]) / 2e-5 == pytest.approx((gradient**2).sum(), rel=1e-6)
