"""Gradients through torch.ops.hyperattn.forward, against PyTorch's own autograd."""

import pytest

import hyperattn

torch = pytest.importorskip("torch")

import hyperattn.torch  # noqa: E402

FEW = dict(min_seq_len=32, block_size=16, sample_size=16, budget=64, num_first_keys=4, band=16, target_error=0.0)


@pytest.fixture
def leaves(seed):
    """leaves(n_q, n_k) -> q, k, v that require gradients, two query heads for each of k and v."""
    generator = torch.Generator().manual_seed(seed)

    def make(n_q, n_k, dtype=torch.float32):
        shapes = (2, 4, n_q, 32), (2, 2, n_k, 32), (2, 2, n_k, 24)
        return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]

    return make


def attention(q, k, v, mask):
    """(out, lse) in double precision, with PyTorch's own operators."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if mask == "causal":
        visible = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(logits.shape[-1] - logits.shape[-2])
        logits = logits.masked_fill(~visible, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def loss(out, lse):
    """Of the outputs, with different weights for all their elements."""
    weights = torch.arange(out.numel(), dtype=torch.float64).cos().reshape(out.shape)
    return (out * weights).sum() + lse.double().sin().sum()


def near(got, wanted, bound):
    for one, other in zip(got, wanted):
        assert (one.double() - other.double()).norm() / other.double().norm() < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("n_q, n_k", [(70, 70), (20, 70)])
def test_exact(leaves, dtype, bound, mask, n_q, n_k):
    inputs = leaves(n_q, n_k, dtype)
    got = torch.autograd.grad(loss(*hyperattn.torch.forward(*inputs, method="exact", mask=mask)), inputs)
    near(got, torch.autograd.grad(loss(*attention(*inputs, mask)), inputs), bound)
    assert [x.dtype for x in got] == [dtype] * 3


def test_any_order_permitted(leaves):
    """Autograd passes the permission on; sums on the CPU have one order."""
    inputs = leaves(40, 40)
    out, lse = hyperattn.torch.forward(*inputs, method="exact", deterministic=False)
    assert out.grad_fn.arguments["deterministic"] is False
    permitted = torch.autograd.grad(loss(out, lse), inputs)
    fixed = torch.autograd.grad(loss(*hyperattn.torch.forward(*inputs, method="exact")), inputs)
    assert all(torch.equal(one, other) for one, other in zip(permitted, fixed))


def test_views(leaves):
    """Queries, keys and values are parts of one tensor, [batch, tokens, heads, head_dim]; keys are broadcast."""
    packed = torch.cat([x[..., :24].transpose(1, 2) for x in leaves(40, 40)], dim=2).detach().requires_grad_()

    def parts():
        q, k, v = packed.split([4, 2, 2], dim=2)
        return q, k[:, :, :1].expand(-1, -1, 2, -1), v

    out, lse = hyperattn.torch.forward(*parts(), method="exact", layout="bshd")
    (got,) = torch.autograd.grad(loss(out.transpose(1, 2), lse.transpose(1, 2)), packed)
    (wanted,) = torch.autograd.grad(loss(*attention(*(x.transpose(1, 2) for x in parts()), "none")), packed)
    near([got], [wanted], 1e-5)


def test_parts_of_the_loss(leaves):
    """A sum's gradient has stride 0; only one of the outputs is used; only one input wants a gradient."""
    inputs = leaves(30, 30)
    for part in (lambda out, lse: out.sum(), lambda out, lse: lse.sum()):
        got = torch.autograd.grad(part(*hyperattn.torch.forward(*inputs, method="exact")), inputs[:2])
        near(got[1:], torch.autograd.grad(part(*attention(*inputs, "none")), inputs[1]), 1e-5)
    q, k, v = inputs
    out, _ = hyperattn.torch.forward(q.detach(), k, v.detach(), method="exact")
    near(torch.autograd.grad(out.sum(), k), torch.autograd.grad(attention(q, k, v, "none")[0].sum(), k), 1e-5)


def test_differences(seed):
    """The gradients against differences of the operator itself, which rounds to single precision."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(1, heads, 5, 3, generator=generator).double() for heads in (2, 1, 1)]

    def single(*inputs):
        out, lse = hyperattn.torch.forward(*(x.float() for x in inputs), method="exact", mask="causal")
        return out.double(), lse.double()

    # Differences of 1e-2 are off by 1e-4 of third derivatives and 1e-5 of rounding.
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(single, inputs, eps=1e-2, atol=1e-3, rtol=1e-3)


def test_parts_of_the_keys(leaves):
    """Parts joined with PyTorch's operators: gradients reach each part through its out and its lse."""
    q, k, v = leaves(20, 60)
    cuts = slice(0, 25), slice(25, 60)
    parts = [hyperattn.torch.forward(q, k[:, :, cut], v[:, :, cut], method="exact") for cut in cuts]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * (part_lse - lse).exp()[..., None] for part, part_lse in parts)
    got = torch.autograd.grad(loss(out, lse), (q, k, v))
    near(got, torch.autograd.grad(loss(*attention(q, k, v, "none")), (q, k, v)), 1e-5)


@pytest.mark.parametrize("method", ["exact", "paper", "refined"])
def test_compile(leaves, method):
    """Forward and backward traced ahead of time: the same bits."""
    inputs = leaves(100, 100)

    def layer(q, k, v):
        out, _ = hyperattn.torch.forward(q * 2, k, v, method=method, mask="causal", seed=1, **FEW)
        return (out * out).sum()

    wanted = torch.autograd.grad(layer(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs), inputs)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted))
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in got)


def test_what_has_no_gradient(leaves):
    q, k, v = leaves(10, 10)
    mask = torch.zeros(10, 10, requires_grad=True)
    with pytest.raises(NotImplementedError, match="additive_mask"):
        hyperattn.torch.forward(q, k, v, additive_mask=mask)[0].sum().backward()
    hyperattn.torch.forward(q, k, v, additive_mask=mask.detach())[0].sum().backward()
    (dq,) = torch.autograd.grad(hyperattn.torch.forward(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="hyperattn.backward"):
        dq.sum().backward()
    with torch.no_grad():
        assert not hyperattn.torch.forward(q, k, v)[0].requires_grad


class Layer(torch.nn.Module):
    """A layer of causal attention between an embedding and the logits."""

    def __init__(self, tokens, width, heads, **method):
        super().__init__()
        self.heads, self.method = heads, method
        self.embedding = torch.nn.Embedding(tokens, width)
        self.projections = torch.nn.Linear(width, 3 * width)
        self.logits = torch.nn.Linear(width, tokens)

    def forward(self, ids):
        q, k, v = self.projections(self.embedding(ids)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out, _ = hyperattn.torch.forward(q, k, v, mask="causal", layout="bshd", **self.method)
        return self.logits(out.flatten(2))


@pytest.mark.parametrize("method", ["exact", "paper", "refined"])
def test_a_model_trains(method, seed):
    """Each token's successor is always the same one: the loss falls far below that of guessing."""
    torch.manual_seed(seed)
    model = Layer(16, 32, 2, method=method, **FEW)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    ids = torch.randint(16, (2, 160))
    successors = torch.randperm(16)[ids]
    for _ in range(40):
        optimizer.zero_grad()
        error = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), successors.flatten())
        error.backward()
        optimizer.step()
    assert error < 1.0
