"""What is run: a decode step, tokens appended to a history, or a whole prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.transformers.meters import Clock, Memory
from benchmarks.transformers.record import Row
from benchmarks.transformers.sides import PAGE_SIZE, Side
from mla.config import MLAConfig
from mla_backends import host

PHASES = ("decode", "append", "prefill")
APPENDED = 128


@dataclass(frozen=True)
class Work:
    """One phase of one config at one length."""

    name: str  # of the config
    config: MLAConfig
    device: torch.device
    synchronize: Callable[[], None]
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
        if side.backend or self.device.type != "cpu" or available is None:
            return ""
        config, size, tokens = self.config, side.model.dtype.itemsize, self.history + self.new_tokens
        widths = config.qk_nope_head_dim + config.qk_head_dim + 2 * config.v_head_dim  # expanded, and copied
        copies, logits = (2.2 if side.name == "sdpa" else 1.2), 10 * self.new_tokens  # as seen
        needed = config.num_attention_heads * tokens * (copies * widths * size + logits)
        if needed < 0.85 * available:
            return ""
        return f"needs about {needed / 2**30:.0f} GiB, of which {available / 2**30:.0f} are available"

    def weigh(self, side: Side, row: Row) -> torch.Tensor:
        """Run one forward, which warms up, and note the memory that it takes; return the last logits."""
        side.start()
        words, clock = self._cache(side), Clock(side.model, self.synchronize)
        with Memory(self.device).peak() as taken:
            logits, _, _ = clock.forward(input_ids=self._ids(), **words)
        row.transient_bytes, row.cache_bytes = taken[0], self._cache_bytes(side)
        return logits.float()

    def forwards(self, side: Side, count: int) -> Iterator[tuple[float, float]]:
        """Yield milliseconds of the model and of its attention alone, of so many forwards."""
        side.select()
        clock = Clock(side.model, self.synchronize)
        with clock.attached():
            words = self._cache(side)
            if self.phase == "decode" and count > 1:
                clock.forward(input_ids=self._ids(), **words)  # the first one after the cache was filled
            for _ in range(count):
                yield clock.forward(input_ids=self._ids(), **words)[1:]
                if self.phase != "decode":
                    words = self._cache(side)

    def _cache(self, side: Side) -> dict[str, Any]:
        """Return a cache that holds the history, the same for all sides, rounded to bfloat16."""
        generator = torch.Generator().manual_seed(self.history)
        widths = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        latent, pe = (torch.randn(1, 1, self.history, width, generator=generator) for width in widths)
        return side.cache(latent.bfloat16(), pe.bfloat16())

    def _cache_bytes(self, side: Side) -> int:
        """Return the bytes of the latents of all tokens; whole pages of a paged cache."""
        tokens = self.history + self.new_tokens
        if side.pages:
            tokens = -(-tokens // PAGE_SIZE) * PAGE_SIZE
        return tokens * (self.config.kv_lora_rank + self.config.qk_rope_head_dim) * side.model.dtype.itemsize

    def _ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.new_tokens)
        ids = torch.randint(0, 1024, (1, self.new_tokens), generator=generator)
        return ids.to(self.device)
