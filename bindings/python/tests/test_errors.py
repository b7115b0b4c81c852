"""What is refused, and how it says so."""

import subprocess
import sys

import numpy
import pytest

import hyperattn


@pytest.fixture
def qkv(random):
    return random(1, 4, 20, 16), random(1, 2, 20, 16), random(1, 2, 20, 16)


def test_status_and_sentence(qkv):
    q, k, v = qkv
    with pytest.raises(hyperattn.InvalidArgument, match="lsh_num_projs") as caught:
        hyperattn.forward(q, k, v, method="paper", lsh_num_projs=99)
    assert caught.value.status == 1 and caught.value.status_name == "INVALID_ARGUMENT"
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, hyperattn.HyperAttnError)


def test_last_dimension_must_be_contiguous(qkv):
    q, k, v = qkv
    with pytest.raises(hyperattn.InvalidArgument, match=r"k.stride\[3\]"):
        hyperattn.forward(q, numpy.asfortranarray(k), v)


def test_heads_must_divide(qkv, random):
    with pytest.raises(hyperattn.InvalidArgument, match="not a multiple"):
        hyperattn.forward(qkv[0], random(1, 3, 20, 16), random(1, 3, 20, 16))


def test_every_status_has_its_class():
    from hyperattn._library import check, lib

    with pytest.raises(hyperattn.Unsupported) as caught:
        check(lib.HYPERATTN_STATUS_UNSUPPORTED)
    assert isinstance(caught.value, NotImplementedError)
    with pytest.raises(hyperattn.DeviceUnavailable):
        check(lib.HYPERATTN_STATUS_DEVICE_UNAVAILABLE)
    with pytest.raises(hyperattn.HyperAttnError) as caught:
        check(lib.HYPERATTN_STATUS_INTERNAL)
    assert caught.value.status_name == "INTERNAL"


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        (dict(blok_size=3), TypeError, "no parameter 'blok_size'.*block_size"),
        (dict(struct_size=3), TypeError, "no parameter 'struct_size'"),
        (dict(mask="left"), ValueError, "mask='left'.*causal"),
        (dict(method="best"), ValueError, "method='best'.*exact, paper"),
        (dict(layout="sbhd"), ValueError, "layout='sbhd'"),
        (dict(block_size=-1), OverflowError, None),
        (dict(block_size="a"), ValueError, "a number"),
        (dict(deterministic="no"), ValueError, "deterministic='no'"),
        (dict(flags=2), TypeError, "no parameter 'flags'"),
    ],
)
def test_keywords(qkv, change, error, sentence):
    with pytest.raises(error, match=sentence):
        hyperattn.forward(*qkv, **change)


@pytest.mark.parametrize(
    "make, error, sentence",
    [
        (lambda q: q.tolist(), TypeError, "q: an array with __dlpack__ is needed, not list"),
        (lambda q: q.astype(numpy.float64), TypeError, "q: dtype float64"),
        (lambda q: q.astype(">f4"), TypeError, "swapped"),
        (lambda q: q[0, 0], ValueError, "q: 2 dimensions"),
        (lambda q: numpy.zeros(q.shape, [("x", "f4"), ("pad", "i1")])["x"], ValueError, "multiples"),
    ],
)
def test_arrays(qkv, make, error, sentence):
    with pytest.raises(error, match=sentence):
        hyperattn.forward(make(qkv[0]), *qkv[1:])


def test_outputs_are_not_read_only(qkv):
    out = numpy.zeros_like(qkv[0])
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        hyperattn.forward(*qkv, out=out)


def test_import_needs_neither_numpy_nor_torch():
    program = (
        "import sys, hyperattn\n"
        "assert hyperattn.version() and hyperattn.isa() and hyperattn.has_feature('threads')\n"
        "assert not {'numpy', 'torch', 'transformers'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
