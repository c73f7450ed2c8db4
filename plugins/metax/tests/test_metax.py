"""The MetaX backend without a card. Its life on an emulated one is in tests/backends/emulation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mla_backend_metax import Metax
from mla_backends.api import AttentionSpec


def backend_on(index: int) -> Metax:
    backend = Metax()
    vars(backend).update(device=torch.device("cuda", index), module=None)
    return backend


def test_macas_variable_wins_over_cudas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert backend_on(1).address().physical_index() == 1
    monkeypatch.setenv("MACA_VISIBLE_DEVICES", "4,6")
    assert backend_on(1).address().physical_index() == 6


def test_both_variables_are_named_when_a_card_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("MACA_VISIBLE_DEVICES", "")
    hint = Metax().device_hint()
    assert hint.startswith("check that `mx-smi` lists the device")
    assert "MACA_VISIBLE_DEVICES=''" in hint
    assert "CUDA_VISIBLE_DEVICES='0'" in hint


def test_what_is_on_pypi_is_not_offered() -> None:
    spec = AttentionSpec(16, 512, 128, 64, 128, 0.1, torch.bfloat16, torch.device("cpu"))
    for op in (op for name, op in Metax().kernels().items() if name != "sdpa"):  # that is torch's own
        (missing, *_) = op.unsupported_reasons(spec)
        assert "MetaX's own index" in missing


def test_a_capability_is_text() -> None:
    """10.0 is a C500 here and a Blackwell card elsewhere, so nothing may compare it."""
    backend = Metax()
    properties = SimpleNamespace(major=10, minor=0)
    backend.__dict__["module"] = SimpleNamespace(get_device_properties=lambda device: properties)
    assert backend.capability() == "10.0"
