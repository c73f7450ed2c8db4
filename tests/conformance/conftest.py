"""Backends for the suite to judge: right ones with their own ops, or one that a test makes wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from judged import judged
from right_ops import RIGHT_OPS
from smaller_cases import make_nearer, make_smaller
from sound_backend import Allocated, Asynchronous, Sound

from mla.conformance.report import CheckResult
from mla_backends import FusedOp

Run = Callable[..., list[CheckResult]]


@pytest.fixture(scope="session")
def sound() -> type[Sound]:
    """Return the class of a backend that passes; keyword `ops` gives it ops."""
    return Sound


@pytest.fixture(scope="session")
def right_ops() -> dict[str, FusedOp]:
    """Return an op of each kind that is written in another way than the reference, and right."""
    return {op.__name__.lower(): op() for op in RIGHT_OPS}


@pytest.fixture(autouse=True)
def nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the memory of caches beyond 32 bits, which some ops copy."""
    make_nearer(monkeypatch)


@pytest.fixture
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time of large cases, for slow ops."""
    make_smaller(monkeypatch)


@pytest.fixture(scope="session")
def judge() -> Run:
    """Return a function that runs checks of a backend, by default in fp32."""
    return functools.partial(judged, dtypes=(torch.float32,))


@pytest.fixture
def asynchronous() -> Iterator[type[Asynchronous]]:
    """Give the CPU a queue for one test."""
    with Asynchronous():
        yield Asynchronous


@pytest.fixture
def allocated() -> Iterator[None]:
    """Count what is allocated during one test."""
    Allocated.bytes = 0
    with Allocated():
        yield
    Allocated.bytes = None
