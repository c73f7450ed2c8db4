"""Building the kernels: processes at once, killed builds, spoilt caches, and reasons for having none."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from native_cases import BF16, CPU, levels_here

import mla
from mla_backend_cpu import build, instruction_sets, library, tuning
from mla_backend_cpu.library import Library
from mla_backends.api import LinearSpec

PORTABLE = instruction_sets.choose_level("portable")
BUILD = """
from mla_backend_cpu import build, instruction_sets
print(build.library(instruction_sets.choose_level("portable")))
"""
LIST_OPS = ("-m", "mla.bench", "--backend", "cpu", "--list-ops")

Script = Callable[[str], Path]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return a function that puts a script before the real compiler, which then optimises nothing, for speed.

    It also makes an empty cache. The script runs for a compilation only, not when asked for the version.
    """
    real = shutil.which("g++")
    assert real, "these tests need g++"
    path = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("MLA_CACHE_DIR", str(tmp_path / "cache"))

    def write(script: str = "") -> Path:
        path.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*)\n:\n{script}\nesac\nexec {real} "$@" -O0\n')
        path.chmod(0o755)
        return path

    write()
    return write


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start Python in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def loads(path: Path) -> bool:
    """Say whether a library of `small_sources` can be loaded; in a process that a spoilt one may end."""
    code = "import sys, ctypes; ctypes.CDLL(sys.argv[1]).mla_dot_bf16()"
    return subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0


def left(tmp_path: Path) -> list[str]:
    """Return what is in the cache."""
    return sorted(path.name for path in (tmp_path / "cache" / "cpu").iterdir())


# ------------------------------------------------------------------------------------------ building


def test_two_processes_may_build_at_once(compiler: Script, tmp_path: Path) -> None:
    compiler(  # each waits until both compile
        f"touch {tmp_path}/started.$$\n"
        f"while [ $(ls {tmp_path}/started.* | wc -l) -lt 2 ]; do sleep 0.05; done"
    )
    found = [finish(process) for process in [start("-c", BUILD), start("-c", BUILD)]]
    assert [code for code, _, _ in found] == [0, 0]
    paths = {Path(out.strip()) for _, out, _ in found}
    assert len(paths) == 1
    for _, _, err in found:
        assert "building the CPU kernels for portable, once, with" in err
    (path,) = paths
    assert left(tmp_path) == [path.parent.name]
    assert Library("portable", ctypes.CDLL(str(path))).dot_bf16 is False
    assert path.parent.stat().st_mode & 0o777 == 0o755
    code, out, err = finish(start("-c", BUILD))  # a third one has nothing to build
    assert (code, out.strip(), err) == (0, str(path), "")


def test_a_killed_build_leaves_nothing_broken(compiler: Script, tmp_path: Path) -> None:
    compiler(f'touch {tmp_path}/started; for last; do :; done; echo half > "$last"; sleep 600')
    process = start("-c", BUILD)
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    (private,) = left(tmp_path)
    assert private.startswith(".building-")
    compiler("")
    code, out, _ = finish(start("-c", BUILD))
    assert code == 0
    path = Path(out.strip())
    assert Library("portable", ctypes.CDLL(str(path))).dot_bf16 is False
    assert left(tmp_path) == [private, path.parent.name]  # perhaps somebody is still building there ...
    long_ago = time.time() - 24 * 3600
    os.utime(tmp_path / "cache" / "cpu" / private, (long_ago, long_ago))
    shutil.rmtree(path.parent)
    assert finish(start("-c", BUILD))[0] == 0
    assert left(tmp_path) == [path.parent.name]  # ... but not a day later


@pytest.mark.parametrize("spoil", ["truncate", "overwrite", "remove", "empty"])
def test_spoilt_kernels_are_built_again(
    compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: str
) -> None:
    monkeypatch.setattr(build, "SOURCES", small_sources(tmp_path))
    path = build.library(PORTABLE)
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
    assert build.library(PORTABLE) == path
    assert len(path.read_bytes()) == len(good)
    assert loads(path)


def small_sources(tmp_path: Path) -> Path:
    """Return sources that compile at once."""
    folder = tmp_path / "sources"
    folder.mkdir(exist_ok=True)
    visible = '__attribute__((visibility("default")))'
    (folder / "api.cpp").write_text(f'extern "C" {visible} int mla_dot_bf16() {{ return 0; }}\n')
    return folder


