"""Steps with our Triton kernels: how many launches they take, in which memory, and decode as one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import emulated
import pytest
import torch

import mla
from mla.config import MLAConfig
from mla.weights import random_state_dict

DEFAULT = MLAConfig.preset("deepseek-v2-lite")
# A norm and a projection more. Few heads, as interpreting takes time by heads.
WITH_Q_LORA = replace(DEFAULT, q_lora_rank=96, num_attention_heads=4, hidden_size=64)
INDEXED = replace(WITH_Q_LORA, index_topk=32, index_n_heads=3, index_head_dim=128)
OURS = {
    "rotate_query": "triton_rotate_query",
    "write_latent": "triton_write_latent",
    "latent_attention": "triton_latent",
}
SELECTS = {"select_latents": "triton_select", "sparse_latent_attention": "triton_sparse_latent"}
SHORT, LONG = (60, 5, 1, 100), (60, 5, 1, 300)  # cached tokens: nobody is split, and one is
TOKENS = 4


class Count(NamedTuple):
    """Launches of one step, copies included."""

    plan: int  # `extend` and `plan`: once for all layers
    forward: int  # per layer


class Decode:
    """A layer that decodes, and a cache with a history."""

    def __init__(self, backend: Any, config: MLAConfig, history: tuple[int, ...], ops: str = "auto") -> None:
        self.layer = mla.MLA(config, backend=backend, attention="absorbed", ops=ops)
        self.layer.load_state_dict(random_state_dict(config))
        self.cache = mla.LatentCache(config, max_tokens=2048, device=backend.device, shuffle=1)
        self.ids = self.cache.new_sequences(len(history))
        generator = torch.Generator().manual_seed(1)
        for sequence, length in zip(self.ids, history, strict=True):
            latents = torch.randn(length, config.latent_dim, generator=generator)
            parts = latents.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=1)
            keys = torch.randn(length, config.index_head_dim, generator=generator)
            self.cache.load(sequence, *parts, index=keys if config.index_n_heads else None)
        draw = torch.randn(8, TOKENS, config.hidden_size, generator=generator).bfloat16()
        self.hidden = draw.to(backend.device)
        self.out = torch.empty_like(self.hidden[0])

    def extend(self, tokens: int = 0) -> Any:
        return self.cache.extend(self.ids, [1] * TOKENS, table_tokens=tokens)

    def forward(self, batch: Any, hidden: torch.Tensor) -> None:
        self.layer(hidden, batch, *self.cache.of_layer(0), out=self.out)

    def step(self, index: int) -> Count:
        before = emulated.STATE.launches
        batch = self.extend()
        self.layer.plan(batch)
        planned = emulated.STATE.launches
        self.forward(batch, self.hidden[index])
        return Count(planned - before, emulated.STATE.launches - planned)


@pytest.mark.parametrize(
    ("config", "history", "launches"),
    [
        (DEFAULT, SHORT, Count(2, 6)),
        (DEFAULT, LONG, Count(2, 7)),  # the merge
        (WITH_Q_LORA, SHORT, Count(2, 8)),
    ],
    ids=["default", "split", "q_lora"],
)
def test_a_decode_step_takes_few_launches(
    config: MLAConfig, history: tuple[int, ...], launches: Count, backend: Any
) -> None:
    """Four projections, attention, and one launch that writes latents and rotates queries."""
    decode = Decode(backend, config, history)
    ops = decode.layer.ops
    assert OURS.items() <= ops.names().items()
    decode.step(0)
    launcher = ops["latent_attention"].op.launcher  # type: ignore[attr-defined]
    started = launcher.launches
    assert decode.step(1) == launches
    projections = sum(role.endswith("_proj") or role in ("w_uk", "w_uv") for role in ops.names()) - 1  # kv_b
    assert launcher.launches - started == launches.forward - projections


def test_a_step_makes_no_memory_and_waits_for_nothing(backend: Any) -> None:
    decode = Decode(backend, DEFAULT, LONG)
    decode.step(0)
    with emulated.forbidden_waits() as state:
        held = state.peak = state.allocated
        decode.step(1)
    assert state.peak == held
    assert state.uploads == 1


def test_what_selects_makes_no_memory(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither do selections wait; index keys are written by torch, whose memory is of the graph there."""
    decode, grown = Decode(backend, INDEXED, LONG), {}
    for role in SELECTS:
        kind = type(decode.layer.ops[role].op)

        def call(op: Any, *given: Any, called: Any = kind.__call__, role: str = role, **named: Any) -> None:
            held = emulated.STATE.peak = emulated.STATE.allocated
            called(op, *given, **named)
            grown[role] = emulated.STATE.peak - held

        monkeypatch.setattr(kind, "__call__", call)
    decode.step(0)
    with emulated.forbidden_waits():
        decode.step(1)
    assert grown == dict.fromkeys(SELECTS, 0)


