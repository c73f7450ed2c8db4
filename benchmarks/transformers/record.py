"""Records of the comparison with `transformers`, as a program that is gone has written them, as JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec

from mla.errors import ResultError

LAYERS = {"deepseek-r1": 61, "deepseek-v2-lite": 27}  # of each config's model, all with MLA


class Row(msgspec.Struct, kw_only=True):
    """One side, in one setting of the host's allocator, in one phase at one length."""

    config: str
    phase: str  # decode, append or prefill
    history: int  # cached tokens before the forward
    new_tokens: int
    requests: int = 1
    side: str  # sdpa or eager of `transformers`; mla, mla-paged
    dtype: str
    allocator: str = "default"  # or kept: freed memory stays in the process
    model_ms: list[list[float]] = []  # of each round
    attention_ms: list[list[float]] = []
    weight_bytes: int = 0  # of the attention layer, packed ones too
    cache_bytes: int = 0  # of the latents after the forward, in whole pages where there are any
    transient_bytes: int = 0  # at most, during one forward, beyond weights and the history's cache
    # Relative, of last tokens' attention from that of the first side of `transformers`; None: not compared.
    deviation: float | None = None
    load: float = 0.0  # of the machine: processes that ran or waited, over the last minute
    left_out: str = ""  # why there is no number

    def needed_bytes(self, layers: int) -> int:
        """Return what so many attention layers need at once, at most: while the last of them runs.

        Weights and caches are there for every layer, and the transient memory of a forward once. Of the layer
        that runs, the cache's growth is part of that.
        """
        before = self.cache_bytes * self.history // self.tokens
        return layers * self.weight_bytes + (layers - 1) * self.cache_bytes + before + self.transient_bytes

    @property
    def tokens(self) -> int:
        """All tokens of a request after the forward."""
        return self.history + self.new_tokens


class Record(msgspec.Struct, kw_only=True):
    """A run."""

    device: str
    label: str = ""  # of the machine in headings, where another one's tables have none
    threads: int
    backend: str
    versions: dict[str, str]
    commit: str | None
    environment: dict[str, str] = {}  # what else numbers depend on, the backend's own facts among it
    allocators: dict[str, str] = {}  # GLIBC_TUNABLES of each setting
    memory_bytes: int | None  # of the host
    flush: str  # how caches are flushed
    date: str
    arguments: list[str]
    rows: list[Row] = []


def read(path: Path) -> Record:
    """Read a record. Raises `ResultError` for anything else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except OSError as error:
        raise ResultError(f"cannot read '{path}': {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise ResultError(f"'{path}' is not a record of this comparison: {error}.") from error
