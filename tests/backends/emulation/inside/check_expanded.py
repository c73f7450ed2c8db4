"""Expanded attention with what torch itself brings: long contexts through SDPA, and its own varlen kernel."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch

import mla
from mla.bench import results
from mla.layer.ops import attention_spec
from mla.layer.plan import rebuilt_bytes
from mla.verify.layer_check import Checker
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict

COMMON = Path(__file__).resolve().parents[3] / "fakes" / "kernels" / "common"
KEY = {"moore": "PrivateUse1"}.get(os.environ["EMULATED_BACKEND"], "CUDA")
NEW, PAST = (40, 10), (0, 50)  # like a prompt of 4096, and 1024 after 4096, with a workspace of 256 MiB


@pytest.fixture
def tight(config: mla.MLAConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let layers have a workspace of 20 keys unless they are told otherwise."""
    size = 20 * rebuilt_bytes(config, 2, 1)
    monkeypatch.setitem(mla.MLA.__init__.__kwdefaults__, "workspace_bytes", size)
    return size


@pytest.mark.only("nvidia")  # once will do: no op depends on the vendor
def test_a_run_of_long_prompts_goes_through_sdpa(tight: int, bench: Any, tmp_path: Path) -> None:
    """The histories of the decode scenario are what a workspace of 20 keys is too small for."""
    which = ("--scenario", "decode", "--implementations", "mla", "--mode", "eager", "--cache", "warm")
    done = bench("--attention", "expanded", "--ops", "sdpa", *which, "-o", "run.json")
    assert done.code == 0, done.err
    (case,) = results.decode((tmp_path / "run.json").read_bytes()).cases
    assert (case.ops["expanded_attention"], case.check.status) == ("sdpa", "ok")


@pytest.mark.only("nvidia")  # once will do: no op depends on the vendor
def test_a_long_context_is_right_and_planning_it_does_not_wait(
    tight: int, backend: Any, config: mla.MLAConfig
) -> None:
    layer, cache, ids, hidden, check = prepared(backend, config)
    layer.plan(cache.extend(ids, NEW))  # angles and tables are made
    for sequence, past in zip(ids, PAST, strict=True):
        cache.truncate(sequence, past)
    with emulated.forbidden_waits():
        batch = cache.extend(ids, NEW)
        out = layer(hidden, batch, cache.pages[0])
    assert len(layer.plan(batch).expanded.rounds) == 2
    check(out.cpu())


def prepared(backend: Any, config: mla.MLAConfig) -> Any:
    """Return a layer on SDPA, a cache with histories, inputs, and the check of an output."""
    layer = mla.MLA(config, backend=backend, attention="expanded", ops="sdpa")
    weights = random_state_dict(config)
    layer.load_state_dict(weights)
    cache = mla.LatentCache(config, max_tokens=512, device=backend.device)
    ids = cache.new_sequences(2)
    widths = (config.kv_lora_rank, config.qk_rope_head_dim)
    history = [tuple(torch.randn(past, width).bfloat16() for width in widths) for past in PAST]
    for sequence, (kv, pe) in zip(ids, history, strict=True):
        cache.load(sequence, kv, pe)
    hidden = torch.randn(sum(NEW), config.hidden_size).bfloat16()

    def check(out: torch.Tensor) -> None:
        truth = oracle(config, weights, hidden, NEW, history)
        checker = Checker(truth[None], torch.bfloat16, lambda: pytest.fail("not asked for"))
        verdict = checker.check(out[None], held_to_reference=False)
        assert verdict.status == "ok", verdict.reason

    return layer, cache, ids, hidden.to(backend.device), check


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what stands in for torch's kernel."""
    monkeypatch.syspath_prepend(COMMON)
    return importlib.import_module("fake_kernels.torch_flash")


@pytest.mark.only("nvidia", "moore")
def test_torchs_own_kernel_is_tried_before_it_is_used(backend: Any, stand_ins: Any) -> None:
    op = backend.ops()["torch_varlen"]
    spec = attention_spec(mla.MLAConfig.preset("deepseek-v2-lite"), torch.bfloat16, backend.device)
    kind = backend.device.type
    missing = f"this torch has no flash attention of its own for devices of kind '{kind}'"
    has_one = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_flash_attention_forward", KEY)
    assert op.unsupported_reasons(spec) == ([] if has_one else [missing])  # PyPI's torch is built for CUDA
    right = stand_ins.musa if kind == "musa" else stand_ins.cuda
    for kernel, wrong in ((right, 0), (stand_ins.first_key, 1), (stand_ins.without_flash, 1)):
        with stand_ins.registered(kernel, "CPU", KEY):
            assert op.unsupported_reasons(spec) == []
            assert len(op.preflight(spec)) == wrong
