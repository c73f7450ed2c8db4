"""What Triton needs at run time: every lack is found on a real machine's files, and named with its cure."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from mla_backends.triton_ops import launcher as requirements
from mla_backends.triton_ops.launcher import cache_folder, missing


@pytest.fixture(autouse=True)
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give Triton all it needs: a package, a compiler, headers and a cache folder; return where they are."""
    for name in (*requirements.VARIABLES, "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "site" / "triton").mkdir(parents=True)
    (tmp_path / "site" / "triton" / "__init__.py").write_text("raise ImportError('nobody may import this')")
    headers = tmp_path / "include"
    headers.mkdir()
    (headers / "Python.h").touch()
    program(tmp_path / "bin" / "gcc")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(headers)})
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def program(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_nothing_is_missing_and_nothing_is_made(complete: Path) -> None:
    before = sorted(complete.rglob("*"))
    assert missing() == []
    assert sorted(complete.rglob("*")) == before
    assert cache_folder() == complete / ".triton" / "cache"


def test_without_triton_its_source_is_named(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that happens to have its name is not Triton."""
    (complete / "site" / "triton" / "__init__.py").unlink()
    for required, cure in (
        (None, "this torch asks for none"),
        (["sympy", 'triton == 3.8.0 ; sys_platform == "linux"'], "pip install triton==3.8.0"),
        (["pytorch-triton-rocm==3.1.0"], "pip install pytorch-triton-rocm==3.1.0"),
    ):
        monkeypatch.setattr("importlib.metadata.requires", lambda name, listed=required: listed)
        (reason,) = missing()
        assert reason.startswith("triton is not installed: ")
        assert reason.endswith(cure)


def gone(complete: Path, patch: pytest.MonkeyPatch) -> None:
    (complete / "bin" / "gcc").unlink()


def not_executable(complete: Path, patch: pytest.MonkeyPatch) -> None:
    (complete / "bin" / "gcc").chmod(0o644)


def no_headers(complete: Path, patch: pytest.MonkeyPatch) -> None:
    (complete / "include" / "Python.h").unlink()


def home_is_a_file(complete: Path, patch: pytest.MonkeyPatch) -> None:
    (complete / "passwd").touch()
    patch.setenv("HOME", str(complete / "passwd"))


def chosen(name: str, value: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def break_it(complete: Path, patch: pytest.MonkeyPatch) -> None:
        (complete / "file").touch()
        patch.setenv(name, value.format(complete))

    return break_it


LACKS: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], None], str]] = {
    "no compiler": (gone, "Triton finds no C compiler: install gcc or clang, or name one in CC"),
    "a compiler that cannot run": (not_executable, "Triton finds no C compiler: "),
    "CC": (chosen("CC", "icx"), "Triton compiles with CC, but 'icx' is not a program: unset it, or "),
    "CC with options": (chosen("CC", "gcc -m64"), "Triton compiles with CC, but 'gcc -m64' is not a program"),
    "an empty CC": (chosen("CC", ""), "Triton compiles with CC, but '' is not a program"),
    "headers": (no_headers, "Triton compiles against Python, and {0}/include has no Python.h: install the "),
    "HOME": (
        home_is_a_file,
        "Triton cannot write its cache to {0}/passwd/.triton/cache: set TRITON_CACHE_DIR ",
    ),
    "TRITON_HOME": (
        chosen("TRITON_HOME", "{0}/file"),
        "Triton cannot write its cache to {0}/file/.triton/cache",
    ),
    "TRITON_CACHE_DIR": (
        chosen("TRITON_CACHE_DIR", "{0}/file/a"),
        "Triton cannot write its cache to {0}/file/a",
    ),
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_lack_is_named_with_its_cure(lack: str, complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, sentence = LACKS[lack]
    break_it(complete, monkeypatch)
    (reason,) = missing()
    assert reason.startswith(sentence.format(complete))


def test_what_stands_in_for_a_default_is_enough(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for break_it in (gone, no_headers, home_is_a_file):
        break_it(complete, monkeypatch)
    program(complete / "tools" / "clang")
    (complete / "headers").mkdir()
    (complete / "headers" / "Python.h").touch()
    monkeypatch.setenv("CC", str(complete / "tools" / "clang"))
    monkeypatch.setenv("CPATH", f"/nowhere{os.pathsep}{complete / 'headers'}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(complete / "scratch" / "deep"))
    assert missing() == []


def test_the_interpreter_compiles_nothing(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for break_it in (gone, no_headers, home_is_a_file):
        break_it(complete, monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert missing() == []
