"""`LayerCase`: forwards of a whole layer, drawn, known in float64, placed on a poisoned cache, judged."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mla.cache import LatentCache
from mla.cache.formats import given_back
from mla.cache.ragged_batch import RaggedBatch
from mla.cases.case import Lengths
from mla.config import MLAConfig
from mla.layer.attention import MLA
from mla.verify.layer_check import Checker, Poison
from mla.verify.layer_oracle import TrueLayer, oracle_of_steps
from mla.verify.selected import Past, SelectionJudge, Taken, take
from mla.verify.verdict import Check
from mla.weights import random_state_dict

History = list[tuple[torch.Tensor, torch.Tensor]]  # per request kv [s, c] normed, pe [s, r] rotated


@dataclass(frozen=True)
class LayerCase:
    """`steps` forwards of a layer in a row, with the same new tokens per request each."""

    query_lens: Lengths
    history: Lengths
    config: MLAConfig
    steps: int = 1
    seed: int = 7  # of inputs
    model: int = 0  # seed of the weights
    dtype: torch.dtype = torch.float32

    @property
    def label(self) -> str:
        steps = f", {self.steps} steps" * (self.steps > 1)
        lengths = ",".join(f"{new}+{old}" for new, old in zip(self.query_lens, self.history, strict=True))
        return f"{self.config.name}, new+old {lengths}{steps}"

    @property
    def final_lens(self) -> list[int]:
        """Tokens per request after the last step."""
        pairs = zip(self.query_lens, self.history, strict=True)
        return [old + new * self.steps for new, old in pairs]

    @property
    def host(self) -> LayerHost:
        """The host's side, drawn once."""
        return _host(self)


weights = functools.lru_cache(maxsize=8)(random_state_dict)


class LayerHost:
    """Inputs N(0, 1) of a case, and what they must give."""

    def __init__(self, case: LayerCase) -> None:
        self.case, config = case, case.config
        generator = torch.Generator().manual_seed(case.seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(case.dtype)

        self.state = weights(config, case.model, case.dtype)
        c, r = config.kv_lora_rank, config.qk_rope_head_dim
        self.history: History = [(draw(length, c), draw(length, r)) for length in case.history]
        self.hidden = draw(case.steps, sum(case.query_lens), config.hidden_size)
        width = config.index_head_dim if config.index_n_heads else 0
        self.index = [draw(length, width) for length in case.history]  # keys, of a layer with an indexer

    @functools.cached_property
    def truth(self) -> torch.Tensor:
        """The outputs [steps, T, d] in float64."""
        case, hidden = self.case, self.hidden[None]
        return oracle_of_steps(case.config, self.state, hidden, case.query_lens, self.history)[0]

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """The reference's outputs [steps, T, d]."""
        layer = MLA(self.case.config, dtype=self.case.dtype)
        layer.load_state_dict(self.state)
        return LayerCall(self.case, layer).run()

    def check(self, outputs: torch.Tensor) -> Check:
        """Compare outputs [steps, T, d] with the oracle, by the runner's rules."""
        checker = Checker(self.truth, self.case.dtype, lambda: self.reference)
        return checker.check(outputs, held_to_reference=True)

    def check_selected(self, outputs: torch.Tensor, taken: Sequence[Taken], cache: LatentCache) -> Check:
        """Judge outputs [steps, T, d] by what each step has left in memory, in turn.

        The formats are those of the `cache`.
        """
        case, (codec, coded) = self.case, (cache.codec, cache.index_codec)
        stored = self.history if codec is None else [given_back(codec, *past) for past in self.history]
        index = [keys if coded is None else coded.given_back(keys) for keys in self.index]
        past = [Past(kv, pe, keys) for (kv, pe), keys in zip(stored, index, strict=True)]
        judge = SelectionJudge(TrueLayer(case.config, self.state), case.dtype, codec, coded)
        by_request, expected = self.hidden.split(list(case.query_lens), dim=1), []
        for step, left in enumerate(taken):
            new = [tokens[: step + 1].flatten(0, 1) for tokens in by_request]
            judged = judge.judge(case.query_lens, past, new, left, torch.arange(sum(case.query_lens)))
            if judged.reason:
                return Check(status="wrong", reason=f"{judged.reason}{f' (step {step})' * (case.steps > 1)}")
            expected.append(judged.expected)
        checker = Checker(torch.stack(expected), case.dtype, lambda: outputs)
        return checker.check(outputs, held_to_reference=False)


_host = functools.lru_cache(maxsize=64)(LayerHost)


class LayerCall:
    """A layer and a cache that holds a case's history, in shuffled pages; all other slots are poisoned."""

    def __init__(self, case: LayerCase, layer: MLA, page_size: int = 64) -> None:
        self.case, self.layer = case, layer
        device, host, indexed = layer.device, case.host, case.config.index_n_heads > 0
        pages = sum(-(-length // page_size) for length in case.final_lens) + 3
        self.cache = LatentCache(
            case.config,
            max_tokens=pages * page_size,
            page_size=page_size,
            device=device,
            dtype=case.dtype,
            shuffle=0,
            cache_format=layer.ops["latent_attention"].spec.cache_format,
            index_format=layer.ops["write_index_key"].spec.index_format if indexed else None,
        )
        self.ids = self.cache.new_sequences(len(case.history))
        for sequence, (kv, pe), keys in zip(self.ids, host.history, host.index, strict=True):
            self.cache.load(sequence, kv, pe, index=keys if indexed else None)
        for role, of_index in (("latent_attention", False), *[("select_latents", True)] * indexed):
            safe = layer.ops[role].op.nan_safe_tail
            Poison(self.cache, self.ids, case.final_lens, safe, of_index).apply()
        self.hidden = host.hidden.to(device, copy=True)
        self.taken: list[Taken] = []  # by step, of a layer that selects

    def extend(self, in_shape: bool = False) -> RaggedBatch:
        """Return the next step's batch; if `in_shape`, with a block table as wide as the last step needs."""
        wide = {"table_tokens": max(self.case.final_lens)} if in_shape else {}
        return self.cache.extend(self.ids, self.case.query_lens, **wide)

    def forward(self, step: int, batch: RaggedBatch, selection: torch.Tensor | None = None) -> torch.Tensor:
        """Run one step, which attends a `selection` [T, topk] if there is one. What is not written is NaN."""
        hidden, pages = self.hidden[step], self.cache.of_layer(0)
        out = self.layer(hidden, batch, *pages, selection, out=torch.full_like(hidden, torch.nan))
        if self.case.config.index_topk or self.cache.cache_format:
            self.take()
        return out

    def take(self) -> None:
        """Keep what the last forward, of a layer that selects or over a format, has left."""
        lengths = [self.cache.length(sequence) for sequence in self.ids]
        what = self.ids, self.case.query_lens, self.case.history, lengths
        self.taken.append(take(self.layer, self.cache, *what))

    def check(self, outputs: torch.Tensor) -> Check:
        """Judge the outputs [steps, T, d] of every step, and what each has left."""
        host, taken = self.case.host, self.taken[-len(outputs) :]
        return host.check_selected(outputs, taken, self.cache) if taken else host.check(outputs)

    def run(self) -> torch.Tensor:
        """Run every step and return the outputs [steps, T, d] on the host."""
        return torch.stack([self.forward(step, self.extend()).cpu() for step in range(self.case.steps)])
