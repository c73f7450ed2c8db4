"""Every command opens its backend the same way: on this task's device, with a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import mla
import mla.conformance.cli
from mla.bench.cli import main as bench
from mla.command import launcher
from mla.command.options import only_usable
from mla_backends import BackendError, probe
from mla_backends.probe import USABLE, Status

Main = Callable[[list[str]], int]
RUN: tuple[Main, list[str], str] = (bench.main, [], "-o")
CEILINGS: tuple[Main, list[str], str] = (bench.main, ["ceilings"], "-o")
CONFORMANCE: tuple[Main, list[str], str] = (mla.conformance.cli.main, [], "--report")
COMMANDS = pytest.mark.parametrize(
    ("main", "words", "file_option"), [RUN, CEILINGS, CONFORMANCE], ids=["run", "ceilings", "conformance"]
)


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process the second task of torchrun on one node."""
    for name in (*launcher.LOCAL, *launcher.TASKS, "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what `load_backend` is called with; it opens nothing."""
    calls: list[Any] = []

    def load_backend(name: str, index: Any, threads: int | None, options: dict[str, str]) -> None:
        calls.append((name, index(4) if callable(index) else index, threads, options))
        raise BackendError("there is nothing to open.")

    monkeypatch.setattr(mla, "load_backend", load_backend)
    return calls


@COMMANDS
@pytest.mark.parametrize(
    ("chosen", "call", "said"),
    [
        (
            ["--threads", "3", "-O", "native=off"],
            ("cpu", 1, 3, {"native": "off"}),
            "device 1 of 4, from LOCAL_RANK\n",
        ),
        (["--device", "0"], ("cpu", 0, None, {}), ""),
    ],
)
@pytest.mark.usefixtures("second_of_two")
def test_a_command_takes_the_device_of_its_task_or_that_which_was_named(
    main: Main,
    words: list[str],
    file_option: str,
    chosen: list[str],
    call: Any,
    said: str,
    asked: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*words, "--backend", "cpu", *chosen]) == 3
    assert asked == [call]
    assert said in capsys.readouterr().err


@COMMANDS
@pytest.mark.usefixtures("second_of_two")
def test_a_file_of_all_tasks_and_an_option_of_none_are_refused_in_a_sentence(
    main: Main, words: list[str], file_option: str, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--backend", "cpu", file_option, "out.json"]) == 2
    assert "2 tasks would all write 'out.json'" in capsys.readouterr().err
    assert main([*words, "--backend", "cpu", "-O", "native"]) == 2
    assert capsys.readouterr().err == "error: -O takes KEY=VALUE, got 'native'.\n"
    assert asked == []


@pytest.mark.parametrize(
    ("plugins", "chosen"),
    [
        ({"a": USABLE, "b": "no device"}, "a"),
        ({"a": "no device", "b": "not installed"}, "torch"),
        ({}, "torch"),
    ],
)
def test_the_backend_without_a_plugin_is_for_hosts_where_no_plugin_is_usable(
    plugins: dict[str, str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "statuses", lambda: [Status(*plugin) for plugin in plugins.items()])
    monkeypatch.setattr(probe, "status", lambda name: Status(name, USABLE))
    assert only_usable() == chosen