def captured(decode: Decode, backend: Any) -> tuple[Any, Callable[[], None], torch.Tensor, Count]:
    """Return a graph of planning and a forward, its batch, where it reads its inputs, and its launches."""
    batch, hidden = decode.extend(400), decode.hidden[0].clone()
    counts: list[int] = []

    def step() -> None:
        counts[:] = [emulated.STATE.launches]
        batch.update_(batch)  # drops the plan, so that planning is captured too
        decode.layer.plan(batch)
        counts.append(emulated.STATE.launches)
        decode.forward(batch, hidden)
        counts.append(emulated.STATE.launches)

    replay = backend.graph(step)
    assert replay is not None
    return batch, replay, hidden, Count(counts[1] - counts[0], counts[2] - counts[1])


@pytest.mark.parametrize(
    ("config", "launches"),
    [(replace(DEFAULT, num_attention_heads=4, hidden_size=64), Count(1, 7)), (INDEXED, Count(1, 36))],
    ids=["dense", "indexer"],
)
def test_one_graph_follows_the_lengths_over_the_end_of_a_page(
    config: MLAConfig, launches: Count, backend: Any
) -> None:
    """And none of its steps makes memory or waits; results are those of the reference."""
    ours, reference = (Decode(backend, config, (60, 5, 1, 255), ops) for ops in ("auto", "reference"))
    batch, replay, hidden, counted = captured(ours, backend)
    assert counted == launches
    assert not config.index_topk or SELECTS.items() <= ours.layer.ops.names().items()
    reference.step(0)
    for index in range(1, 5):
        with emulated.forbidden_waits() as state:
            held = state.peak = state.allocated
            before = state.launches
            batch.update_(ours.extend(400))
            assert state.launches == before + 1  # the upload of the tables
            hidden.copy_(ours.hidden[index])
            replay()
        assert state.peak == held
        reference.step(index)
        difference = (ours.out.float() - reference.out.float()).norm() / reference.out.float().norm()
        assert float(difference) < (0.05 if config.index_topk else 0.02)
        if config.index_topk:  # a key whose score is within rounding of another's may stand for it
            chosen, wanted = (case.layer.selection.cpu().sort().values for case in (ours, reference))
            assert torch.equal((chosen >= 0).sum(1), (wanted >= 0).sum(1))
            assert all(len({*a} ^ {*b}) <= 2 for a, b in zip(chosen.tolist(), wanted.tolist(), strict=True))


def test_a_prefill_takes_few_launches(backend: Any) -> None:
    """Four prompts at once: keys and values take a gather, a projection and two copies."""
    small = replace(DEFAULT, num_attention_heads=4, hidden_size=64)
    overrides = {"expanded_attention": "triton_expanded"}
    layer = mla.MLA(small, backend=backend, attention="expanded", overrides=overrides)
    layer.load_state_dict(random_state_dict(small))
    cache = mla.LatentCache(small, max_tokens=2048, device=backend.device)
    ids, new = cache.new_sequences(4), (3, 5, 30, 7)
    hidden = torch.randn(sum(new), small.hidden_size).bfloat16().to(backend.device)
    for _ in range(2):
        before = emulated.STATE.launches
        batch = cache.extend(ids, new)
        layer.plan(batch)
        planned = emulated.STATE.launches
        layer(hidden, batch, cache.pages[0])
    assert Count(planned - before, emulated.STATE.launches - planned) == Count(4, 9)
