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
# rest is for what such a context needs besides: queries, outputs, and what the op allocates.
FREE_PARTS = 4


def rebuilt_bytes(config: MLAConfig, itemsize: int, keys: int) -> int:
    """Return the bytes of this many rebuilt keys: k, kv_b's own output, which v is a part of, and latents."""
    row = config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    return keys * (row * config.num_attention_heads + config.latent_dim) * itemsize


def grown_bytes(config: MLAConfig, itemsize: int, keys: int) -> int:
    """Return the bytes for keys that are rebuilt beyond the workspace: with values padded to k's width."""
    padded = keys * config.num_attention_heads * config.qk_head_dim * itemsize
    return rebuilt_bytes(config, itemsize, keys) + padded


class Growth:
    """What a layer may rebuild at a time beyond its workspace, where its op cannot merge rounds."""

    def __init__(self, backend: Backend | None) -> None:
        self._backend = backend

    def require(self, config: MLAConfig, choice: Choice, keys: int) -> None:
        """Raise `UnsupportedBatch` when what `keys` keys need is more than the device has to spare.

        Called when a batch is planned whose context exceeds the workspace. The device is asked every time:
        what was free before may be in use by now, and asking costs nothing next to such a context.
        """
        itemsize = choice.spec.dtype.itemsize
        need, spare = grown_bytes(config, itemsize, keys), self._spare()
        if need > spare and self._backend is not None:
            self._backend.empty_cache()  # freed memory that torch keeps counts as used
            spare = self._spare()
        if need > spare:
            raise UnsupportedBatch(
                f"fused op '{choice.name}' returns no log-sum-exp, so it needs the keys and values of a "
                f"whole request at once: {size(need)} for {keys} tokens, more than a quarter of the device's "
                f"free memory ({size(int(spare))}). Use shorter prompts, or an op that "
                "returns it, as the reference ops do (`--ops reference`); a program may also give MLA "
                f"workspace_bytes={rebuilt_bytes(config, itemsize, keys)}, which plans this unasked."
            )

    def _spare(self) -> float:
        """Return what may be taken now; nothing is refused where the free memory is unknown."""
        free = self._backend.memory().free if self._backend is not None else None
        return math.inf if free is None else free / FREE_PARTS
