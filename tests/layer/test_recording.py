"""Forwards that come again: when a backend is asked to make their calls in one, and when it must not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from sequencing import Sequencing, Stateless

from mla import MLA, LatentCache, MLAConfig, RaggedBatch
from mla.config import QueryScaling
from mla.layer.forward import Step
from mla.layer.ops import Ops
from mla.weights import random_state_dict
from mla_backends import FusedOp
from mla_backends.testing import HostBackend

FP32 = torch.float32


class Pair:
    """A layer whose forwards are made at once where they come again, and one whose never are."""

    def __init__(self, config: MLAConfig, **arguments: Any) -> None:
        self.config, self.backend = config, Sequencing(**arguments)
        self.layers = [
            MLA(config, backend=self.backend, dtype=FP32),
            MLA(config, dtype=FP32, backend=Sequencing(refuses=True, stateless=self.backend.stateless)),
        ]
        self.reload(0)
        self.caches = [
            LatentCache(config, max_tokens=1024, page_size=16, dtype=FP32, shuffle=0) for _ in range(2)
        ]
        for cache in self.caches:
            cache.new_sequences(2)

    def reload(self, seed: int) -> None:
        for layer in self.layers:
            layer.load_state_dict(random_state_dict(self.config, seed, FP32))

    def decode(self, times: int) -> None:
        for _ in range(times):
            self.forward()

    def forward(self, query_lens: Sequence[int] = (1, 1)) -> None:
        """Run both layers on the same new tokens; their results must be the same bits."""
        hidden = torch.randn(sum(query_lens), self.config.hidden_size)
        ids = range(len(query_lens))
        outs = [
            layer(hidden, cache.extend(ids, query_lens), cache.pages[0])
            for layer, cache in zip(self.layers, self.caches, strict=True)
        ]
        assert torch.equal(*outs)
        assert torch.equal(*(cache.pages for cache in self.caches))


@pytest.fixture
def pair(tiny: Any) -> Pair:
    made = Pair(tiny())
    made.forward([17, 20])
    made.decode(2)  # the memory that a decode needs is there
    return made


def test_a_repeated_step_is_asked_for_once(pair: Pair) -> None:
    before = pair.backend.asked, pair.backend.ran
    pair.decode(5)
    assert pair.backend.asked - before[0] <= 1
    assert pair.backend.ran - before[1] >= 4


def test_a_backend_that_refuses_is_not_asked_again(tiny: Any) -> None:
    pair = Pair(tiny(), refuses=True)
    pair.forward([17, 20])
    pair.decode(8)
    assert (pair.backend.asked, pair.backend.ran) == (1, 0)


def test_a_step_that_an_op_prepares_anew_is_never_asked_for(tiny: Any) -> None:
    pair = Pair(tiny(), stateless=False)
    pair.forward([17, 20])
    pair.decode(5)
    assert pair.backend.asked == 0


def test_a_wider_block_table_and_another_batch_are_new(pair: Pair) -> None:
    pair.decode(20)  # across a page
    pair.forward([1])
    pair.forward([3, 1])
    pair.decode(4)
    assert pair.backend.asked >= 3


def test_new_weights_and_new_ops_are_new(pair: Pair) -> None:
    pair.decode(3)
    pair.reload(1)
    pair.decode(3)
    ran = pair.backend.ran
    pair.layers[0].ops = pair.layers[0].ops.replaced(lambda role, op: op)
    pair.forward()
    assert pair.backend.ran == ran


def test_a_forward_with_expanded_requests_is_never_asked_for(pair: Pair) -> None:
    hidden = torch.randn(61, pair.config.hidden_size)
    for layer, cache in zip(pair.layers, pair.caches, strict=True):
        batch = cache.extend([0, 1], [60, 1])
        assert layer.plan(batch).absorbed is not None
        assert layer.plan(batch).expanded is not None
        outs = [layer(hidden, batch, cache.pages[0]) for _ in range(4)]
        assert all(torch.equal(out, outs[0]) for out in outs)
    assert pair.backend.asked == 0


def test_a_step_in_place_is_another_forward_than_one_that_is_not(pair: Pair) -> None:
    hidden = torch.randn(2, pair.config.hidden_size)
    batches = [cache.extend([0, 1], [1, 1]) for cache in pair.caches]
    expected = pair.layers[1](hidden, batches[1], pair.caches[1].pages[0])
    for in_place in (True, True, False, False, True):
        given = hidden.clone()
        out = pair.layers[0](given, batches[0], pair.caches[0].pages[0], out=given if in_place else None)
        assert torch.equal(out, expected)
    assert pair.backend.ran > 0


def test_a_forward_with_scaled_queries_is_never_asked_for(tiny: Any) -> None:
    pair = Pair(tiny(query_scaling=QueryScaling(beta=0.5, period=24)))
    pair.forward([17, 17])
    pair.decode(5)
    assert pair.backend.ran > 0
    pair.decode(6)  # the first tokens past the period
    ran = pair.backend.ran
    pair.decode(3)
    assert pair.backend.ran == ran


def test_one_batch_over_pages_of_two_sizes(tiny: Any) -> None:
    """A batch that describes no cache may be run on any: the number of pages is part of what repeats."""
    config = tiny()
    layers = [MLA(config, backend=Sequencing(refuses=refuses), dtype=FP32) for refuses in (False, True)]
    for layer in layers:
        layer.load_state_dict(random_state_dict(config, 0, FP32))
    table = torch.zeros(1, 1, dtype=torch.int32)
    batch = RaggedBatch([1], [9], table, 16, torch.device("cpu"))
    for count in (2, 2, 2, 5, 5, 2):
        hidden, pages = torch.randn(1, config.hidden_size), torch.randn(count, 16, config.latent_dim)
        assert torch.equal(*(layer(hidden, batch, pages.clone()) for layer in layers))


@pytest.mark.parametrize("inside", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_inference_mode_may_come_and_go(tiny: Any, inside: tuple[int, int]) -> None:
    pair = Pair(tiny())
    layer, cache = pair.layers[0], pair.caches[0]
    for step in range(6):
        hidden, mode = torch.randn(2, pair.config.hidden_size), step % 2 == 0
        with torch.inference_mode(mode and bool(inside[0])):
            batch = cache.extend([0, 1], [1, 1])
        with torch.inference_mode(mode and bool(inside[1])):
            assert layer(hidden, batch, cache.pages[0]).isfinite().all()


def test_a_copy_of_a_layer_computes_the_same_without_the_backend(pair: Pair) -> None:
    pair.decode(3)
    ran = pair.backend.ran
    layers = [
        pair.layers[0],
        copy.deepcopy(pair.layers[0]),
        pickle.loads(pickle.dumps(pair.layers[0]._repeated)),
    ]
    assert not layers.pop().offered
    batch, hidden = pair.caches[0].extend([0, 1], [1, 1]), torch.randn(2, pair.config.hidden_size)
    outs = [layer(hidden, batch, pair.caches[0].pages[0]) for layer in layers for _ in range(2)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert pair.backend.ran <= ran + 2


def test_what_a_subclass_does_is_done_in_every_step(pair: Pair) -> None:
    class LouderStep(Step):
        def linear(self, ops: Ops, role: str, x: torch.Tensor, out: torch.Tensor, bias: str = "") -> None:
            super().linear(ops, role, x, out, bias)
            out.mul_(2)

    class Louder(MLA):
        def __init__(self, config: MLAConfig, **arguments: Any) -> None:
            super().__init__(config, **arguments)
            self.step = LouderStep(**vars(self.step))

    layer = Louder(pair.config, backend=pair.backend, dtype=FP32)
    layer.load_state_dict(random_state_dict(pair.config, 0, FP32))
    asked = pair.backend.asked
    batch, hidden = pair.caches[0].extend([0, 1], [1, 1]), torch.randn(2, pair.config.hidden_size)
    outs = [layer(hidden, batch, pair.caches[0].pages[0]) for _ in range(4)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert pair.backend.asked == asked


def test_inputs_that_begin_where_the_pages_do_are_another_forward(pair: Pair) -> None:
    """A record finds what moves by its address."""
    layer, cache = pair.layers[0], pair.caches[0]
    pair.decode(2)
    ran = pair.backend.ran
    strange = torch.as_strided(
        cache.pages, (2, pair.config.hidden_size), (pair.config.hidden_size, 1)
    ).clone()
    pages = torch.cat((strange.flatten(), cache.pages[0].flatten()))[: cache.pages[0].numel()]
    hidden = pages[: strange.numel()].view(strange.shape)
    layer(hidden, cache.extend([0, 1], [1, 1]), pages.view(cache.pages[0].shape))
    assert pair.backend.ran == ran


def test_a_layer_that_is_gone_leaves_nothing_in_a_batch(tiny: Any) -> None:
    config = tiny()
    cache = LatentCache(config, max_tokens=64, page_size=16, dtype=FP32)
    batch = cache.extend(cache.new_sequences(1), [3])
    layer = MLA(config, dtype=FP32)
    layer.plan(batch)
    table = weakref.ref(layer.rotary)
    del layer
    gc.collect()
    assert table() is None


def test_a_backend_that_never_makes_sequences_is_offered_none(tiny: Any) -> None:
    pair = Pair(tiny())
    layer = MLA(pair.config, backend=HostBackend(ops={"stateless": Stateless()}), dtype=FP32)
    layer.load_state_dict(random_state_dict(pair.config, 0, FP32))
    pair.layers[0] = layer
    pair.decode(4)
    assert not layer._repeated.offered
    assert layer._repeated._owners == ()


def test_replaced_ops_are_called_one_by_one(tiny: Any) -> None:
    """Whoever watches ops must see each call, and no call of what they stand for in a sequence."""
    pair, seen = Pair(tiny()), []

    class Watched(Stateless):
        def __init__(self, role: str, op: FusedOp) -> None:
            self._role, self._op = role, op

        def __getattr__(self, name: str) -> Any:
            return getattr(self._op, name)

        def __call__(self, *leading: Any, **tensors: Any) -> None:
            seen.append(self._role)
            self._op(*leading, **tensors)

    pair.decode(4)
    ran, asked = pair.backend.ran, pair.backend.asked
    assert ran > 0
    pair.layers[0].replace_ops(Watched)
    pair.decode(4)
    assert (pair.backend.ran, pair.backend.asked) == (ran, asked)
    assert seen.count("o_proj") == seen.count("qkv_a_proj") == 4
