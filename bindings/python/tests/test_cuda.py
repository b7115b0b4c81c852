"""Arrays on CUDA: how they get to the library, which needs no device, and what it computes, which does."""

import sys
import threading
import types

import numpy
import pytest
from lender import Lender
from reference import attention, gradients, relative_error

import hyperattn
from hyperattn import _call, _cuda

try:
    import torch
except ImportError:
    torch = None

HAS_DEVICE = torch is not None and torch.cuda.is_available()
needs_device = pytest.mark.skipif(not HAS_DEVICE, reason="no CUDA device, or no PyTorch that sees one")
CUDA = (2, 0)


class Recorder:
    """The library with CUDA calls that compute nothing and remember how they were called."""

    def __init__(self, library):
        self.native, self.calls, self.flags = library, [], []

    def __getattr__(self, name):
        return getattr(self.native, name)

    def hyperattn_cuda_backward_workspace(self, params, tensors, need):
        return self.native.HYPERATTN_STATUS_OK

    def hyperattn_cuda_backward(self, params, tensors, grads, execution):
        assert grads.dq.data != grads.dk.data != _call.ffi.NULL
        self.flags.append(params.flags)
        return self.hyperattn_cuda_forward(params, tensors, execution)

    def hyperattn_cuda_forward(self, params, tensors, execution):
        stream = int(_call.ffi.cast("uintptr_t", execution.stream))
        self.calls.append((int(_call.ffi.cast("uintptr_t", tensors.q.data)), stream, execution.workspace.size))
        return self.native.HYPERATTN_STATUS_OK


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder(_call.lib)
    monkeypatch.setattr(_call, "lib", recorder)
    return recorder


@pytest.fixture
def lenders(random):
    """q, k, v and out that say that they are on CUDA."""
    shapes = (1, 4, 20, 16), (1, 2, 30, 16), (1, 2, 30, 24), (1, 4, 20, 24)
    return [Lender(random(*shape), device=CUDA) for shape in shapes]


@pytest.mark.skipif(HAS_DEVICE, reason="these are addresses of the host")
def test_without_a_device(lenders):
    *inputs, out = lenders
    before = out.array.copy()
    with pytest.raises(hyperattn.DeviceUnavailable) as caught:
        hyperattn.forward(*inputs, out=out)
    assert caught.value.status_name == "DEVICE_UNAVAILABLE"
    assert [lender.returned for lender in lenders] == [1, 1, 1, 1]
    numpy.testing.assert_array_equal(out.array, before)


@pytest.mark.parametrize("stream, asked, used", [(None, 1, 0), (1, 1, 1), (2, 2, 2), (4096, 4096, 4096)])
def test_stream(lenders, recorder, stream, asked, used):
    """What the owners are asked to wait for, and where the work goes. The library allocates its own workspace."""
    *inputs, out = lenders
    assert hyperattn.forward(*inputs, out=out, stream=stream) is out
    assert recorder.calls == [(inputs[0].array.ctypes.data, used, 0)]
    assert [lender.streams for lender in lenders] == [[asked]] * 4
    assert [lender.returned for lender in lenders] == [1, 1, 1, 1]


def test_backward(lenders, recorder, random):
    """The same of the backward pass."""
    *inputs, out = lenders
    lse, dout = Lender(random(1, 4, 20), device=CUDA), Lender(out.array, device=CUDA)
    written = tuple(Lender(random(*x.shape), device=CUDA) for x in inputs)
    assert hyperattn.backward(*inputs, out, lse, dout, gradients=written, stream=2) == written
    assert recorder.calls == [(inputs[0].array.ctypes.data, 2, 0)]
    assert [x.streams for x in (*inputs, out, lse, dout, *written)] == [[2]] * 9
    with pytest.raises(TypeError, match="pass what to write to: results on CUDA"):
        hyperattn.backward(*inputs, out, lse, dout)


def test_deterministic(lenders, recorder, random):
    """The flag is there where it is asked for, and nowhere else."""
    *inputs, out = lenders
    lse, dout = Lender(random(1, 4, 20), device=CUDA), Lender(out.array, device=CUDA)
    written = tuple(Lender(random(*x.shape), device=CUDA) for x in inputs)
    for arguments in ({}, {"deterministic": None}, {"deterministic": True}, {"deterministic": False}):
        hyperattn.backward(*inputs, out, lse, dout, gradients=written, **arguments)
    assert recorder.flags == [0, 0, 0, _call.lib.HYPERATTN_FLAG_NONDETERMINISTIC]


