"""The runner, called as a function or as a process, over really installed fakes and tiny shapes."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ceiling_cases import ceiling_run, measure_limits_quickly, quick_ceilings
from outcome import Outcome
from scripted_clock import script_the_clock
from small_flush import flush_little
from tiny_run import write_tiny_run

import mla
import mla_backends
from mla.bench import results
from mla.bench.cli.main import main
from mla.bench.results.cases import latency_of, throughput_of
from mla.bench.run import scheduler

__all__ = ["ceiling_run", "quick_ceilings"]


Bench = Callable[..., Outcome]
QUICK = str(Path(__file__).resolve().parents[1] / "support" / "quick")  # limits in no time


@pytest.fixture(autouse=True)
def _work_in_an_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _flush_little(monkeypatch: pytest.MonkeyPatch) -> None:
    flush_little(monkeypatch)


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Write a tiny config and workload, and return the options that choose them, without cold caches."""
    options = write_tiny_run(tmp_path, passes=6, prefill_runs=6, decode_runs=4, history=(5, 9))
    return [*options, "--cache", "warm"]


@pytest.fixture
def bench(
    install: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """Return a function that runs the command line in this process, which saves importing torch again.

    Nothing gives way for lack of time, however busy the machine is.
    """
    for name in ("TARGET_S", "MAX_S"):
        monkeypatch.setattr(scheduler, name, 1e6)

    def bench(*words: str, fakes: Sequence[str] = ()) -> Outcome:
        for fake in fakes:
            monkeypatch.syspath_prepend(install(fake))
        if "virtual_clock" in fakes:
            script_the_clock(monkeypatch)
        if "ceilings" not in words:
            measure_limits_quickly(monkeypatch)
        capsys.readouterr()
        code = main(list(words))
        return Outcome(code, *capsys.readouterr())

    return bench


@pytest.fixture
def process(install: Callable[[str], Path], tmp_path: Path) -> Bench:
    """Return a function that runs the command line in a process of its own and refuses tracebacks."""

    def process(
        *words: str,
        fakes: Sequence[str] = (),
        path: Sequence[Path] = (),
        flags: Sequence[str] = (),
        **environment: str,
    ) -> Outcome:
        folders = [*map(str, path), *(str(install(fake)) for fake in fakes), QUICK]
        if not flags:
            folders += filter(None, [os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, *flags, "-m", "mla.bench", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    return process


@pytest.fixture(scope="session")
def without_backends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything installed here except backends, for an interpreter started with -S."""
    farm = tmp_path_factory.mktemp("farm")
    for package in (mla, mla_backends):
        source = Path(str(package.__file__)).parent
        (farm / source.name).symlink_to(source)
    for folder in sys.path:
        if {"site-packages", "dist-packages"} & set(Path(folder).parts) and Path(folder).is_dir():
            for entry in Path(folder).iterdir():
                if not re.match(r"mla_backend_", entry.name) and not os.path.lexists(farm / entry.name):
                    (farm / entry.name).symlink_to(entry)
    return farm


@pytest.fixture
def isolated(process: Bench, without_backends: Path) -> Bench:
    """Return `process` where no backend is installed but the named fakes."""
    return functools.partial(process, path=[without_backends], flags=["-S"])


def numbers(samples: Sequence[float], steps: int, tokens: int) -> dict[str, Any]:
    """Return the fields of a case that follow from its samples."""
    passes = [list(samples[first : first + steps]) for first in range(0, len(samples), steps)]
    latency, rate = latency_of(passes), throughput_of(passes, tokens)
    return {"passes": len(passes), "latency_ms": latency, "tokens_per_s": rate}


@pytest.fixture(scope="session")
def make_run() -> Callable[..., results.Run]:
    """Return a maker of a run with one prefill case; keyword arguments replace fields of the case."""

    def make_run(samples: Sequence[float] = (2.0, 1.0, 3.0), **changes: Any) -> results.Run:
        fields: dict[str, Any] = {
            "scenario": "prefill",
            "mode": "prefill",
            "implementation": "mla",
            "query_lens": [3, 5],
            "history": [4, 0],
            "steps_per_pass": 1,
            "warmups": 1,
            "check": results.Check(status="ok", error_ratio=0.5, relative_error=1e-3),
            "plan_ms": 0.1,
            "switch_steps": [0],
            "cost": results.Cost(flops=10**9, bytes=10**6),
            "memory": results.Memory(weight_bytes=10, cache_bytes=20, peak_bytes=None),
            "ops": {"latent_attention": "reference"},
            "clock": "host",
            "repro": "python -m mla.bench --backend cpu",
            "base": "prefill",
            "dtype": "bfloat16",
        }
        fields |= numbers(samples, changes.get("steps_per_pass", 1), sum(fields["query_lens"])) | changes
        return results.Run(
            schema_version=results.SCHEMA_VERSION,
            argv=["bench"],
            created="2000-01-01T00:00:00+00:00",
            git_commit=None,
            backend=results.BackendFacts(
                name="cpu", version=None, device="a CPU", memory_bytes=None, cache_bytes=None
            ),
            environment={"torch": "2"},
            config={"hidden_size": 64},
            dtype="bfloat16",
            attention="auto",
            page_size=64,
            seed=0,
            cases=[results.Case(**fields)],
        )

    return make_run


@pytest.fixture(scope="session")
def case(make_run: Callable[..., results.Run]) -> Callable[..., results.Case]:
    """Return a maker of one case."""
    return lambda **changes: make_run(**changes).cases[0]
