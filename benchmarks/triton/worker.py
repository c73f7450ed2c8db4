"""Compiles cases that come on stdin, one JSON a line, and prints what each needs, in the same order.

    PYTHONPATH=folder/with/another/triton python -m benchmarks.triton.worker JOBS < cases > answers

Every case has a process of its own, forked from one that has imported Triton: old compilers abort.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it is; 3.9 announces another default
os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported
os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.triton.resources import resources_of
from benchmarks.triton.sources import VERSION, source_of

SECONDS = 300  # of one case


def main(jobs: int) -> None:
    cases = [json.loads(line) for line in sys.stdin]
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / str(number) for number in range(len(cases))]
        _run(cases, folders, jobs)
        for folder in folders:
            print((folder / "answer").read_text())  # noqa: T201


def _run(cases: list[dict[str, Any]], folders: list[Path], jobs: int) -> None:
    waiting = list(zip(cases, folders, strict=True))
    running: dict[int, Path] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case, folder = waiting.pop(0)
            running[_start(case, folder)] = folder
        process, status = os.wait()
        _end(running.pop(process), status)


def _start(case: dict[str, Any], folder: Path) -> int:
    folder.mkdir()
    process = os.fork()
    if process:
        return process
    signal.alarm(SECONDS)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (folder / "answer").write_text(json.dumps(_answer(case, folder)))
    os._exit(0)


def _answer(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    target = case["target"]
    options = {"num_warps": case["warps"], "num_stages": case["stages"]}
    if case["registers"]:
        options["maxnreg"] = case["registers"]
    if target["backend"] == "hip" and VERSION < (3, 5):
        _leave_unlinked()
    try:
        gpu = GPUTarget(target["backend"], target["arch"], target["warp_size"])
        resources = resources_of(triton.compile(source_of(case), target=gpu, options=options))
        return {"triton": triton.__version__, **resources}
    except Exception as error:  # noqa: BLE001  # compilers raise anything
        return {"error": f"{type(error).__name__}: {_said(str(error))}"}


def _leave_unlinked() -> None:
    """Old compilers link with ROCm, which need not be here. What is counted stands in the assembly."""
    amd: Any = triton.backends.backends["amd"].compiler
    amd.make_hsaco = staticmethod(lambda *_: b"")
    amd.hash = lambda self: f"unlinked-{self.target}"


def _end(folder: Path, status: int) -> None:
    """Answer for a process that could not: the signal that ended it, and what the compiler said."""
    answer = folder / "answer"
    if answer.exists() and answer.read_text():
        return
    code = os.waitstatus_to_exitcode(status)
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    answer.write_text(json.dumps({"error": f"{ended}: {_said((folder / 'log').read_text())}"}))


def _said(log: str) -> str:
    """Return what a log says of the cause, without paths of the machine that built the compiler."""
    telling = re.search(r"(Assertion .*|LLVM ERROR.*|error: .*)", log)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = telling[1] if telling else lines[-1] if lines else "nothing said"
    return re.sub(r"\S*/", "", said)[:160].replace("|", "/")


if __name__ == "__main__":
    main(int(sys.argv[1]))
