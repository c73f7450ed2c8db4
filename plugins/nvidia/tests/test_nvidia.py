"""The NVIDIA backend without a card. Its life on an emulated one is in tests/backends/emulation."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla_backend_nvidia import Nvidia
from mla_backend_nvidia.cards import SHEETS, driver_version, peaks, tuning_for
from mla_backend_nvidia.kernels import (
    ahead_of,
    installed_triton,
    kernels,
    old_triton,
    starts_early,
)
from mla_backends.api import AttentionSpec
from mla_backends.cuda import CudaBackend
from mla_backends.errors import DeviceUnavailable
from mla_backends.triton_ops import Tile, ordered, triton_ops
from mla_backends.triton_ops.tuning import tile_for

GIB = 1 << 30


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
    declared, flops = peaks(name, int(reported * GIB))
    assert declared is not None
    assert declared.value == pytest.approx(bandwidth)
    assert flops["bfloat16"].value == flops["float16"].value == pytest.approx(bfloat16)
    assert flops["float32"].value < flops["bfloat16"].value / 4
    assert {declared.source, *(peak.source for peak in flops.values())} == {SHEETS[name].source}


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


# ------------------------------------------------------------------------------------------- hardware


CARDS = ((7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (10, 7), (11, 0), (12, 0))


SPEC = AttentionSpec(16, 512, 128, 64, 128, 0.1, torch.bfloat16, torch.device("cpu"))
MISSING = ("is not installed", "no flash attention of its own")


def reasons(op: str, architecture: tuple[int, int], but: tuple[str, ...] = MISSING) -> list[str]:
    """Return what the op says of a layer of DeepSeek's shape, but for packages that are not installed."""
    refusals = kernels(architecture, 132)[op].unsupported_reasons(SPEC)
    return [reason for reason in refusals if not any(words in reason for words in but)]


