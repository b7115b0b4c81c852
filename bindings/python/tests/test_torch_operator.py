"""torch.ops.hyperattn.forward and its backward: what torch.compile and torch.export ask of an operator."""

import pytest

import hyperattn

torch = pytest.importorskip("torch")

from torch import library  # noqa: E402

import hyperattn.torch  # noqa: E402
from hyperattn import _params  # noqa: E402


@pytest.fixture
def qkv(seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, 60, dim, generator=generator) for heads, dim in ((4, 16), (2, 16), (2, 24)))
    return q, k, v


def test_same_as_the_call(qkv):
    settings = dict(method="paper", mask="causal", min_seq_len=16, block_size=16, sample_size=8, residual="row_norm")
    wanted = hyperattn.forward(*qkv, seed=3, scale=0.3, return_lse=True, **settings)
    for got in (
        hyperattn.torch.forward(*qkv, seed=3, scale=0.3, **settings),
        torch.ops.hyperattn.forward(*qkv, seed=3, scale=0.3, **settings),
    ):
        assert all(torch.equal(one, other) for one, other in zip(got, wanted))
    out, lse = hyperattn.torch.forward(*(x.transpose(1, 2) for x in qkv), layout="bshd", method="exact")
    parts = dict(head_methods=["exact", "paper"] * 2, cu_seqlens_q=[0, 20, 60], min_seq_len=8)
    one = [x[:1] for x in qkv]
    mask = torch.randn(60, 60, dtype=torch.float16)
    masked = hyperattn.torch.forward(*one, additive_mask=mask)[0]
    assert torch.equal(masked, hyperattn.forward(*one, additive_mask=mask))
    assert torch.equal(hyperattn.torch.forward(*one, **parts)[0], hyperattn.forward(*one, **parts))
    exact, exact_lse = hyperattn.forward(*qkv, method="exact", return_lse=True)
    assert torch.equal(out.transpose(1, 2), exact) and torch.equal(lse.transpose(1, 2), exact_lse)


def test_every_parameter_is_an_argument(qkv):
    names = {argument.name for argument in torch.ops.hyperattn.forward.default._schema.arguments}
    own = {"q", "k", "v", "layout", "threads", "additive_mask", "head_methods", "cu_seqlens_q", "cu_seqlens_k"}
    assert names == own | set(_params.fields())
    of_backward = {argument.name for argument in torch.ops.hyperattn.backward.default._schema.arguments}
    assert of_backward == names | {"out", "lse", "dout", "dlse"}
    with pytest.raises(hyperattn.InvalidArgument, match="lsh_num_projs"):
        hyperattn.torch.forward(*qkv, method="paper", lsh_num_projs=99)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_registrations(qkv, layout):
    """The schema is what it does, the fake implementation's tensors are like the real one's, and autograd knows it."""
    q, k, v = qkv if layout == "bhsd" else (x.transpose(1, 2) for x in qkv)
    arguments = dict(method="exact", layout=layout)
    halves = tuple(x.to(torch.bfloat16) for x in (q, k, v))
    library.opcheck(torch.ops.hyperattn.forward.default, halves, arguments)
    tracked = tuple(x.clone().requires_grad_() for x in (q, k, v))
    library.opcheck(torch.ops.hyperattn.forward.default, tracked, arguments)
    out, lse = hyperattn.torch.forward(q, k, v, **arguments)
    library.opcheck(torch.ops.hyperattn.backward.default, (q, k, v, out, lse, out, lse), arguments)


def test_export_keeps_it_whole(qkv):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return hyperattn.torch.forward(q, k, v, method="exact", mask="causal")[0] * 2

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = ({2: tokens},) * 3
    program = torch.export.export(Attention(), qkv, dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.hyperattn.forward.default) == 1
    shorter = [x[:, :, :33] for x in qkv]
    assert torch.equal(program.module()(*shorter), hyperattn.forward(*shorter, method="exact", mask="causal") * 2)


def test_compile(qkv):
    def layer(q, k, v):
        return hyperattn.torch.forward(q, k, v, method="exact")[0] + q.mean()

    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*qkv), layer(*qkv))
