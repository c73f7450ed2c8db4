"""The Iluvatar backend without a card. Its life on an emulated one is in tests/backends/emulation."""

from __future__ import annotations

import pytest

from mla_backend_iluvatar import Iluvatar
from mla_backends.errors import BackendError


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