@pytest.mark.parametrize(
    ("op", "serves"),
    [
        ("flash_mla", {(9, 0)}),
        ("flash_mla_sparse", {(9, 0), (10, 0), (10, 3)}),
        ("flashinfer_sparse", {(10, 0), (10, 3)}),
        ("tokenspeed", {(10, 0), (10, 3), (10, 7)}),
        ("tokenspeed_prefill", {(10, 0), (10, 3), (10, 7)}),
        ("flashinfer", {(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (10, 7), (11, 0), (12, 0)}),
        ("flash_attn_3", {(9, 0)}),
        ("flash_attn", {(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (10, 7), (11, 0), (12, 0)}),
        ("torch_varlen", {(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (10, 7), (11, 0), (12, 0)}),
    ],
)
def test_a_kernel_is_refused_where_it_was_not_built_for(op: str, serves: set[tuple[int, int]]) -> None:
    for architecture in CARDS:
        refusals, why = reasons(op, architecture), " ".join(reasons(op, architecture, ()))
        assert (not refusals) == (architecture in serves), (architecture, refusals)
        assert all(f"this is sm_{architecture[0]}{architecture[1]}" in reason for reason in refusals)
        assert "it runs on" not in why or not re.search("pip install|build", why), "what cannot run here"


def missing(architecture: tuple[int, int], kind: str) -> dict[str, str]:
    """Return op -> why it is refused, of the ops that would run on a card, best first."""
    whys = {}
    for name, op in kernels(architecture, 132).items():
        why = op.unsupported_reasons(SPEC)
        if op.contract.startswith(kind) and not any("but this is sm_" in clause for clause in why):
            whys[name] = "".join(why)
    return whys


@pytest.mark.parametrize(
    ("architecture", "kind", "best", "hint"),
    [
        ((9, 0), "latent", "flash_mla", "sgl-flash-mla"),
        ((10, 0), "latent", "tokenspeed", "pip install tokenspeed-mla"),
        ((10, 3), "latent", "tokenspeed", "pip install tokenspeed-mla"),
        ((8, 0), "latent", "flashinfer", "pip install flashinfer-python"),
        ((8, 9), "latent", "flashinfer", "pip install flashinfer-python"),
        ((12, 0), "latent", "flashinfer", "pip install flashinfer-python"),
        ((9, 0), "expanded", "flash_attn_3", "build the folder hopper"),
        ((10, 0), "expanded", "tokenspeed_prefill", "pip install tokenspeed-mla"),
        ((8, 0), "expanded", "flash_attn", "pip install a wheel"),
    ],
)
def test_the_card_at_hand_names_its_best_kernel_and_how_to_get_it(
    architecture: tuple[int, int], kind: str, best: str, hint: str
) -> None:
    """`--list-ops` and `doctor` print these reasons in this order."""
    first, reason = next(iter(missing(architecture, kind).items()))
    assert first == best
    assert re.search(rf"is not installed \(.*{re.escape(hint)}", reason), reason


@pytest.mark.parametrize(
    ("architecture", "latent"),
    [
        ((8, 0), ["triton_latent", "flashinfer"]),
        ((8, 9), ["triton_latent", "flashinfer"]),
        ((9, 0), ["flash_mla", "triton_latent", "flashinfer"]),
        ((10, 0), ["tokenspeed", "flashinfer", "triton_latent"]),
        ((11, 0), ["flashinfer", "triton_latent"]),  # nothing is predicted of it
        ((12, 0), ["triton_latent", "flashinfer"]),
    ],
)
def test_our_kernels_stand_where_evidence_puts_them(architecture: tuple[int, int], latent: list[str]) -> None:
    ours = triton_ops(tuning_for(227 * 1024), 132)
    there = ordered(kernels(architecture, 132), ours, ahead_of(architecture))
    kinds = {name: op.contract.partition("/")[0] for name, op in there.items()}
    refused = {"flash_mla": architecture != (9, 0), "tokenspeed": architecture[0] != 10}
    assert [
        name for name, kind in kinds.items() if kind == "latent_attention" and not refused.get(name)
    ] == latent
    assert [name for name, kind in kinds.items() if kind == "expanded_attention"][-1] == "triton_expanded"
    assert set(ours) <= set(there)


@pytest.mark.parametrize(
    ("version", "cuda", "hint"),
    [
        ("2.14.1+cu130", "13.0", r"pip install sgl-flash-mla"),
        ("2.15.0a0+nv26", "13.1", r"pip install sgl-flash-mla"),
        ("2.13.0+cu130", "13.0", r"pip install --no-deps sgl-flash-mla, as pip would replace this torch.*"),
        ("2.10.0a0+nv", "13.0", r"build commit 9241ae3 .*"),
        ("2.15.0+cu129", "12.9", r"build commit 9241ae3 .*"),
        ("2.9.0", "13.0", r"build commit 9241ae3 .*"),
        ("2.9.0+cpu", None, r"build commit 9241ae3 .*"),
    ],
)
def test_flash_mla_is_named_for_the_torch_at_hand(
    monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None, hint: str
) -> None:
    """pip must not replace a vendor's torch, and `flash-mla` on PyPI is a placeholder."""
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    reason = missing((9, 0), "latent")["flash_mla"]
    assert re.fullmatch(rf"flash_mla is not installed \({hint}\)", reason), reason


def test_the_first_generation_of_flash_mla_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its planner has room for 4095 rows, and ends the process for more."""

    def decode(
        q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any, head_dim_v: Any,
        tile_scheduler_metadata: Any, num_splits: Any, softmax_scale: Any = None, causal: Any = False,
    ) -> None: ...  # fmt: skip

    module = SimpleNamespace(get_mla_metadata=decode, flash_mla_with_kvcache=decode)
    monkeypatch.setitem(sys.modules, "flash_mla", module)  # type: ignore[arg-type]
    reason = missing((9, 0), "latent")["flash_mla"]
    assert reason.startswith("flash_mla.flash_mla_with_kvcache takes no argument is_fp8_kvcache (")


# --------------------------------------------------------------------------------------- our own kernels

H100, A100, L40S = 232_448, 166_912, 101_376  # bytes of shared memory that a block may use


@pytest.mark.parametrize(
    ("reported", "least"),
    [
        (H100, "200 KiB of"),
        (A100, "160 KiB of"),
        (L40S, "96 KiB of"),
        (49_152, "little"),
        (None, "little or"),
    ],
)
def test_tiles_are_for_the_shared_memory_that_the_card_reports(reported: int | None, least: str) -> None:
    assert tuning_for(reported).source.startswith(f"defaults for {least}")


@pytest.mark.parametrize("name", ["NVIDIA B200", "NVIDIA GB200", "NVIDIA B300 SXM6 AC"])
def test_tensor_memory_has_tiles_of_its_own(name: str) -> None:
    """It does not show in the shared memory."""
    assert tuning_for(H100, name).source == "defaults for tensor memory"
    for other in ("NVIDIA H200", "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GB10", "NVIDIA B2000"):
        assert tuning_for(H100, other) == tuning_for(H100)


@pytest.mark.parametrize(
    ("name", "reported", "triton", "spared"),
    [
        ("NVIDIA H200", H100, (3, 8), {"fp8_ds_mla": Tile(64, 32, 8, 2), "int8": Tile(64, 32, 8, 2)}),
        (
            "NVIDIA B200",
            H100,
            (3, 8),
            dict.fromkeys(("fp8_ds_mla", "int8"), Tile(16, 64, 8, 2, spread=False)),
        ),
        ("NVIDIA A100", A100, (3, 6), {"int8": Tile(64, 16, 8, 3)}),
        ("NVIDIA H200", H100, (3, 6), {}),
        ("NVIDIA A100", A100, (3, 8), {}),
        ("NVIDIA B200", H100, (3, 9), {}),
        ("NVIDIA L40S", L40S, (3, 8), {}),
    ],
)
def test_what_one_triton_spills_has_a_smaller_tile_with_that_triton_alone(
    name: str, reported: int, triton: tuple[int, ...], spared: dict[str, Tile]
) -> None:
    """That none of them spills is read from compiled code: benchmarks/triton/table.md."""
    tuning, latest = tuning_for(reported, name, triton), tuning_for(reported, name)
    for cache in ("", "fp8", "fp8_ds_mla", "int8", "fp8_ds_mla_any", "q8_0"):
        tiles = tuning.of_latents(cache, sparse=False)
        assert tile_for(tiles, 32) == tile_for(latest.latent, 32)
        if cache in spared:
            assert tile_for(tiles, 128).of_bytes(parts=False) == spared[cache]
        else:
            assert tiles == latest.latent
        assert tuning.of_latents(cache, sparse=True) == latest.latent


@pytest.mark.parametrize("reported", [H100, A100, L40S, 49_152])
def test_what_a_tile_holds_fits_the_card(reported: int) -> None:
    """A lower bound: queries once, and keys of all stages but the one that is multiplied (bfloat16)."""
    tuning = tuning_for(reported)
    for width, values, tiles in ((576, 0, tuning.latent), (192, 128, tuning.expanded)):
        for tile in tiles.values():
            held = 2 * (tile.rows * width + max(1, tile.stages - 1) * tile.keys * (width + values))
            assert held <= reported, str(tile)


def backend_of(**properties: Any) -> Nvidia:
    backend, card = Nvidia(), SimpleNamespace(**{"name": "NVIDIA H200", **properties})
    backend.__dict__["module"] = SimpleNamespace(get_device_properties=lambda device: card)
    return backend


def test_our_own_kernels_come_after_the_vendors_but_for_one_with_evidence() -> None:
    backend = backend_of(major=9, minor=0, shared_memory_per_block_optin=H100)
    names = list(backend.ops())
    vendors = list(kernels((9, 0), 132))
    place = vendors.index("flashinfer")
    last = len(vendors) + 1
    assert names[:last] == [*vendors[:place], "triton_latent", *vendors[place:]]
    assert all(name.startswith("triton_") for name in names[last:])
    assert backend.tuning == tuning_for(H100, triton=installed_triton()[1])
    assert backend.ops() is backend.ops(), "they hold scratch memory"


@pytest.mark.parametrize("architecture", CARDS)
def test_our_own_kernels_need_ampere(architecture: tuple[int, int]) -> None:
    backend = backend_of(major=architecture[0], minor=architecture[1])
    assert bool(backend.triton_reason(torch.device("cpu"))) == (architecture < (8, 0))


# --------------------------------------------------------------------------------------------- driver

TOO_OLD = (
    "device failed to start: RuntimeError: The NVIDIA driver on your system is too old (found version {}). "
    "Please update your GPU driver by downloading and installing a new version"
)


@pytest.mark.parametrize(
    "reason",
    [
        TOO_OLD.format(12020),
        "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
        "Error 803: system has unsupported display driver / cuda driver combination",
        "the provided PTX was compiled with an unsupported toolchain.",
        "out of memory",
    ],
)
def test_a_driver_that_is_too_old_is_to_be_updated_or_torch_replaced_wherever_it_shows(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe asks NVML, which says yes; the first use of the device says what is wrong."""

    def fail(*arguments: Any) -> Any:
        raise RuntimeError(reason)

    backend = Nvidia()
    hint = backend.cure(reason) or backend.device_hint()
    assert hint.startswith("update the driver, or install a torch older than ") == (reason != "out of memory")
    assert Nvidia().probe_module(SimpleNamespace(is_available=fail), {}).hint == hint
    monkeypatch.setattr(CudaBackend, "_check_index", fail)
    with pytest.raises(DeviceUnavailable, match="failed to start") as error:
        backend.setup()
    assert error.value.hint == hint


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
    assert driver_version(tmp_path / "version") == ""
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version


def test_a_uuid_finds_the_card_whatever_hides_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "card",
        nvmlSystemGetDriverVersion=lambda: "570.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-4711")
    backend = backend_of(uuid="4711-0815")
    assert backend.monitor is not None
    assert backend.monitor.facts() == {"driver": "570.1"}
    assert asked == ["GPU-4711-0815"]


@pytest.mark.parametrize(
    ("installed", "old"),
    [("3.5.1", True), ("3.2.0+git9641", True), ("3.6.0", False), ("3.10.1", False), (None, False)],
)
@pytest.mark.parametrize("package", ["triton", "pytorch-triton"])
def test_a_triton_that_is_too_old_is_not_tried(
    package: str, installed: str | None, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None or name != package:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    assert old_triton().endswith("whose Triton is 3.6 or newer") == old


def test_launches_start_early_on_hopper_and_newer_with_a_driver_whose_graphs_hold_them() -> None:
    assert starts_early((9, 0))
    assert starts_early((10, 0), "545.23.08")
    assert not starts_early((9, 0), "535.183.01")
    assert not starts_early((8, 9))
