"""The state of every backend, each determined in a child process.

Probing in this process would load every vendor's stack into it, and one that aborts or hangs would take the
whole report down.

`python -m mla_backends.probe NAME [KEY=VALUE ...]` prints what it found as JSON, in the last line of
stdout. If the backend is not usable, one sentence goes to stderr, after the traceback if there is one. Exit
code 0: usable, 3: not usable or unknown, 2: wrong arguments.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mla_backends.errors import BackendError, BackendImportError, DeviceUnavailable, original
from mla_backends.known import KNOWN
from mla_backends.registry import create, entries, locate, probe_backend

USABLE = "usable"
NO_ANSWER = "no answer"  # of a process that hung or crashed: nothing is known of the device


@dataclass(frozen=True)
class Status:
    """What is known of one backend. `state` is `USABLE`, `NO_ANSWER` or that of a `BackendError` class."""

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


def status(name: str, timeout: float = 30.0, options: Mapping[str, str] | None = None) -> Status:
    """Report on one backend with its options; a child that answers later than `timeout` seconds is killed."""
    try:
        entry = locate(name)
    except BackendError as error:
        return Status(name, error.state, reason=error.reason, hint=error.hint)
    words = [entry.name, *(f"{key}={value}" for key, value in (options or {}).items())]
    fields = ("state", "reason", "hint", "evidence")
    try:
        answer = ask(["-m", "mla_backends.probe", *words], fields, timeout)
    except NoAnswer as none:
        hint = f"`python -X faulthandler -m mla_backends.probe {' '.join(words)}` shows where it stops"
        answer = {"state": NO_ANSWER, "reason": f"the probe {none}", "hint": hint}
    return Status(name, distribution=entry.distribution, version=entry.version, **answer)


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
    lines, code = child.stdout.decode(errors="replace").strip().splitlines(), child.returncode
    try:
        answer = json.loads(lines[-1])
        return {field: answer[field] for field in fields}
    except (IndexError, ValueError, KeyError, TypeError):
        if code < 0:
            known = {int(number): number.name for number in signal.Signals}
            raise NoAnswer(f"died with signal {known.get(-code, -code)}") from None
        last = _last_line(child.stderr)
        raise NoAnswer(f"exited with status {code} without an answer{last}") from None


def _last_line(stderr: bytes | None) -> str:
    """Return the last line in brackets, after a space; "" if there is none."""
    last = (stderr or b"").decode(errors="replace").strip().splitlines()[-1:]
    return "".join(f" ({line.strip()})" for line in last)


USAGE = """\
usage: python -m mla_backends.probe NAME [KEY=VALUE ...]

Prints what probing a backend finds, as JSON, and the traceback of what it raises.
`python -m mla.bench doctor NAME` says the same in words, and how to fix it."""


def probe_by_name(name: str, options: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Create the backend `name` with `options` and probe it; return state, reason, hint and evidence."""
    try:
        backend = create(name, options)
    except BackendError as error:
        return _problem(error, BackendImportError.state)
    try:
        available = probe_backend(name, backend)
    except BackendError as error:
        return _problem(error, DeviceUnavailable.state)
    return {"state": USABLE, "reason": "", "hint": "", "evidence": _strings(available.evidence)}


def _problem(error: BackendError, state: str) -> dict[str, Any]:
    """Describe `error`; `state` is used for a plain `BackendError`, which a plugin may raise."""
    if error.__cause__ is not None:
        traceback.print_exception(original(error.__cause__))
    sys.stderr.write(f"error: {error}\n")
    return {
        "state": state if error.state == BackendError.state else error.state,
        "reason": error.reason,
        "hint": error.hint,
        "evidence": _strings(getattr(error, "evidence", {})),
    }


def _strings(evidence: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in dict(evidence).items()}


def main(arguments: list[str]) -> None:
    """Print the answer and end the process at once."""
    options = dict(word.partition("=")[::2] for word in arguments[1:])
    asked = arguments[:1] in (["-h"], ["--help"])
    if asked or not arguments or not all("=" in word for word in arguments[1:]):
        print(USAGE if asked else USAGE.partition("\n")[0], file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    answer = probe_by_name(arguments[0], options)
    # On its own line, whatever the plugin printed before.
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    # Vendor stacks have been seen to hang or crash while the interpreter shuts down.
    os._exit(0 if answer["state"] == USABLE else 3)


if __name__ == "__main__":
    main(sys.argv[1:])
