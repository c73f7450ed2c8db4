"""A forward made as one call of the kernels is, bit for bit, the forward made op by op."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mla
from mla.weights import random_state_dict
from mla_backend_cpu import recorded
from mla_backend_cpu.library import Library
from mla_backend_cpu.native_ops import NativeLinear, NativeRmsNorm, NativeRotateQuery
from mla_backends.api import OpCall

BF16 = torch.bfloat16
Threads = Callable[[int], AbstractContextManager[None]]


def a_config(q_lora_rank: int | None = None) -> mla.MLAConfig:
    return mla.MLAConfig(
        hidden_size=64,
        num_attention_heads=3,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=32,
        v_head_dim=32,
    )


def a_layer(config: mla.MLAConfig, kernels: Library, *, at_once: bool = True) -> mla.MLA:
    backend = mla.load_backend("cpu", options={"native": kernels.level})
    if not at_once:
        backend.sequence = lambda calls, moving: None  # type: ignore[method-assign]
    layer = mla.MLA(config, backend=backend)
    layer.load_state_dict(random_state_dict(config))
    return layer


class Stage:
    """A layer, and two caches of three requests each."""

    def __init__(self, config: mla.MLAConfig, kernels: Library, *, at_once: bool) -> None:
        self.config, self.layer = config, a_layer(config, kernels, at_once=at_once)
        self.caches = [
            mla.LatentCache(config, max_tokens=tokens, page_size=4, num_layers=2, shuffle=tokens)
            for tokens in (400, 800)
        ]
        self.ids = [cache.new_sequences(3) for cache in self.caches]
        self.count = 0

    def _draw(self, *shape: int) -> torch.Tensor:
        self.count += 1
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.count)).to(BF16)

    def forward(self, cache: int, part: int, query_lens: list[int], wide: bool) -> torch.Tensor:
        chosen = self.caches[cache]
        ids = self.ids[cache][: len(query_lens)]
        if sum(query_lens) + 3 * 4 > chosen.free_pages * chosen.page_size:
            for sequence in ids:
                chosen.truncate(sequence, 0)
        batch = chosen.extend(ids, query_lens)
        hidden = self._draw(sum(query_lens), 2 * self.config.hidden_size)
        hidden = hidden[:, ::2].contiguous() if not wide else hidden[:, : self.config.hidden_size]
        return self.layer(hidden, batch, chosen.pages[part]).clone()

    def reload(self, seed: int) -> None:
        self.layer.load_state_dict(random_state_dict(self.config, seed))


#: The same again and again, which is what is recorded: by cache and lengths, then layer and strides.
FORWARDS = st.tuples(
    st.integers(0, 1),
    st.sampled_from([[1], [1, 1, 1], [1, 0, 1], [2, 1], [24, 1], [60]]),
    st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=2, max_size=6),
)
ACTIONS = st.one_of(FORWARDS, st.tuples(st.sampled_from(["reload", "threads"]), st.integers(1, 3)))


@pytest.mark.parametrize("q_lora_rank", [None, 48])
@settings(max_examples=8, deadline=None)
@given(course=st.lists(ACTIONS, min_size=1, max_size=8))
def test_whatever_comes_before_a_step_it_is_that_of_the_ops(
    kernels: Library, threads: Threads, q_lora_rank: int | None, course: list[tuple[Any, ...]]
) -> None:
    config = a_config(q_lora_rank)
    stages = [Stage(config, kernels, at_once=at_once) for at_once in (True, False)]
    with threads(2):
        for action, *details in course:
            if action == "reload":
                for stage in stages:
                    stage.reload(*details)
            elif action == "threads":
                torch.set_num_threads(*details)
            else:
                for part, wide in details[1]:
                    ours, ops = (stage.forward(action, part, details[0], wide) for stage in stages)
                    assert ours.isfinite().all()
                    assert torch.equal(ours, ops)
        for first, second in zip(stages[0].caches, stages[1].caches, strict=True):
            assert torch.equal(first.pages, second.pages)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every call of a sequence."""
    calls: list[int] = []
    plain = recorded.Recorded.__call__

    def counted(self: Any, *moved: torch.Tensor) -> None:
        calls.append(len(moved))
        plain(self, *moved)

    monkeypatch.setattr(recorded.Recorded, "__call__", counted)
    return calls