def test_devices_must_agree(lenders, random):
    q, k, v, out = lenders
    with pytest.raises(ValueError, match="k: on cpu, but q is on cuda:0"):
        hyperattn.forward(q, k.array, v, out=out)
    v.where = (2, 1)
    with pytest.raises(ValueError, match="v: on cuda:1, but q is on cuda:0"):
        hyperattn.forward(q, k, v, out=out)
    with pytest.raises(ValueError, match="stream=5: q is on the CPU"):
        hyperattn.forward(q.array, k.array, v.array, stream=5)


def test_cpu_only(lenders):
    q, k, v, out = lenders
    with pytest.raises(NotImplementedError, match="diagnose is for the CPU"):
        hyperattn.diagnose(q, k, v)
    with pytest.raises(NotImplementedError, match="merge is for the CPU"):
        hyperattn.merge(out, q, out, q)
    with pytest.raises(TypeError, match="pass what to write to: results on CUDA"):
        hyperattn.forward(q, k, v)


class Driver:
    """A CUDA driver with two devices that notes what is called."""

    def __init__(self, refuses=""):
        self.called, self.refuses = [], refuses

    def __getattr__(self, name):
        def function(*arguments):
            last = arguments[-1] if arguments else None
            self.called.append((name, getattr(last, "value", last) if name != "cuCtxPopCurrent_v2" else None))
            if name == self.refuses:
                return 100
            if name == "cuDeviceGet":
                arguments[0]._obj.value = 10 + arguments[1]
            if name == "cuDevicePrimaryCtxRetain":
                arguments[0]._obj.value = 1000 + arguments[1].value
            return 0

        return function


@pytest.fixture
def driver(monkeypatch):
    def install(driver):
        _cuda._primary_context.cache_clear()
        monkeypatch.setattr(_cuda, "_driver", lambda: driver)
        return driver

    yield install
    _cuda._primary_context.cache_clear()


def test_primary_context(driver):
    """Retained once for a device, current for a call, and gone after it also when the call raises."""
    fake = driver(Driver())
    with _cuda.current_context(1):
        assert fake.called == [("cuDeviceGet", 1), ("cuDevicePrimaryCtxRetain", 11), ("cuCtxPushCurrent_v2", 1011)]
    assert fake.called.pop() == ("cuCtxPopCurrent_v2", None)
    fake.called.clear()
    with pytest.raises(RuntimeError), _cuda.current_context(1):
        raise RuntimeError
    assert [name for name, _ in fake.called] == ["cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"]


@pytest.mark.parametrize("fake", [None, Driver("cuDeviceGet"), Driver("cuDevicePrimaryCtxRetain")])
def test_no_primary_context(driver, fake):
    driver(fake)
    with _cuda.current_context(0):
        assert fake is None or "cuCtxPushCurrent_v2" not in dict(fake.called)
    assert fake is None or "cuCtxPopCurrent_v2" not in dict(fake.called)


def test_cupy_current_stream(recorder, monkeypatch, random):
    """CuPy's stream and memory, seen with a CuPy that is made up."""

    class Device:
        def __init__(self, index=0):
            self.index = index

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    class Array(Lender):
        dtype, device = numpy.float32, Device()

    made = []

    def empty(shape, dtype):
        made.append(Array(numpy.empty(shape, dtype), device=CUDA))
        return made[-1]

    stream = types.SimpleNamespace(ptr=77)
    cuda = types.SimpleNamespace(Device=Device, get_current_stream=lambda: stream)
    cupy = types.SimpleNamespace(ndarray=Array, empty=empty, cuda=cuda)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    q, k, v = (Array(random(1, 2, 20, 16), device=CUDA) for _ in range(3))
    out, lse = hyperattn.forward(q, k, v, return_lse=True)
    assert made == [out, lse] and [call[1] for call in recorder.calls] == [77]
    assert q.streams == [77] and [lender.returned for lender in (q, k, v, out, lse)] == [1] * 5


def same(got, wanted):
    """Up to the order of sums, which a device need not keep."""
    assert relative_error(got.cpu(), wanted.cpu()) < 1e-5


