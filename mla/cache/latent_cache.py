"""`LatentCache`: paged storage for the compressed latents, the only thing MLA ever caches.

One token of one layer is a row [c + r], the normed latent and the rotated shared key, or the bytes of them
in a format. Pages are handed out by a free list; sequences own pages through a block table kept on the host.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mla.cache.formats import codec_of, index_codec, index_keys, stored_format, stored_index_format
from mla.cache.ragged_batch import (
    BatchMemory,
    RaggedBatch,
    check_dtype,
    check_page_size,
    host_ints,
    whole_numbers,
)
from mla.config import MLAConfig
from mla.config.layer_config import require_config
from mla.errors import CacheFull
from mla_backends.operands import misfit


@dataclass(slots=True)
class _Sequence:
    row: int  # of the block table
    length: int = 0
    pages: list[int] = field(default_factory=list)


class LatentCache:
    """`pages` [layers, pages, page_size, c + r], zero where nothing was written.

    `index_pages` [layers with an indexer, pages, page_size, D] hold their index keys under the same block
    table; `of_layer` finds a layer's among them. With an `index_format` of `mla.cache.formats` they are
    [.., D + 4] uint8, split within a page.

    With a `cache_format` (a name of `mla.cache.formats.FORMATS`) other than numbers of `dtype`, `pages` are
    [layers, pages, page_size, bytes of a token] uint8. Bytes are copied, and never encoded again.
    `shuffle` (a seed) hands pages out in random order: contiguous pages flatter a benchmark.
    Raises ValueError for invalid sizes, and methods do for a sequence that the cache does not have.
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        max_tokens: int,
        page_size: int = 64,
        num_layers: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        cache_format: str | None = None,
        index_format: str | None = None,
        shuffle: int | None = None,
    ) -> None:
        require_config(config)
        page_size = check_page_size(page_size)
        max_tokens, num_layers = whole_numbers("max_tokens and num_layers", (max_tokens, num_layers))
        if max_tokens < 1 or num_layers < 1:
            raise ValueError(
                f"max_tokens and num_layers must be positive, got {max_tokens} and {num_layers}."
            )
        self.config = config
        self.page_size = page_size
        self.num_pages = -(-max_tokens // page_size)
        self.dtype, self.cache_format = check_dtype(dtype), stored_format(cache_format, dtype)
        self.codec = codec_of(self.cache_format, config.kv_lora_rank, config.qk_rope_head_dim)
        width, held = (self.codec.token_bytes, torch.uint8) if self.codec else (config.latent_dim, dtype)
        shape = (num_layers, self.num_pages, page_size, width)
        self.index_layers = config.index_layers(num_layers)
        self.index_format = stored_index_format(index_format, config.index_n_heads)
        self.index_codec = index_codec(self.index_format, config.index_head_dim)
        index_width = self.index_codec.token_bytes if self.index_codec else config.index_head_dim
        index_held = torch.uint8 if self.index_codec else dtype
        index_shape = (len(self.index_layers), *shape[1:3], index_width)
        with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
            self.pages = torch.zeros(shape, dtype=held, device=device)
            self.index_pages = torch.zeros(index_shape, dtype=index_held, device=device)
            self._tables = torch.zeros(0, 1, dtype=torch.int32, device="cpu")  # [rows, pages]
        self.generation = 0
        self._free = list(range(self.num_pages - 1, -1, -1))
        if shuffle is not None:
            random.Random(shuffle).shuffle(self._free)
        self._sequences: dict[int, _Sequence] = {}
        self._free_rows: list[int] = []
        self._next_id = 0
        self._last_entries: tuple[list[int], list[_Sequence]] | None = None  # the last step's, by id
        self._last_tables: dict[int, torch.Tensor] = {}  # of those sequences, by the least width asked for
        self._memory: dict[bool, BatchMemory] = {}  # of the last step without and with a least width

    @property
    def kv_cache(self) -> torch.Tensor:
        """The latent part of `pages`: [layers, pages, page_size, c]. RuntimeError where they are bytes."""
        return self._plain_pages()[..., : self.config.kv_lora_rank]

    @property
    def pe_cache(self) -> torch.Tensor:
        """The rotary part of `pages`: [layers, pages, page_size, r], channels in checkpoint order."""
        return self._plain_pages()[..., self.config.kv_lora_rank :]

    def _plain_pages(self) -> torch.Tensor:
        if self.codec is not None:
            raise RuntimeError(f"this cache holds bytes of {self.cache_format}: read() decodes them.")
        return self.pages

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a layer's pages and its index pages, None where it has no indexer. Raises ValueError."""
        pages = self._pages_of(layer)
        if layer not in self.index_layers:
            return pages, None
        return pages, self.index_pages[self.index_layers.index(layer)]

    def _pages_of(self, layer: int) -> torch.Tensor:
        if not 0 <= layer < self.pages.shape[0]:
            raise ValueError(
                f"this cache has no layer {layer}: it has {self.pages.shape[0]}, numbered from 0."
            )
        return self.pages[layer]

    @property
    def free_pages(self) -> int:
        """Pages no sequence owns."""
        return len(self._free)

    @property
    def sequences(self) -> list[int]:
        """The ids of all sequences, in the order in which they were made."""
        return list(self._sequences)

    def __repr__(self) -> str:
        """Return the shape, dtype or format, and device of `pages`, and how full they are."""
        tokens = sum(entry.length for entry in self._sequences.values())
        held = self.cache_format or self.pages.dtype
        indexed = f" + {self.index_pages.shape[-1]} of {len(self.index_layers)} indexers"
        held = f"{held}{indexed if self.index_layers else ''}"
        return (
            f"{type(self).__name__}(pages={list(self.pages.shape)} {held} on {self.pages.device}, "
            f"sequences={len(self._sequences)}, tokens={tokens}, free_pages={self.free_pages})"
        )

    def __contains__(self, sequence: int) -> bool:
        """Return whether the cache has a sequence of this id."""
        return sequence in self._sequences

    def length(self, sequence: int) -> int:
        """Return the tokens cached for a sequence."""
        return self._get(sequence).length

    def slots(self, sequence: int) -> torch.Tensor:
        """Return the rows [length] int64 of a flattened layer that hold a sequence, in token order."""
        entry = self._get(sequence)
        pages = host_ints(entry.pages)
        rows = pages[:, None] * self.page_size + torch.arange(self.page_size, device="cpu")
        return rows.reshape(-1)[: entry.length].to(self.pages.device)

    def slot(self, sequence: int, token: int) -> int:
        """Return the row of a flattened layer that holds a token of a sequence; the token must exist."""
        return self._get(sequence).pages[token // self.page_size] * self.page_size + token % self.page_size

    def new_sequences(self, count: int) -> list[int]:
        """Return the ids of `count` empty sequences."""
        (count,) = whole_numbers("count", (count,))
        if count < 0:
            raise ValueError(f"new_sequences() takes a count from 0 on, got {count}.")
        return [self._new_sequence() for _ in range(count)]

    def _new_sequence(self) -> int:
        row = self._free_rows.pop() if self._free_rows else len(self._sequences)
        if row >= self._tables.shape[0]:
            self._grow_tables(rows=max(16, 2 * row), width=self._tables.shape[1])
        self._sequences[self._next_id] = _Sequence(row)
        self._next_id += 1
        return self._next_id - 1

    def extend(
        self, sequences: Sequence[int], query_lens: Sequence[int], *, table_tokens: int = 0
    ) -> RaggedBatch:
        """Make room for `query_lens[i]` new tokens of each sequence and return the step's batch.

        The block table is as wide as the longest sequence needs, or as `table_tokens` tokens would if that is
        more: steps of sequences that grow up to there have one shape and one memory, as a graph needs.
        Raises `CacheFull` when pages run out and ValueError for bad arguments; both change nothing. After any
        other error, as for want of memory, lengths are as before, and earlier batches out of date.
        """
        query_lens = whole_numbers("query_lens", query_lens)
        reserved = table_tokens and whole_numbers("table_tokens", [table_tokens])[0]
        width = -(-reserved // self.page_size)
        if width > self._tables.shape[1]:  # before anything changes: there may be no memory
            self._grow_tables(self._tables.shape[0], width)
        entries, kv_lens = self._with_room(sequences, query_lens)
        table = self._table(entries, width)
        slots = None
        if query_lens.count(1) == len(query_lens):  # decode: a few integers, not worth tensor arithmetic
            size = self.page_size
            slots = [
                entry.pages[(length - 1) // size] * size + (length - 1) % size
                for entry, length in zip(entries, kv_lens, strict=True)
            ]
        shape, reserves = (sum(query_lens), table.shape, self.pages.device), reserved > 0
        memory = self._memory[reserves] = BatchMemory.of(self._memory.get(reserves), *shape)
        of = (table, self.page_size, self.pages.device, self, slots, memory)
        batch = RaggedBatch(query_lens, kv_lens, *of)
        for entry, length in zip(entries, kv_lens, strict=True):  # last: until here memory may be short
            entry.length = length
        return batch

    def grow(self, sequences: Sequence[int], query_lens: Sequence[int]) -> torch.Tensor:
        """Make room as `extend` does, and return the host's block table [B, n] int32 alone."""
        entries, kv_lens = self._with_room(sequences, whole_numbers("query_lens", query_lens))
        table = self._table(entries, 0)
        for entry, length in zip(entries, kv_lens, strict=True):
            entry.length = length
        return table

    def _with_room(
        self, sequences: Sequence[int], query_lens: Sequence[int]
    ) -> tuple[list[_Sequence], list[int]]:
        """Give sequences the pages that a step needs; return them and the lengths that it gives them."""
        entries = self._entries(sequences, query_lens)
        kv_lens = [entry.length + new for entry, new in zip(entries, query_lens, strict=True)]
        self._reserve(entries, kv_lens)
        self.generation += 1
        return entries, kv_lens

    def _table(self, entries: list[_Sequence], least: int) -> torch.Tensor:
        """Return the block table [B, n >= least] of these; the last one while no page has changed."""
        if (last := self._last_tables.get(least)) is not None:
            return last
        width = max(1, least, *[len(entry.pages) for entry in entries])
        if width > self._tables.shape[1]:
            self._grow_tables(self._tables.shape[0], width)
        table = self._tables[:, :width].index_select(0, host_ints(entry.row for entry in entries))
        self._last_tables[least] = table
        return table

    def _entries(self, sequences: Sequence[int], query_lens: Sequence[int]) -> list[_Sequence]:
        """Return the entries of a step's sequences: the same list as long as they are the same sequences."""
        ids = whole_numbers("sequences", sequences)
        if len(ids) != len(query_lens) or not ids:
            raise ValueError(f"got {len(ids)} sequences and {len(query_lens)} query_lens: give one for each.")
        if min(query_lens) < 0:
            raise ValueError(f"query_lens must not be negative, got {min(query_lens)}.")
        if self._last_entries is None or self._last_entries[0] != ids:
            if len(set(ids)) != len(ids):
                raise ValueError("a sequence may appear only once in a step: list its new tokens together.")
            self._last_entries = (ids, [self._get(sequence) for sequence in ids])
            self._last_tables.clear()
        return self._last_entries[1]

    def _reserve(self, entries: Sequence[_Sequence], lengths: Sequence[int]) -> None:
        """Give each entry the pages for so many rows; raises before giving any."""
        size = self.page_size
        wanted = [-(-n // size) - len(e.pages) for e, n in zip(entries, lengths, strict=True)]
        if max(wanted) <= 0:  # most steps of a decode
            return
        if sum(wanted) > len(self._free):
            raise CacheFull(
                f"the cache has {len(self._free)} free pages of {self.page_size} tokens and this step needs "
                f"{sum(wanted)}: release sequences or make the cache larger."
            )
        self._last_tables.clear()
        for entry, count in zip(entries, wanted, strict=True):
            start = len(entry.pages)
            if count > 0 and start + count > self._tables.shape[1]:
                self._grow_tables(self._tables.shape[0], width=2 * (start + count))
            if count > 0:
                entry.pages += [self._free.pop() for _ in range(count)]
                self._tables[entry.row, start : start + count] = host_ints(entry.pages[start:], torch.int32)

    def _grow_tables(self, rows: int, width: int) -> None:
        with torch.inference_mode(False):
            grown = torch.zeros(rows, width, dtype=torch.int32, device="cpu")
        grown[: self._tables.shape[0], : self._tables.shape[1]] = self._tables
        self._tables = grown

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence past `length`; freed pages are zeroed.

        Raises ValueError when the sequence is shorter.
        """
        sequence, length = whole_numbers("a sequence and its length", (sequence, length))
        entry = self._get(sequence)
        held = entry.length
        if not 0 <= length <= held:
            raise ValueError(f"cannot truncate a sequence of {held} tokens to {length}: choose 0 to {held}.")
        keep = -(-self._rows(length) // self.page_size)
        if dropped := entry.pages[keep:]:
            freed = torch.tensor(dropped, device=self.pages.device)
            self.pages[:, freed] = 0
            self.index_pages[:, freed] = 0
            self._last_tables.clear()
            self._free += reversed(dropped)  # so that extending again takes the same pages
            del entry.pages[keep:]
        entry.length = length
        self.generation += 1

    def release(self, sequences: Sequence[int]) -> None:
        """Free the pages of sequences and forget their ids. Raises ValueError before freeing any."""
        sequences = whole_numbers("sequences", sequences)
        if len(set(sequences)) != len(sequences):
            raise ValueError("a sequence may be released only once: list each id once.")
        for sequence in sequences:
            self._get(sequence)
        self._last_entries = None
        self._last_tables.clear()
        for sequence in sequences:
            self.truncate(sequence, 0)
            self._free_rows.append(self._sequences.pop(sequence).row)

    def load(
        self,
        sequence: int,
        kv: torch.Tensor,
        pe: torch.Tensor,
        layer: int = 0,
        *,
        index: torch.Tensor | None = None,
    ) -> None:
        """Store history: kv [s, c] already normed, pe [s, r] already rotated.

        Of a layer with an indexer, `index` [s, D] are its keys, normed and rotated.

        An empty sequence grows to s tokens; a sequence of s tokens (another layer was loaded first) is
        overwritten. Raises `CacheFull`, or ValueError when the sequence has another length or a tensor does
        not fit; both change nothing.
        """
        sequence, layer = whole_numbers("a sequence and its layer", (sequence, layer))
        pages, given = self._pages_of(layer), self._history(layer, kv, pe, index)
        count, held = kv.shape[0], self.length(sequence)
        if held not in (0, count):
            raise ValueError(
                f"load() got {count} tokens for a sequence of {held}: load as many in every layer."
            )
        kept = [self._held(x.detach().to(self.pages.device, self.dtype)) for x in given]
        rows = self.encoded(*kept[:2])
        if count and not held:
            self.grow([sequence], [count])
        slots = self.slots(sequence)
        pages.flatten(0, 1).index_copy_(0, slots, rows)
        if index is not None:
            self.write_index(layer, slots, kept[2])

    def _history(self, layer: int, kv: Any, pe: Any, index: Any) -> list[torch.Tensor]:
        """Return the history of a layer: with index keys of one that has an indexer, and of no other.

        Raises ValueError for anything but floating-point tensors of as many rows.
        """
        config, indexed = self.config, layer in self.index_layers
        if index is not None and not indexed:
            raise ValueError("load() got index keys of a layer without an indexer: leave index= out.")
        parts = [("kv", kv, config.kv_lora_rank), ("pe", pe, config.qk_rope_head_dim)]
        parts += [("index", index, config.index_head_dim)] * indexed
        count = kv.shape[0] if isinstance(kv, torch.Tensor) and kv.dim() else 0
        for name, x, width in parts:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.is_meta:
                got = f"{x.dtype} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
                raise ValueError(f"load() takes {name} [s, {width}] of floating-point numbers, got {got}.")
            if wrong := misfit(x.resolve_neg(), (count, width), x.dtype, x.device):
                raise ValueError(f"load(): {name} {wrong}")
        return [x for _, x, _ in parts]

    def _rows(self, length: int) -> int:
        """Return the rows of pages that the first tokens of a sequence take."""
        return length

    def _held(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is stored here of all of a sequence's tokens, the rows of x."""
        return x

    def copy(self, sequence: int, home: LatentCache) -> int:
        """Return the id of a copy of a sequence in `home`, this cache or one like it: bytes stay as they are.

        Raises `CacheFull`, which changes nothing.
        """
        length = self.length(sequence)
        (made,) = home.new_sequences(1)
        try:
            home.grow([made], [length])
        except BaseException:
            home.release([made])
            raise
        new = home._get(made).pages
        old = self._get(sequence).pages[: len(new)]  # a step that failed may have left it more
        source, target = (host_ints(pages).to(self.pages.device) for pages in (old, new))
        for held, theirs in ((self.pages, home.pages), (self.index_pages, home.index_pages)):
            theirs.index_copy_(1, target, held.index_select(1, source))
        return made

    def write_index(self, layer: int, slots: torch.Tensor, index: torch.Tensor) -> None:
        """Write index keys [s, D] in `dtype` to slots [s] int64 of a layer that has an indexer.

        Slots are those of latents. Raises ValueError for a layer without an indexer.
        """
        pages = self.index_pages[self.index_layers.index(layer)]
        if self.index_codec is None:
            pages.flatten(0, 1).index_copy_(0, slots, index)
        else:
            self.index_codec.write(pages, slots, index)

    def read_index(self, sequence: int, layer: int = 0, start: int = 0) -> torch.Tensor | None:
        """Return a copy of a sequence's index keys [s, D] from `start` on; None where there is no indexer.

        They are float32 where the cache has an `index_format`.
        """
        pages = self.of_layer(layer)[1]
        if pages is None:
            return None
        whole, skipped = divmod(start, self.page_size)
        owned = host_ints(self._get(sequence).pages[whole:]).to(pages.device)
        kept = pages.index_select(0, owned)
        keys = kept if self.index_codec is None else index_keys(kept, self.index_codec)
        return keys.flatten(0, 1)[skipped : len(self.slots(sequence)) - start + skipped].clone()

    def encoded(self, kv: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        """Return rows of `pages` for kv [s, c] and pe [s, r] in `dtype`."""
        return torch.cat((kv, pe), dim=1) if self.codec is None else self.codec.encode(kv, pe)

    def read(self, sequence: int, layer: int = 0, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of a sequence's kv [s, c] and pe [s, r] from token `start` on.

        They are float32 where the cache has a format.
        """
        rows = self._pages_of(layer).flatten(0, 1).index_select(0, self.slots(sequence)[start:])
        if self.codec is not None:
            return self.codec.decode(rows)
        kv, pe = rows.split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=1)
        return kv.contiguous(), pe.contiguous()

    def _get(self, sequence: int) -> _Sequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise ValueError(
                f"this cache has no sequence {sequence}: pass ids of new_sequences() until release()."
            ) from None
