"""Building the kernels: processes at once, killed builds, spoilt caches, and what prevents a build."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from native_builds import BUILD, PORTABLE, built, finish, small_sources, start

from mla_backend_cpu import cache, compilation
from mla_backend_cpu.compilation import BuildError, Level
from mla_backend_cpu.library import Library

Script = Callable[[str], Path]


def loads(path: Path) -> bool:
    """Say whether a library of `small_sources` can be loaded; in a process that a spoilt one may end."""
    code = "import sys, ctypes; ctypes.CDLL(sys.argv[1]).mla_dot_bf16()"
    return subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0


def left(tmp_path: Path) -> list[str]:
    """Return what is in the cache beside the files of locks."""
    return sorted(path.name for path in (tmp_path / "cache" / "cpu").iterdir() if path.suffix != ".lock")


# ------------------------------------------------------------------------------------------ building


def test_processes_at_once_compile_once(compiler: Script, tmp_path: Path) -> None:
    compiler(f"echo >> {tmp_path}/compiled\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.05; done")
    processes = [start("-c", BUILD) for _ in range(3)]
    said = sorted(str(process.stderr and process.stderr.readline()) for process in processes)
    (tmp_path / "go").touch()
    outcomes = [finish(process) for process in processes]
    assert [(code, err) for code, _, err in outcomes] == [(0, "")] * 3
    assert said[0].startswith("building the CPU kernels for portable, once, with")
    assert said[1:] == ["waiting for another process that builds the CPU kernels for portable ...\n"] * 2
    assert (tmp_path / "compiled").read_text() == "\n"
    (path,) = {Path(out.strip()) for _, out, _ in outcomes}
    assert left(tmp_path) == [path.parent.name]
    assert Library("portable", ctypes.CDLL(str(path))).dot_bf16 is False
    assert path.parent.stat().st_mode & 0o777 == 0o755
    code, out, err = finish(start("-c", BUILD))  # a fourth one has nothing to build
    assert (code, out.strip(), err) == (0, str(path), "")


def test_a_killed_build_leaves_nothing_broken_and_no_lock(compiler: Script, tmp_path: Path) -> None:
    """Its compiler may outlive it."""
    compiler(f'touch {tmp_path}/started; for last; do :; done; echo half > "$last"; sleep 600')
    process = start("-c", BUILD)
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        finish(process)
        (private,) = left(tmp_path)
        assert private.startswith(".building-")
        compiler("")
        code, out, err = finish(start("-c", BUILD))
        assert (code, "waiting" in err) == (0, False)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    path = Path(out.strip())
    assert Library("portable", ctypes.CDLL(str(path))).dot_bf16 is False
    assert left(tmp_path) == [private, path.parent.name]  # somebody may still be building there


@pytest.mark.usefixtures("small")
def test_a_file_system_without_locks_builds_all_the_same() -> None:
    (cache.prepare() / ".portable.lock").mkdir()
    assert loads(built())


@pytest.mark.parametrize("spoil", ["truncate", "overwrite", "remove", "empty"])
@pytest.mark.usefixtures("small")
def test_spoilt_kernels_are_built_again(spoil: str) -> None:
    path = built()
    good = path.read_bytes()
    if spoil == "truncate":
        path.write_bytes(good[: len(good) // 2])
    elif spoil == "overwrite":
        path.write_bytes(b"\0" * len(good))
    elif spoil == "remove":
        path.unlink()
    else:
        shutil.rmtree(path.parent)
        path.parent.mkdir()
    assert built() == path
    assert len(path.read_bytes()) == len(good)
    assert loads(path)


@pytest.mark.usefixtures("small")
def test_other_sources_flags_and_arguments_in_cxx_make_kernels_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What "g++ -O0" has built is not used later, when CXX is "g++" again. What is kept needs no compiler."""
    first, other = built().parent, Level("other", ("-DOTHER",), frozenset())
    monkeypatch.setenv("CXX", f"{tmp_path}/compiler -DONE")
    second = built().parent
    monkeypatch.setenv("CXX", f"{tmp_path}/compiler")
    (tmp_path / "sources" / "more.h").write_text("// nothing\n")
    assert len({first, second, built().parent, built(other).parent}) == 4
    (tmp_path / "sources" / "more.h").unlink()
    (tmp_path / "compiler").unlink()
    assert built().parent == first
    (tmp_path / "sources" / "more.h").write_text("// another source\n")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler '.*compiler' was found"):
        built()