def test_a_decode_is_one_call_from_its_second_step_on(kernels: Library, runs: list[int]) -> None:
    stage = Stage(a_config(), kernels, at_once=True)
    stage.forward(0, 0, [17, 17, 17], False)
    stage.forward(0, 0, [1, 1, 1], False)  # takes all memory it needs
    stage.forward(0, 0, [1, 1, 1], False)
    assert not runs
    stage.forward(0, 0, [1, 1, 1], False)  # the second one on that memory, and the page is full
    assert len(runs) == 1
    for _ in range(4):
        stage.forward(0, 0, [1, 1, 1], False)  # with a wider block table
    assert len(runs) == 4


def test_a_bad_page_is_refused_by_name(kernels: Library, runs: list[int]) -> None:
    stage = Stage(a_config(), kernels, at_once=True)
    stage.forward(0, 0, [8], False)
    for _ in range(3):
        stage.forward(0, 0, [1], False)
    batch = stage.caches[0].extend(stage.ids[0][:1], [1])
    batch.block_table[0, 0] = 10_000
    hidden = torch.zeros(1, 64, dtype=BF16)
    with pytest.raises(ValueError, match="block_table names page 10000 in column 0"):
        stage.layer(hidden, batch, stage.caches[0].pages[0])
    assert len(runs) == 2


def test_a_sequence_keeps_neither_a_cache_nor_weights_that_are_gone(
    kernels: Library, runs: list[int]
) -> None:
    stage = Stage(a_config(), kernels, at_once=True)
    for _ in range(8):
        stage.forward(0, 0, [1], False)
    assert runs
    pages = weakref.ref(stage.caches[0].pages)
    weight = weakref.ref(stage.layer._weights.packed["o_proj"].data[0])
    del stage.caches[0]
    gc.collect()
    assert pages() is None
    stage.reload(1)
    gc.collect()
    assert weight() is None


def test_what_must_be_copied_for_the_kernels_is_not_recorded(kernels: Library) -> None:
    rotate = NativeRotateQuery(kernels)
    x, out = torch.randn(2, 3, 64).to(BF16), torch.full((2, 3, 32), 7.0, dtype=BF16)
    angles = torch.randn(2, 32)
    plain = OpCall(rotate, (), {"x": x[..., :32], "cos_sin": angles, "interleaved": False, "out": out})
    strided = OpCall(rotate, (), {**plain.tensors, "x": x[..., ::2]})
    assert recorded.sequence([plain], []) is not None
    assert recorded.sequence([plain, strided], []) is None
    assert (out == 7).all(), "recording computes nothing"


def test_an_op_that_does_more_is_not_recorded(kernels: Library) -> None:
    class Louder(NativeRmsNorm):
        def __call__(self, **tensors: Any) -> None:
            super().__call__(**tensors)
            tensors["out"].mul_(2)

    x = torch.randn(2, 32).to(BF16)
    norm = {"x": x, "weight": torch.ones(32, dtype=BF16), "eps": 1e-6, "out": torch.empty_like(x)}
    assert recorded.sequence([OpCall(Louder(kernels), (), norm)], []) is None


def test_moving_tensors_take_the_place_of_those_recorded(kernels: Library) -> None:
    linear = NativeLinear(kernels)
    packed, bias = linear.pack(torch.randn(24, 16).to(BF16)), torch.randn(24).to(BF16)
    first, out = torch.randn(3, 16).to(BF16), torch.empty(3, 24, dtype=BF16)
    call = OpCall(linear, (packed,), {"x": first, "bias": bias, "out": out})
    run = recorded.sequence([call], [first, out])
    assert run is not None
    second, target = torch.randn(3, 16).to(BF16), torch.empty(3, 24, dtype=BF16)
    expected = torch.empty(3, 24, dtype=BF16)
    run(second, target)
    linear(packed, x=second, bias=bias, out=expected)
    assert torch.equal(target, expected)


def test_a_sequence_keeps_what_it_points_to(kernels: Library) -> None:
    linear, x, out = NativeLinear(kernels), torch.randn(3, 16).to(BF16), torch.empty(3, 24, dtype=BF16)
    packed, bias = linear.pack(torch.randn(24, 16).to(BF16)), torch.randn(24).to(BF16)
    held = [weakref.ref(tensor) for tensor in (packed.data[0], bias)]
    run = recorded.sequence([OpCall(linear, (packed,), {"x": x, "bias": bias, "out": out})], [x, out])
    del packed, bias
    assert all(tensor() is not None for tensor in held)
    del run
    assert not any(tensor() for tensor in held)
