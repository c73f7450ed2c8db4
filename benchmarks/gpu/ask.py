#!/usr/bin/env python3
"""Ask one open question of a device, and print the answer as one line of JSON.

\b
    python benchmarks/gpu/ask.py launch --backend nvidia
    python benchmarks/gpu/ask.py --list

stdout: {"question": ..., "answer": ..., "evidence": {...}}. Exit codes: 0 answered, 2 usage, 3 it cannot be
answered here (the answer says why), 4 the answer is a wrong result of this project, 1 the probe raised.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import click
import msgspec

from benchmarks.gpu.questions.asking import QUESTIONS, NotHere
from mla.command import console
from mla.command.exit_codes import Exit, guarded, place
from mla.errors import UsageError, did_you_mean
from mla_backends.errors import BackendError, describe, one_line

FAMILIES = ("attention", "copies", "device", "flashinfer", "launches", "libraries")


class Answer(msgspec.Struct, kw_only=True):
    """What a question prints as one line of JSON."""

    question: str
    answer: str
    evidence: dict[str, object] = {}


def load() -> None:
    """Import every family, whose questions register themselves. None imports torch."""
    for family in FAMILIES:
        importlib.import_module(f"benchmarks.gpu.questions.{family}")


def answer(name: str, backend_name: str) -> tuple[Answer, int]:
    """Return the answer and the exit code."""
    from mla import load_backend

    question = QUESTIONS[name]
    try:
        if question.needs_cuda and backend_name != "nvidia":
            raise NotHere(f"needs CUDA: it is about NVIDIA's devices, not those of {backend_name}")
        backend = load_backend(backend_name)
        asked = question.probe(backend)
    except (NotHere, BackendError) as reason:
        return Answer(question=question.text, answer=str(reason)), Exit.BACKEND
    except Exception as error:  # noqa: BLE001  # no probe foresaw it, so it is worth reporting
        said = f"it raised {one_line(describe(error))} ({place(error)})"
        return Answer(question=question.text, answer=said), Exit.REGRESSION
    code = Exit.WRONG if asked.wrong else Exit.OK
    return Answer(question=question.text, answer=asked.answer, evidence=dict(asked.evidence)), code


@click.command(help=__doc__)
@click.argument("name", required=False)
@click.option("--backend", default="nvidia", show_default=True, help="Backend whose device is asked.")
@click.option("--list", "list_only", is_flag=True, help="List the questions, and stop.")
def ask(name: str | None, backend: str, list_only: bool) -> int:
    """Carry out the command line."""
    load()
    if list_only:
        console.out("".join(f"{each}: {QUESTIONS[each].text}\n" for each in sorted(QUESTIONS)))
        return Exit.OK
    if name not in QUESTIONS:
        known = sorted(QUESTIONS)
        raise UsageError(f"there is no question '{name}'.{did_you_mean(str(name), known)} --list shows all.")
    warnings.simplefilter("always")
    said, code = answer(name, backend)
    console.out(msgspec.json.encode(said, enc_hook=str).decode() + "\n")
    return code


if __name__ == "__main__":
    sys.exit(guarded(lambda: ask(standalone_mode=False)))
