"""A process that runs command lines, and prints of each its exit code and the shape of what it wrote.

    PYTHONPATH=tests/support python -m commands_in_play FILE

prints JSON: command line -> {"exit", "stdout", and "wrote" for the file that it names}. Shapes hold the keys
of JSON with their types, columns of tables, labels in front of colons, ids and options, but no numbers.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import forked
import pytest
from ceiling_cases import measure_limits_quickly
from tiny_run import write_tiny_run

WRITES = ("-o", "--report", "--dump-failure", "--html")
COMMENT = r"warning|[^,]*, mla"  # what is said only where a machine is busy
# Objects whose keys go by the machine or the run.
MAPS = ("environment", "device_state", "ops", "op_remarks", "point")


def commands(file: Path) -> list[str]:
    """Return the command lines of a file."""
    return [line for line in file.read_text().splitlines() if line[:1] not in ("#", "")]


def spelt_out(line: str, file: Path) -> list[str]:
    """Return the words of a command line."""
    short = dict(re.findall(r"^# ([A-Z]+): (.*)$", file.read_text(), re.MULTILINE))
    while word_known := next((word for word in line.split() if word in short), None):
        line = line.replace(word_known, short[word_known])
    return shlex.split(line)


def shape(value: Any) -> Any:
    """Return keys and types: of a list those of all elements; null and what is empty tell nothing."""
    if isinstance(value, dict):
        return {key: "map" if key in MAPS else shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        inner: Any = None
        for item in value:
            inner = merged(inner, shape(item))
        return {"[]": inner}
    kinds = {bool: "bool", int: "number", float: "number", str: "text"}
    return None if value is None else kinds[type(value)]


def merged(first: Any, other: Any) -> Any:
    """Return a shape that both have; "mixed" where there is none."""
    if first is None or other is None:
        return other if first is None else first
    if isinstance(first, dict) and isinstance(other, dict):
        return {key: merged(first.get(key), other.get(key)) for key in {**first, **other}}
    return first if first == other else "mixed"


def labels(text: str) -> list[str]:
    """Return the labels, columns, headings and options of a text, without numbers, each once."""
    lines, kept_lines = text.splitlines(), []
    if re.fullmatch(r"[a-z]+(  +[a-z]+)+", (lines or [""])[0]):
        kept_lines = lines[0].split()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if re.fullmatch(r"[ ─]+|[| -]+", below) and below.strip():
            kept_lines += [cell.strip() for cell in re.split(r"\||  +", line.strip().strip("|"))]
        elif re.fullmatch(r"[a-z]\w*(,[a-z]\w*){3,}", line):
            kept_lines += line.split(",")
        elif line.startswith("#"):
            kept_lines.append(line)
        else:
            kept_lines += re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", line)
            kept_lines += [label.strip() for label in re.findall(r"^([A-Za-z][^:|`(]{0,40}?): ", line)]
            kept_lines += re.findall(r"^([a-z_]+\.[a-z_]+)(?=\[| \()", line)  # ids of checks
    kept_lines = [kept for kept in kept_lines if kept and not re.match(COMMENT, kept)]
    return sorted({re.sub(r"\d+(\.\d+)*(\+\w+)?", "N", kept) for kept in kept_lines})


def of_text(text: str) -> Any:
    """Return the shape of JSON, of JSON lines, or the labels of another text."""
    try:
        return shape(json.loads(text))
    except ValueError:
        pass
    try:
        return shape([json.loads(line) for line in text.splitlines()]) if text else []
    except ValueError:
        return labels(text)


def of_path(path: Path) -> Any:
    """Return the shape of what a command wrote: a file, or the names in a folder with the JSON among them."""
    if path.is_dir():
        shapes: dict[str, Any] = {}
        for entry in (file for file in sorted(path.rglob("*")) if file.is_file()):
            name = re.sub(r"[0-9a-f_]{8,}", "N", str(entry.relative_to(path)))
            shapes[name] = merged(shapes.get(name), of_path(entry))
        return shapes
    return of_text(path.read_text()) if path.suffix == ".json" else "file"


def prepare(folder: Path) -> None:
    """Write the files that commands read."""
    write_tiny_run(folder, passes=6, q_lora_rank=24)
    for name in ("broken.json", "broken.toml"):
        (folder / name).write_text("{")
    (folder / "known.txt").write_text("linear.outlier[faulty-*]: it is known\n")


def outcome(words: list[str], folder: Path) -> dict[str, Any]:
    """Run a command and return what is frozen of it."""
    done = forked.call(words, folder, lambda: measure_limits_quickly(pytest.MonkeyPatch()))
    if "Traceback" in done.out + done.err:
        raise RuntimeError(f"{shlex.join(words)}: {done.err}")
    ended: dict[str, Any] = {"exit": done.code, "stdout": of_text(done.out)}
    named = [word for flag, word in itertools.pairwise(words) if flag in WRITES]
    for path in (folder / word for word in named):
        ended["wrote"] = of_path(path) if path.exists() else None
    return ended


def main() -> None:
    file = Path(sys.argv[1])
    forked.import_all("mla", "mla.integrations")
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        outcomes = {line: outcome(spelt_out(line, file), Path(name)) for line in commands(file)}
    print(json.dumps(outcomes))  # noqa: T201


if __name__ == "__main__":
    main()
