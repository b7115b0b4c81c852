"""Exact attention and HyperAttention (arXiv 2310.05869) on the CPU and on CUDA.

Arrays are anything with `__dlpack__`: of NumPy, PyTorch, JAX, CuPy and others.

    out = hyperattn.forward(q, k, v, method="exact", mask="causal")

`backward` gives its gradients. `hyperattn.torch` is both as an operator of PyTorch, for autograd, torch.compile and
torch.export; `hyperattn.transformers` puts it into models of the transformers library; `python -m hyperattn.evaluate`
measures what that costs and gains on a model.
"""

from ._attention import diagnose, forward, merge
from ._backward import backward
from ._dlpack import SupportsDLPack
from ._inputs import BlockMask
from ._library import abi_version, has_feature, isa, version
from ._params import Parameters, defaults
from .errors import DeviceUnavailable, HyperAttnError, InvalidArgument, OutOfMemory, Unsupported

__version__ = version()

__all__ = [
    "BlockMask",
    "DeviceUnavailable",
    "HyperAttnError",
    "InvalidArgument",
    "OutOfMemory",
    "Parameters",
    "SupportsDLPack",
    "Unsupported",
    "abi_version",
    "backward",
    "defaults",
    "diagnose",
    "forward",
    "has_feature",
    "isa",
    "merge",
    "version",
]
