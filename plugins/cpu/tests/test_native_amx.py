"""The level for AMX: what happens where it is refused, that it holds its instructions, and its emulation."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import mla
from mla_backend_cpu import compilation, products
from mla_backend_cpu.compilation import LEVELS
from mla_backends import BackendError


@pytest.mark.usefixtures("no_level_named", "nothing_loaded")
def test_amx_is_refused_with_the_systems_reason_and_the_next_level_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The request is a real one: processors without AMX, and old kernels, refuse it."""
    flags = compilation.processor_flags()
    if "amx_tile" in flags or compilation.tiles_refused() is None:
        pytest.skip("this machine has AMX")
    claimed = flags | next(level for level in LEVELS if level.name == "amx").needs
    if not claimed - {"amx_tile", "amx_bf16"} <= flags:
        pytest.skip("this processor lacks AVX-512-BF16, which amx needs beside the tiles")
    monkeypatch.setattr(compilation, "processor_flags", lambda: claimed)
    monkeypatch.setattr(products, "product_gain", lambda kernels, fp32: 2.0)
    backend = mla.load_backend("cpu")
    lines = mla.MLA(mla.MLAConfig(hidden_size=64, num_attention_heads=2), backend=backend).ops.explain()
    kernels = backend.environment()["kernels"]
    with pytest.raises(BackendError, match=r"no kernels for native=amx: Linux refuses this process"):
        mla.load_backend("cpu", options={"native": "amx"})
    refused = "Linux refuses this process AMX tiles ("
    assert f"CPU kernels for avx512_bf16 instead of amx: {refused}" in capsys.readouterr().err
    assert "latent_attention: native_latent_attention" in lines
    assert kernels.startswith(f"avx512_bf16; not amx: {refused}")


def test_the_level_for_amx_holds_its_instructions(tmp_path: Path) -> None:
    """Compiled, not run: this needs no AMX."""
    level = next(level for level in LEVELS if level.name == "amx")
    built = tmp_path / "kernels.o"
    if platform.machine() != "x86_64" or not shutil.which("objdump"):
        pytest.skip("needs an x86-64 compiler and objdump")
    source = str(compilation.SOURCES / "api.cpp")
    subprocess.run(["g++", *compilation.FLAGS, *level.flags, "-c", source, "-o", str(built)], check=True)
    listing = subprocess.run(["objdump", "-d", str(built)], capture_output=True, text=True, check=True).stdout
    for instruction in ("tdpbf16ps", "tileloadd", "tilestored", "tilezero"):
        assert instruction in listing
    assert listing.count("ldtilecfg") == listing.count("tilerelease") > 0
