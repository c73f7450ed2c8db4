"""Which kernels a run uses, and what it says where there are none."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from native_builds import PORTABLE, built
from native_cases import BF16, CPU, levels_here, load

import mla
from mla_backend_cpu import cache, compilation, library, products
from mla_backend_cpu.compilation import LEVELS, BuildError
from mla_backends import BackendError
from mla_backends.api import LinearSpec

Script = Callable[[str], Path]
LIST_OPS = ("-m", "mla.bench", "--backend", "cpu", "--list-ops")


def bench(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *LIST_OPS, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("no_level_named")
def test_without_kernels_the_reference_runs_and_the_reason_is_printed(tmp_path: Path, pure: str) -> None:
    done = bench(PATH="", CXX="", MLA_CACHE_DIR=str(tmp_path), PYTHONPATH=pure)
    assert done.returncode == 0
    assert "\nrotate_query: reference\n" in done.stdout
    reason = "not used because no C++ compiler 'g++' was found (install g++, or set CXX)"
    for op in ("linear", "batched_linear", "write_latent", "latent_attention", "expanded_attention"):
        assert f"  fused op 'native_{op}' {reason}\n" in done.stdout
    assert done.stderr.count("no C++ compiler") == 1
    assert "no CPU kernels: the reference ops run, which is several times slower, since no C" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_level_named")
def test_without_kernels_a_layer_computes_and_the_result_names_the_reason(tmp_path: Path, pure: str) -> None:
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
        mla.MLA(config, backend=mla.load_backend("cpu"))  # what was said is not said again
        print(backend.environment()["kernels"])"""
    broken = tmp_path / "compiler"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "counted" >> "$0.log"\nexit 1\n')
    broken.chmod(0o755)
    variables = {
        **os.environ,
        "CXX": str(broken),
        "MLA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": pure,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    why = f"the compiler '{broken}' failed: no message"
    assert done.stdout == f"True\nnone: {why}\n"
    slower = f"no CPU kernels: the reference ops run, which is several times slower, since {why}"
    assert [line for line in done.stderr.splitlines() if "building" not in line] == [slower]
    tried = (tmp_path / "compiler.log").read_text().count("counted")
    assert tried == len(compilation.levels())  # once for each level, not for every question


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
    monkeypatch.setattr(products, "torch_has_tiles", lambda: False)  # a measurement might decide against them
    backend = mla.load_backend("cpu", options=options)
    assert backend.environment()["kernels"] == kernels
    assert backend.remarks() == []
    assert ("kernels_from" in backend.environment()) == (kernels != "off")
    name = "amx_emulated_native_linear" if kernels == "amx_emulated" else "native_linear"
    reasons = backend.ops()[name].unsupported_reasons(LinearSpec(8, 8, 1, BF16, CPU))
    assert reasons == (["disabled by the option native=off"] if kernels == "off" else [])


def test_a_wrong_level_is_one_sentence() -> None:
    done = bench("-O", "native=best")
    listed = ", ".join(level.name for level in LEVELS[:-1])
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"backend 'cpu' takes -O native=auto, off, {listed} or portable, got 'best'.\n"
    )
    assert "Traceback" not in done.stderr
    assert "emulated" not in done.stderr


def test_emulation_is_named_wherever_ops_are() -> None:
    done = bench("-O", "native=amx_emulated")
    assert done.returncode == 0
    assert "\nlatent_attention: amx_emulated_native_latent_attention\n" in done.stdout


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A processor with AVX2, and a package that came without kernels."""
    has = frozenset({"avx2", "fma", "f16c", "bmi2"})
    monkeypatch.setattr(compilation, "processor_flags", lambda: has)
    monkeypatch.setattr(cache, "PREBUILT", tmp_path / "prebuilt")


@pytest.mark.usefixtures("avx2", "nothing_loaded")
def test_a_compiler_that_does_not_know_the_instructions_leaves_the_next_level(compiler: Script) -> None:
    compiler(
        'case "$*" in *mavx2*) '
        "echo \"g++: error: unrecognized command-line option '-mavx2'\" >&2; exit 1;; esac"
    )
    kernels = load("auto")
    assert kernels.level == "portable"
    assert "unrecognized command-line option '-mavx2'" in kernels.passed_over["avx2"]
    with pytest.raises(BuildError, match="unrecognized command-line option"):
        load("avx2")


@pytest.mark.usefixtures("avx2", "nothing_loaded", "no_level_named")
def test_a_worse_level_that_is_there_serves_if_a_better_one_cannot_be_built(
    compiler: Script, tmp_path: Path
) -> None:
    built()
    (tmp_path / "compiler").unlink()
    backend = mla.load_backend("cpu")
    why = f"no C++ compiler '{tmp_path}/compiler' was found (install g++, or set CXX)"
    assert backend.environment()["kernels"] == f"portable; not avx2: {why}"
    assert backend.remarks() == [f"CPU kernels for portable instead of avx2: {why}"]
    with pytest.raises(BackendError, match="no kernels for native=avx2: no C"):
        mla.load_backend("cpu", options={"native": "avx2"})


class Refusing:
    """A loader that refuses the files of some folder, as that of a mount with noexec."""

    def __init__(self, folder: Path, message: str) -> None:
        self.folder, self.message, self._real = folder, message, ctypes.CDLL

    def __call__(self, name: str, *arguments: object, **options: object) -> ctypes.CDLL:
        if name and Path(os.path.realpath(name)).is_relative_to(self.folder):
            raise OSError(f"{name}: {self.message}")
        return self._real(name, *arguments, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("avx2", "nothing_loaded", "no_level_named")
def test_a_level_that_cannot_be_loaded_leaves_the_next_one(
    compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cache on a mount with noexec, beside kernels of another level that came with the installation."""
    came = tmp_path / "prebuilt" / compilation.kernels_name(PORTABLE)
    came.mkdir(parents=True)
    compilation.make_kernels(compilation.find_compiler(), PORTABLE, came)
    refusing = Refusing(tmp_path / "cache", "failed to map segment from shared object")
    monkeypatch.setattr(library.ctypes, "CDLL", refusing)
    kernels = load("auto")
    assert kernels.level == "portable"
    (kept,) = (tmp_path / "cache" / "cpu").glob("avx2-*")
    assert kernels.passed_over["avx2"] == (
        f"the built kernels cannot be loaded: '{kept}/kernels.so': failed to map segment from shared object "
        "(set MLA_CACHE_DIR to a folder on a file system without noexec)"
    )