@pytest.fixture
def qkv(seed):
    """On the device; float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, 150, 64), (2, 2, 200, 64), (2, 2, 200, 64)
    return [torch.randn(*shape, generator=generator).cuda() for shape in shapes]


@needs_device
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 1.5e-2)])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_torch(qkv, dtype, bound, layout):
    q, k, v = (x.to(getattr(torch, dtype)) for x in qkv)
    wanted, wanted_lse = attention(*(x.float().cpu() for x in (q, k, v)), "causal")
    inputs = [x if layout == "bhsd" else x.transpose(1, 2).contiguous() for x in (q, k, v)]
    settings = dict(method="exact", mask="causal", layout=layout)
    out, lse, error = hyperattn.forward(*inputs, return_lse=True, return_error=True, **settings)
    assert out.is_cuda and out.dtype == q.dtype and lse.shape == out.shape[:-1] and error.shape == (2, 4)
    if layout == "bshd":
        out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    assert relative_error(out.float().cpu(), wanted) < bound
    assert relative_error(lse.cpu(), wanted_lse) < 1e-3 and (error.cpu() == 0).all()


@needs_device
def test_torch_stream(qkv):
    """Work of a side stream before the call is waited for, and its memory is used again only after the call."""
    q, k, v = qkv
    wanted = hyperattn.forward(q, k, v, method="exact")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(20):
            torch.cuda._sleep(5_000_000)
            late = torch.zeros_like(q)
            late += q
            out = hyperattn.forward(late, k, v, method="exact")
            del late
            # Reuses the workspace and the queries, in the stream's order.
            torch.full((4_000_000,), float("nan"), device="cuda")
    side.synchronize()
    same(out, wanted)
    with pytest.raises(ValueError, match="torch.cuda.stream"):
        hyperattn.forward(q, k, v, stream=1)


@needs_device
def test_a_thread_without_a_context(qkv):
    wanted = hyperattn.forward(*qkv, method="exact")
    results = []
    thread = threading.Thread(target=lambda: results.append(hyperattn.forward(*qkv, method="exact")))
    thread.start()
    thread.join()
    same(results[0], wanted)


@needs_device
@pytest.mark.parametrize("method", ["exact", "paper", "refined"])
def test_graph(qkv, method):
    """A captured call computes on what the addresses hold when it is replayed."""
    q, k, v = qkv
    settings = dict(method=method, mask="causal", min_seq_len=64, block_size=64, sample_size=32, budget=64)
    hyperattn.forward(q, k, v, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hyperattn.forward(q, k, v, **settings)
    v.mul_(-1)
    graph.replay()
    same(out, hyperattn.forward(q, k, v, **settings))


@needs_device
def test_operator(qkv):
    import hyperattn.torch

    arguments = dict(method="exact", mask="causal")
    from torch import library

    library.opcheck(torch.ops.hyperattn.forward.default, tuple(qkv), arguments)
    out, _ = hyperattn.torch.forward(*qkv, **arguments)
    same(out, hyperattn.forward(*qkv, **arguments))


@needs_device
@pytest.mark.parametrize("method", ["exact", "paper", "refined"])
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_gradients(qkv, method, dtype, bound):
    """Through the operator: exact ones as in double precision, and those of estimators the same bits again."""
    import hyperattn.torch

    inputs = [x.to(getattr(torch, dtype)).requires_grad_() for x in qkv]
    settings = dict(method=method, mask="causal", min_seq_len=64, block_size=64, sample_size=32, budget=64)
    out, _ = hyperattn.torch.forward(*inputs, **settings)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(got, torch.autograd.grad(out, inputs, dout)))
    if method == "exact":
        wanted = gradients(*(x.detach().float().cpu() for x in (*inputs, dout)), mask="causal")
        assert all(relative_error(one.float().cpu(), other) < bound for one, other in zip(got, wanted))
    assert all(x.isfinite().all() for x in got)


@needs_device
def test_transformers(seed):
    pytest.importorskip("transformers")
    from models import decoder, tokens

    from hyperattn.transformers import replace

    model, ids = decoder("llama", seed).cuda(), tokens(seed, 2, 50).cuda()
    with torch.no_grad():
        wanted = model(ids).logits
        with replace(model, method="exact", strict=True) as replaced:
            got = model(ids).logits
    assert [layer.calls for layer in replaced.layers] == [1, 1, 1]
    assert relative_error(got.cpu(), wanted.cpu()) < 1e-4


class OnlyDLPack:
    """A tensor that is not known to be PyTorch's."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.ndim = tensor, tensor.shape, tensor.ndim

    def __dlpack__(self, **wanted):
        return self.tensor.__dlpack__(**wanted)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@needs_device
@pytest.mark.parametrize("own_stream", [False, True])
def test_dlpack(qkv, own_stream):
    """The library's stream-ordered workspace, on a stream that is given."""
    wanted = hyperattn.forward(*qkv, method="exact")
    out = torch.empty_like(wanted)
    stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
    number = {"stream": stream.cuda_stream} if own_stream else {}
    hyperattn.forward(*map(OnlyDLPack, qkv), out=OnlyDLPack(out), method="exact", **number)
    stream.synchronize()
    same(out, wanted)


@needs_device
def test_cupy(qkv):
    cupy = pytest.importorskip("cupy")
    wanted = hyperattn.forward(*qkv, method="exact")
    arrays = [cupy.from_dlpack(x) for x in qkv]
    with cupy.cuda.Stream() as stream:
        out, lse = hyperattn.forward(*arrays, method="exact", return_lse=True)
    stream.synchronize()
    assert isinstance(out, cupy.ndarray) and lse.shape == out.shape[:-1]
    same(torch.from_dlpack(out), wanted)
