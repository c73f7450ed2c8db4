"""The probes on the host: right answers, wrong ones, and why there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu import ask

CPU = torch.device("cpu")


def test_a_copy_that_loses_its_source_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "FILLS", 20)
    assert ask.lost_copies(CPU, torch.clone) == 0
    sent: list[torch.Tensor] = []

    def late(host: torch.Tensor) -> torch.Tensor:
        sent.append(host.clone())
        return sent[-2] if len(sent) == 7 else sent[-1]

    assert ask.lost_copies(CPU, late) == 1


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
