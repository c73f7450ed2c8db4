"""The suite as a pytest class, used as a plugin's author would use it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from smaller_cases import make_smaller

import mla
import mla_backends
from mla.conformance import BackendConformance
from mla.conformance.registry import all_checks
from mla.conformance.selection import Xfails
from mla_backends import Backend

OUTSIDE = r"""
import pytest
import torch
from mla.conformance import BackendConformance
from mla.reference import REFERENCE
from mla_backends.testing import HostBackend

class NoBias(type(REFERENCE["linear"])):
    def __call__(self, packed, *, x, bias, out):
        super().__call__(packed, x=x, bias=None, out=out)

class Mine(HostBackend):
    name = "mine"

    def dtypes(self):
        return (torch.float32,)

@pytest.fixture(scope="module")
def backend():
    return Mine(ops={"nobias": NoBias()})

class TestMine(BackendConformance):
    pass

class TestExpected(BackendConformance):
    @pytest.fixture
    def xfails(self, tmp_path):
        path = tmp_path / "known.txt"
        path.write_text("linear.grid[nobias-float32]: no bias before SDK 4.3\nlinear.pack: wrong\n")
        return path

class TestUndrawn(BackendConformance):
    draws = 0

class TestMisspelt(BackendConformance):
    @pytest.fixture
    def xfails(self):
        return {"linear.gird": "no such check"}
"""


@pytest.fixture(scope="module", autouse=True)
def _smaller() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patches:
        make_smaller(patches)
        yield


@pytest.fixture(scope="module")
def backend(sound: Any, right_ops: Any) -> Backend:
    made: Backend = type("Fp32Only", (sound,), {"dtypes": lambda self: (torch.float32,)})(ops=right_ops)
    return made


class TestPlain(BackendConformance):
    """The class itself, on a backend that offers everything."""

    draws = 3


def test_every_check_is_one_test() -> None:
    (mark,) = vars(BackendConformance)["test_conformance"].pytestmark
    assert list(mark.args[1]) == [check.id for check in all_checks()]


def test_an_author_sees_which_check_failed_and_why(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(OUTSIDE)
    folders = {str(Path(str(package.__file__)).parents[1]) for package in (mla, mla_backends)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sorted(folders))}
    flags = ["-q", "-rA", "-p", "no:cacheprovider", "-W", "error"]
    chosen = "linear.grid and not batched or linear.pack or device.graph or linear.drawn or rms_norm.drawn"
    command = [sys.executable, "-m", "pytest", *flags, "-k", chosen]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout + done.stderr

    def outcome(test: str) -> str:
        (line,) = [line for line in lines if re.search(rf"^[A-Z]+ .*{re.escape(test)}", line)]
        return line.partition(" ")[0]

    assert outcome("TestMine::test_conformance[linear.grid]") == "FAILED"
    assert "linear.grid[nobias-float32]: 4 wrong" in done.stdout
    assert "`linear.grid[nobias-float32]#2`: 256 tokens, 256 to 128, biased: out: " in done.stdout
    assert outcome("TestMine::test_conformance[linear.pack]") == "PASSED"
    assert "the backend offers no graphs" in done.stdout
    assert outcome("TestMine::test_conformance[linear.drawn]") == "FAILED", "a bias is drawn"
    assert outcome("TestMine::test_conformance[rms_norm.drawn]") == "PASSED", "few draws, all right"
    assert outcome("TestUndrawn::test_conformance[linear.grid]") == "FAILED"
    assert "no cases were to be drawn" in done.stdout
    assert "TestUndrawn::test_conformance[linear.drawn]" not in done.stdout, "it is skipped"
    assert outcome("TestExpected::test_conformance[linear.grid]") == "XFAIL"
    assert outcome("TestExpected::test_conformance[linear.pack]") == "FAILED"
    assert "expected to fail, but passed" in done.stdout
    assert outcome("TestMisspelt::test_conformance[linear.grid]") == "ERROR"
    assert "unknown check 'linear.gird'. Did you mean 'linear.grid'?" in done.stdout


def test_without_hypothesis_the_backend_is_not_to_blame(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    suite = BackendConformance()
    suite.test_conformance("rms_norm.formula", backend, Xfails())
    with pytest.raises(pytest.fail.Exception, match="the suite needs hypothesis to draw cases"):
        suite.test_conformance("rms_norm.drawn", backend, Xfails())