# ------------------------------------------------------------------------------------------ no kernels


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PATH": ""}, r"no C\+\+ compiler 'g\+\+' was found \(install g\+\+, or set CXX\)"),
        ({"CXX": "g++-none"}, r"no C\+\+ compiler 'g\+\+-none' was found"),
        ({"CXX": "g++ '"}, "CXX is not a valid command: No closing quotation"),
        ({"CXX": "false"}, "the compiler 'false' failed: "),
        ({"CXX": "true"}, r"the compiler 'true' wrote no file \(set CXX to a C\+\+ compiler\)"),
        ({"MLA_CACHE_DIR": "a file"}, "built kernels cannot be stored: .*MLA_CACHE_DIR to another folder"),
        ({"MLA_CACHE_DIR": "/proc/none"}, "built kernels cannot be stored: .*'/proc/none'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_prevents_a_build_is_said_in_one_clause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "a file").touch()
    for name, value in {"MLA_CACHE_DIR": "", **variables}.items():
        path = name == "MLA_CACHE_DIR"
        monkeypatch.setenv(name, str(tmp_path / value) if path else value)
    with pytest.raises(BuildError, match=reason) as caught:
        built()
    assert "\n" not in str(caught.value)


def test_instructions_that_a_compiler_does_not_know_are_not_announced(
    compiler: Script, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Such a level is tried by every process."""
    unknown = Level("unknown", ("-mnone",), frozenset())
    with pytest.raises(BuildError, match="unrecognized command-line option '-mnone'"):
        built(unknown)
    assert capfd.readouterr().err == ""
    assert left(tmp_path) == []


def test_arguments_in_cxx_do_not_change_what_a_level_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A wheel that was built with -march=native must run elsewhere."""
    if platform.machine() != "x86_64":
        pytest.skip("asks the compiler for macros of x86-64")
    source = small_sources(tmp_path / "sources") / "api.cpp"
    lines = "#if defined(__AVX__) || defined(__SSE4_2__)\n#error more than the portable level\n#endif\n"
    source.write_text(lines + source.read_text())
    monkeypatch.setattr(compilation, "SOURCES", source.parent)
    (tmp_path / "made").mkdir()
    compilation.make_kernels(("g++", "-march=native"), PORTABLE, tmp_path / "made")
    assert loads(tmp_path / "made" / compilation.LIBRARY)


@pytest.mark.parametrize("target", ["riscv64-linux-gnu", "x86_64-w64-mingw32", "arm64-apple-darwin", ""])
def test_a_compiler_for_an_unknown_target_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str
) -> None:
    monkeypatch.setattr(compilation.sysconfig, "get_platform", lambda: "linux-x86_64")
    path = tmp_path / "foreign"
    path.write_text(f"#!/bin/sh\necho {target}\n")
    path.chmod(0o755)
    with pytest.raises(BuildError, match=f"compiles for '{target}', not for Linux on x86_64, aarch64$"):
        compilation.compiled_machine((str(path),))


def test_a_processor_without_the_instructions_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        compilation, "processor_flags", lambda: frozenset({"sse2", "avx2", "fma", "f16c", "bmi2"})
    )
    assert [level.name for level in compilation.levels()] == ["avx2", "portable"]
    with pytest.raises(BuildError, match=r"this processor lacks avx512bw, .*, which level 'avx512' needs"):
        compilation.levels("avx512")
    monkeypatch.setattr(compilation, "processor_flags", frozenset)  # arm64, or no /proc
    assert [level.name for level in compilation.levels()] == ["portable"]
