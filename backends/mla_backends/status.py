"""The state of every backend, each determined in a child process.

Probing in this process would load every vendor's stack into it, and one that aborts or hangs would take
the whole report down.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mla_backends.discovery import Entry, entries, locate
from mla_backends.errors import BackendError, DeviceUnavailable
from mla_backends.known import KNOWN

USABLE = "usable"


@dataclass(frozen=True)
class Status:
    """What is known about one backend. `state` is "usable" or the state of a `BackendError` class."""

    name: str
    state: str
    distribution: str | None = None
    version: str | None = None
    reason: str = ""
    hint: str = ""
    evidence: Mapping[str, str] = field(default_factory=dict)


def statuses(timeout: float = 30.0, chosen: Sequence[str] = ()) -> list[Status]:
    """Report on the `chosen` backends, by default those that `names` returns."""
    chosen = chosen or names()
    with ThreadPoolExecutor(max_workers=len(chosen)) as pool:
        return list(pool.map(lambda name: status(name, timeout), chosen))


def names() -> list[str]:
    """Return every installed plugin's backend, sorted, and then the known ones that are not installed.

    Not `GENERAL`: it would claim a device a second time.
    """
    installed = sorted({entry.name for entry in entries()})
    return installed + [name for name in KNOWN if name not in installed]


def status(
    name: str,
    timeout: float = 30.0,
    variables: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
) -> Status:
    """Report on one backend; a child process that answers later than `timeout` seconds is killed.

    `variables` are set in the child's environment, in addition to those of this process. `options` are the
    backend's.
    """
    try:
        entry = locate(name)
    except BackendError as error:
        return Status(name, error.state, reason=error.reason, hint=error.hint)
    answer = _probe(entry, timeout, variables, options or {})
    return Status(name, distribution=entry.distribution, version=entry.version, **answer)


def _probe(
    entry: Entry, timeout: float, variables: Mapping[str, str] | None, options: Mapping[str, str]
) -> dict[str, Any]:
    """Probe `entry` in a child process and return the fields of its `Status`."""
    fields = ("state", "reason", "hint", "evidence")
    words = [f"{key}={value}" for key, value in options.items()]
    try:
        return ask(["-m", "mla_backends.probe", entry.name, *words], fields, timeout, variables)
    except NoAnswer as none:
        return _no_answer(" ".join([entry.name, *words]), f"the probe {none}")


class NoAnswer(Exception):
    """A child process gave no answer. The text is a clause without a subject: "died with signal SIGABRT"."""


def ask(
    arguments: Sequence[str],
    fields: Sequence[str],
    timeout: float,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run this Python with `arguments` in a child process; return `fields` of the JSON object it prints last.

    `variables` are set in the child's environment, in addition to those of this process. Raises `NoAnswer` if
    the child prints no such object or takes more than `timeout` seconds, after which it is killed; the last
    line on its stderr is quoted, because it may say what it was doing.
    """
    try:
        child = subprocess.run(
            [sys.executable, *arguments],
            timeout=timeout,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
            env={**os.environ, **(variables or {})},
        )
    except subprocess.TimeoutExpired as late:
        raise NoAnswer(f"did not answer within {timeout:g} s{_last_line(late.stderr)}") from None
    lines = child.stdout.decode(errors="replace").strip().splitlines()
    try:
        answer = json.loads(lines[-1])
        return {field: answer[field] for field in fields}
    except (IndexError, ValueError, KeyError, TypeError):
        raise NoAnswer(_ending(child)) from None


def _no_answer(asked: str, reason: str) -> dict[str, Any]:
    hint = f"`python -X faulthandler -m mla_backends.probe {asked}` shows where it stops"
    return {"state": DeviceUnavailable.state, "reason": reason, "hint": hint, "evidence": {}}


def _ending(child: subprocess.CompletedProcess[bytes]) -> str:
    """Return how a child that gave no answer ended."""
    if child.returncode < 0:
        try:
            return f"died with signal {signal.Signals(-child.returncode).name}"
        except ValueError:  # real-time signals have numbers only
            return f"died with signal {-child.returncode}"
    return f"exited with status {child.returncode} without an answer{_last_line(child.stderr)}"


def _last_line(stderr: bytes | None) -> str:
    """Return the last line in brackets, after a space; "" if there is none."""
    last = (stderr or b"").decode(errors="replace").strip().splitlines()[-1:]
    return "".join(f" ({line.strip()})" for line in last)
