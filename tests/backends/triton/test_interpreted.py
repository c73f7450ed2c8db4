"""Our Triton kernels, interpreted. The tests are in `inside/`, some files to a process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent
INSIDE = HERE / "inside"
DEVICE = HERE.parent / "emulation" / "device"
# Files, and how many tests they have at least.
PROCESSES = {
    "kernels": (("interpreter", "latent", "selection", "expanded", "small_ops", "formats"), 320),
    "mutations": (("mutations", "preflight"), 140),
    "conformance": (("conformance",), 7),
}
# The `-c` of a process that has imported triton as it is.
TOO_LATE = """
import os
del os.environ["TRITON_INTERPRET"]
import triton
import interpreting
"""


def run_inside(interpret: Any, names: tuple[str, ...], least: int, **more: Any) -> None:
    files = [str(INSIDE / f"check_{name}.py") for name in names]
    configuration = ("-c", str(INSIDE / "pytest.ini"), f"--confcutdir={INSIDE}", "-p", "no:cacheprovider")
    done = interpret("-m", "pytest", *configuration, *files, **more)
    assert done.code == 0, done.out + done.err
    match = re.search(r"(\d+) passed", done.out)
    assert match, done.out
    assert int(match[1]) >= least


@pytest.mark.parametrize("process", PROCESSES)
def test_interpreted(process: str, interpret: Any) -> None:
    run_inside(interpret, *PROCESSES[process])


def test_every_file_is_run() -> None:
    files = {path.stem.removeprefix("check_") for path in INSIDE.glob("check_*.py")}
    assert files == {"emulated", *(name for names, _ in PROCESSES.values() for name in names)}


def test_on_an_emulated_device(interpret: Any) -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot take a device written in Python")
    run_inside(interpret, ("emulated",), 5, folders=(DEVICE,))


def test_the_command_line_checks_the_interpreted_backend(interpret: Any) -> None:
    backend = ("--backend", "interpreted:mla_backend", "--quick", "--dtype", "bfloat16")
    only = ("--only", "latent.formula", "--only", "write_latent.formula")
    done = interpret("-m", "mla.conformance", *backend, *only)
    assert done.code == 0, done.out + done.err
    assert re.search(r"latent\.formula +\| triton_latent +\| pass", done.out), done.out


def test_triton_that_was_imported_before_is_an_error_that_says_so(interpret: Any) -> None:
    done = interpret("-c", TOO_LATE)
    assert done.code == 1
    assert done.error.startswith("ImportError: triton was imported without TRITON_INTERPRET=1: set it")
