"""What a comparison writes down, as JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec

from mla.errors import ResultError


class Row(msgspec.Struct, kw_only=True):
    """One side, one phase, one length."""

    config: str
    phase: str  # decode, append or prefill
    history: int  # cached tokens before the forward
    new_tokens: int
    side: str  # sdpa or eager of `transformers`; mla, mla-paged
    dtype: str
    model_ms: list[list[float]] = []  # of each round
    attention_ms: list[list[float]] = []
    weight_bytes: int = 0
    cache_bytes: int = 0  # of the latents after the forward, in whole pages where there are any
    transient_bytes: int = 0  # at most, during one forward, beyond weights and the history's cache
    deviation: float = 0.0  # of the last token's attention from that of the first side, relative
    load: float = 0.0  # of the machine: processes that ran or waited, over the last minute
    left_out: str = ""  # why there is no number

    @property
    def total_bytes(self) -> int:
        """What must be there at once: weights, the history's cache and the transient memory of a forward."""
        return self.weight_bytes + self.cache_bytes * self.history // self.tokens + self.transient_bytes

    @property
    def tokens(self) -> int:
        """All tokens after the forward."""
        return self.history + self.new_tokens


class Record(msgspec.Struct, kw_only=True):
    """A run."""

    device: str
    threads: int
    backend: str
    versions: dict[str, str]
    commit: str | None
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
        raise ResultError(f"'{path}' is no record of this comparison: {error}.") from error


def write(record: Record, path: Path) -> None:
    """Write a record, a line for each row."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
