"""A model folder, a text, and tokens of the one made from the other."""

import argparse
import os
import pathlib
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=pathlib.Path, help="folder of a transformers model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the model")


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer, from the folder alone: nothing is fetched."""
    if not options.model.is_dir():
        raise ValueError(f"{options.model}: not a folder")
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    dtype = getattr(torch, options.dtype)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, local_files_only=True).eval(), tokenizer


def text_tokens(tokenizer: Any, text: pathlib.Path, count: int) -> torch.Tensor:
    """The first `count` tokens of a text file, as a batch of one."""
    ids = tokenizer(text.read_text(), verbose=False)["input_ids"]
    if len(ids) < count:
        raise ValueError(f"{text}: {len(ids)} tokens, fewer than {count}")
    return torch.tensor([ids[:count]])