def test_a_change_of_the_sources_is_a_new_build(
    compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "SOURCES", small_sources(tmp_path))
    first = build.library(PORTABLE)
    (tmp_path / "sources" / "more.h").write_text("// nothing\n")
    second = build.library(PORTABLE)
    assert first.parent != second.parent
    assert build.library(PORTABLE) == second
    assert build.library(instruction_sets.Level("other", ("-DOTHER",), frozenset())).parent not in (
        first.parent,
        second.parent,
    )


def test_kernels_that_were_built_need_no_compiler(
    compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "SOURCES", small_sources(tmp_path))
    first = build.library(PORTABLE)
    again = tmp_path / "another"
    again.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo another && exit 0\nexec {tmp_path}/compiler "$@"\n'
    )
    again.chmod(0o755)
    monkeypatch.setenv("CXX", str(again))
    second = build.library(PORTABLE)
    assert second != first
    os.utime(first.parent, (1, 1))
    monkeypatch.setenv("CXX", "g++-none")
    assert build.library(PORTABLE) == second  # the newest
    second.write_bytes(b"spoilt")
    assert build.library(PORTABLE) == first
    (tmp_path / "sources" / "more.h").write_text("// another source\n")
    with pytest.raises(instruction_sets.BuildError, match=r"no C\+\+ compiler 'g\+\+-none' was found"):
        build.library(PORTABLE)


# ------------------------------------------------------------------------------------------ no kernels


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PATH": ""}, r"no C\+\+ compiler 'g\+\+' was found \(install g\+\+, or set CXX\)"),
        ({"CXX": "g++-none"}, r"no C\+\+ compiler 'g\+\+-none' was found"),
        ({"CXX": "g++ '"}, "CXX is not a valid command: No closing quotation"),
        ({"CXX": "false"}, "the compiler 'false' failed: "),
        ({"MLA_CACHE_DIR": __file__}, "built kernels cannot be stored: .*MLA_CACHE_DIR to another folder"),
        ({"MLA_CACHE_DIR": "/proc/none"}, "built kernels cannot be stored: .*'/proc/none'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_prevents_a_build_is_said_in_one_clause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name, value in {"MLA_CACHE_DIR": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(instruction_sets.BuildError, match=reason) as caught:
        build.library(PORTABLE)
    assert "\n" not in str(caught.value)


def test_a_compiler_that_fails_is_quoted(compiler: Script, tmp_path: Path) -> None:
    compiler("echo 'In file included from api.cpp:'; echo 'api.cpp:7: error: no such luck' >&2; exit 1")
    with pytest.raises(
        instruction_sets.BuildError, match=r"compiler' failed: api.cpp:7: error: no such luck$"
    ):
        build.library(PORTABLE)
    assert left(tmp_path) == []


def test_a_processor_without_the_instructions_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        instruction_sets, "processor_flags", lambda: frozenset({"sse2", "avx2", "fma", "f16c", "bmi2"})
    )
    assert instruction_sets.choose_level().name == "avx2"
    with pytest.raises(
        instruction_sets.BuildError, match=r"this processor lacks avx512bw, .*, which level 'avx512' needs"
    ):
        instruction_sets.choose_level("avx512")
    monkeypatch.setattr(instruction_sets, "processor_flags", frozenset)  # arm64, or no /proc
    assert instruction_sets.choose_level().name == "portable"
    with pytest.raises(instruction_sets.BuildError, match="unknown level 'best'"):
        instruction_sets.choose_level("best")


def test_the_processor_flags_are_those_of_this_machine() -> None:
    text = Path("/proc/cpuinfo").read_text()
    for name in ("sse2", "avx2", "avx512_bf16", "amx_tile"):
        assert (name in instruction_sets.processor_flags()) == (f" {name} " in text.replace("\n", " "))


# ------------------------------------------------------------------------------------------ the runner


