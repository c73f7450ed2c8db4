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
# Bytes that `transformers` takes for a head of a token, by attention and bytes of an element, as measured
# with the head dimensions of DeepSeek; and for a logit: no attention has a fused kernel for them on a CPU.
EXPANDED = {("sdpa", 2): 3050, ("sdpa", 4): 2900, ("eager", 2): 1200, ("eager", 4): 1830}
LOGIT = 10


@dataclass(frozen=True)
class Work:
    """One phase of one config at one length."""

    name: str  # of the config
    config: MLAConfig
    backend: Backend
    flush: Callable[[], None]
    phase: str
    length: int

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
            side=side.name,
            dtype=side.dtype,
            weight_bytes=side.weight_bytes,
        )

    def refusal(self, side: Side) -> str:
        """Return why a side of `transformers` would not fit the host's memory, or ""."""
        available = host.memory_available()
        if side.backend or side.model.device.type != "cpu" or available is None:
            return ""
        each = EXPANDED[side.name, side.model.dtype.itemsize] + LOGIT * self.new_tokens
        needed = self.config.num_attention_heads * (self.history + self.new_tokens) * each
        if needed < 0.9 * available:
            return ""
        return f"needs about {needed / 2**30:.0f} GiB, of which {available / 2**30:.0f} are available"

    def weigh(self, side: Side, row: Row) -> torch.Tensor:
        """Run a forward, which warms up, and note its memory; return the last token's attention [hidden]."""
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
        latent, pe = (torch.randn(1, 1, self.history, width, generator=generator) for width in widths)
        return side.cache(latent.bfloat16(), pe.bfloat16())

    def _ids(self, side: Side) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.new_tokens)
        return torch.randint(0, 1024, (1, self.new_tokens), generator=generator).to(side.model.device)
