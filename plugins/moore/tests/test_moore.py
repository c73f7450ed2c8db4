"""The Moore Threads backend without a card. Its life on an emulated one is in tests/backends/emulation."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mla_backend_moore
from mla_backend_moore.kernels import kernels
from mla_backends.api import AttentionSpec
from mla_backends.registry import create


def test_no_line_of_it_names_torch_cuda() -> None:
    """Under torchada `torch.cuda` is a mirror of `torch.musa`; elsewhere it is another vendor's device."""
    for path in Path(str(mla_backend_moore.__file__)).parent.glob("*.py"):
        names = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert "cuda" not in {node.attr for node in names}, path


def test_without_torch_musa_the_reason_says_so() -> None:
    available = create("moore").probe()
    assert not available.ok
    assert available.reason == "torch_musa is not installed"
    assert "https://github.com/MooreThreads/torch_musa" in available.hint


def test_a_torch_musa_that_brings_no_musa_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_musa", ModuleType("torch_musa"))
    available = create("moore").probe()
    assert not available.ok
    assert available.reason == f"torch {torch.__version__} has no torch.musa"


def reasons(op: str, capability: str | None, dtype: torch.dtype = torch.bfloat16, heads: int = 16) -> str:
    """Return what the op says of a layer of DeepSeek's shape, but for packages that are not installed."""
    spec = AttentionSpec(heads, 512, 128, 64, 128, 0.1, dtype, torch.device("cpu"))
    answers = kernels(lambda: capability)[op].unsupported_reasons(spec)
    missing = ("is not installed", "no flash attention of its own")
    return "; ".join(reason for reason in answers if not any(words in reason for words in missing))


@pytest.mark.parametrize("op", ["mate", "mate_sparse", "mate_varlen"])
def test_the_kernels_are_for_the_s5000_only(op: str) -> None:
    assert reasons(op, "3.1") == ""
    for capability in ("2.1", "2.2", "3.0", "4.0", None):
        assert f"it runs on capability 3.1 (MTT S5000) only, but this device reports {capability}" in reasons(
            op, capability
        )


def test_torchs_own_kernels_take_values_narrower_than_keys() -> None:
    """Padded to 192, they would leave muDNN's FlashAttention for plain products."""
    offered: Mapping[str, Any] = kernels(lambda: "3.1")
    assert not offered["torch_varlen"].limits.pads(192, 128)
    assert not offered["sdpa"]._pads_values
    for capability in ("2.2", "3.1", "10.0"):
        assert reasons("torch_varlen", capability) == ""
    for capability in ("2.1", None):
        assert f"this device reports {capability}" in reasons("torch_varlen", capability)
