"""What only one vendor's stack needs."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import emulated
import pytest
import torch

import mla
from mla_backends.errors import DeviceUnavailable
from mla_backends.registry import create


@pytest.mark.only("metax")
def test_metax_keeps_attention_off_cudnn(name: str) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    mla.load_backend(name)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.only("nvidia", "metax", "iluvatar")
def test_tf32_is_off_once_the_device_has_started(name: str) -> None:
    torch.set_float32_matmul_precision("high")
    assert mla.load_backend(name).environment()["float32_matmul_precision"] == "highest"


@pytest.mark.only("iluvatar")
def test_iluvatar_believes_products_and_not_words(name: str, state: Any) -> None:
    assert not torch.cuda.is_bf16_supported(including_emulation=False)
    assert torch.bfloat16 in mla.load_backend(name).dtypes()
    state.card = emulated.CARDS["Iluvatar BI-V100"]
    backend = mla.load_backend(name)
    assert torch.bfloat16 not in backend.dtypes()
    assert "aten::mm is not implemented for bfloat16" in backend.environment()["refused.torch.bfloat16"]
    state.card = replace(state.card, products=())
    assert mla.load_backend(name).dtypes() == (torch.float32,)


@pytest.mark.only("nvidia")
def test_nvidia_refuses_a_foreign_device_by_name(name: str, state: Any) -> None:
    state.card = replace(state.card, name="Iluvatar BI-V150")
    with pytest.raises(DeviceUnavailable, match="offers 'Iluvatar BI-V150', not an NVIDIA device"):
        mla.load_backend(name)


@pytest.mark.only("nvidia")
def test_nvidia_names_a_driver_that_is_too_old(
    name: str, module: Any, monkeypatch: pytest.MonkeyPatch, bench: Any
) -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.setattr(module, "synchronize", fail)
    done = bench()
    assert done.code == 3
    assert "update the driver, or install a torch older than" in done.error
    assert "nvidia-smi" not in done.error


@pytest.mark.only("nvidia")
def test_nvidia_asks_nvml_instead_of_starting_the_driver(
    name: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, seen = "PYTORCH_NVML_BASED_CUDA_CHECK", []
    monkeypatch.setattr(module, "is_available", lambda: seen.append(os.environ.get(variable)) or True)
    create(name).probe()
    assert seen == ["1"]
    assert variable not in os.environ


@pytest.mark.only("moore")
def test_moore_never_asks_torch_cuda(name: str, monkeypatch: pytest.MonkeyPatch, bench: Any) -> None:
    """torchada turns `torch.cuda` into a mirror of `torch.musa`; without it there is nothing there."""

    class Trap(SimpleNamespace):
        def __getattribute__(self, attribute: str) -> Any:
            raise AssertionError(f"torch.cuda.{attribute} was asked for")

    backend = create(name)
    monkeypatch.setattr(torch, "cuda", Trap())
    assert backend.probe().ok
    backend.device = backend.setup()
    backend.environment()
    backend.device_info()
    backend.memory()
    backend.dtypes()
    assert backend.graph(lambda: None) is not None


@pytest.mark.only("moore")
def test_moore_multiplies_float32_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mudnn, "allow_tf32", True)  # as torch_musa has it
    backend = mla.load_backend(name)
    assert torch.backends.mudnn.allow_tf32 is False
    assert backend.environment()["mudnn.allow_tf32"] == "False"
    monkeypatch.delattr(torch.backends, "mudnn")  # an old release
    assert "mudnn.allow_tf32" not in mla.load_backend(name).environment()
