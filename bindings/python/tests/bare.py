"""The wheel in an environment that has NumPy only: it carries the library, and forward works."""

import importlib.metadata
import importlib.util
import sys

import numpy

import hyperattn

for package in ("torch", "transformers", "ml_dtypes"):
    assert importlib.util.find_spec(package) is None, f"{package} is here"
assert hyperattn.has_feature("cuda")
v = numpy.ones((1, 2, 300, 16), numpy.float32)
out = hyperattn.forward(v, v, v, method="exact", mask="causal")
assert numpy.allclose(out, 1)
files = [str(path) for path in importlib.metadata.files("hyperattn")]
for wanted in ("hyperattn/py.typed", "LICENSE-APACHE", "LICENSE-MIT"):
    assert any(path.endswith(wanted) for path in files), f"no {wanted} in the wheel"
packages = sorted(distribution.name for distribution in importlib.metadata.distributions())
print(f"hyperattn {hyperattn.version()} with Python {sys.version.split()[0]} and {', '.join(packages)}")
