"""Clocks, power and temperature of a device, for the result file; reading them can never break a run.

A `Sampler` may raise, and a driver may hang: `Monitor` asks it in a separate thread, for a bounded time, and
turns every failure into one line of text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from mla_backends.errors import describe

PATIENCE = 3.0  # seconds that a management library may take to answer


class Sampler(Protocol):
    """What a vendor's management library knows about one device. Both methods may raise anything."""

    def facts(self) -> Mapping[str, str]:
        """Return what does not change: the driver's version."""
        ...

    def sample(self) -> Mapping[str, str]:
        """Return what changes: clocks, power, temperature, each with its unit in the key."""
        ...


class Monitor:
    """A sampler that cannot break a run. After the first failure it is never asked again."""

    def __init__(self, sampler: Sampler, patience: float = PATIENCE) -> None:
        self._sampler = sampler
        self._patience = patience
        self._problem = ""
        self._facts: dict[str, str] | None = None

    def facts(self) -> dict[str, str]:
        """Return what does not change, or why it is unknown, as {"monitor": reason}."""
        if self._facts is None:
            self._facts = self._ask(lambda: self._sampler.facts())
        return {**self._facts, **({"monitor": f"none ({self._problem})"} if self._problem else {})}

    def sample(self) -> dict[str, str]:
        """Return what changes; empty if the library reports nothing."""
        return self._ask(lambda: self._sampler.sample())

    def _ask(self, question: Callable[[], Mapping[str, str]]) -> dict[str, str]:
        if self._problem:
            return {}
        answers: list[Mapping[str, str]] = []
        problems: list[str] = []

        def work() -> None:
            try:
                answers.append({str(key): str(value) for key, value in question().items()})
            except BaseException as error:  # noqa: BLE001  # a library's SystemExit must not end the thread's run
                problems.append(describe(error))

        # A daemon, because a call into a hanging driver cannot be stopped.
        thread = threading.Thread(target=work, name="mla-monitor", daemon=True)
        thread.start()
        thread.join(self._patience)
        if not answers:
            self._problem = problems[0] if problems else f"no answer within {self._patience:g} s"
            return {}
        return dict(answers[0])
