"""`pip install mla-backend-NAME` in a fresh environment, from a folder of our wheels, then one command."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import write_tiny_run

from mla_backends.known import KNOWN

VENDORS = [name for name in KNOWN if "PyPI" not in KNOWN[name].torch_source]
OURS = ("mla", "_editable_impl_mla", "__editable__")
TORCH = ("torch", "triton", "functorch", "transformers")


def elsewhere(folder: Path, *unwanted: str) -> Path:
    """Link what is installed here, but for some, into a folder that stands for an index of third parties."""
    folder.mkdir()
    for place in map(Path, sys.path):
        if place.name not in ("site-packages", "dist-packages"):
            continue
        for entry in place.iterdir():
            link = folder / entry.name
            if not entry.name.startswith(unwanted) and entry.suffix != ".pth" and not link.is_symlink():
                link.symlink_to(entry)
    return folder


class Fresh:
    """An environment with third parties in it, and nothing of ours."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "env", symlinks=True)
        self._python = folder / "env" / "bin" / "python"
        (self.site,) = (folder / "env" / "lib").glob("python*/site-packages")
        self._folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        self._environment = {**kept, "PIP_CONFIG_FILE": os.devnull, "MLA_CACHE_DIR": str(folder / "cache")}

    def add(self, name: str, *unwanted: str) -> None:
        packages = elsewhere(self._folder / name, *unwanted)
        (self.site / f"{name}.pth").write_text(f"{packages}\n")

    def run(self, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
        words, environment = list(map(str, command)), {**self._environment, **variables}
        return subprocess.run(
            words, cwd=self._folder, env=environment, capture_output=True, text=True, check=False
        )

    def pip_install(self, *words: object) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self._python, "--disable-pip-version-check")
        done = self.run(*pip, "install", *words)
        assert done.returncode == 0, done.stdout + done.stderr

    def bench(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(self._python, "-m", "mla.bench", *words, **variables)

    def installed(self) -> set[str]:
        return {distribution.name for distribution in importlib.metadata.distributions(path=[str(self.site)])}


@pytest.fixture
def fresh(tmp_path: Path) -> Fresh:
    return Fresh(tmp_path)


@pytest.fixture
def install(fresh: Fresh, dist: Path) -> Callable[[str], None]:
    """Return a function that installs a plugin next to those before, and nothing else of ours.

    The first brings the runner and the contract as well.
    """

    def install(backend: str) -> None:
        before = fresh.installed()
        fresh.pip_install("--no-index", "--find-links", dist, KNOWN[backend].distribution)
        expected = {KNOWN[backend].distribution} | (set() if before else {"mla-bench", "mla-backends"})
        assert fresh.installed() - before == expected

    return install


def test_a_vendors_machine(fresh: Fresh, install: Callable[[str], None]) -> None:
    """pip sees no torch here, and must not ask for one: it would get it from an index that has another."""
    fresh.add("light", *OURS, *TORCH)
    for backend in VENDORS:
        install(backend)
        without = fresh.bench("--backend", backend)
        assert (without.returncode, without.stdout) == (3, "")
        assert f"backend '{backend}'" in without.stderr
        assert "torch" in without.stderr
        assert len(without.stderr.splitlines()) == 1
    listed = fresh.bench("list").stdout
    assert "run `pip install . ./backends ./plugins/cpu` in a checkout (once released, `pip" in listed


def test_a_machine_with_torch(fresh: Fresh, install: Callable[[str], None], tmp_path: Path) -> None:
    """The CPU runs. NVIDIA's plugin, asked for by name, uses no other device instead of a missing one."""
    fresh.add("everything", *OURS)
    install("cpu")
    options = [*write_tiny_run(tmp_path), "--scenario", "decode", "--cache", "warm", "--mode", "eager"]
    done = fresh.bench("--backend", "cpu", *options)
    assert done.returncode in (0, 6), done.stderr  # 6: a doubtful time, on a busy machine
    assert "Decode Throughput: " in done.stdout
    install("nvidia")
    done = fresh.bench("--backend", "nvidia", CUDA_VISIBLE_DEVICES="")  # this machine may have a card
    assert (done.returncode, done.stdout) == (3, "")
    assert "backend 'nvidia' has no usable device: " in done.stderr
