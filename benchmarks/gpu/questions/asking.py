"""What a question is, and what several of them need. Importing it needs no torch."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_backends.errors import describe, one_line

if TYPE_CHECKING:
    import torch

    from mla_backends.api import Backend


MAX_MESSAGE_CHARS = 200  # characters of what a library raises


class NotHere(Exception):
    """The question cannot be answered on this machine; the text says why."""


@dataclass(frozen=True)
class Asked:
    """An answer in one sentence, and the numbers behind it. `wrong`: this project's own result is wrong."""

    answer: str
    evidence: Mapping[str, object] = field(default_factory=dict)
    wrong: bool = False


@dataclass(frozen=True)
class Question:
    """A probe and what it asks."""

    text: str
    probe: Callable[[Backend], Asked]
    needs_cuda: bool


QUESTIONS: dict[str, Question] = {}


def question(
    name: str, text: str, *, needs_cuda: bool = False
) -> Callable[[Callable[[Backend], Asked]], Callable[[Backend], Asked]]:
    """Register a probe under a name."""

    def register(probe: Callable[[Backend], Asked]) -> Callable[[Backend], Asked]:
        QUESTIONS[name] = Question(text, probe, needs_cuda)
        return probe

    return register


def library(name: str) -> ModuleType:
    """Import a library. Raises `NotHere` if it is missing or broken."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotHere(f"not installed: {error.name}") from error
    except Exception as error:  # a broken extension module raises anything
        raise NotHere(f"{name} cannot be imported: {one_line(describe(error))}") from error


def raised(call: Callable[[], object]) -> str:
    """Return what a call raised, in one line; "" if it returned."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  # that is the question
        said = one_line(describe(error))
        return said if len(said) <= MAX_MESSAGE_CHARS else f"{said[:MAX_MESSAGE_CHARS]}…"
    return ""


def device_module(backend: Backend) -> Any:
    """Return torch's module for the device, such as torch.cuda. Raises `NotHere` for the host."""
    import torch

    assert backend.device is not None
    kind = backend.device.type
    module = getattr(torch, kind, None)
    if kind == "cpu" or module is None or not hasattr(module, "Event"):
        raise NotHere(f"needs a device with events of its own, such as CUDA; {kind} has none")
    return module


def microseconds(backend: Backend, call: Callable[[], object], calls: int = 50, rounds: int = 7) -> float:
    """Return the host's microseconds per call, synchronization included; the median of several rounds."""
    timer = backend.timer()
    call()
    times = []
    for _ in range(rounds):
        timer.start()
        for _ in range(calls):
            call()
        times.append(timer.stop() * 1e3 / calls)
    return round(statistics.median(times), 2)


def worst(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest relative error of a row, the last dimension being its channels; NaN is infinite."""
    exact = exact.double()
    error = (got.double().cpu() - exact.cpu()).norm(dim=-1) / exact.cpu().norm(dim=-1).clamp_min(1e-30)
    largest = float(error.max())
    return math.inf if math.isnan(largest) else largest
