"""The NVIDIA backend without a card. Its life on an emulated one is in tests/backends/emulation."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla_backend_nvidia import Nvidia, _driver
from mla_backend_nvidia.kernels import kernels
from mla_backend_nvidia.peaks import SHEETS, peaks
from mla_backends.api import AttentionSpec, SegmentLengths

GIB = 1 << 30


def test_it_requires_torch_and_nothing_of_a_vendor() -> None:
    required = metadata.requires("mla-backend-nvidia") or []
    always = {one for one in required if "extra" not in one and not one.startswith("editables")}
    assert always == {
        "mla-backends<0.2,>=0.1",
        "numpy",
        "torch>=2.4",
    }
    (monitor,) = (one for one in required if "extra" in one)
    assert monitor.startswith("nvidia-ml-py")


# ---------------------------------------------------------------------------------------------- peaks


@pytest.mark.parametrize(
    ("name", "reported", "bandwidth", "bfloat16"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, 3.35e12, 989e12),
        ("NVIDIA H200", 139.8, 4.8e12, 989e12),
        ("NVIDIA A100-SXM4-80GB", 79.3, 2.039e12, 312e12),
        ("NVIDIA A100-SXM4-40GB", 39.4, 1.555e12, 312e12),
    ],
)
def test_a_known_card_has_ceilings_with_a_source(
    name: str, reported: float, bandwidth: float, bfloat16: float
) -> None:
    found, flops = peaks(name, int(reported * GIB))
    assert found is not None
    assert found.value == pytest.approx(bandwidth)
    assert flops["bfloat16"].value == flops["float16"].value == pytest.approx(bfloat16)
    assert flops["float32"].value < flops["bfloat16"].value / 4
    assert {found.source, *(one.source for one in flops.values())} == {SHEETS[name].source}


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("NVIDIA H100 80GB HBM3", 10 * GIB),  # a slice of it
        ("NVIDIA H100 80GB HBM3", None),
        ("NVIDIA H100", 79 * GIB),
        ("NVIDIA GeForce RTX 4090", 24 * GIB),
        ("nvidia h200", 140 * GIB),
        ("", 80 * GIB),
    ],
)
def test_whatever_leaves_a_doubt_is_unknown(name: str, memory: int | None) -> None:
    assert peaks(name, memory) == (None, {})


def test_every_sheet_is_nvidias_own_and_dense() -> None:
    for name, sheet in SHEETS.items():
        assert sheet.source.startswith(("https://www.nvidia.com/", "https://images.nvidia.com/")), name
        assert 100 < sheet.tensor / (sheet.bandwidth / 1e3) < 500, f"{name} is off by a factor"


# ------------------------------------------------------------------------------------------- hardware


def reasons(op: str, architecture: tuple[int, int]) -> list[str]:
    """Return what the op says of a layer of DeepSeek's shape, but for packages that are not installed."""
    spec = AttentionSpec(16, 512, 128, 64, 128, 0.1, torch.bfloat16, torch.device("cpu"))
    found = kernels(lambda: architecture, 132)[op].unsupported_reasons(spec)
    missing = ("is not installed", "no flash attention of its own")
    return [one for one in found if not any(words in one for words in missing)]


@pytest.mark.parametrize(
    ("op", "serves"),
    [
        ("flash_mla", {(9, 0)}),
        ("flashinfer", {(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)}),
        ("flash_attn_3", {(9, 0)}),
        ("flash_attn", {(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)}),
        ("torch_varlen", {(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)}),
    ],
)
def test_a_kernel_is_refused_where_it_was_not_built_for(op: str, serves: set[tuple[int, int]]) -> None:
    for architecture in ((7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        found = reasons(op, architecture)
        assert (not found) == (architecture in serves), (architecture, found)
        assert all(f"this is sm_{architecture[0]}{architecture[1]}" in one for one in found)


DEEPSEEK, SMALL, WIDE = (128, 64, 128), (64, 32, 64), (192, 64, 128)  # qk_nope, qk_rope and v


@pytest.mark.parametrize(
    ("architecture", "cudnn", "unpadded"),
    [
        ((8, 0), 92000, ()),  # FlashAttention 2
        ((8, 9), 92000, ()),
        ((9, 0), 91500, ()),  # not asked first
        ((9, 0), 91501, (DEEPSEEK, SMALL)),
        ((10, 0), 92000, (DEEPSEEK, SMALL)),
        ((10, 3), 92000, (DEEPSEEK, SMALL)),
        ((12, 0), 92000, ()),  # cuDNN is not asked first here
        ((9, 0), None, ()),  # a torch without cuDNN
    ],
)
def test_sdpa_gets_the_widths_that_its_fastest_kernel_takes(
    architecture: tuple[int, int], cudnn: int | None, unpadded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    op = kernels(lambda: architecture, 132)["sdpa"]
    for widths in (DEEPSEEK, SMALL, WIDE):
        spec = AttentionSpec(16, 512, *widths, 0.1, torch.bfloat16, torch.device("cpu"))
        assert op.prepare(spec, SegmentLengths((3,), (3,), True)).pads == (widths not in unpadded)


def test_ops_with_a_log_sum_exp_come_before_the_one_without() -> None:
    """Only they can merge the parts of a long context."""
    found = [op for op in kernels(lambda: (9, 0), 132).values() if op.contract == "expanded_attention/1"]
    assert [op.writes_lse for op in found] == [True] * (len(found) - 1) + [False]


def test_the_placeholder_on_pypi_is_not_offered() -> None:
    """`flash-mla` on PyPI is not the kernel."""
    spec = AttentionSpec(16, 512, 128, 64, 128, 0.1, torch.bfloat16, torch.device("cpu"))
    (missing, *_) = kernels(lambda: (9, 0), 132)["flash_mla"].unsupported_reasons(spec)
    assert "https://github.com/deepseek-ai/FlashMLA" in missing
    assert "pip install" not in missing


@pytest.mark.parametrize("name", ["NVIDIA H20", "Tesla V100-SXM2-16GB", "GeForce GTX 1080", "A100-PCIE-40GB"])
def test_nvidias_own_cards_pass_by_name(name: str) -> None:
    backend = Nvidia()
    backend.__dict__["module"] = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(name=name)
    )
    backend.prepare_device()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build  (x)\n", "570.86"),
        ("something else\n", ""),
    ],
)
def test_the_driver_is_read_from_the_kernel(tmp_path: Path, text: str, version: str) -> None:
    assert _driver(tmp_path / "version") == ""
    (tmp_path / "version").write_text(text)
    assert _driver(tmp_path / "version") == version


def test_a_uuid_finds_the_card_whatever_hides_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "card",
        nvmlSystemGetDriverVersion=lambda: "570.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-4711")
    backend = Nvidia()
    properties = SimpleNamespace(name="NVIDIA H200", uuid="4711-0815")
    backend.__dict__["module"] = SimpleNamespace(
        get_device_properties=lambda device: properties, current_device=lambda: 0
    )
    assert backend.make_monitor().facts() == {"driver": "570.1"}
    assert asked == ["GPU-4711-0815"]
