"""Nothing beside their arguments is touched by the kernels, nor anything undefined done."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from native_cases import levels_here

from mla_backend_cpu import instruction_sets
from mla_backend_cpu.compilation import compiler

# The checks do not see what the tile instructions of AMX touch; the emulation is checked instead.
UNTILED = next(name for name in levels_here() if name != "amx")


@pytest.mark.parametrize("name", dict.fromkeys(("portable", UNTILED, instruction_sets.EMULATED)))
def test_the_sanitizers_find_nothing(tmp_path: Path, name: str) -> None:
    """Ragged, page-boundary and poisoned cases stay within memory that is just large enough."""
    level, program = instruction_sets.choose_level(name), tmp_path / "driver"
    flags = [flag for flag in compiler.FLAGS if flag not in ("-O3", "-fPIC", "-fvisibility=hidden")]
    checks = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    driver = Path(__file__).with_name("native_driver.cpp")
    built = subprocess.run(
        ["g++", *flags, *checks, *level.flags, f"-I{compiler.SOURCES}", str(driver), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" cases, 0 wrong\n")
