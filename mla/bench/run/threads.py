"""Torch's host threads, which a plugin's code may change: implementations must run on equally many."""

from __future__ import annotations

import torch

from mla.command.console import note


class Threads:
    """Keeps torch at `count` host threads, and says once per scenario that code of a backend changes them."""

    def __init__(self, count: int, scenario: str, backend: str) -> None:
        self._count, self._scenario, self._backend = count, scenario, backend
        self._said = False

    def look(self) -> None:
        """Say that the number has changed, if it has."""
        now = torch.get_num_threads()
        if now != self._count and not self._said:
            self._said = True
            note(
                f"{self._scenario}: torch had {self._count} host threads before it and has {now} after it: "
                f"code of backend '{self._backend}' changes them, so not all ran on as many"
            )

    def restore(self) -> None:
        """Set the number that the run was opened with, if it has changed."""
        self.look()
        if torch.get_num_threads() != self._count:
            torch.set_num_threads(self._count)
