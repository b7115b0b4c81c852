"""Error per head of methods on a folder of captured Q, K and V.

Every method runs in single precision on every file of the folder; EXACT is the reference. The table has one line for
each layer and method; --out adds a CSV file with one line for each head, and a JSON file.
"""

import argparse
import pathlib
import statistics
import time
from typing import Any

import torch
from safetensors import safe_open

import hyperattn
from hyperattn._library import has_field, lib
from hyperattn.transformers import select_layers

from . import report, settings
from .head_error import exact_output, relative_errors, summary
from .settings import Setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=pathlib.Path, help="of the capture command, or one of its files")
    settings.add_arguments(parser)
    parser.add_argument("--layers", default="all", help="all, first:K, last:K, every:K or numbers with commas")
    parser.add_argument("--heads", help="query heads, with commas; all when missing")
    parser.add_argument("--tokens", type=int, help="only the first so many")
    parser.add_argument("--queries", type=int, help="only the last so many queries, against all keys")
    parser.add_argument("--mask", default="causal", choices=("causal", "none"))
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from --seed on")
    parser.add_argument("--diagnose", action="store_true", help="add what hyperattn_diagnose reports; slower")
    parser.add_argument("--out", type=pathlib.Path, help="folder for errors.csv and errors.json")


def _load(
    path: pathlib.Path, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float | None]:
    with safe_open(path, "pt") as file:
        q, k, v = (file.get_tensor(name) for name in "qkv")
        scale = (file.metadata() or {}).get("scale")
    n = options.tokens or q.shape[1]
    if n > q.shape[1]:
        raise ValueError(f"{path}: {q.shape[1]} tokens, not {n}")
    first = n - (options.queries or n)
    q, k, v = q[:, first:n].float(), k[:, :n].float(), v[:, :n].float()
    return q, k, v, None if scale is None else float(scale)


def _select_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: list[int]) -> list[torch.Tensor]:
    if len(heads) == q.shape[0]:
        return [q, k, v]
    kv = [head // (q.shape[0] // k.shape[0]) for head in heads]
    return [q[heads], k[kv], v[kv]]


def _files(options: argparse.Namespace) -> list[tuple[int, pathlib.Path]]:
    """The chosen files, with their places in the folder."""
    if options.folder.is_file():
        return [(0, options.folder)]
    files = sorted(options.folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{options.folder}: no .safetensors files")
    return [(index, files[index]) for index in select_layers(options.layers, len(files))]


def _measure(
    qkv: list[torch.Tensor], reference: torch.Tensor, call: dict[str, Any], diagnose: bool
) -> list[dict[str, Any]]:
    """One row for each head."""
    estimates = has_field("hyperattn_tensors", "error")
    started = time.perf_counter()
    result = hyperattn.forward(*qkv, **call, return_error=estimates)
    seconds = time.perf_counter() - started
    out = result[0] if estimates else result
    rows: list[dict[str, Any]] = [
        {"true_error": error, "layer_seconds": seconds} for error in relative_errors(out, reference).tolist()
    ]
    if estimates:
        for row, estimate in zip(rows, result[1].tolist()):
            row["estimated_error"] = estimate
    if diagnose:
        for row, head in zip(rows, hyperattn.diagnose(*qkv, **call)[0]):
            row.update({name: value for name, value in head._asdict().items() if name != "true_error"})
    return rows


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    line = summary(rows)
    if all("keys_per_query" in row for row in rows):
        line["keys_per_query"] = statistics.fmean(row["keys_per_query"] for row in rows)
    calls = {(row["layer"], row["seed"]): row["layer_seconds"] for row in rows}
    line["seconds"] = statistics.fmean(calls.values())
    return line


def _summaries(rows: list[dict[str, Any]], methods: list[Setting]) -> list[dict[str, Any]]:
    lines = []
    for layer in [*dict.fromkeys(row["layer"] for row in rows), None]:
        for setting in methods:
            chosen = [r for r in rows if r["setting"] == str(setting) and layer in (None, r["layer"])]
            lines.append({"layer": layer or "all", "method": str(setting), **_summary(chosen)})
    return lines


def run(options: argparse.Namespace) -> None:
    methods = settings.parse(options)
    if options.diagnose and not hasattr(lib, "hyperattn_diagnose"):
        raise ValueError("--diagnose: this version of the library does not diagnose")
    rows: list[dict[str, Any]] = []
    for number, path in _files(options):
        q, k, v, scale = _load(path, options)
        heads = list(range(q.shape[0])) if options.heads is None else [int(head) for head in options.heads.split(",")]
        qkv = _select_heads(q, k, v, heads)
        started = time.perf_counter()
        reference = exact_output(*qkv, mask=options.mask, scale=scale, threads=options.threads)
        exact_seconds = time.perf_counter() - started
        for setting in methods:
            for seed in range(options.seed, options.seed + options.seeds):
                call = {"seed": seed, "offset": number, **setting.params}
                call |= {"method": setting.method, "mask": options.mask, "scale": scale, "threads": options.threads}
                for head, row in zip(heads, _measure(qkv, reference, call, options.diagnose)):
                    about = {"layer": path.stem, "head": head, "setting": str(setting), "method": setting.method}
                    rows.append({**about, **setting.params, "seed": seed, **row, "exact_layer_seconds": exact_seconds})
        report.progress(f"{path.stem}: {len(methods)} methods, {len(heads)} heads")
    lines = _summaries(rows, methods)
    print(report.table(lines, list(dict.fromkeys(column for line in lines for column in line))))
    if options.out:
        report.write_csv(options.out / "errors.csv", rows)
        report.write_json(options.out / "errors.json", vars(options), {"summary": lines, "heads": rows})
