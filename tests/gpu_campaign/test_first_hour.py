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
SOURCES = f"""eval "$(sed -n '/^brought=(/,/^}}/p' {HERE}/first_hour.sh)"; sources"""  # its own function


def environment(work: Path) -> dict[str, str]:
    cpu = {"BACKEND": "cpu", "SMOKE": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **cpu, "WORK": str(work), "OUT": str(work / "out"), "PYTHON": sys.executable}


def sources(checkout: Path) -> bytes:
    return subprocess.run(["bash", "-c", SOURCES], cwd=checkout, capture_output=True, check=True).stdout


def run(work: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HERE / "first_hour.sh"), *words], cwd=work.parent, env=environment(work) | variables,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder as after the installation: wheels of this checkout, in this interpreter's own environment."""
    for folder in ("wheels", "venv"):
        (tmp_path / folder / "bin").mkdir(parents=True)
        (tmp_path / folder / "sources").write_bytes(sources(ROOT))
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def test_results_are_two_files_with_which_another_machine_goes_on(work: Path) -> None:
    first = run(work, "conformance")
    assert first.returncode == 0, first.stderr
    assert "conformance 1/1 device: ok (" in first.stderr
    assert "14 steps are left: compile tiles, compile other-ops, facts " in first.stderr
    out = work / "out"
    assert {path.name for path in out.iterdir()} == {"results.tgz", "table.md"}
    with tarfile.open(out / "results.tgz") as archive:
        assert {"results/campaign.json", "results/table.md"} <= set(archive.getnames())
    shutil.rmtree(work / "results")
    (out / "results.tgz").rename(work / "results.tgz")
    second = run(work, "compile", "conformance", WORK=work.name, OUT=f"{work.name}/out")
    assert second.returncode == 0, second.stderr
    assert "conformance 1/1 device: ok (kept)" in second.stderr
    assert "compile 2/2 other-ops: ok (" in second.stderr
    assert "compile 1/2 tiles: refused" in second.stderr
    assert "kernels are interpreted: there is nothing to compile." in second.stderr


def test_what_is_done_is_brought_home_when_the_command_is_ended(work: Path) -> None:
    """Only the script gets the signal, as from a machine that ends what it started."""
    command = [str(HERE / "first_hour.sh"), "conformance"]
    with subprocess.Popen(command, env=environment(work), stderr=subprocess.PIPE, text=True) as script:
        assert script.stderr is not None
        said = [next(line for line in script.stderr if "at most" in line)]
        script.terminate()
        said += script.stderr
    assert script.returncode == 143, said
    with tarfile.open(work / "out" / "results.tgz") as archive:
        assert "results/campaign.json" in archive.getnames()
    assert "interrupted" in (work / "out" / "table.md").read_text()
    assert any(" steps are left: " in line and "conformance device" in line for line in said)
    assert f"what is to be taken away is in {work}/out\n" in said


@pytest.mark.parametrize("limit", ["150", "-600", "ten", "0600"])
def test_a_limit_without_room_for_a_step_is_refused(tmp_path: Path, limit: str) -> None:
    done = run(tmp_path, "facts", LIMIT=limit)
    assert done.returncode == 2
    assert done.stderr == f"error: LIMIT must be 240 to 99999 seconds, got '{limit}'.\n"


def test_wheels_are_known_by_all_that_goes_into_them(tmp_path: Path) -> None:
    files = [
        "mla/bench/workload/standard.toml", "backends/mla_backends/py.typed", "plugins/nvidia/pyproject.toml",
        "plugins/nvidia/mla_backend_nvidia/tuning/card.json", "backends/pyproject.toml", "pyproject.toml",
    ]  # fmt: skip
    found = set()
    for change in ["", *files]:
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"changed: {name == change}")
        found.add(sources(tmp_path))
    assert len(found) == 1 + len(files)
    (tmp_path / "mla" / "__pycache__").mkdir()
    (tmp_path / "mla" / "__pycache__" / "x.pyc").write_text("x")
    assert sources(tmp_path) in found
    (tmp_path / files[0]).rename(tmp_path / "mla" / "other.toml")
    assert sources(tmp_path) not in found


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
