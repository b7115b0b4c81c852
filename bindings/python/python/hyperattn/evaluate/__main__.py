"""The command line."""

import argparse
import sys

from hyperattn import HyperAttnError

from . import capture, errors, fetch, needle, perplexity

COMMANDS = {
    "model": fetch,
    "capture": capture,
    "errors": errors,
    "perplexity": perplexity,
    "needle": needle,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hyperattn.evaluate", description="Evaluation on real models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        about = module.__doc__ or ""
        command = commands.add_parser(name, help=about.splitlines()[0], description=about)
        module.add_arguments(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        COMMANDS[options.command].run(options)
    except (ValueError, OSError, HyperAttnError) as error:
        print(f"hyperattn.evaluate {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
