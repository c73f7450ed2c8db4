"""`LatentCache` beside a model of plain Python: lengths, pages and contents agree whatever is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from damage import few
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mla import LatentCache, MLAConfig
from mla.cache.ragged_batch import RaggedBatch
from mla.errors import CacheFull, StaleBatch

CONFIG = MLAConfig(hidden_size=8, num_attention_heads=1, kv_lora_rank=2, qk_rope_head_dim=2)
COUNTS = st.integers(0, 1) | st.integers(0, 20)
PICKS = st.lists(st.tuples(st.integers(0, 20), COUNTS), min_size=1, max_size=4)


class CacheMachine(RuleBasedStateMachine):
    """`rows` maps a sequence to its tokens, layer by layer; a token is one number, in all of its channels."""

    @initialize(
        size=st.sampled_from([1, 4, 16]), layers=st.integers(1, 2), shuffle=st.none() | st.integers(0, 9)
    )
    def make(self, size: int, layers: int, shuffle: int | None) -> None:
        options: dict[str, Any] = {"num_layers": layers, "shuffle": shuffle, "dtype": torch.float32}
        self.cache = LatentCache(CONFIG, max_tokens=70, page_size=size, **options)
        self.layers, self.written = layers, 0
        self.rows: dict[int, list[list[float]]] = {}
        self.last: list[int] = []  # the sequences of the last step
        self.latest: RaggedBatch | None = None  # None: whatever batch there was is out of date
        self.stale: list[RaggedBatch] = []

    # ------------------------------------------------------------------------------------------ the model

    def length(self, sequence: int) -> int:
        return len(self.rows[sequence][0])

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.cache.page_size)

    def free(self) -> int:
        return self.cache.num_pages - sum(self.pages(self.length(row)) for row in self.rows)

    def picked(self, index: int) -> int:
        return list(self.rows)[index % len(self.rows)]

    def tokens(self, count: int) -> list[float]:
        """Return numbers that no token has had."""
        self.written += count
        return [float(self.written - left) for left in range(count)]

    def changed(self, batch: RaggedBatch | None = None) -> None:
        if self.latest is not None:
            self.stale = [*self.stale[-3:], self.latest]
        self.latest = batch

    def refused(self, call: Callable[[], object], *errors: type[Exception]) -> None:
        """Assert that a call raises one of these, and changes nothing that `state` sees."""
        before = self.state()
        with pytest.raises(errors):
            call()
        assert self.state() == before

    def state(self) -> tuple[Any, ...]:
        cache = self.cache
        slots = [cache.slots(sequence).tolist() for sequence in cache.sequences]
        return cache.sequences, slots, cache.free_pages, cache.generation, cache.pages.tolist()

    # ------------------------------------------------------------------------------------------ calls

    @rule(count=st.integers(0, 3))
    def new_sequences(self, count: int) -> None:
        made = self.cache.new_sequences(count)
        assert not self.rows.keys() & set(made)
        self.rows |= {sequence: [[] for _ in range(self.layers)] for sequence in made}

    @precondition(lambda self: self.rows)
    @rule(picks=PICKS, table_tokens=st.sampled_from([0, 0, 40]), alone=st.booleans(), again=st.booleans())
    def extend(self, picks: list[tuple[int, int]], table_tokens: int, alone: bool, again: bool) -> None:
        """Extend some sequences, or `alone` grow them without a batch, and write what is new."""
        steps = {self.picked(index): count for index, count in picks}
        if again and self.rows.keys() >= set(self.last):  # as in a decode
            steps = dict.fromkeys(self.last, picks[0][1]) or steps
        ids, counts = list(steps), list(steps.values())
        lens = [self.length(sequence) + count for sequence, count in steps.items()]
        needed = sum(
            self.pages(new) - self.pages(self.length(sequence))
            for sequence, new in zip(ids, lens, strict=True)
        )
        if needed > self.free():
            self.refused(lambda: self.cache.extend(ids, counts, table_tokens=table_tokens), CacheFull)
            self.refused(lambda: self.cache.grow(ids, counts), CacheFull)
            return
        if alone:
            table, batch = self.cache.grow(ids, counts), None
        else:
            batch = self.cache.extend(ids, counts, table_tokens=table_tokens)
            table = batch.block_table
            assert table.shape[1] == max(1, self.pages(table_tokens), *map(self.pages, lens))
            self.check_batch(batch, lens, ids)
        for row, sequence, new in zip(table, ids, lens, strict=True):
            pages = self.cache.slots(sequence)[:: self.cache.page_size] // self.cache.page_size
            assert row[: self.pages(new)].tolist() == pages.tolist()
        self.changed(batch)
        self.last = ids
        for sequence, count in steps.items():
            self.write(sequence, count)

    def check_batch(self, batch: RaggedBatch, lens: list[int], ids: list[int]) -> None:
        """Compare what a kernel is given with what follows from the lengths and the slots."""
        pieces = list(zip(ids, batch.query_lens, lens, strict=True))
        slots = [
            slot
            for sequence, new, _ in pieces
            for slot in self.cache.slots(sequence).tolist()[len(self.rows[sequence][0]) :]
        ]
        assert batch.slots.tolist() == slots
        assert batch.positions.tolist() == [at for _, new, kv in pieces for at in range(kv - new, kv)]
        assert batch.kv_lens_device.tolist() == list(batch.kv_lens) == lens
        assert batch.cu_q.tolist() == [sum(batch.query_lens[:end]) for end in range(len(ids) + 1)]

    def write(self, sequence: int, count: int) -> None:
        """Write the last tokens of a sequence through its slots, as the layer does."""
        slots = self.cache.slots(sequence)[self.length(sequence) :]
        for layer, held in enumerate(self.rows[sequence]):
            new = self.tokens(count)
            self.cache.pages[layer].view(-1, CONFIG.latent_dim)[slots] = torch.tensor(new)[:, None].expand(
                -1, 4
            )
            held += new

    @precondition(lambda self: self.rows)
    @rule(index=st.integers(0, 20), count=st.integers(0, 40), layer=st.integers(-1, 2))
    def load(self, index: int, count: int, layer: int) -> None:
        sequence, new = self.picked(index), self.tokens(count)
        rows = torch.tensor(new)[:, None]
        held = self.length(sequence)

        def call() -> None:
            self.cache.load(sequence, rows.expand(-1, 2), rows.expand(-1, 2), layer)

        if not 0 <= layer < self.layers or (held and held != count):
            self.refused(call, ValueError)
        elif not held and self.pages(count) > self.free():
            self.refused(call, CacheFull)
        else:
            call()
            if not held and count:  # which other layers of these pages are zero
                self.changed()
                self.rows[sequence] = [[0.0] * count for _ in range(self.layers)]
            self.rows[sequence][layer] = new

    @precondition(lambda self: self.rows)
    @rule(index=st.integers(0, 20), length=st.integers(-1, 40))
    def truncate(self, index: int, length: int) -> None:
        sequence = self.picked(index)
        if not 0 <= length <= self.length(sequence):
            self.refused(lambda: self.cache.truncate(sequence, length), ValueError)
            return
        self.cache.truncate(sequence, length)
        self.changed()
        self.rows[sequence] = [held[:length] for held in self.rows[sequence]]

    @precondition(lambda self: self.rows)
    @rule(indices=st.lists(st.integers(0, 20), max_size=3))
    def release(self, indices: list[int]) -> None:
        ids = [self.picked(index) for index in indices]
        if len(set(ids)) != len(ids):
            self.refused(lambda: self.cache.release(ids), ValueError)
            return
        self.cache.release(ids)
        if ids:
            self.changed()
        for sequence in ids:
            del self.rows[sequence]

    @rule(picks=st.lists(st.integers(0, 20), max_size=2), strange=st.sampled_from([-1, 10**6, 2**70]))
    def name_a_stranger(self, picks: list[int], strange: int) -> None:
        ids = [*(self.picked(index) for index in picks if self.rows), strange]
        self.refused(lambda: self.cache.extend(ids, [1] * len(ids)), ValueError)
        self.refused(lambda: self.cache.release(ids), ValueError)
        self.refused(lambda: self.cache.truncate(strange, 0), ValueError)
        self.refused(lambda: self.cache.read(strange), ValueError)
        assert strange not in self.cache

    @precondition(lambda self: not self.rows.keys() >= set(self.last))
    @rule()
    def name_a_released_one(self) -> None:
        self.refused(lambda: self.cache.extend(self.last, [1] * len(self.last)), ValueError)

    @precondition(lambda self: self.rows)
    @rule(index=st.integers(0, 20), lens=st.sampled_from([[], [-1], [1, 1], [2**70], [2**31]]))
    def ask_for_what_cannot_be(self, index: int, lens: list[int]) -> None:
        ids = [self.picked(index)]
        self.refused(lambda: self.cache.extend(ids, lens), ValueError, CacheFull)
        self.refused(lambda: self.cache.extend(ids * 2, [0, 0]), ValueError)

    # ------------------------------------------------------------------------------------------ invariants

    @invariant()
    def contents_agree(self) -> None:
        assert self.cache.sequences == list(self.rows)
        for sequence, layers in self.rows.items():
            for layer, held in enumerate(layers):
                kv, pe = self.cache.read(sequence, layer)
                assert torch.cat((kv, pe), 1).tolist() == [[number] * 4 for number in held]
                kv.fill_(-1)  # a copy

    @invariant()
    def pages_agree(self) -> None:
        cache, owned = self.cache, []
        for sequence in self.rows:
            slots = cache.slots(sequence).tolist()
            assert cache.length(sequence) == len(slots) == self.length(sequence)
            assert slots == [cache.slot(sequence, token) for token in range(len(slots))]
            owned += [slot // cache.page_size for slot in slots[:: cache.page_size]]
        assert len(set(owned)) == len(owned) == cache.num_pages - cache.free_pages
        free = torch.ones(cache.num_pages, dtype=torch.bool)
        free[owned] = False
        assert not cache.pages[:, free].any(), "pages that nobody owns are zero"

    @invariant()
    def only_the_latest_batch_is_current(self) -> None:
        if self.latest is not None:
            self.latest.check_current()
        for batch in self.stale:
            with pytest.raises(StaleBatch):
                batch.check_current()


TestCache = CacheMachine.TestCase
TestCache.settings = settings(few(2), stateful_step_count=30)
