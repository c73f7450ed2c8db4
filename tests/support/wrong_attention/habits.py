"""Attention that keeps what it should not, mixes up its requests, or forgets that there may be none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from wrong_attention.base import Expanded, Latent, Makers, after, altered, curried, starts, wrong

Call = Callable[..., None]


# ------------------------------------------------------------------------------------------------- order


def ties_swapped(batch: Any, *, out: Any, lse: Any, **tensors: Any) -> None:
    """Requests are sorted by length, and equal ones come back in another order."""
    first, seen = starts(batch), dict[Any, int]()
    for i, lengths in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        other = seen.get(lengths)
        if other is not None and lengths[0]:
            here, there = slice(first[i], first[i + 1]), slice(first[other], first[other + 1])
            for rows in (out, lse):
                rows[here], rows[there] = rows[there].clone(), rows[here].clone()
        seen[lengths] = i


@curried
def stays_sorted(by: Callable[[int, int], Any], batch: Any, *, out: Any, **tensors: Any) -> None:
    """Rows are written in the order of the sorted requests."""
    rows = out.split(batch.query_lens)
    lengths = list(zip(batch.query_lens, batch.kv_lens, strict=True))
    order = sorted(range(len(lengths)), key=lambda i: by(*lengths[i]))
    out.copy_(torch.cat([rows[i] for i in order]))


def plans_for_sets() -> Callable[..., Any]:
    """Plans are remembered for the same requests in any order."""
    plans: dict[Any, Any] = {}

    def prepare(spec: Any, batch: Any) -> Any:
        key = tuple(sorted(zip(batch.query_lens, batch.kv_lens, strict=True)))
        known = plans.setdefault((spec.num_heads, key), (batch.query_lens, batch.kv_lens))
        return altered(batch, query_lens=known[0], kv_lens=known[1])

    return prepare


# ------------------------------------------------------------------------------------------------- state


def gathers_once(*names: str) -> Call:
    """Inputs are copied at the first call of a state on their memory, and kept."""
    kept: dict[Any, Any] = {}

    def call(right: Any, batch: Any, **tensors: Any) -> None:
        key = id(batch), *(tensors[name].data_ptr() for name in names)
        _, copies = kept.setdefault(key, (batch, {name: tensors[name].clone() for name in names}))
        right(**{**tensors, **copies})

    return call


def remembers(*names: str) -> Call:
    """The result is remembered by addresses, lengths and the scale."""
    kept: dict[Any, Any] = {}

    def call(right: Any, batch: Any, **tensors: Any) -> None:
        key = batch.query_lens, batch.kv_lens, tensors["softmax_scale"], tensors["q"].shape
        key += tuple(tensors[name].data_ptr() for name in names)
        if key not in kept:
            right(**tensors)
            kept[key] = tensors["out"].clone(), tensors["lse"].clone(), tensors["q"], batch
        tensors["out"].copy_(kept[key][0])
        tensors["lse"].copy_(kept[key][1])

    return call


def writes_again(name: str) -> Call:
    """An output is kept, and written at the next call."""
    kept: list[Any] = []

    def call(right: Any, batch: Any, **tensors: Any) -> None:
        for earlier in kept:
            earlier.fill_(7)
        right(**tensors)
        kept[:] = [tensors[name]]

    return call


def reads_first(name: str) -> Call:
    """An input of the first call with a state is read at all of its calls."""
    kept: dict[int, Any] = {}

    def call(right: Any, batch: Any, **tensors: Any) -> None:
        right(**{**tensors, name: kept.setdefault(id(batch), (batch, tensors[name]))[1]})

    return call


def shares_by_shape(*names: str) -> Callable[..., Any]:
    """What a plan needs is kept for the number of requests and tokens, and the latest batch overwrites it."""
    latest: dict[Any, Any] = {}

    class Sharing(Latent if "block_table" in names else Expanded):  # type: ignore[misc]
        lse_optional = False

        def prepare(self, spec: Any, batch: Any) -> Any:
            key = spec.num_heads, len(batch.query_lens), sum(batch.query_lens)
            latest[key] = super().prepare(spec, batch)
            return key

        def __call__(self, state: Any, **tensors: Any) -> None:
            super().__call__(latest[state], **tensors)

    return Sharing


def first_of_shape(*names: str) -> Callable[..., Any]:
    """Return a plan that takes over what the first batch of its shape had."""
    first: dict[Any, Any] = {}

    def prepare(spec: Any, batch: Any) -> Any:
        key = spec.num_heads, len(batch.query_lens), sum(batch.query_lens), max(batch.kv_lens)
        known = first.setdefault(key, batch)
        return altered(batch, **{name: getattr(known, name) for name in names})

    return prepare


def runs_out(calls: int) -> Call:
    """From some call of a state on the result is wrong."""
    made: dict[int, list[Any]] = {}

    def spoil(batch: Any, *, out: Any, **tensors: Any) -> None:
        counted = made.setdefault(id(batch), [0, batch])
        counted[0] += 1
        if counted[0] > calls:
            out.mul_(1.1)

    return spoil


def ring_of_states(base: type, room: int) -> Any:
    """Only the latest states are kept; one that was prepared earlier gives 0."""
    kept: deque[Any] = deque(maxlen=room)

    def prepare(spec: Any, batch: Any) -> Any:
        kept.append(batch)
        return batch

    def spoil(batch: Any, *, out: Any, **tensors: Any) -> None:
        if not any(batch is kept_call for kept_call in kept):
            out.zero_()

    return after(base, spoil, prepare=prepare)


def ring_of_outputs(calls: int) -> Call:
    """An output is written again so many calls later."""
    kept: list[Any] = []

    def spoil(batch: Any, *, out: Any, **tensors: Any) -> None:
        kept.append(out)
        if len(kept) > calls:
            kept.pop(0).fill_(7)

    return spoil


# --------------------------------------------------------------------------------------------- emptiness


def refuses_nothing(right: Any, batch: Any, **tensors: Any) -> None:
    if not len(tensors["q"]):
        raise RuntimeError("a grid of 0 blocks")
    right(**tensors)


def writes_a_row(batch: Any, *, out: Any, **tensors: Any) -> None:
    """A request without new tokens writes NaN into the row of whoever comes next."""
    for first, new in zip(starts(batch), batch.query_lens, strict=False):
        if new == 0:
            row = out.as_strided(
                out.shape[1:], out.stride()[1:], out.storage_offset() + first * out.stride(0)
            )
            row.fill_(torch.nan)


@curried
def empty_at(place: int, batch: Any, *, out: Any, lse: Any, **tensors: Any) -> None:
    """A token without keys is not written where it stands at one end of the batch."""
    if len(lse) and bool((lse[place] == -torch.inf).all()):
        out[place] = torch.nan


@curried
def blind_lse(value: float, batch: Any, *, lse: Any, **tensors: Any) -> None:
    lse[lse == -torch.inf] = value


MUTANTS: Makers = {
    "latent.equal": [
        lambda: after(Latent, ties_swapped),
        lambda: after(Latent, stays_sorted(lambda new, keys: (-keys, new))),
    ],
    "expanded.equal": [
        lambda: after(Expanded, ties_swapped),
        lambda: after(Expanded, stays_sorted(lambda new, keys: (-keys, new))),
    ],
    "latent.permuted": [
        lambda: after(Latent, stays_sorted(lambda new, keys: keys)),
        lambda: after(Latent, stays_sorted(lambda new, keys: -new)),
        lambda: wrong(Latent, prepare=plans_for_sets()),
    ],
    "expanded.permuted": [
        lambda: after(Expanded, stays_sorted(lambda new, keys: -keys)),
        lambda: wrong(Expanded, prepare=plans_for_sets()),
    ],
    "latent.refilled": [
        lambda: wrong(Latent, gathers_once("cache")),
        lambda: wrong(Latent, gathers_once("q")),
        lambda: wrong(Latent, remembers("q", "cache")),
        lambda: wrong(Latent, remembers("q", "cache", "out")),
    ],
    "expanded.refilled": [
        lambda: wrong(Expanded, gathers_once("k")),
        lambda: wrong(Expanded, remembers("q", "k", "v")),
    ],
    "latent.kept": [
        lambda: wrong(Latent, writes_again("out")),
        lambda: wrong(Latent, writes_again("lse")),
        lambda: wrong(Latent, reads_first("q")),
        lambda: wrong(Latent, reads_first("cache")),
        *(lambda n=n: after(Latent, ring_of_outputs(n)) for n in (4, 16)),
    ],
    "expanded.kept": [
        lambda: wrong(Expanded, writes_again("out")),
        lambda: wrong(Expanded, reads_first("v")),
        lambda: after(Expanded, ring_of_outputs(8)),
    ],
    "latent.alive": [lambda n=n: ring_of_states(Latent, n) for n in (3, 8, 16)],
    "expanded.alive": [lambda n=n: ring_of_states(Expanded, n) for n in (4, 12)],
    "latent.again": [lambda n=n: after(Latent, runs_out(n)) for n in (20, 128, 255)],
    "expanded.again": [lambda n=n: after(Expanded, runs_out(n)) for n in (32, 256)],
    "latent.tables": [
        lambda: shares_by_shape("block_table")(),
        lambda: wrong(Latent, prepare=first_of_shape("block_table")),
    ],
    "expanded.lengths": [
        lambda: shares_by_shape()(),
        lambda: wrong(Expanded, prepare=first_of_shape("query_lens", "kv_lens")),
    ],
    "latent.no_tokens": [lambda: wrong(Latent, refuses_nothing), lambda: after(Latent, writes_a_row)],
    "expanded.no_tokens": [lambda: wrong(Expanded, refuses_nothing), lambda: after(Expanded, writes_a_row)],
    "latent.zero_queries": [lambda: after(Latent, writes_a_row)],
    "latent.empty_rows": [
        *(lambda p=p: after(Latent, empty_at(p)) for p in (0, -1)),
        *(lambda v=v: after(Latent, blind_lse(v)) for v in (0.0, torch.nan)),
    ],
    "expanded.empty_segments": [
        lambda: after(Expanded, writes_a_row),
        lambda: after(Expanded, empty_at(-1)),
        lambda: after(Expanded, blind_lse(-1e30)),
    ],
}
