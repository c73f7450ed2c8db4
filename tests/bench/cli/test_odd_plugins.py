"""Plugins with a mistake that is no crash: each is told what it is, by the command that runs into it."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla.bench.doctor import diagnosis
from mla_backends import BackendError, TorchBackend, host

Bench = Callable[..., Any]
Plugin = Callable[..., tuple[str, str]]

CODE = """
import torch
from mla_backends import Backend, FusedOp, TorchBackend
from mla_backends.testing import HostBackend

class Op(FusedOp):
    contract = "linear/1"
    reasons = []
    def unsupported_reasons(self, spec): return self.reasons
    def __call__(self, *args, **tensors): raise NotImplementedError

class Plugin(HostBackend):
    name = "odd"
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugin:
    """Return a function that writes a plugin with those lines and returns the options that choose it."""
    numbers = itertools.count()

    def plugin(lines: str) -> tuple[str, str]:
        name = f"odd_{tmp_path.name.replace('-', '_')}_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(f"{CODE}{lines}\n")
        return ("--backend", f"{name}:Plugin")

    monkeypatch.syspath_prepend(tmp_path)
    return plugin


@pytest.fixture
def _threads() -> Any:
    """Leave the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- ops


@pytest.mark.parametrize(
    ("offered", "sentence"),
    [
        ("{'x': Op}", "the backend's op 'x' is the class Op itself, not an instance of a FusedOp."),
        ("{'x': print}", "the backend's op 'x' is a builtin_function_or_method, not an inst"),
        ("{'': Op()}", "a backend's op needs a name other than 'reference', and <odd_"),
        ("{3: Op()}", "a backend's op needs a name other than 'reference', and <odd_"),
        ("[Op()]", "the backend's ops() returned a list, not a mapping of ops."),
    ],
)
def test_what_is_no_op_is_told_from_a_misspelt_one(
    bench: Bench, plugin: Plugin, offered: str, sentence: str
) -> None:
    done = bench(*plugin(f"    def ops(self): return {offered}"), "--list-ops")
    assert (done.code, done.out) == (3, "")
    assert done.error.startswith(f"error: {sentence}")


def test_a_refusal_that_comes_too_late_names_the_op(bench: Bench, small: list[str]) -> None:
    late = ["-O", "at=call", "-O", "raises=BackendError"]
    words = ["--backend", "leaving_backend:Leaving", "--dtype", "float32", "--scenario", "decode"]
    done = bench(*words, *late, *small, "--implementations", "mla")
    assert done.code == 3
    assert "scenario 'decode', implementation 'mla': op 'leaving_op' of " in done.error
    assert "10 rows or more, please. " in done.error


# --------------------------------------------------------------------------------------------- threads


@pytest.mark.usefixtures("_threads")
def test_threads_reach_torch_where_the_backend_does_nothing_with_them(bench: Bench, plugin: Plugin) -> None:
    for threads in (1, 2):
        assert bench(*plugin(""), "--threads", str(threads), "--list-ops").code == 0
        assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("_threads")
def test_a_backend_that_sets_another_number_of_threads_is_refused(bench: Bench, plugin: Plugin) -> None:
    words = plugin(
        "    def setup(self, index=None):\n        torch.set_num_threads(1)\n        return super().setup()"
    )
    assert bench(*words, "--threads", "1", "--list-ops").code == 0
    done = bench(*words, "--threads", "2", "--list-ops")
    assert (done.code, done.out) == (3, "")
    assert "ignores the option threads: 2 were asked for, and after its setup() torch uses 1; " in done.error
    words = plugin(
        "    def setup(self, index=None):\n        torch.set_num_threads(2)\n        return super().setup()"
    )
    assert ": 1 was asked for, and" in bench(*words, "--threads", "1", "--list-ops").error


@pytest.mark.usefixtures("_threads")
def test_more_threads_than_cpus_are_remarked_on(bench: Bench, plugin: Plugin) -> None:
    cpus = host.cpu_limit()
    said = f"{cpus + 1} host threads share {cpus} CPU"
    assert said in bench(*plugin(""), "--threads", str(cpus + 1), "--list-ops").err
    assert "host threads share" not in bench(*plugin(""), "--threads", str(cpus), "--list-ops").err


@pytest.mark.usefixtures("_threads")
def test_an_op_that_changes_the_threads_is_remarked_on(
    bench: Bench, plugin: Plugin, small: list[str]
) -> None:
    """So that mla and the reference beside it do not run on as many."""
    words = plugin(
        "    def ops(self): return {'x': Changing()}\n"
        "from mla.reference import REFERENCE\n"
        "class Changing(Op):\n"
        "    seen = []\n"
        "    def __call__(self, *args, **tensors):\n"
        "        self.seen.append(torch.get_num_threads())\n"
        "        REFERENCE['linear'](*args, **tensors)\n"
        "        torch.set_num_threads(1)"
    )
    options = ["--threads", "2", "--passes", "1", "--dtype", "float32", "--scenario", "decode"]
    done = bench(*words, *small, *options)
    assert done.code == 0
    assert "decode: backend 'odd' changed torch's host threads from 2 to 1, " in done.err
    seen = sys.modules[words[1].partition(":")[0]].Changing.seen
    assert seen.count(2) > 2, "every pass begins on as many"


# -------------------------------------------------------------------------------------- device, clock, name


def test_a_device_whose_events_cannot_time_has_no_device_clock(bench: Bench, plugin: Plugin) -> None:
    """torch.cpu.Event takes no arguments; doctor and run agree that this does no harm."""
    words = plugin("class Plugin(TorchBackend):\n    name, api_version, device_type = 'odd', 1, 'cpu'")
    assert bench(*words, "--list-ops").code == 0
    done = bench(*words, "--list-ops", "--clock", "device")
    assert (done.code, done.error.partition(" (")[0]) == (3, "error: backend 'odd' has no device timer")


def test_an_event_that_fails_otherwise_names_the_backend(bench: Bench, plugin: Plugin) -> None:
    def broken(enable_timing: bool) -> None:
        raise RuntimeError("driver too old")

    class Odd(TorchBackend):
        name, api_version, device_type = "odd", 1, "odd"
        module = SimpleNamespace(Event=broken)  # type: ignore[assignment]

    with pytest.raises(BackendError, match=r"'odd' cannot make a torch\.odd\.Event .*: driver too old"):
        Odd().device_timer()


@pytest.fixture
def doctor(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a function that diagnoses a backend, but does not look for what may be wrong with torch."""
    nothing = {"version": "2", "build": {}, "problem": "", "autoload": True, "extensions": [], "fixes": []}
    monkeypatch.setattr(diagnosis, "_torch", lambda backends: nothing)
    return functools.partial(bench, "doctor")


