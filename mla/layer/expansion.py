"""How many bytes of keys and values the expanded path may rebuild at a time."""

from __future__ import annotations

import math

from mla.config import MLAConfig
from mla.errors import UnsupportedBatch
from mla.layer.ops import Choice
from mla.text import size
from mla_backends.api import Backend

# Bytes that the rebuilt keys and values of one round usually take at most.
WORKSPACE_BYTES = 256 << 20
# An op that cannot merge rounds may take one part in this many of the free memory for a longer context. The
# rest is for what such a context needs besides: padded values, queries, outputs, and what the op allocates.
FREE_PARTS = 4


def rebuilt_bytes(config: MLAConfig, itemsize: int, keys: int) -> int:
    """Return the bytes of this many rebuilt keys: k, and kv_b's own output, which v is a part of."""
    row = config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    return keys * row * config.num_attention_heads * itemsize


class Growth:
    """What a layer may rebuild at a time beyond its workspace, where its op cannot merge rounds."""

    def __init__(self, backend: Backend | None) -> None:
        self._backend = backend
        self._limit = 0.0  # a part of what was free when it was last asked for

    def require(self, need: int, choice: Choice, keys: int) -> None:
        """Raise `UnsupportedBatch` when `need` bytes for `keys` keys are more than the device has to spare.

        Called when a batch is planned, which a decode step does in timed code. The device is asked only for
        more than was allowed before: on some stacks the answer takes as long as a small op.
        """
        if need <= self._limit:
            return
        self._limit = self._spare()
        if need > self._limit and self._backend is not None:
            self._backend.empty_cache()  # freed memory that torch keeps counts as used
            self._limit = self._spare()
        if need > self._limit:
            raise UnsupportedBatch(
                f"fused op '{choice.name}' returns no log-sum-exp, so it needs the keys and values of a "
                f"whole request at once: {size(need)} for {keys} tokens, more than a quarter of the device's "
                f"free memory ({size(int(self._limit))}). Use shorter requests, an op that returns it, the "
                "reference ops (`--ops reference`), or raise workspace_bytes to that much."
            )

    def _spare(self) -> float:
        """Return what may be taken now; nothing is refused where the free memory is unknown."""
        free = self._backend.memory().free if self._backend is not None else None
        return math.inf if free is None else free / FREE_PARTS
