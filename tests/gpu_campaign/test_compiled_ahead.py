"""Tiles are compiled before they are swept: what the launch will look for, whatever a compiler does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from triton_here import needs_triton

HERE = Path(__file__).parents[2] / "benchmarks" / "gpu"
# As on a card, but nothing can be started: a driver that knows its device's architecture only.
DRIVER = """
import json, os, sys, time
from types import SimpleNamespace
sys.path.append(sys.argv[1])
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
))
from benchmarks.gpu.tuning import ahead
from benchmarks.gpu.tuning.classes import classes
tuned = classes(True)["latent-16"]
"""
POOL = """
from dataclasses import replace
good, *_ = ahead.launches([replace(tuned, tiles=tuned.tiles[:1], changes=())])
def kernel(name, warmup):
    return replace(good, kernel=SimpleNamespace(fn=SimpleNamespace(__name__=name), warmup=warmup))
def refuses(**_):
    raise RuntimeError("PassManager::run failed")
ahead.KERNEL_SECONDS = 60
bad = [kernel("refuses", refuses), kernel("aborts", lambda **_: os.abort())]
print(json.dumps(ahead.compile_all([*bad, good], 2, lambda: 60.0)))
other = os.posix_spawn("/bin/true", ["true"], {})  # of somebody else, who waits for it
time.sleep(0.5)
ahead.KERNEL_SECONDS = 1
print(json.dumps(ahead.compile_all([kernel("hangs", lambda **_: time.sleep(60))] * 2, 2, lambda: 60.0)))
print(json.dumps(ahead.compile_all([kernel("late", refuses)], 2, lambda: 0.5)))
os.waitpid(other, 0)
"""
LAUNCH = """
from mla_backends.triton_ops import Launcher

good, *_ = ahead.launches([replace(tuned, tiles=tuned.tiles[:1], changes=())])
try:
    Launcher().start(good.kernel, good.grid, good.arguments, warps=good.warps, stages=good.stages)
except AttributeError as error:
    print(error)
"""


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-c", DRIVER + code, str(HERE.parents[1])]
    variables |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=variables, capture_output=True, text=True, check=True)


def binaries(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.cubin")}


@needs_triton
def test_a_compiler_that_fails_stops_no_other_and_the_launch_finds_what_was_compiled(tmp_path: Path) -> None:
    done = run(tmp_path, POOL)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [1, 2], [0, 2], [0, 0],
    ]  # fmt: skip
    said = done.stderr.splitlines()
    assert any(
        line.startswith("refuses: RAGGED False") and "PassManager::run failed" in line for line in said
    )
    assert [line.rpartition(" ")[2] for line in said if "its compiler ended by" in line] == [
        "SIGABRT", "SIGALRM", "SIGALRM",
    ]  # fmt: skip
    compiled = binaries(tmp_path)
    assert len(compiled) == 1
    launched = run(tmp_path, "from dataclasses import replace\n" + LAUNCH)
    assert launched.stdout.strip(), "there is nothing here that starts a kernel"
    assert binaries(tmp_path) == compiled


@needs_triton
def test_few_tokens_launch_the_kernels_of_many() -> None:
    """By what the table of compiled kernels goes by: all arguments as the JIT specialises them."""
    from benchmarks.gpu.tuning import ahead, problems
    from benchmarks.gpu.tuning.classes import FULL
    from benchmarks.triton.cases import Target, case_of
    from benchmarks.triton.fingerprint import _compiled_for
    from benchmarks.triton.recording import Launch, Recorder
    from mla_backends.triton_ops import Tuning, triton_ops

    def kernels(launches: list[Launch]) -> set[str]:
        return {_compiled_for(case_of(launch, Target("cuda", 90, 32))) for launch in launches}

    for tuned in (FULL[0], FULL[3]):
        few = replace(tuned, tiles=tuned.tiles[:2], shapes=tuned.shapes[1:2], changes=())
        recorder = Recorder()
        for tile in few.tiles:
            op = triton_ops(Tuning({1: tile}, {1: tile}), 132, recorder)[few.op]
            for shape in few.shapes:
                problems.of_shape(few.kind, shape, "cpu").bound(op).call()
        assert kernels(ahead.launches([few])) == kernels(recorder.recorded)
