#!/usr/bin/env python3
"""Ask one open question of a device, and print the answer as one line of JSON.

\b
    python benchmarks/gpu/ask.py l2-flush --backend nvidia
    python benchmarks/gpu/ask.py --list

stdout: {"question": ..., "answer": ..., "evidence": {...}}. Exit codes: 0 answered, 2 usage, 3 it cannot be
answered here (the answer says why), 4 the answer is a wrong result of this project, 1 the probe raised.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[2]))

import click
import msgspec

from mla.command import console
from mla.command.exit_codes import Exit, guarded, place
from mla.errors import UsageError, did_you_mean
from mla_backends.errors import BackendError, describe, one_line

if TYPE_CHECKING:
    import torch

    from mla_backends.api import Backend

BUSY = 2048  # width of the product that keeps the device busy for longer than a launch takes
FILLS, NUMBERS = 10_000, 2048


class NotHere(Exception):
    """The question cannot be answered on this machine; the text says why."""


class Asked(NamedTuple):
    """An answer in one sentence, and the numbers behind it. `wrong`: this project's own result is wrong."""

    answer: str
    evidence: dict[str, object]
    wrong: bool = False


class Answer(msgspec.Struct, kw_only=True):
    """What a question prints as one line of JSON."""

    question: str
    answer: str
    evidence: dict[str, object] = {}


def device_module(backend: Backend) -> Any:
    """Return torch's module for the device, such as torch.cuda. Raises `NotHere` for the host."""
    import torch

    assert backend.device is not None
    kind = backend.device.type
    module = getattr(torch, kind, None)
    if kind == "cpu" or module is None or not hasattr(module, "Event"):
        raise NotHere(f"needs a device with events of its own, such as CUDA; {kind} has none")
    return module


def event_gap(backend: Backend) -> Asked:
    """How much idle time does the device clock count when an eager forward begins?"""
    import torch

    module = device_module(backend)
    number, large = torch.zeros(1, device=backend.device), torch.zeros(BUSY, BUSY, device=backend.device)

    def between(busy: bool) -> float:
        times = []
        for _ in range(21):
            first, last = (module.Event(enable_timing=True) for _ in range(2))
            backend.synchronize()
            if busy:
                large @ large
            first.record()
            number.add_(0)
            last.record()
            backend.synchronize()
            times.append(first.elapsed_time(last) * 1e3)
        return round(statistics.median(times), 2)

    between(True)
    idle, busy = between(False), between(True)
    return Asked(f"{idle - busy:.1f} us", {"on an idle stream us": idle, "behind other work us": busy})


def copies(backend: Backend) -> Asked:
    """Do our asynchronous copies arrive whole when their source is freed and used again at once?"""
    from mla_backends.upload import upload

    device_module(backend)
    device = backend.device
    assert device is not None
    lost = lost_copies(device, lambda host: upload(host, device))
    return Asked(f"{lost} of {FILLS} wrong", {"wrong": lost}, wrong=bool(lost))


def lost_copies(device: torch.device, send: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """Return how many tables arrived with other numbers than were sent."""
    import torch

    bad = torch.zeros((), dtype=torch.int64, device=device)
    for number in range(FILLS):
        host = torch.full((NUMBERS,), number, dtype=torch.int32)
        there = send(host)
        del host
        torch.full((NUMBERS,), -1, dtype=torch.int32)  # takes the freed memory
        bad += (there != number).any()
    return int(bad)


def l2_flush(backend: Backend) -> Asked:
    """Does the flush before a cold forward really empty the last-level cache?"""
    import torch

    from mla.bench.measure.passes import CacheFlush

    device_module(backend)
    timer = backend.device_timer()
    assert timer is not None
    flush, cache = CacheFlush(backend), backend.device_info().cache_bytes or 32 << 20
    data = torch.ones(cache // 4 // 4, device=backend.device)  # a quarter of the cache

    def read(flushed: bool) -> float:
        times = []
        for _ in range(15):
            data.sum()
            if flushed:
                flush()
            timer.start()
            data.sum()
            times.append(timer.stop() * 1e3)
        return round(statistics.median(times), 2)

    read(False)
    warm, cold = read(False), read(True)
    said = f"reading {data.nbytes >> 20} MiB takes {cold / warm:.2f} times as long after it"
    return Asked(said, {"warm us": warm, "after the flush us": cold, "flushed MiB": flush.bytes >> 20})


QUESTIONS: dict[str, Callable[[Backend], Asked]] = {
    "event-gap": event_gap,
    "copies-alive": copies,
    "l2-flush": l2_flush,
}


def answer(name: str, backend_name: str) -> tuple[Answer, int]:
    """Return the answer and the exit code."""
    from mla import load_backend

    question = text_of(name)
    try:
        asked = QUESTIONS[name](load_backend(backend_name))
    except (NotHere, BackendError) as reason:
        return Answer(question=question, answer=str(reason)), Exit.BACKEND
    except Exception as error:  # noqa: BLE001  # no probe foresaw it, so it is worth reporting
        said = f"it raised {one_line(describe(error))} ({place(error)})"
        return Answer(question=question, answer=said), Exit.REGRESSION
    code = Exit.WRONG if asked.wrong else Exit.OK
    return Answer(question=question, answer=asked.answer, evidence=asked.evidence), code


def text_of(name: str) -> str:
    """Return what a question asks."""
    return QUESTIONS[name].__doc__ or ""


@click.command(help=__doc__)
@click.argument("name", required=False)
@click.option("--backend", default="nvidia", show_default=True, help="Backend whose device is asked.")
@click.option("--list", "list_only", is_flag=True, help="List the questions, and stop.")
def ask(name: str | None, backend: str, list_only: bool) -> int:
    """Carry out the command line."""
    if list_only:
        console.out("".join(f"{each}: {text_of(each)}\n" for each in sorted(QUESTIONS)))
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
