"""Arrays that come and go through DLPack only."""

import gc

import numpy
import pytest
from lender import Lender, Namespaced

import hyperattn
from hyperattn._dlpack import Memory

KINDS = pytest.mark.parametrize("versioned", [True, False, None], ids=["versioned", "legacy", "without max_version"])


@pytest.fixture
def qkv(random):
    return random(1, 4, 20, 16), random(1, 2, 30, 16), random(1, 2, 30, 24)


@KINDS
def test_in_place_and_returned_once(qkv, versioned):
    lenders = [Lender(array, versioned=versioned) for array in qkv]
    out = numpy.zeros((1, 4, 20, 24), numpy.float32)
    target = Lender(out, versioned=versioned)
    assert hyperattn.forward(*lenders, method="exact", mask="causal", out=target) is target
    numpy.testing.assert_array_equal(out, hyperattn.forward(*qkv, method="exact", mask="causal"))
    assert [lender.returned for lender in [*lenders, target]] == [1, 1, 1, 1]
    assert [lender.streams for lender in lenders] == [[None]] * 3


def test_result_is_the_librarys_own(qkv):
    """Made here, taken over by from_dlpack: no copy, and q is asked for its element type once more."""
    lenders = [Namespaced(array) for array in qkv]
    out, lse, error = hyperattn.forward(*lenders, method="exact", return_lse=True, return_error=True)
    wanted = hyperattn.forward(*qkv, method="exact", return_lse=True, return_error=True)
    for got, expected in zip((out, lse, error), wanted):
        assert isinstance(got, numpy.ndarray) and got.shape == expected.shape
        numpy.testing.assert_array_equal(got, expected)
    assert [lender.returned for lender in lenders] == [2, 1, 1]
    del got
    del out, lse, error
    gc.collect()


def test_without_a_namespace_out_is_needed(qkv):
    with pytest.raises(TypeError, match="pass what to write to: Lender"):
        hyperattn.forward(Lender(qkv[0]), *qkv[1:])


def test_memory_is_freed_or_taken_over(monkeypatch):
    memory = Memory((2, 3), "float32")
    assert memory.pointer % 64 == 0 and memory.strides == (3, 1)
    array = numpy.from_dlpack(memory)
    assert array.ctypes.data == memory.pointer
    array[:] = 1
    del memory
    gc.collect()
    assert array.sum() == 6
    # One that nobody takes: its deleter runs, and only then.
    freed = []
    kept, given_up = Memory((5,), "bfloat16"), Memory((5,), "float32")
    monkeypatch.setattr("hyperattn._dlpack._Deleter", lambda address: freed.append)
    block = given_up._block
    del given_up
    gc.collect()
    assert freed == [block]
    monkeypatch.undo()
    del kept


@pytest.mark.parametrize(
    "settings",
    [dict(strides=False), dict(byte_offset=64), dict(deleter=False), dict(device=(3, 0))],
    ids=["no strides", "byte offset", "no deleter", "pinned memory"],
)
def test_fields(qkv, settings):
    q = Lender(qkv[0], **settings)
    out = numpy.zeros((1, 4, 20, 24), numpy.float32)
    hyperattn.forward(q, *qkv[1:], method="exact", out=out)
    numpy.testing.assert_array_equal(out, hyperattn.forward(*qkv, method="exact"))
    assert q.returned == (0 if settings.get("deleter") is False else 1)


def test_strided_views(qkv):
    wide = numpy.zeros((1, 4, 40, 20), numpy.float32)
    wide[:, :, ::2, 2:18] = qkv[0]
    got = hyperattn.forward(Namespaced(wide[:, :, ::2, 2:18]), *qkv[1:], method="exact")
    numpy.testing.assert_array_equal(got, hyperattn.forward(*qkv, method="exact"))


