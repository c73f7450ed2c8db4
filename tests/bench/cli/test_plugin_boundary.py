"""What a plugin's code raises or prints: never a result without a result, never text among the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from leaving_backend import Leaving

import mla.conformance.cli
from mla.bench.limits import microbench
from mla.command import console

Bench = Callable[..., Any]

LEAVING = ("--backend", "leaving_backend:Leaving", "--dtype", "float32")
# Where a run calls a plugin's code, and how the sentence names the place.
PLACES = {
    "init": "mla_backend(options) of module leaving_backend",
    "probe": "probe()",
    "setup": "setup(None)",
    "device_count": "device_count()",
    "device_info": "device_info() of backend 'leaving'",
    "dtypes": "dtypes() of backend 'leaving'",
    "device_timer": "device_timer() of backend 'leaving'",
    "memory": "memory() of backend 'leaving'",
    "environment": "environment() of backend 'leaving'",
    "sensors": "sensors() of backend 'leaving'",
    "synchronize": "synchronize() of backend 'leaving'",
    "remarks": "remarks() of backend 'leaving'",
    "ops": "ops() of backend 'leaving'",
    "unsupported_reasons": "op 'leaving_op'",
    "pack": "op 'leaving_op'",
    "call": "op 'leaving_op' of ",
}


OTHERS = [(place, said) for place in ("setup", "ops", "call") for said in ("GeneratorExit", "Odd: why")]
OTHERS += [("ops", "OSError: 2")]


@pytest.mark.parametrize(("place", "raised"), [*((place, "SystemExit: 0") for place in PLACES), *OTHERS])
def test_a_plugin_that_ends_the_process_is_named_and_is_no_success(
    bench: Bench, small: list[str], place: str, raised: str
) -> None:
    what = raised.partition(":")[0]
    options = ["-O", f"at={place}", "-O", f"raises={what}", "--passes", "1"]
    done = bench(*LEAVING, *small, *options)
    assert (done.code, done.out) == (3, "")
    assert raised in done.error
    assert PLACES[place] in done.error
    assert "Traceback" not in done.err


@pytest.mark.parametrize("what", ["BackendError", "SystemExit", "OSError"])
@pytest.mark.parametrize("alone", [(), ("--op", "kv_b_proj")], ids=["layer", "op"])
def test_what_packing_raises_is_named_by_the_op(
    bench: Bench, small: list[str], what: str, alone: tuple[str, ...]
) -> None:
    where = [*small[:2], *alone] if alone else [*small, "--scenario", "decode"]
    options = ["-O", "at=pack", "-O", f"raises={what}", "--implementations", "mla"]
    done = bench(*LEAVING, *where, *options)
    assert done.code == 3
    assert "op 'leaving_op'" in done.error
    assert ("10 rows or more" if what == "BackendError" else what) in done.error


@pytest.mark.parametrize("place", ["pack", "call"])
@pytest.mark.parametrize("what", ["SystemExit", "OSError"])
def test_an_op_that_fails_as_a_limit_is_named_and_costs_no_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str, what: str
) -> None:
    monkeypatch.setattr(console, "_noted", set())
    backend = Leaving({"at": place, "raises": what})
    measured = microbench.Microbenchmark(backend, torch.device("cpu"), torch.float32)
    for _ in range(2):
        assert "torch.mm" in measured.product(8, 64, 32).source
    said = capsys.readouterr().err
    work = "multiplying 8 x 64 x 32 float32"
    assert said.startswith(f"leaving_op failed when {work}, and is left out of the limits: {what}")
    assert said.count("failed when") == 1


@pytest.mark.parametrize("what", ["SystemExit", "GeneratorExit", "Odd"])
def test_in_the_conformance_suite_it_is_a_failed_check(capsys: pytest.CaptureFixture[str], what: str) -> None:
    """Whatever an op raises is a finding about it; the other checks still run."""
    options = ["-O", "at=call", "-O", f"raises={what}", "--only", "linear", "--quick"]
    assert mla.conformance.cli.main([*LEAVING, *options]) == 4
    card = capsys.readouterr().out
    assert f"raised {what}" in card
    assert "leaving_backend.py:" in card


def test_what_ends_the_process_before_the_suite_starts_is_exit_code_3(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert mla.conformance.cli.main([*LEAVING, "-O", "at=setup"]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "setup(None) raised SystemExit: 0" in shown.err


# ---------------------------------------------------------------------------------------------- stdout

CHATTY = """
import atexit, ctypes, os, subprocess, sys
import torch
from mla_backends import FusedOp
from mla_backends.testing import HostBackend
from mla.reference import REFERENCE

libc = ctypes.CDLL(None)

def talk(where):
    print("print", where)
    sys.stdout.write("write\\n")
    sys.__stdout__.write("the stream itself\\n")
    os.write(1, b"descriptor\\n")
    libc.puts(b"printf " + where.encode())
    subprocess.run(["echo", "a child"], check=True)

talk("import")
atexit.register(talk, "the end")

class Op(FusedOp):
    contract = "linear/1"
    said = False
    def __call__(self, *args, **tensors):
        REFERENCE["linear"](*args, **tensors)
        if not Op.said:
            talk("forward")
        Op.said = True

class Chatty(HostBackend):
    name = "chatty"
    def __init__(self, options=None):
        super().__init__(options, ops={"op": Op()})
    def probe(self):
        talk("probe")
        return super().probe()
"""


@pytest.fixture
def chatty(tmp_path: Path) -> tuple[str, ...]:
    """Write a backend that prints wherever it runs; return the options that choose it."""
    (tmp_path / "chatty.py").write_text(CHATTY)
    return ("--backend", "chatty:Chatty", "--dtype", "float32")


def test_what_a_plugin_prints_does_not_reach_the_result(
    process: Bench, small: list[str], chatty: tuple[str, ...]
) -> None:
    done = process(*chatty, *small, "--passes", "1", "--format", "json")
    assert done.code == 0
    assert json.loads(done.out)["backend"]["name"] == "chatty"
    for place in ("import", "probe", "forward", "the end"):
        assert f"print {place}\n" in done.err
        assert f"printf {place}\n" in done.err
    for text in ("write", "the stream itself", "descriptor", "a child"):
        assert done.err.count(f"{text}\n") >= 4


def test_other_commands_keep_stdout_for_themselves_as_well(
    process: Bench, chatty: tuple[str, ...], tmp_path: Path
) -> None:
    assert process(*chatty, "--list-ops").out.startswith("qkv_a_proj: op\n")
    json.loads(process("doctor", "chatty:Chatty", "--json").out)
    done = subprocess.run(
        [sys.executable, "-m", "mla.conformance", *chatty, "--only", "device.info"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#")
    assert "print" not in done.stdout
