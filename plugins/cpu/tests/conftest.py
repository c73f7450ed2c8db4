"""The compiled kernels, once per instruction set that this processor has, and with AMX emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import native_cases
import pytest
import torch

from mla_backend_cpu.instruction_sets import EMULATED
from mla_backend_cpu.library import Library, load


@pytest.fixture(scope="session", params=[*native_cases.levels_here(), EMULATED])
def kernels(request: pytest.FixtureRequest) -> Library:
    """Return the kernels of one level; every test that uses them runs at each."""
    return load(request.param)


@pytest.fixture
def no_level_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests about what is chosen when nobody names a level: the suite itself may run held to one."""
    monkeypatch.delenv("MLA_CPU_NATIVE", raising=False)


@pytest.fixture(scope="session")
def threads() -> Callable[[int], AbstractContextManager[None]]:
    """Return a context in which torch, and so the kernels, use another number of threads."""

    @contextmanager
    def use(count: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return use
