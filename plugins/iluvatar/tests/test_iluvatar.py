"""The Iluvatar backend without a card. Its life on an emulated one is in tests/backends/emulation."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from mla_backend_iluvatar import Iluvatar, refusal
from mla_backends.errors import BackendError, DeviceUnavailable
from mla_backends.registry import open_backend

CPU = torch.device("cpu")


def test_it_requires_no_torch() -> None:
    """pip would replace the vendor's build of it. An editable install requires `editables` as well."""
    required = metadata.requires("mla-backend-iluvatar") or []
    always = [one for one in required if "extra" not in one and not one.startswith("editables")]
    assert always == ["mla-backends<0.2,>=0.1"]


def test_another_vendors_torch_is_a_sentence() -> None:
    with pytest.raises(DeviceUnavailable, match="this torch is ") as error:
        open_backend("iluvatar")
    assert "its version contains +corex" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_right_product_is_accepted(dtype: torch.dtype) -> None:
    """The factors are chosen so that every floating dtype gets the product exactly right."""
    assert refusal(dtype, CPU) == ""


@pytest.mark.parametrize("scale", [1.01, 0.0, float("nan")])
def test_a_wrong_product_is_not(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.Tensor.__matmul__

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return right(a, b) * scale if a.is_floating_point() else right(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert refusal(torch.float16, CPU) == "a product came out wrong"


def test_a_product_that_raises_says_how() -> None:
    assert refusal(torch.float16, torch.device("meta")).startswith("a product raised NotImplementedError: ")


def test_nothing_is_native_before_it_was_tried() -> None:
    assert Iluvatar().dtypes() == ()


def test_graphs_are_opt_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENFORCE_CUDA_GRAPH", raising=False)
    assert not Iluvatar().graphs_by_default()
    monkeypatch.setenv("VLLM_ENFORCE_CUDA_GRAPH", "0")
    assert not Iluvatar().graphs_by_default()
    monkeypatch.setenv("VLLM_ENFORCE_CUDA_GRAPH", "1")
    assert Iluvatar().graphs_by_default()
    with pytest.raises(BackendError, match="takes -O graph=on or off, got '1'"):
        Iluvatar({"graph": "1"})
