"""Exact attention and HyperAttention (arXiv 2310.05869) on the CPU, for NumPy arrays and PyTorch tensors.

    out = hyperattn.forward(q, k, v, method="exact", mask="causal")

`hyperattn.transformers` puts it into models of the transformers library; `python -m hyperattn.evaluate` measures what
that costs and gains on a model.
"""

from ._attention import BlockMask, diagnose, forward, merge
from ._library import abi_version, has_feature, isa, version
from ._params import defaults
from .errors import HyperAttnError, InvalidArgument, OutOfMemory, Unsupported

__version__ = version()

__all__ = [
    "BlockMask",
    "HyperAttnError",
    "InvalidArgument",
    "OutOfMemory",
    "Unsupported",
    "abi_version",
    "defaults",
    "diagnose",
    "forward",
    "has_feature",
    "isa",
    "merge",
    "version",
]
