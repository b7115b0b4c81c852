"""Q, K and V of every layer on the first tokens of a text.

One safetensors file for each layer, in half precision, after rotary embedding: q [heads_q, n, d], k and v
[heads_kv, n, d], with the softmax scale in the metadata.
"""

import argparse
import pathlib

import torch
from safetensors.torch import save_file

from hyperattn.transformers import Call, replace, select_layers, attention_modules

from . import model as models
from . import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("text", type=pathlib.Path, help="a text file")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--layers", default="all", help="all, first:K, last:K, every:K or numbers with commas")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for layerNN.safetensors")


def run(options: argparse.Namespace) -> None:
    model, tokenizer = models.load(options)
    ids = models.text_tokens(tokenizer, options.text, options.tokens)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = select_layers(options.layers, len(attention_modules(model)))

    def store(call: Call) -> None:
        tensors = {name: getattr(call, name)[0].to(torch.float16).contiguous() for name in "qkv"}
        infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if infinite:
            raise ValueError(f"layer {call.layer}: {', '.join(infinite)} do not fit half precision")
        about = {
            "model": options.model.resolve().name,
            "text": options.text.name,
            "scale": str(call.q.shape[-1] ** -0.5 if call.scale is None else call.scale),
            "layout": "q [heads_q, n, d]; k, v [heads_kv, n, d]",
        }
        save_file(tensors, options.out / f"layer{call.layer:02d}.safetensors", metadata=about)
        report.progress(f"layer {call.layer}: {call.seconds:.2f} s of attention")

    with torch.no_grad(), replace(model, chosen, "exact", strict=True, threads=options.threads, observer=store):
        model.base_model(ids, use_cache=False)
    print(f"{len(chosen)} layers of {options.tokens} tokens in {options.out}")
