"""What Triton needs at run time is a reason with its cure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_backends.api import NormSpec
from mla_backends.triton_ops.launcher import Launcher, missing
from mla_backends.triton_ops.pointwise import RmsNorm


def test_without_triton_its_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that happens to have its name is not Triton, and none is imported to know that."""
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    for required, cure in (
        (None, "this torch asks for none"),
        (["sympy", 'triton == 3.8.0 ; sys_platform == "linux"'], "pip install triton==3.8.0"),
        (["pytorch-triton-rocm==3.1.0"], "pip install pytorch-triton-rocm==3.1.0"),
    ):
        monkeypatch.setattr("importlib.metadata.requires", lambda name, listed=required: listed)
        (reason,) = missing()
        assert reason.startswith("triton is not installed: ")
        assert reason.endswith(cure)
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('nobody may import this')")
    assert missing() == []


class Uncompiled(RmsNorm):
    def attempt(self, spec: Any) -> str:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def test_what_does_not_compile_is_a_reason_that_names_what_triton_needs() -> None:
    (reason,) = Uncompiled(Launcher()).preflight(NormSpec(64, torch.float32, torch.device("cpu")))
    assert reason.startswith("the Triton kernel raises RuntimeError: Failed to find C compiler. ")
    for word in ("gcc", "CC", "python3-dev", "TRITON_CACHE_DIR", "-O triton=off"):
        assert word in reason
