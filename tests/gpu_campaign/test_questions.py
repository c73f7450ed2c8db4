"""The probes on the host: right answers, wrong ones, and why there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import ask

CPU = torch.device("cpu")


class Timer:
    """A clock that takes a millisecond per round."""

    def start(self) -> None: ...

    def stop(self) -> float:
        return 1.0


def test_a_copy_that_loses_its_source_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "FILLS", 20)
    assert ask.lost_copies(CPU, torch.clone) == 0
    sent: list[torch.Tensor] = []

    def late(host: torch.Tensor) -> torch.Tensor:
        sent.append(host.clone())
        return sent[-2] if len(sent) == 7 else sent[-1]

    assert ask.lost_copies(CPU, late) == 1


def test_launches_are_divided_by_their_number() -> None:
    def launch(graph: Any) -> ask.Asked:
        backend: Any = SimpleNamespace(device=CPU, timer=Timer, graph=graph)
        return ask.launch(backend)

    answer = launch(lambda call: call)
    assert answer.evidence["add of one element us"] == 20.0  # a round of 50 takes a millisecond
    assert answer.evidence["add as a node of a graph us"] == 2.0  # five replays of a hundred
    assert launch(lambda call: None).answer.endswith("this stack has no graphs")
    assert launch(lambda call: 1 / 0).answer.endswith("in a graph: ZeroDivisionError: division by zero")


@pytest.mark.parametrize("name", ["copies-alive", "event-gap", "l2-flush"])
def test_the_host_is_answered_truthfully(name: str) -> None:
    answer, code = ask.answer(name, "cpu")
    assert (code, answer.question) == (3, ask.text_of(name))
    assert answer.answer.startswith("needs a device with events of its own")


def test_a_probe_that_raises_is_no_missing_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(opened: Any) -> Any:
        raise IndexError("off by one")

    monkeypatch.setitem(ask.QUESTIONS, "broken", broken)
    answer, code = ask.answer("broken", "cpu")
    assert code == 1
    assert answer.answer.startswith("it raised IndexError: off by one")
