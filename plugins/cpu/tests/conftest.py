"""The compiled kernels, once per instruction set that this processor has, and with AMX emulated."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import native_builds
import native_cases
import pytest
import torch

from mla_backend_cpu import cache, compilation, library
from mla_backend_cpu.compilation import EMULATED, BuildError
from mla_backend_cpu.library import Library


def pytest_configure() -> None:
    """Keep kernels in a folder of this user that lasts, if HOME is of no use: compiling takes a while."""
    try:
        cache.prepare()
    except BuildError:
        fallback = Path(tempfile.gettempdir(), f"mla-tests-{os.geteuid()}")
        os.environ["MLA_CACHE_DIR"] = str(fallback)


@pytest.fixture(scope="session", params=[*native_cases.levels_here(), EMULATED])
def kernels(request: pytest.FixtureRequest) -> Library:
    """Return the kernels of one level; every test that uses them runs at each."""
    return native_cases.load(request.param)


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


Script = Callable[[str], Path]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return a function that puts a script before the real compiler, which then optimises nothing, for speed.

    It also makes an empty cache. The script runs for a compilation only, not when asked for the version.
    """
    real = shutil.which("g++")
    assert real, "these tests need g++"
    path = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("MLA_CACHE_DIR", str(tmp_path / "cache"))

    def write(script: str = "") -> Path:
        path.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*)\n:\n{script}\nesac\nexec {real} "$@" -O0\n')
        path.chmod(0o755)
        return path

    write()
    return write


@pytest.fixture
def small(compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder of sources that compile at once, which stand in for the kernels."""
    monkeypatch.setattr(compilation, "SOURCES", native_builds.small_sources(tmp_path / "sources"))
    return tmp_path / "sources"


@pytest.fixture(scope="session")
def pure(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder for PYTHONPATH where the package has no kernels."""
    return str(native_builds.copy_package(tmp_path_factory.mktemp("pure")))


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    """Forget what this process has loaded, before and after."""
    library.loaded.cache_clear()
    yield
    library.loaded.cache_clear()


@pytest.fixture
def public() -> Iterator[Path]:
    """Return a folder that other users can read; what pytest makes is for this one only."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
