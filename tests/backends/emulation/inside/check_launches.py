"""How many launches a step is, per adapter. Each costs the host some microseconds, so none is added unseen.

Copies and kernels count, views and allocations do not; a vendor's function is one launch. A change that adds
one has to say so here.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any, NamedTuple

import emulated
import pytest
import torch

import mla
from mla.weights import random_state_dict

BACKEND = os.environ["EMULATED_BACKEND"]
DIMS = {"hidden_size": 64, "num_attention_heads": 8, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
CONFIG = mla.MLAConfig(**DIMS, qk_rope_head_dim=64, v_head_dim=128)


class Step(NamedTuple):
    """Launches of one step."""

    plan: int  # `extend` and `plan`: once for all layers
    forward: int  # per layer


# Fake package, or "reference" -> launches.
DECODE = {
    "nvidia": {
        "reference": Step(9, 35),
        "nvidia_b": Step(3, 29),
        "nvidia_c": Step(3, 29),
        "nvidia_sgl": Step(3, 29),
        "tokenspeed": Step(7, 28),
        "flashinfer": Step(4, 28),
        "flashinfer_07": Step(4, 28),
    },
    "metax": {"metax": Step(3, 29)},
    "moore": {"reference": Step(9, 35), "moore_mate": Step(3, 29)},
    "iluvatar": {"ixformer": Step(2, 28), "ixformer_old": Step(2, 28)},
}
# The same, captured with its planning for two layers: nothing is planned per layer.
CAPTURED: dict[str, dict[str, Step]] = {
    "nvidia": {
        "reference": Step(8, 35),
        "nvidia_b": Step(2, 32),
        "nvidia_c": Step(2, 32),
        "nvidia_sgl": Step(2, 32),
        "tokenspeed": Step(7, 32),
    },
    "metax": {"reference": Step(8, 35)},
    "moore": {"reference": Step(8, 35)},
    "iluvatar": {"ixformer": Step(2, 32)},
}
PREFILL = {
    "nvidia": {
        "reference": Step(3, 105),
        "tokenspeed": Step(4, 32),
        "flash_attn_2": Step(4, 33),
        "flash_attn_3": Step(4, 31),
        "torch_flash.cuda": Step(4, 33),
    },
    "metax": {"flash_attn_2": Step(4, 33)},
    "moore": {
        "reference": Step(3, 105),
        "moore_mate": Step(4, 31),
        "torch_flash.musa": Step(4, 31),
    },
    "iluvatar": {"reference": Step(3, 105)},
}


@pytest.fixture
def backend(fake: str, name: str, vendor_package: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the backend, with a vendor's package to be found."""
    if fake != "reference":
        vendor_package(fake)
    if fake.startswith("flashinfer"):
        import flashinfer.mla

        wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper
        for method in ("plan", "run"):
            monkeypatch.setattr(wrapper, method, emulated.kernel(getattr(wrapper, method)))
    return mla.load_backend(name)


def prepared(backend: Any, fake: str, attention: str, tokens: int) -> tuple[Any, Any, list[int], Any]:
    """Return a layer, a cache with four histories, their ids, and inputs."""
    ops = "reference" if fake == "reference" else "auto"
    layer = mla.MLA(CONFIG, backend=backend, attention=attention, ops=ops)
    layer.load_state_dict(random_state_dict(CONFIG))
    cache = mla.LatentCache(CONFIG, max_tokens=2048, device=backend.device)
    ids = cache.new_sequences(4)
    cache.extend(ids, [60, 5, 1, 100])
    cache.pages.zero_()
    return layer, cache, ids, torch.randn(tokens, 64).bfloat16().to(backend.device)


def captured_launches(name: str, fake: str) -> Step:
    """Count what a graph of planning and two layers holds, as the runner captures a step."""
    backend = mla.load_backend(name, options={"graph": "on"})
    layer, cache, ids, hidden = prepared(backend, fake, "absorbed", 4)
    batch, out = cache.extend(ids, [1] * 4), torch.empty_like(hidden)
    counts: list[int] = []

    def step() -> None:
        counts[:] = [emulated.STATE.launches]
        batch.update_(batch)  # drops the plan, so that planning is captured too
        layer.plan(batch)
        for _ in range(3):
            counts.append(emulated.STATE.launches)
            layer(hidden, batch, cache.pages[0], out=out)

    assert backend.graph(step) is not None
    update, first, second = (after - before for before, after in pairwise(counts))
    assert first == second
    return Step(update, first)


def launches(backend: Any, fake: str, attention: str, query_lens: tuple[int, ...]) -> Step:
    """Count the launches of a step that is not the first."""
    layer, cache, ids, hidden = prepared(backend, fake, attention, sum(query_lens))
    out = torch.empty_like(hidden)
    for _ in range(2):
        before = emulated.STATE.launches
        batch = cache.extend(ids, query_lens)
        layer.plan(batch)
        planned = emulated.STATE.launches
        layer(hidden, batch, cache.pages[0], out=out)
    return Step(planned - before, emulated.STATE.launches - planned)


@pytest.mark.parametrize("fake", DECODE[BACKEND])
def test_a_decode_step_of_four_lengths(fake: str, backend: Any) -> None:
    assert launches(backend, fake, "absorbed", (1, 1, 1, 1)) == DECODE[BACKEND][fake]


@pytest.mark.parametrize("fake", CAPTURED[BACKEND])
def test_a_captured_decode_step_of_four_lengths(fake: str, backend: Any, name: str) -> None:
    assert captured_launches(name, fake) == CAPTURED[BACKEND][fake]


@pytest.mark.parametrize("fake", PREFILL[BACKEND])
def test_a_prefill_of_four_prompts(fake: str, backend: Any) -> None:
    assert launches(backend, fake, "expanded", (3, 5, 30, 7)) == PREFILL[BACKEND][fake]


def test_what_is_counted() -> None:
    """Views and allocations are free, and what a kernel does inside is its own."""
    device = torch.empty(0, device="musa" if hasattr(torch, "musa") else "cuda").device
    x, launch = torch.ones(4, 4, device=device), emulated.kernel(lambda x: x.mul_(2.0).add_(1.0))

    def count(function: Any) -> int:
        before = emulated.STATE.launches
        function()
        return int(emulated.STATE.launches) - before

    assert count(lambda: (x.t()[1:].view(-1, 2, 2), torch.empty(3, device=device))) == 0
    assert count(lambda: x.mul_(2.0).add_(1.0)) == 2
    assert count(lambda: x.copy_(x + 1.0)) == 2
    assert count(lambda: torch.ones(3).to(device)) == 1
    assert count(lambda: launch(x)) == 1