@pytest.mark.parametrize("dtype, bits", [("float16", numpy.float16), ("bfloat16", numpy.uint16)])
def test_half_precision(qkv, dtype, bits):
    """bfloat16 as bits: the upper halves of float32 numbers."""
    if dtype == "float16":
        arrays = [array.astype(numpy.float16) for array in qkv]
        exact = arrays
    else:
        arrays = [(array.view(numpy.uint32) >> 16).astype(numpy.uint16) for array in qkv]
        exact = [(array.astype(numpy.uint32) << 16).view(numpy.float32) for array in arrays]
    lenders = [Lender(array.view(bits), dtype=dtype) for array in arrays]
    out = numpy.zeros((1, 4, 20, 24), numpy.float32)
    hyperattn.forward(*lenders, method="exact", out=out)
    wanted = hyperattn.forward(*(array.astype(numpy.float32) for array in exact), method="exact")
    numpy.testing.assert_allclose(out, wanted, rtol=1e-2, atol=1e-2)


def test_merge_and_block_mask(random):
    q, k, v = random(1, 2, 100, 16), random(1, 2, 100, 16), random(1, 2, 100, 16)
    offsets, columns = numpy.arange(5), numpy.arange(4, dtype=numpy.int32)
    settings = dict(method="paper", min_seq_len=0, residual="none")
    wanted = hyperattn.forward(q, k, v, block_mask=hyperattn.BlockMask(25, 25, offsets, columns), **settings)
    lent = hyperattn.BlockMask(25, 25, Lender(offsets), Lender(columns))
    numpy.testing.assert_array_equal(hyperattn.forward(q, k, v, block_mask=lent, **settings), wanted)
    assert lent.row_offsets.returned == lent.columns.returned == 1

    parts = [hyperattn.forward(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 40), slice(40, 100))]
    lenders = [Lender(array) for part in parts for array in part]
    out, lse = hyperattn.merge(*lenders)
    assert out is lenders[0] and lse is lenders[1] and [lender.returned for lender in lenders] == [1] * 4
    numpy.testing.assert_allclose(parts[0][0], hyperattn.forward(q, k, v, method="exact"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings, error, sentence, returned",
    [
        (dict(lanes=2), TypeError, "2 lanes", 1),
        (dict(dtype="int32"), TypeError, "q: dtype int32", 1),
        (dict(device=(8, 0)), ValueError, "DLPack device type 8", 0),
        (dict(major=2), BufferError, "DLPack 2.1", 0),
    ],
)
def test_what_is_refused_is_returned(qkv, settings, error, sentence, returned):
    q = Lender(qkv[0], **settings)
    with pytest.raises(error, match=sentence):
        hyperattn.forward(q, *qkv[1:], out=numpy.zeros((1, 4, 20, 24), numpy.float32))
    assert q.returned == returned


@pytest.mark.parametrize("flags, sentence", [(1, "read-only"), (2, "a copy")])
def test_flags_of_outputs(qkv, flags, sentence):
    out = numpy.full((1, 4, 20, 24), 7, numpy.float32)
    target = Lender(out, flags=flags)
    with pytest.raises(ValueError, match=f"out: .*{sentence}"):
        hyperattn.forward(*qkv, out=target)
    assert target.returned == 1 and (out == 7).all()
    # Inputs may be both.
    q = Lender(qkv[0], flags=flags)
    hyperattn.forward(q, *qkv[1:], out=out)
    assert q.returned == 1


def test_a_used_capsule_is_refused(qkv):
    capsule = Lender(qkv[0]).__dlpack__()

    class Same(Lender):
        def __dlpack__(self, **_):
            return capsule

    out = numpy.zeros((1, 4, 20, 24), numpy.float32)
    q = Same(qkv[0])
    hyperattn.forward(q, *qkv[1:], out=out)
    with pytest.raises(BufferError, match="unused"):
        hyperattn.forward(q, *qkv[1:], out=out)


def test_jax(qkv):
    jax = pytest.importorskip("jax")
    # Where JAX has a GPU too, arrays would be there, and could not be written to.
    q, k, v = (jax.device_put(array, jax.devices("cpu")[0]) for array in qkv)
    out, lse = hyperattn.forward(q, k, v, method="exact", return_lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    numpy.testing.assert_array_equal(out, hyperattn.forward(*qkv, method="exact"))
    half = hyperattn.forward(*(array.astype(jax.numpy.bfloat16) for array in (q, k, v)), method="exact")
    assert half.dtype == jax.numpy.bfloat16
    numpy.testing.assert_allclose(half.astype(jax.numpy.float32), out, rtol=5e-2, atol=5e-2)
    with pytest.raises(ValueError, match="cannot be written to"):
        hyperattn.forward(q, k, v, out=out)
