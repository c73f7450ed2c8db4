"""A decode step never waits for the device, and no tensor of another device slips into it."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch

import mla
from mla.weights import random_state_dict
from mla_backends import FusedOp

pytestmark = pytest.mark.only("nvidia")  # the suite looks at moore
# One packed copy of the batch's tables, and one for the reference's groups of requests.
UPLOADS_PER_STEP = 2


class Steps:
    """A layer that decodes, one step after the other, over pages that run full on the way."""

    def __init__(self, config: Any, backend: Any, attention: str, counts: tuple[int, ...]) -> None:
        self.layer = mla.MLA(config, backend=backend, attention=attention)
        self.layer.load_state_dict(random_state_dict(config))
        self.cache = mla.LatentCache(config, max_tokens=4096, page_size=16, device=backend.device)
        self.ids = self.cache.new_sequences(len(counts))
        self.cache.extend(self.ids, [9, 40, 1][: len(counts)])
        self.counts = counts
        self.hidden = torch.randn(sum(counts), config.hidden_size).bfloat16().to(backend.device)

    def run(self, count: int) -> None:
        for _ in range(count):
            batch = self.cache.extend(self.ids, self.counts)
            self.layer.plan(batch)
            self.layer(self.hidden, batch, self.cache.pages[0])


@pytest.mark.parametrize("attention", ["absorbed", "expanded", "auto"])
@pytest.mark.parametrize("counts", [(1, 1, 1), (1,), (2, 1, 3)], ids=str)
def test_a_decode_step_does_not_wait(
    attention: str, counts: tuple[int, ...], config: Any, backend: Any
) -> None:
    steps = Steps(config, backend, attention, counts)
    steps.run(3)
    with emulated.forbidden_waits() as state:
        steps.run(12)
    assert not state.waits
    if attention == "absorbed" and set(counts) == {1}:
        assert 12 <= state.uploads <= 12 * UPLOADS_PER_STEP  # equal lengths need no tables of their own


def test_a_prefill_does_not_wait(config: Any, backend: Any) -> None:
    steps = Steps(config, backend, "auto", (30, 200, 5))
    steps.run(1)
    with emulated.forbidden_waits() as state:
        steps.run(2)
    assert not state.waits


class Waiting(FusedOp):
    """Reads a length back from the device, as a careless kernel wrapper does."""

    contract = "latent_attention/1"

    def __call__(self, state: Any, *, kv_lens: torch.Tensor, **rest: Any) -> None:
        int(kv_lens.max())


class Careless(FusedOp):
    """Makes a tensor without saying where."""

    contract = "rotate_query/1"

    def __call__(self, *, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, out: Any) -> None:
        out.copy_(x * torch.ones(x.shape[-1], dtype=x.dtype))


def test_an_op_that_waits_is_caught(config: Any, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "ops", lambda: {"waiting": Waiting()})
    steps = Steps(config, backend, "absorbed", (1, 1, 1))
    steps.run(1)
    with pytest.raises(emulated.HostWait, match="_local_scalar_dense"), emulated.forbidden_waits():
        steps.run(1)


def test_an_op_that_mixes_devices_is_caught(
    config: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "ops", lambda: {"careless": Careless()})
    steps = Steps(config, backend, "absorbed", (1, 1, 1))
    with pytest.raises(emulated.DeviceMix, match="aten::mul"):
        steps.run(1)
