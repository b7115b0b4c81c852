"""forward and merge on PyTorch tensors."""

import pytest
from reference import attention, relative_error

import hyperattn

torch = pytest.importorskip("torch")


@pytest.fixture
def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_element_types(tensors, dtype, bound):
    q, k, v = tensors(2, 4, 50, 32, dtype=dtype), tensors(2, 2, 70, 32, dtype=dtype), tensors(2, 2, 70, 32, dtype=dtype)
    out, lse = hyperattn.forward(q, k, v, method="exact", mask="causal", return_lse=True)
    assert out.dtype == dtype and out.shape == q.shape and lse.dtype == torch.float32
    wanted, wanted_lse = attention(q.float(), k.float(), v.float(), "causal")
    assert relative_error(out.float(), wanted) < bound
    assert relative_error(lse, wanted_lse) < 1e-5


def test_memory_is_the_callers(tensors):
    """Views of one larger block of memory go in, a view of a larger block comes out."""
    packed = tensors(2, 50, 3, 4, 32)  # batch, token, (q, k, v), head, head_dim
    q, k, v = packed.unbind(2)
    room = torch.full((2, 60, 4, 32), 7.0)
    out = room[:, :50]
    got = hyperattn.forward(q, k, v, method="exact", layout="bshd", out=out)
    assert got is out and out.data_ptr() == room.data_ptr()
    wanted, _ = attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert relative_error(room[:, :50].transpose(1, 2), wanted) < 1e-5
    assert (room[:, 50:] == 7).all()


def test_merge(tensors):
    q, k, v = tensors(1, 4, 30, 16), tensors(1, 4, 60, 16), tensors(1, 4, 60, 16)
    one = hyperattn.forward(q, k[:, :, :20], v[:, :, :20], method="exact", return_lse=True)
    two = hyperattn.forward(q, k[:, :, 20:], v[:, :, 20:], method="exact", return_lse=True)
    out, _ = hyperattn.merge(*one, *two)
    assert relative_error(out, attention(q, k, v)[0]) < 1e-5


def test_gradients_are_refused(tensors):
    q = tensors(1, 2, 10, 16).requires_grad_()
    with pytest.raises(ValueError, match="hyperattn.torch.forward"):
        hyperattn.forward(q, q, q)
    with torch.no_grad():
        assert not hyperattn.forward(q, q, q).requires_grad


def test_other_devices_are_refused(tensors):
    q = torch.empty(1, 2, 10, 16, device="meta")
    with pytest.raises(ValueError, match="device meta"):
        hyperattn.forward(q, q, q)