def bench(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *LIST_OPS, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("no_level_named")
def test_without_kernels_the_reference_runs_and_the_reason_is_printed(tmp_path: Path) -> None:
    done = bench(PATH="", CXX="", MLA_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0
    assert "\nrotate_query: reference\n" in done.stdout
    reason = "not used because no C++ compiler 'g++' was found (install g++, or set CXX)"
    for op in ("linear", "batched_linear", "write_latent", "latent_attention", "expanded_attention"):
        assert f"  fused op 'native_{op}' {reason}\n" in done.stdout
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_level_named")
def test_without_kernels_a_layer_computes_and_the_result_names_the_reason(tmp_path: Path) -> None:
    code = """if True:
        import mla, torch
        from mla.weights import random_state_dict
        backend = mla.load_backend("cpu")
        config = mla.MLAConfig(hidden_size=64, num_attention_heads=2)
        layer = mla.MLA(config, backend=backend)
        layer.load_state_dict(random_state_dict(config))
        cache = mla.LatentCache(config, max_tokens=256, device=backend.device)
        batch = cache.extend(cache.new_sequences(1), [3])
        print(layer(torch.ones(3, 64).bfloat16(), batch, cache.pages[0]).isfinite().all().item())
        print(backend.environment()["kernels"])"""
    broken = tmp_path / "compiler"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "counted" >> "$0.log"\nexit 1\n')
    broken.chmod(0o755)
    variables = {**os.environ, "CXX": str(broken), "MLA_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"True\nnone: the compiler '{broken}' failed: no message\n"
    assert (tmp_path / "compiler.log").read_text() == "counted\n"  # tried once, not for every question


@pytest.mark.parametrize(
    ("options", "variable", "kernels"),
    [
        ({"native": "portable"}, "", "portable"),
        ({}, "portable", "portable"),
        ({}, "", levels_here()[0]),
        ({"native": "amx_emulated"}, "", "amx_emulated"),
        ({"native": "off"}, "", "off"),
        ({}, "off", "off"),
        ({"native": "portable"}, "off", "portable"),  # the option wins
    ],
)
def test_the_level_is_chosen_by_option_or_environment(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], variable: str, kernels: str
) -> None:
    monkeypatch.setenv("MLA_CPU_NATIVE", variable)
    if not variable:
        monkeypatch.delenv("MLA_CPU_NATIVE")
    monkeypatch.setattr(tuning, "torch_has_tiles", lambda: False)  # a measurement might decide against them
    backend = mla.load_backend("cpu", options=options)
    assert backend.environment()["kernels"] == kernels
    name = "amx_emulated_native_linear" if kernels == "amx_emulated" else "native_linear"
    reasons = backend.ops()[name].unsupported_reasons(LinearSpec(8, 8, 1, BF16, CPU))
    assert reasons == (["disabled by the option native=off"] if kernels == "off" else [])


def test_a_wrong_level_is_one_sentence() -> None:
    done = bench("-O", "native=best")
    listed = ", ".join(level.name for level in instruction_sets.LEVELS[:-1])
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"backend 'cpu' takes -O native=auto, off, {listed} or portable, got 'best'.\n"
    )
    assert "Traceback" not in done.stderr


def test_emulation_is_named_wherever_ops_are() -> None:
    done = bench("-O", "native=amx_emulated")
    assert done.returncode == 0
    assert "\nlatent_attention: amx_emulated_native_latent_attention\n" in done.stdout
    assert "native=auto, off, amx, avx512_bf16" in bench("-O", "native=no").stderr
    assert "emulated" not in bench("-O", "native=no").stderr


def test_a_compiler_that_does_not_know_the_instructions_leaves_the_next_level(
    compiler: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(
        'case "$*" in *mavx2*) '
        "echo \"g++: error: unrecognized command-line option '-mavx2'\" >&2; exit 1;; esac"
    )
    monkeypatch.setattr(
        instruction_sets, "processor_flags", lambda: frozenset({"avx2", "fma", "f16c", "bmi2"})
    )
    library._load.cache_clear()
    try:
        kernels = library.load("auto")
        assert kernels.level == "portable"
        assert "unrecognized command-line option '-mavx2'" in kernels.passed_over["avx2"]
        with pytest.raises(instruction_sets.BuildError, match="unrecognized command-line option"):
            library.load("avx2")
    finally:
        library._load.cache_clear()


# ------------------------------------------------------------------------------------------ sanitizers


@pytest.mark.parametrize("name", dict.fromkeys(("portable", levels_here()[0], instruction_sets.EMULATED)))
def test_the_sanitizers_find_nothing(tmp_path: Path, name: str) -> None:
    """Ragged, page-boundary and poisoned cases stay within memory that is just large enough."""
    level, program = instruction_sets.choose_level(name), tmp_path / "driver"
    flags = [flag for flag in build.FLAGS if flag not in ("-O3", "-fPIC", "-fvisibility=hidden")]
    checks = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    driver = Path(__file__).with_name("native_driver.cpp")
    built = subprocess.run(
        ["g++", *flags, *checks, *level.flags, f"-I{build.SOURCES}", str(driver), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" cases, 0 wrong\n")
