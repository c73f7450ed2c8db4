"""What is run: a decode step, tokens appended to a history, or a whole prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.transformers.meters import Clock, Memory, Sample
from benchmarks.transformers.record import Row
from benchmarks.transformers.sides import Side
from mla.config import MLAConfig
from mla_backends import host
from mla_backends.api import Backend

PHASES = ("decode", "append", "prefill")
APPENDED = 64
# Transient bytes of a forward, at most, as measured on a CPU (2 vCPUs of an Intel Xeon with AMX, torch 2.13,
# `transformers` 5.24.0) with the head dimensions of DeepSeek: what `transformers` takes for a head of a
# token, by attention and bytes of an element, and for a logit, as no attention has a fused kernel there ...
EXPANDED = {("sdpa", 2): 3050, ("sdpa", 4): 2900, ("eager", 2): 1200, ("eager", 4): 1830}
LOGIT = 10
# ... and what our ops take for a head of a new token, and for a latent, in copies of it.
OURS = 6700
COPIES = 2.5


@dataclass(frozen=True)
class Work:
    """One phase of one config at one length."""

    name: str  # of the config
    config: MLAConfig
    backend: Backend
    flush: Callable[[], None]
    phase: str
    length: int
    requests: int = 1
    allocator: str = "default"

    @property
    def history(self) -> int:
        """The tokens that are cached before."""
        return 0 if self.phase == "prefill" else self.length

    @property
    def new_tokens(self) -> int:
        """The tokens of a forward."""
        return {"decode": 1, "append": APPENDED, "prefill": self.length}[self.phase]

    def row(self, side: Side) -> Row:
        """Return a row without numbers."""
        return Row(
            config=self.name,
            phase=self.phase,
            history=self.history,
            new_tokens=self.new_tokens,
            requests=self.requests,
            side=side.name,
            dtype=side.dtype,
            allocator=self.allocator,
            weight_bytes=side.weight_bytes,
        )

    def refusal(self, side: Side) -> str:
        """Return why a side would not fit the host's memory, or ""."""
        available, needed = host.memory_available(), self.estimate(side)
        if side.model.device.type != "cpu" or available is None or needed < 0.9 * available:
            return ""
        return f"needs about {needed / 2**30:.0f} GiB, and {available / 2**30:.0f} are available"

    def estimate(self, side: Side) -> float:
        """Return the bytes that a forward takes on a host, about."""
        heads, size = self.config.num_attention_heads, side.model.dtype.itemsize
        tokens, new = self.requests * (self.history + self.new_tokens), self.requests * self.new_tokens
        if side.backend:
            latent = size * (self.config.kv_lora_rank + self.config.qk_rope_head_dim)
            return OURS * heads * new + COPIES * latent * tokens
        return heads * tokens * (EXPANDED[side.name, size] + LOGIT * self.new_tokens)

    def weigh(self, side: Side, row: Row) -> torch.Tensor:
        """Run a forward, which warms up, and note its memory; return attention of last tokens [b, hidden]."""
        side.start()
        words, clock = self._cache(side), Clock(side.model, self.backend, self.flush)
        with clock.attached(), Memory(side.model.device).peak() as taken:
            attended = clock.forward(input_ids=self._ids(side), **words).attended
        row.transient_bytes, row.cache_bytes = taken[0], side.cache_bytes(words)
        return attended

    def forwards(self, side: Side, count: int) -> Iterator[Sample]:
        """Yield so many forwards."""
        side.select()
        clock = Clock(side.model, self.backend, self.flush)
        with clock.attached():
            words = self._cache(side)
            if self.phase == "decode":
                clock.forward(input_ids=self._ids(side), **words)  # the first one after the cache was filled
            for _ in range(count):
                yield clock.forward(input_ids=self._ids(side), **words)
                if self.phase != "decode":
                    words = self._cache(side)

    def _cache(self, side: Side) -> dict[str, Any]:
        """Return a cache that holds the history, the same for all sides, rounded to bfloat16."""
        generator = torch.Generator().manual_seed(self.history)
        widths = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        shapes = [(self.requests, 1, self.history, width) for width in widths]
        latent, pe = (torch.randn(*shape, generator=generator) for shape in shapes)
        return side.cache(latent.bfloat16(), pe.bfloat16())

    def _ids(self, side: Side) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.new_tokens)
        return torch.randint(0, 1024, (self.requests, self.new_tokens), generator=generator).to(
            side.model.device
        )
