"""The declarations are those of the C header."""

import pathlib
import re

import pytest

import hyperattn
from hyperattn._library import ffi, has_field, lib

HEADER = pathlib.Path(__file__).resolve().parents[3] / "include" / "hyperattn" / "hyperattn.h"


def struct_fields(name):
    body = re.search(rf"typedef struct {name} {{(.*?)}} {name};", HEADER.read_text(), flags=re.DOTALL)[1]
    code = re.sub(r"//.*", "", body)
    return re.findall(r"(\w+)(?:\[\d+\])?;", code)


@pytest.mark.parametrize("struct", ["params", "tensors", "grads", "cpu_exec", "block_mask"])
def test_structs(struct):
    name = f"hyperattn_{struct}"
    assert [field for field, _ in ffi.typeof(name).fields] == struct_fields(name)


def test_every_function_is_there():
    names = re.findall(r"\b(hyperattn_\w+)\(", re.sub(r"//.*", "", HEADER.read_text()))
    assert "hyperattn_forward" in names
    for name in names:
        assert ffi.cast("void *", getattr(lib, name)) != ffi.NULL


def test_typed_keywords_are_the_parameters():
    own = {"method", "mask", "scale"}
    assert set(hyperattn.Parameters.__annotations__) | own == set(hyperattn.defaults())


def test_defaults_have_every_parameter():
    not_keywords = {"struct_size", "flags", "head_methods"}
    assert set(hyperattn.defaults()) == set(struct_fields("hyperattn_params")) - not_keywords | {"deterministic"}
    assert hyperattn.defaults()["deterministic"] is True


@pytest.mark.skipif(not has_field("hyperattn_tensors", "error"), reason="the header has no tensor for the error")
def test_error_estimate(random):
    q, k, v = random(2, 4, 600, 16), random(2, 2, 600, 16), random(2, 2, 600, 16)
    out, error = hyperattn.forward(q, k, v, method="exact", return_error=True)
    assert error.shape == (2, 4) and (error < 1e-4).all()
    assert hyperattn.forward(q[0], k[0], v[0], method="exact", return_error=True)[1].shape == (4,)


@pytest.mark.skipif(not hasattr(lib, "hyperattn_diagnose"), reason="the header has no hyperattn_diagnose")
def test_diagnose(random):
    q, k, v = random(2, 4, 600, 16), random(2, 2, 600, 16), random(2, 2, 600, 16)
    heads = hyperattn.diagnose(q, k, v, method="exact", mask="causal", true_error=True)
    assert len(heads) == 2 and all(len(item) == 4 for item in heads)
    for head in (head for item in heads for head in item):
        assert head.true_error < 1e-5 and head.keys_per_query == pytest.approx(300.5, abs=1)
        assert head.kappa == 1.0 and head.captured_mass == 1.0
    for method in ("paper", "refined"):
        few = dict(min_seq_len=64, block_size=64, budget=128, target_error=0.0)
        for head in (head for item in hyperattn.diagnose(q, k, v, method=method, **few) for head in item):
            assert head.kappa > 1.0 and 0.0 < head.captured_mass < 1.0
