"""What the checks inside an emulated process share. EMULATED_BACKEND names the backend under test."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from ceiling_cases import measure_limits_quickly
from garbage import pytest_collection_finish, pytest_unconfigure
from outcome import Outcome
from small_flush import flush_little
from tiny_run import DIMS, write_tiny_run

import mla
from mla.bench.cli.main import main
from mla.bench.measure import passes as warmup
from mla_backends.api import Backend

__all__ = ["pytest_collection_finish", "pytest_unconfigure"]

FAKES = Path(__file__).resolve().parents[3] / "fakes" / "kernels"
PACKAGES = (
    "flash_mla",
    "mate",
    "ixformer",
    "flashinfer",
    "flash_attn",
    "flash_attn_interface",
    "tokenspeed_mla",
    "fake_kernels",
)
# What launches kernels of its own, unseen by torch.
LAUNCHES = {
    "flash_mla": ("get_mla_metadata", "flash_mla_with_kvcache", "flash_mla_sparse_fwd"),
    "mate.flashmla": ("get_mla_metadata", "flash_mla_with_kvcache", "flash_mla_sparse_fwd"),
    "mate.mha_interface": ("flash_attn_varlen_func",),
    "ixformer.inference.functions": ("vllm_paged_attention_mla",),
    "flash_attn": ("flash_attn_varlen_func",),
    "flash_attn_interface": ("flash_attn_varlen_func",),
    "tokenspeed_mla": ("tokenspeed_mla_decode", "tokenspeed_mla_prefill"),
}
# Where torch looks a kernel of its own up, on the emulated device.
DISPATCH_KEYS = ("PrivateUse1",) if os.environ["EMULATED_BACKEND"] == "moore" else ("CUDA",)
# Packages for another card than the emulated one usually is.
CARDS = {"tokenspeed": {"name": "NVIDIA B200", "capability": (10, 0)}}


@dataclass(frozen=True)
class Vendor:
    """What is different about one vendor."""

    device: str
    tool: str  # named in hints
    mark: str  # the evidence that decides
    variable: str  # that chooses devices
    cache: int | None = None
    peak: str = ""  # where the ceiling of the bandwidth comes from
    graphs: str = "on"


VENDORS = {
    "moore": Vendor("musa", "mthreads-gmi", "torch.musa", "MUSA_VISIBLE_DEVICES"),
    "nvidia": Vendor(
        "cuda", "nvidia-smi", "torch.version.cuda", "CUDA_VISIBLE_DEVICES", 50 << 20, "https://www.nvidia.com"
    ),
    "metax": Vendor("cuda", "mx-smi", "torch.__version__", "MACA_VISIBLE_DEVICES"),
    "iluvatar": Vendor("cuda", "ixsmi", "torch.corex", "CUDA_VISIBLE_DEVICES", graphs="off"),
}


Bench = Callable[..., Outcome]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only(backends): a check that other backends do not have")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the checks of other vendors."""
    marks = {item: item.get_closest_marker("only") for item in items}
    items[:] = [
        item for item, mark in marks.items() if mark is None or os.environ["EMULATED_BACKEND"] in mark.args
    ]


@pytest.fixture(scope="session")
def name() -> str:
    """Return the name of the backend under test."""
    return os.environ["EMULATED_BACKEND"]


@pytest.fixture
def vendor(name: str) -> Vendor:
    """Return what is different about the vendor under test."""
    return VENDORS[name]


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Give every check a device in order, an own folder, and the state it may spoil."""
    monkeypatch.chdir(tmp_path)
    kept = emulated.STATE.card, emulated.STATE.count
    emulated.STATE.current = 0
    emulated.STATE.waits.clear()
    yield emulated.STATE
    emulated.STATE.card, emulated.STATE.count = kept


@pytest.fixture
def module(name: str) -> Any:
    """Return the torch module of the device."""
    return torch.musa if name == "moore" else torch.cuda


@pytest.fixture
def backend(name: str) -> Backend:
    """Return the backend, set up."""
    return mla.load_backend(name)


@pytest.fixture
def bench(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """Return a function that runs the command line with a tiny config and workload."""
    options = write_tiny_run(tmp_path)
    measure_limits_quickly(monkeypatch)
    flush_little(monkeypatch)
    monkeypatch.setattr(warmup, "MAX_EXTRA", 2)  # times of an emulation do not settle

    def bench(*words: str) -> Outcome:
        capsys.readouterr()
        code = main(["--backend", name, *options, *words])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Outcome(code, out, err)

    return bench


@pytest.fixture(scope="session")
def config() -> mla.MLAConfig:
    """Return a layer small enough for an emulated device."""
    return mla.MLAConfig(**DIMS)


@pytest.fixture
def vendor_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that puts a fake package on the path; what it launches is one kernel a call."""

    def install(folder: str) -> None:
        emulated.STATE.card = replace(emulated.STATE.card, **CARDS.get(folder, {}))
        for path in (FAKES / "common", FAKES / folder):
            monkeypatch.syspath_prepend(path)
        _forget()
        fakes = importlib.import_module("fake_kernels")
        monkeypatch.setattr(fakes, "host", _launched(fakes.host))
        of_torch, _, function = folder.partition(".")
        if function:  # torch's dispatcher is asked for the device, and the emulation computes on the host
            stand_ins = importlib.import_module(f"fake_kernels.{of_torch}")
            undone.enter_context(stand_ins.registered(getattr(stand_ins, function), "CPU", *DISPATCH_KEYS))
        for module, functions in LAUNCHES.items():
            with suppress(ModuleNotFoundError):
                package = importlib.import_module(module)
                for function in filter(partial(hasattr, package), functions):
                    monkeypatch.setattr(package, function, emulated.kernel(getattr(package, function)))

    with ExitStack() as undone:
        yield install
    _forget()


def _launched(host: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a fake's way to its numbers that is closed while its calls would be missing from a graph."""

    def look(tensor: Any) -> Any:
        if emulated.STATE.recording is not None and hasattr(tensor, "raw"):
            raise RuntimeError("a vendor's kernel that LAUNCHES does not name is captured")
        return host(tensor)

    return look


def _forget() -> None:
    importlib.invalidate_caches()
    for module in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[module]
