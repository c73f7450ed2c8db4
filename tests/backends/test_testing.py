"""`HostBackend`, with which plugin authors test: a complete backend that takes ops and facts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla import MLA, LatentCache, MLAConfig
from mla.conformance.selection import Xfails
from mla.conformance.suite import carry_out, trials
from mla.conformance.trial import BackendUnderTest, Drawing
from mla.weights import random_state_dict
from mla_backends import BackendError, BackendOptionError, FusedOp
from mla_backends.registry import open_backend
from mla_backends.testing import HostBackend


class Linear(FusedOp):
    """A right op that counts its calls."""

    contract = "linear/1"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, packed: Any, *, x: Any, bias: Any, out: Any) -> None:
        self.calls += 1
        out.copy_(torch.nn.functional.linear(x.float(), packed.data.float(), bias))


def test_the_suite_accepts_it_and_judges_the_ops_it_is_given() -> None:
    host = HostBackend(ops={"mine": Linear()})
    subject = BackendUnderTest(host, "host", drawing=Drawing(0))
    chosen = trials(subject, (torch.float32,), ["device", "linear"])
    results = [carry_out(choice, Xfails()) for choice in chosen]
    assert not [(result.id, result.reason) for result in results if result.status not in ("pass", "refused")]
    assert any(result.of == "mine" and result.status == "pass" for result in results)


def test_a_layer_calls_its_ops() -> None:
    op, config = Linear(), MLAConfig(hidden_size=64, num_attention_heads=2, kv_lora_rank=32)
    layer = MLA(config, backend=HostBackend(ops={"mine": op}), dtype=torch.float32)
    assert layer.ops.names()["o_proj"] == "mine", layer.ops.explain()
    layer.load_state_dict(random_state_dict(config, dtype=torch.float32))
    cache = LatentCache(config, max_tokens=64, dtype=torch.float32)
    layer(torch.randn(3, 64), cache.extend(cache.new_sequences(1), [3]), cache.pages[0])
    assert op.calls


def test_it_can_be_opened_by_name_and_is_ready_without() -> None:
    opened = open_backend("mla_backends.testing:HostBackend")
    assert opened.device == torch.device("cpu")
    assert HostBackend().device == torch.device("cpu")
    assert HostBackend().probe().ok
    assert HostBackend().ops() == {}
    assert repr(opened) == "HostBackend('host', device='cpu')"


def test_facts_are_those_of_the_device() -> None:
    info = HostBackend(cache_bytes=1 << 20, name="a card").device_info()
    assert (info.name, info.cache_bytes, info.memory_bytes) == ("a card", 1 << 20, None)
    assert HostBackend().device_info().name == "host"
    with pytest.raises(TypeError, match="cash_bytes"):
        HostBackend(cash_bytes=1)


def test_an_unknown_option_is_refused_as_by_every_backend() -> None:
    with pytest.raises(BackendOptionError, match="backend 'host' has no option 'x'"):
        HostBackend({"x": "1"})
    with pytest.raises(BackendError):
        open_backend("mla_backends.testing:HostBackend", options={"x": "1"})