def test_doctor_calls_nothing_usable_that_a_run_cannot_use(doctor: Bench, plugin: Plugin) -> None:
    timer = plugin("    def device_timer(self): raise TypeError('Event() takes no arguments')")
    done = doctor(timer[1])
    assert done.code == 3
    assert "TypeError: Event() takes no arguments" in done.out
    none = plugin("    def device_count(self): return 0")
    done = doctor(none[1])
    assert done.code == 3
    assert f"{none[1]}: no device" in done.out
    assert "device_count() is 0" in done.out


def test_an_unknown_name_gets_one_list_of_each_kind(bench: Bench) -> None:
    """A backend that is installed is not listed a second time as one that is known."""
    said = bench("doctor", "zzz").error
    assert said.count(" cpu") == 1
    assert os.linesep not in said


DEVICE = "    def device_info(self): return {}\nfrom mla_backends.api import DeviceInfo, MemoryInfo, Peak"


# What device_info() returns -> how the sentence says it.
NO_INFO = {
    "DeviceInfo('d', cache_bytes=-5)": "cache_bytes -5, not a ",
    "DeviceInfo('d', memory_bytes=0)": "memory_bytes 0, not a ",
    "DeviceInfo('d', memory_bytes=1.5)": "memory_bytes 1.5, not ",
    "DeviceInfo('d', bandwidth=Peak(0, 'x'))": "bandwidth per second 0, ",
    "DeviceInfo('d', bandwidth=Peak(1e9, None))": "bandwidth of the source None, not a printable text",
    "DeviceInfo('d', flops={'x': 3})": "flops of 'x' 3, not a Peak",
    "DeviceInfo('\\x1b[31mred')": r"the name '\x1b[31mred', not a ",
    "None": "None, not a DeviceInfo",
}


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        *((DEVICE.format(made), f"device_info() returned {said}") for made, said in NO_INFO.items()),
        ("    def setup(self, index=None): return 'cpu'", "setup() returned 'cpu', not a torch.device"),
        ("    def memory(self): return None", "memory() returned None, not a MemoryInfo"),
        ("    def dtypes(self): return ('float32',)", "dtypes() returned ('float32',), not a tuple of "),
    ],
)
def test_what_no_result_could_hold_is_refused_when_the_backend_is_opened(
    bench: Bench, plugin: Plugin, lines: str, sentence: str
) -> None:
    words = plugin(lines)
    done = bench(*words, "--list-ops")
    assert (done.code, done.out) == (3, "")
    assert done.error.startswith(f"error: backend '{words[1]}' cannot be used: {sentence}")
    assert done.err.isascii()
    assert "\x1b" not in done.err


@pytest.mark.parametrize(
    "lines", [DEVICE.format("None"), "    def device_count(self): return '2'"], ids=["info", "count"]
)
def test_doctor_says_what_a_run_says(bench: Bench, doctor: Bench, plugin: Plugin, lines: str) -> None:
    words = plugin(lines)
    done = doctor(words[1])
    assert done.code == 3
    fixes = [line.split(None, 1)[1] for line in done.out.splitlines() if line.startswith("  fix ")]
    assert fixes == ["report it to the backend's authors"]
    reason = next(line.split(None, 1)[1] for line in done.out.splitlines() if line.startswith("  reason "))
    assert reason in bench(*words, "--list-ops").error
