"""A backend that aborts or hangs while it is loaded is named by the command that loads it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mla.command.last_words import while_loading


@pytest.mark.parametrize(("code", "ended"), [("os.abort()", -signal.SIGABRT), ("os._exit(0)", 0)])
def test_a_backend_that_ends_the_process_is_named(tmp_path: Path, code: str, ended: int) -> None:
    (tmp_path / "abrupt.py").write_text(f"import os\n{code}\n")
    words = ["-m", "mla.bench", "--backend", "abrupt:it", "--list-ops"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == ended
    assert done.stdout == ""
    assert done.stderr == (
        "error: the process ended while backend 'abrupt:it' was loaded and set up; "
        "`python -m mla.bench doctor abrupt:it` finds out where\n"
    )


def test_a_backend_that_takes_long_is_named_while_it_does(capfd: pytest.CaptureFixture[str]) -> None:
    said = ""
    with while_loading("slow", patience=0.01):
        while not said:
            said = capfd.readouterr().err
    assert said.startswith("backend 'slow' has not been loaded and set up within 0.01 s; ")
    assert capfd.readouterr().err == ""


def test_a_backend_that_loads_or_raises_leaves_no_word(capfd: pytest.CaptureFixture[str]) -> None:
    with while_loading("right"):
        pass
    with pytest.raises(ValueError, match="why"), while_loading("wrong"):
        raise ValueError("why")
    assert capfd.readouterr().err == ""


ABORTING = """
import os
from mla_backends import FusedOp
from mla_backends.testing import HostBackend

class Op(FusedOp):
    contract = "linear/1"
    def __call__(self, *args, **tensors): os.abort()

class Aborting(HostBackend):
    name = "aborting"
    def __init__(self, options=None):
        super().__init__(options, ops={"op": Op()})
"""


def test_a_backend_that_ends_the_process_in_a_forward_is_named(tmp_path: Path) -> None:
    (tmp_path / "aborting.py").write_text(ABORTING)
    options = ["--op", "o_proj", "--implementations", "mla", "--dtype", "float32", "--batch", "1"]
    words = ["-m", "mla.bench", "--backend", "aborting:Aborting", *options]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, "")
    assert "error: the process ended while backend 'aborting' ran: " in done.stderr
    assert "was loaded" not in done.stderr


def test_a_process_that_ends_on_purpose_leaves_no_word(tmp_path: Path) -> None:
    code = (
        "import os\nfrom mla.command.last_words import dismiss, while_running\n"
        "with while_running('x'):\n    dismiss()\n    os._exit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")
