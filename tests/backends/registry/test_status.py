"""The report on all backends, which no backend may spoil."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Python = Callable[..., str]

STATUSES = """
import json, sys, time
from dataclasses import asdict
from mla_backends.probe import statuses
start = time.monotonic()
told = [asdict(status) for status in statuses(timeout={timeout})]
imported = [module for module in sys.modules if module.startswith("fake_")]
print(json.dumps([time.monotonic() - start, told, imported]))
"""

STATUS = """
import json
from dataclasses import asdict
from mla_backends.probe import status
print(json.dumps(asdict(status({name!r}))))
"""


def status_of(python: Python, name: str, *fakes: str, **environment: str) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(python(STATUS.format(name=name), *fakes, **environment))
    return status


def test_no_backend_can_spoil_the_report_on_the_others(python: Python) -> None:
    fakes = ["good", "hang", "crash", "broken_import", "no_device", "duplicate_a", "duplicate_b"]
    seconds, statuses, imported = json.loads(python(STATUSES.format(timeout=6), *fakes))
    assert imported == [], "no plugin is imported into this process"
    assert [(status["name"], status["state"]) for status in statuses] == [
        ("fake-broken-import", "import failed"),
        ("fake-crash", "no answer"),
        ("fake-good", "usable"),
        ("fake-hang", "no answer"),
        ("fake-hang-too", "no answer"),
        ("fake-no-device", "no device"),
        ("fake-twin", "duplicate"),
        ("cpu", "not installed"),
        ("nvidia", "not installed"),
        ("moore", "not installed"),
        ("metax", "not installed"),
        ("iluvatar", "not installed"),
    ]
    reasons = {status["name"]: status["reason"] for status in statuses}
    assert reasons["fake-crash"] == "the probe died with signal SIGABRT"
    assert reasons["fake-hang"] == "the probe did not answer within 6 s"
    assert seconds < 11, "two probes that hang for 6 s must hang at the same time"


def test_a_torch_that_does_not_import_is_explained(python: Python, tmp_path: Path) -> None:
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "version.py").touch()
    (torch / "__init__.py").write_text("import torch.version\nraise OSError('libvendor.so: not found')\n")
    (tmp_path / "local_code.py").write_text("import torch\n")
    status = status_of(python, "local_code:it")
    assert status["state"] == "import failed"
    assert status["reason"] == "importing module local_code raised OSError: libvendor.so: not found"
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in status["hint"]


@pytest.mark.parametrize(
    ("code", "state", "reason", "hint"),
    [
        (
            "import no_such_torch", "import failed", "importing module local_code raised ModuleNotFoundError",
            "shows the traceback",
        ),
        (  # what it prints does not hide the answer
            "import atexit\nprint('loading', end='')\natexit.register(print, 'bye')\nit = 3",
            "import failed", "module local_code has no hook", "mark its mla_backend(options)",
        ),
        (
            "import os\nos._exit(7)", "no answer", "the probe exited with status 7 without an answer",
            "`python -X faulthandler -m mla_backends.probe local_code:it`",
        ),
    ],
    ids=["no torch of that name", "prints", "leaves"],
)  # fmt: skip
def test_what_a_plugin_does_in_its_process_is_reported(
    python: Python, tmp_path: Path, code: str, state: str, reason: str, hint: str
) -> None:
    (tmp_path / "local_code.py").write_text(code)
    status = status_of(python, "local_code:it")
    assert status["state"] == state
    assert status["reason"].startswith(reason)
    assert hint in status["hint"]
    assert "AUTOLOAD" not in status["hint"]
