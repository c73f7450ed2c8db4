"""Implementations side by side: how far apart, how fast, and how much memory a forward takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_peer import needs_transformers

from mla.bench.measure import samples as agreement
from mla.bench.measure.samples import TransientBytes

MIB = 1 << 20


def test_transient_bytes_are_the_most_alive_at_once() -> None:
    x = torch.zeros(MIB // 4)
    counted = TransientBytes()
    with counted:
        first = x + 1  # 1 MiB
        first = first * 2  # the old one goes only after the new one is there
        del first
        x.add_(1)  # in place: nothing new
        x.view(-1, 2).sum()  # 4 bytes
    assert counted.peak == 2 * MIB


def test_views_and_given_buffers_do_not_count() -> None:
    x, out = torch.zeros(256, 256), torch.empty(256, 256)
    with TransientBytes() as counted:
        torch.mm(x, x.t(), out=out)
        x[:10].transpose(0, 1).unsqueeze(0)
    assert counted.peak == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="packs a tensor with oneDNN")
def test_tensors_that_a_library_packed_have_no_storage_to_count() -> None:
    packed = torch.ones(MIB // 4).to_mkldnn()
    with TransientBytes() as counted:
        plain = packed.to_dense()
    assert counted.peak == plain.nbytes == MIB


def test_counting_does_not_load_torchs_compiler() -> None:
    """In a process of its own: this one may have loaded it for another test."""
    code = (
        "import sys, torch\n"
        "from mla.bench.measure.samples import TransientBytes\n"
        "with TransientBytes() as counted: torch.ones(5)\n"
        "print(counted.peak, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "20 False\n", done.stderr


def test_agreement_is_relative_and_mutual(case: Any) -> None:
    a, b = case(implementation="a"), case(implementation="b")
    base = torch.randn(2, 3, 4)
    agreement.compare([a, b], {"a": dict(enumerate(base)), "b": dict(enumerate(1.25 * base))})
    (of_a,), (of_b,) = a.agreement, b.agreement
    assert (of_a.implementation, of_b.implementation) == ("b", "a")
    assert of_a.relative_difference == pytest.approx(0.2)
    assert of_b.relative_difference == pytest.approx(0.25)
    assert of_a.speed_ratio == pytest.approx(1 / of_b.speed_ratio)


@needs_transformers
def test_a_run_says_how_implementations_relate(bench: Any, small: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    done = bench("--backend", "cpu", *small, "--implementations", "mla,transformers", "-v", "-o", str(path))
    assert done.code == 0, done.err
    cases = json.loads(path.read_text())["cases"]
    for case in cases:
        (agreement,) = case["agreement"]
        assert 0 < agreement["relative_difference"] < 3e-2
        assert agreement["speed_ratio"] > 0
        assert case["memory"]["transient_bytes"] > 0
    assert "  difference " in done.out


def test_memory_at_the_address_of_what_is_gone_counts_again() -> None:
    with TransientBytes() as counted:
        for _ in range(50):  # the allocator hands the same address out again and again
            first = torch.empty(1000)
            del first
            second, third = torch.empty(1000), torch.empty(500)
            del second, third
    assert counted.peak == 6000
