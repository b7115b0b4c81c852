"""Tables on the terminal; CSV and JSON files that say how they came about."""

import csv
import datetime
import io
import json
import pathlib
import platform
import sys
from importlib import metadata
from typing import Any

import hyperattn


def _cpu() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def circumstances() -> dict[str, Any]:
    """When, where and with what a result was measured."""
    packages = {name: _installed(name) for name in ("torch", "transformers", "numpy")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "isa": hyperattn.isa(),
        "hyperattn": hyperattn.version(),
        "python": platform.python_version(),
        **{name: version for name, version in packages.items() if version},
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1 else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"
    return str(value)


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Aligned columns; the first is text."""
    cells = [columns, *([_text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = []
    for line in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def write_csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Rows with the union of their columns, in the order of first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)
    _write(path, file.getvalue())


def write_json(path: pathlib.Path, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """The command's settings, the circumstances and the results."""
    content = {"settings": settings, "circumstances": circumstances(), **results}
    _write(path, json.dumps(content, indent=1, default=str) + "\n")


def _write(path: pathlib.Path, text: str) -> None:
    """The whole file or none of it: what was there stays when the process is ended meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, newline="")
    unfinished.replace(path)


def progress(line: str) -> None:
    """What is being done, apart from the results."""
    print(line, file=sys.stderr, flush=True)
