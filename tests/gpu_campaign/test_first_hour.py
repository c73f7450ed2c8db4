"""The first hour as commands: what is refused, what is taken away, and how another machine goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu.sizes import HERE

ROOT = HERE.parents[1]
SOURCES = (
    "find mla backends plugins/nvidia -name '*.py' -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum"
)


def run(work: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    cpu = {"BACKEND": "cpu", "SMOKE": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **cpu, "WORK": str(work), "OUT": str(work / "out"), "PYTHON": sys.executable}
    return subprocess.run(
        [str(HERE / "first_hour.sh"), *words], cwd=HERE, env=environment | variables,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder as after the installation: wheels of this checkout, in this interpreter's own environment."""
    sources = subprocess.run(["bash", "-c", SOURCES], cwd=ROOT, capture_output=True, check=True).stdout
    for folder in ("wheels", "venv"):
        (tmp_path / folder / "bin").mkdir(parents=True)
        (tmp_path / folder / "sources").write_bytes(sources)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def test_results_are_three_files_with_which_another_machine_goes_on(work: Path) -> None:
    first = run(work, "conformance")
    assert first.returncode == 0, first.stderr
    assert "conformance 1/1 device: ok (" in first.stderr
    assert "0 steps are left, after " in first.stderr
    out = work / "out"
    assert {path.name for path in out.iterdir()} == {"first_hour.tgz", "table.md", "traces.tgz"}
    with tarfile.open(out / "first_hour.tgz") as archive:
        assert "results/campaign.json" in archive.getnames()
    shutil.rmtree(work / "results")
    (out / "first_hour.tgz").rename(work / "first_hour.tgz")
    second = run(work, "compile", "conformance")
    assert second.returncode == 0, second.stderr
    assert "conformance 1/1 device: ok (kept)" in second.stderr
    assert "compile 1/1 tiles: refused" in second.stderr
    assert "kernels are interpreted: there is nothing to compile." in second.stderr


def test_what_no_time_is_left_for_is_counted(work: Path) -> None:
    done = run(work, "facts", "conformance", LIMIT="64")  # a minute is for what is around the steps
    assert "2 steps are left, after " in done.stderr
    assert done.returncode == 5, done.stderr


def test_wheels_of_another_checkout_are_refused(work: Path, tmp_path: Path) -> None:
    (work / "wheels" / "sources").write_text("another\n")
    done = run(work, "facts")
    assert done.returncode == 2
    assert done.stderr == f"error: {work}/wheels is not of this checkout: run 'first_hour.sh pack'.\n"
    shutil.rmtree(work / "wheels")
    assert run(work).returncode == 2


def test_help_and_wrong_words(work: Path) -> None:
    done = run(work, "--help")
    assert done.returncode == 0
    assert "first_hour.sh pack" in done.stdout
    for word, said in (("--lst", "there is no option '--lst'"), ("fatcs", "Did you mean 'facts'?")):
        wrong = run(work, word)
        assert wrong.returncode == 2
        assert said in wrong.stderr
