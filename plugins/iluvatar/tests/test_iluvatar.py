"""The Iluvatar backend without a card. Its life on an emulated one is in tests/backends/emulation."""

from __future__ import annotations

from importlib import metadata

import pytest

from mla_backend_iluvatar import Iluvatar
from mla_backends.errors import BackendError, DeviceUnavailable
from mla_backends.registry import open_backend


def test_it_requires_no_torch() -> None:
    """pip would replace the vendor's build of it. An editable install requires `editables` as well."""
    required = metadata.requires("mla-backend-iluvatar") or []
    always = [
        requirement
        for requirement in required
        if "extra" not in requirement and not requirement.startswith("editables")
    ]
    assert always == ["mla-backends<0.2,>=0.1", "mla-bench<0.2,>=0.1"]


def test_another_vendors_torch_is_a_sentence() -> None:
    with pytest.raises(DeviceUnavailable, match="this torch is ") as error:
        open_backend("iluvatar")
    assert "its version contains +corex" in str(error.value)


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
