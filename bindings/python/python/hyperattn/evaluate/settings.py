"""Methods and their parameters, from the command line."""

import argparse
import dataclasses
import itertools
from typing import Any

import hyperattn


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method with its parameters."""

    method: Any
    params: dict[str, Any]

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.params.items())])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", default="exact,paper", help="exact, paper, refined, auto; with commas")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="[METHOD.]NAME=VALUE[,VALUE...]",
        help="a parameter of the methods, or of one method; several values: one run for each. May be repeated",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers; layer i uses stream i")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse(options: argparse.Namespace) -> list[Setting]:
    """Every combination that --methods and --param ask for. EXACT takes no parameters."""
    values: dict[str, dict[str, list[Any]]] = {method: {} for method in options.methods.split(",")}
    for argument in options.param:
        key, equals, text = argument.partition("=")
        method, dot, name = key.rpartition(".")
        if not equals or (dot and method not in values):
            raise ValueError(f"--param {argument}: [METHOD.]NAME=VALUE with a METHOD of --methods")
        if name not in hyperattn.defaults():
            raise ValueError(f"--param {argument}: no parameter {name}; one of {', '.join(hyperattn.defaults())}")
        for target in [method] if dot else [target for target in values if target != "exact"]:
            values[target][name] = [_value(part) for part in text.split(",")]
    return [
        Setting(method, dict(zip(lists, combination)))
        for method, lists in values.items()
        for combination in itertools.product(*lists.values())
    ]
