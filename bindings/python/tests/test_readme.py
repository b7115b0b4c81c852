"""The README's examples run, and its commands are valid."""

import pathlib
import re
import shlex

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from models import decoder  # noqa: E402

from hyperattn.evaluate import settings  # noqa: E402
from hyperattn.evaluate.__main__ import COMMANDS, build_parser  # noqa: E402

README = (pathlib.Path(__file__).resolve().parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LINES = re.findall(r"^python -m hyperattn\.evaluate (\w.*)", README, flags=re.MULTILINE)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, tmp_path, seed):
    decoder("llama", seed).save_pretrained(tmp_path)
    exec(compile(EXAMPLES[number], f"README.md, example {number}", "exec"), {"folder": tmp_path})


def test_commands():
    parsed = [build_parser().parse_args(shlex.split(line)) for line in LINES]
    assert {options.command for options in parsed} == set(COMMANDS)
    for options in parsed:
        if hasattr(options, "methods"):
            assert settings.parse(options)
