"""Whose torch is it: every CUDA-like build, seen by every backend that could mistake it for its own.

The marks are put on the torch of this process; nothing else of it is used.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from mla_backends.cuda import cuda_build
from mla_backends.registry import create

CUDA_LIKE = ("nvidia", "metax", "iluvatar")
# build -> (version of torch, torch.version.cuda, further marks, the backend that serves it)
BUILDS: dict[str, tuple[str, str | None, dict[str, Any], str]] = {
    "PyPI": ("2.9.0+cu128", "12.8", {}, "nvidia"),
    "NVIDIA's container": ("2.9.0a0+50eac81", "13.0", {}, "nvidia"),
    "CoreX by attribute": ("2.7.1", "10.2", {"corex": True}, "iluvatar"),
    "CoreX by version": ("2.10.0+corex.4.5.0", "10.2", {}, "iluvatar"),
    "MACA by version": ("2.8.0+metax3.3.0.2", "11.6", {}, "metax"),
    "MACA from source": ("2.4.0a0+git1234567", "11.6", {"USE_MACA": "/opt/maca"}, "metax"),
    "MACA without its SDK": ("2.4.0a0+git1234567", "11.6", {"USE_MACA": None}, "metax"),
    "ROCm": ("2.9.0+rocm6.4", None, {"hip": "6.4"}, ""),
    "ROCm that sets both": ("2.9.0", "12.8", {"hip": "6.4"}, ""),
    "without CUDA": ("2.9.0+cpu", None, {}, ""),
    "under torchada": ("2.9.0", "12.8", {"torchada": True}, "moore"),
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return a function that makes torch look like a build, and returns the backend that serves it."""

    def pretend(build: str) -> str:
        version, cuda, marks, owner = BUILDS[build]
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", marks.get("hip"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        if "corex" in marks:
            monkeypatch.setattr(torch, "corex", True, raising=False)
        if "USE_MACA" in marks:
            monkeypatch.setattr(torch._utils_internal, "USE_MACA", marks["USE_MACA"], raising=False)
        if "torchada" in marks:
            monkeypatch.setitem(sys.modules, "torchada", ModuleType("torchada"))
        return owner

    return pretend


@pytest.mark.parametrize("backend", CUDA_LIKE)
@pytest.mark.parametrize("build", BUILDS)
def test_each_build_is_usable_by_its_own_backend_only(
    pretend: Callable[[str], str], build: str, backend: str
) -> None:
    owner = pretend(build)
    available = create(backend).probe()
    assert available.ok == (backend == owner)
    assert available.evidence
    if available.ok:
        return
    assert available.reason.startswith("this torch is ")
    assert "install torch" in available.hint
    named = {"metax": "its version contains +metax", "iluvatar": "its version contains +corex"}
    assert named.get(backend, "") in available.hint
    if owner:
        assert f"use `--backend {owner}`" in available.hint
    else:
        assert "--backend" not in available.hint


def test_the_extensions_of_a_build_are_read_without_importing_them(tmp_path: Any, monkeypatch: Any) -> None:
    """Importing `torch.utils.cpp_extension` takes longer than a whole probe may."""
    source = tmp_path / "utils" / "cpp_extension.py"
    source.parent.mkdir()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)
    assert cuda_build().backend != "metax"  # there is no such file
    source.write_text("CUDA_HOME = None\n")
    assert cuda_build().backend != "metax"
    source.write_text("MACA_HOME = None\n")
    assert cuda_build().backend == "metax"
    assert "torch.utils.cpp_extension" not in sys.modules


@pytest.mark.parametrize("backend", [*CUDA_LIKE, "moore"])
def test_without_torch_the_reason_is_torch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *rest: Any) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    created = create(backend)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.import_module", missing)
    available = created.probe()
    assert not available.ok
    assert available.reason == "torch is not installed"
    assert available.hint.startswith("install torch")


def test_a_probe_imports_no_kernel_and_no_management_library(tmp_path: Any) -> None:
    code = """
import sys
unwanted = {"flash_mla", "mate", "ixformer", "flashinfer", "flash_attn", "pynvml", "pymtml", "triton"}
from mla_backends.registry import create
for name in ("nvidia", "moore", "metax", "iluvatar"):
    backend = create(name)
    assert not backend.probe().ok or name == "nvidia"
print(sorted(unwanted & {name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.fixture
def precision() -> Iterator[None]:
    """Restore how this process multiplies float32."""
    yield
    torch.set_float32_matmul_precision("highest")


TF32: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "the flag": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "the precision": lambda: torch.set_float32_matmul_precision("high"),
    "bfloat16": lambda: torch.set_float32_matmul_precision("medium"),
}
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    TF32["the newer name"] = lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")


@pytest.mark.parametrize("turn_on", TF32.values(), ids=TF32)
def test_float32_is_multiplied_in_float32_whatever_turned_tf32_on(
    precision: None, turn_on: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quietly: warnings fail a test here, and some releases have announced a successor of every switch."""
    turn_on()
    backend = create("torch", {"device": "cpu"})
    backend.setup()
    assert torch.backends.cuda.matmul.allow_tf32 is False
    assert backend.environment()["float32_matmul_precision"] == "highest"


def test_a_container_that_exports_tf32_is_overruled() -> None:
    """NVIDIA's images may set the variable that torch reads when it starts."""
    code = """
import torch
from mla_backends.registry import create
before = torch.backends.cuda.matmul.allow_tf32
create("torch", {"device": "cpu"}).setup()
print(before, torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())
"""
    variables = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False", "highest"]


@pytest.mark.parametrize("backend", CUDA_LIKE)
def test_the_variables_that_decide_over_tf32_are_recorded(backend: str) -> None:
    assert {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"} <= set(create(backend).variables)
