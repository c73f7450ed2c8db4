"""Processes whose torch can get a device that no plugin knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import Outcome, run_python
from tiny_run import write_tiny_run
from torch.utils import backend_registration

HERE = Path(__file__).parent
STACK = (HERE / "stack", HERE.parent / "emulation" / "device")
collect_ignore = ["stack", "inside"]


Acme = Callable[..., Outcome]


@pytest.fixture
def acme(tmp_path: Path) -> Acme:
    """Return a function that runs Python where `torch_acme` can be imported."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot take a device written in Python")

    def acme(*words: str, **environment: str) -> Outcome:
        done = run_python(*words, cwd=tmp_path, folders=STACK, **environment)
        assert "Traceback" not in done.out + done.err, done.err
        return done

    return acme


@pytest.fixture
def bench(acme: Acme, tmp_path: Path) -> Acme:
    """Return a function that runs the benchmark's command line on a tiny layer with the backend `torch`."""
    small = [*write_tiny_run(tmp_path), "--cache", "warm"]
    return lambda *words, **environment: acme(
        "-m", "mla.bench", "--backend", "torch", *small, *words, **environment
    )
