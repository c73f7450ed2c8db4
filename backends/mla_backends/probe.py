"""Probe one backend and print what was found as JSON: `python -m mla_backends.probe NAME [KEY=VALUE ...]`.

The last line of stdout is the answer. If the backend is not usable, one sentence goes to stderr, after the
traceback if there is one. Exit code 0: usable, 3: not usable or unknown, 2: wrong arguments.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from mla_backends.errors import BackendError, BackendImportError, DeviceUnavailable
from mla_backends.registry import create, probe_backend
from mla_backends.status import USABLE

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
        found = probe_backend(name, backend)
    except BackendError as error:
        return _problem(error, DeviceUnavailable.state)
    return {"state": USABLE, "reason": "", "hint": "", "evidence": _strings(found.evidence)}


def _problem(error: BackendError, state: str) -> dict[str, Any]:
    """Describe `error`; `state` is used for a plain `BackendError`, which a plugin may raise."""
    if error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
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
