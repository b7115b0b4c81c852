"""Perplexity (e to the mean loss in nats) of a text against the number of replaced layers.

For every choice of layers and every method: perplexity of the whole text and of its second half, time of each replaced
layer's attention, and each head's true error against EXACT on the same inputs. --out adds CSV and JSON files and,
where matplotlib is installed, a picture.
"""

import argparse
import pathlib
import statistics
import time
from typing import Any

import torch
from torch.nn import functional

from hyperattn._library import has_field
from hyperattn.transformers import Call, attention_modules, replace, select_layers

from . import model as models
from . import report, settings
from .head_error import exact_output, relative_errors, summary
from .settings import Setting

# Rows of logits that exist at the same time.
CHUNK = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("text", type=pathlib.Path, help="a text file")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--layers",
        default="all",
        help="choices of replaced layers, with commas: all, first:K, last:K, every:K, or numbers joined by +",
    )
    settings.add_arguments(parser)
    parser.add_argument("--exact", default="hyperattn", choices=("hyperattn", "sdpa"), help="computes the other layers")
    parser.add_argument("--no-errors", action="store_true", help="do not compute EXACT for every call to compare with")
    parser.add_argument("--out", type=pathlib.Path, help="folder for perplexity.csv, heads.csv, perplexity.json, .svg")


def losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The loss of tokens 1.. in nats, with the logits of a part of the text at a time."""
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    parts = []
    for first in range(0, ids.shape[1] - 1, CHUNK):
        last = min(first + CHUNK, ids.shape[1] - 1)
        logits = head(hidden[first:last]).float()
        parts.append(functional.cross_entropy(logits, ids[0, first + 1 : last + 1], reduction="none"))
    return torch.cat(parts)


def check_head(model: Any, ids: torch.Tensor) -> None:
    """Refuses a model that does more than a matrix product between hidden states and logits."""
    ids = ids[:, :16]
    wanted = functional.cross_entropy(model(ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:])
    if not torch.allclose(losses(model, ids).mean(), wanted, rtol=1e-3):
        raise ValueError("this model's logits are not a product of its hidden states and its output embeddings")


def perplexity(loss: torch.Tensor) -> float:
    return float(loss.double().mean().exp())


def _measure(
    model: Any, ids: torch.Tensor, layers: list[int], setting: Setting, options: argparse.Namespace
) -> dict[str, Any]:
    """The row of the table, with the heads' rows under "heads"."""
    heads: list[dict[str, Any]] = []

    def compare(call: Call) -> None:
        reference = exact_output(call.q, call.k, call.v, mask=call.mask, scale=call.scale, threads=call.threads)
        true = relative_errors(call.out, reference)[0].tolist()
        estimated = [None] * len(true) if call.error is None else call.error[0].tolist()
        for head, (error, estimate) in enumerate(zip(true, estimated)):
            row = {"layer": call.layer, "head": head, "true_error": error}
            heads.append(row | ({} if estimate is None else {"estimated_error": estimate}))

    approximate = setting.method != "exact"
    started = time.perf_counter()
    with replace(
        model,
        layers,
        setting.method,
        exact=options.exact,
        threads=options.threads,
        estimate_errors=approximate and has_field("hyperattn_tensors", "error"),
        observer=compare if approximate and not options.no_errors else None,
        **{"seed": options.seed, **setting.params},
    ) as replaced:
        loss = losses(model, ids)
        chosen = [replaced.layers[layer] for layer in layers]
    row: dict[str, Any] = {"method": str(setting), "layers": len(layers), "perplexity": perplexity(loss)}
    row["second_half"] = perplexity(loss[len(loss) // 2 :])
    fallbacks = sum(sum(layer.fallbacks.values()) for layer in replaced.layers)
    if fallbacks:
        row["fallbacks"] = fallbacks
    if chosen:
        row["layer_seconds"] = statistics.fmean(layer.seconds for layer in chosen)
    if heads:
        row |= summary(heads, model.dtype)
    row["seconds"] = time.perf_counter() - started
    return row | {"seconds_by_layer": {layer.index: layer.seconds for layer in chosen}, "heads": heads}


def _plot(path: pathlib.Path, rows: list[dict[str, Any]], exact: float) -> None:
    try:
        import matplotlib
    except ImportError:
        report.progress("no picture: matplotlib is not installed")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.axhline(exact, color="black", linewidth=1, label=f"exact: {exact:.3f}")
    for method in dict.fromkeys(row["method"] for row in rows if row["layers"]):
        line = sorted((row["layers"], row["perplexity"]) for row in rows if row["method"] == method)
        axes.plot(*zip(*line), marker="o", label=method)
    axes.set(xlabel="replaced layers", ylabel="perplexity")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def _write(rows: list[dict[str, Any]], shown: list[dict[str, Any]], options: argparse.Namespace) -> None:
    about = {"tokens": options.tokens, "seed": options.seed}
    report.write_csv(options.out / "perplexity.csv", [{**row, **about} for row in shown])
    heads = [
        {"method": row["method"], "choice": row["choice"], **about, **head} for row in rows for head in row["heads"]
    ]
    if heads:
        report.write_csv(options.out / "heads.csv", heads)
    report.write_json(options.out / "perplexity.json", vars(options), {"runs": rows})


def run(options: argparse.Namespace) -> None:
    methods = settings.parse(options)
    model, tokenizer = models.load(options)
    ids = models.text_tokens(tokenizer, options.text, options.tokens)
    count = len(attention_modules(model))
    choices = {name: select_layers(name.replace("+", ","), count) for name in options.layers.split(",")}
    runs: list[tuple[Setting, str, list[int]]] = [(Setting("exact", {}), "none", [])]
    runs += [(s, name, layers) for s in methods if s.method != "exact" for name, layers in choices.items()]
    if any(setting.method == "exact" for setting in methods):
        # EXACT of this library in every layer, for the time of a layer.
        runs[0] = (Setting("exact", {}), "all", list(range(count)))
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    with torch.no_grad():
        check_head(model, ids)
        for setting, name, layers in runs:
            rows.append({"choice": name, **_measure(model, ids, layers, setting, options)})
            rows[-1]["ratio"] = rows[-1]["perplexity"] / rows[0]["perplexity"]
            shown.append({key: value for key, value in rows[-1].items() if key not in ("heads", "seconds_by_layer")})
            report.progress(f"{setting}, {name}: perplexity {rows[-1]['perplexity']:.4f}, {rows[-1]['seconds']:.0f} s")
            if options.out:
                # After every run: a long evaluation that is interrupted keeps what it has.
                _write(rows, shown, options)
    columns = ["method", "choice", "perplexity", "ratio", "second_half", "layer_seconds"]
    optional = [column for row in shown for column in row if column.startswith(("error_", "estimate_", "fallbacks"))]
    print(report.table(shown, [*columns, *dict.fromkeys(optional)]))
    if options.out:
        _plot(options.out / "perplexity.svg", rows[1:] or rows, rows[0]["perplexity"])
