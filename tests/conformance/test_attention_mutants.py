"""Deliberately wrong attention: each mutant must fail the check that is there for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla.conformance.checks import latent_places
from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult
from mla.reference import REFERENCE

Run = Callable[..., list[CheckResult]]
Latent, Expanded = (type(REFERENCE[kind]) for kind in ("latent_attention", "expanded_attention"))
PAGE = 64
FAR = 1 << 22  # numbers: where the pages lie that `conftest.py` lets the suite ask for


def altered(batch: Any, **changes: Any) -> SimpleNamespace:
    names = ("query_lens", "kv_lens", "page_size", "block_table", "kv_lens_device", "cu_q")
    return SimpleNamespace(**{**{name: getattr(batch, name) for name in names}, **changes})


def wrong(
    base: type,
    call: Callable[..., None] | None = None,
    prepare: Callable[..., Any] | None = None,
    **facts: Any,
) -> Any:
    """Return an op that differs from the reference in its call, its plan, or what it declares.

    `call(right, batch, **tensors)` gets the right call, its state bound. `prepare(spec, batch)` returns
    the batch that is planned instead.
    """

    class Wrong(base):  # type: ignore[misc]
        def prepare(self, spec: Any, batch: Any) -> Any:
            return batch, super().prepare(spec, prepare(spec, batch) if prepare else batch)

        def __call__(self, state: Any, **tensors: Any) -> None:
            batch, inner = state
            right = super().__call__
            if call is None:
                right(inner, **tensors)
            else:
                call(lambda **given: right(inner, **given), batch, **tensors)

    for name, value in {"lse_optional": False, **facts}.items():
        setattr(Wrong, name, value)
    return Wrong()


def after(base: type, spoil: Callable[..., object], **facts: Any) -> Any:
    """Return an op that is right until `spoil(batch, **tensors)` has changed its outputs."""

    def call(right: Any, batch: Any, **tensors: Any) -> None:
        right(**tensors)
        spoil(batch, **tensors)

    return wrong(base, call, **facts)


def given(base: type, change: Callable[..., dict[str, Any]]) -> Any:
    """Return an op that computes with other tensors than it was given: `change(**tensors)`."""
    return wrong(base, lambda right, batch, **tensors: right(**{**tensors, **change(**tensors)}))


# ---------------------------------------------------------------------------------------- for both kinds


def as_contiguous(name: str) -> Callable[..., dict[str, Any]]:
    def change(**tensors: Any) -> dict[str, Any]:
        x = tensors[name]
        return {name: x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset())}

    return change


def rows_moved(batch: Any, *, out: Any, **tensors: Any) -> None:
    if len(set(batch.query_lens)) > 1:
        out.copy_(out.roll(1, 0))


def many_heads(batch: Any, *, out: Any, **tensors: Any) -> None:
    out[:, PAGE:] = 0


def base_two(batch: Any, *, lse: Any, **tensors: Any) -> None:
    lse.div_(math.log(2))


def no_maximum(batch: Any, *, out: Any, lse: Any, **tensors: Any) -> None:
    """exp() of a large logit is infinite, and infinity over infinity is NaN."""
    out.masked_fill_((lse.exp() == torch.inf)[..., None], torch.nan)


def scaled_in_place(right: Any, batch: Any, *, q: Any, softmax_scale: float, **tensors: Any) -> None:
    right(q=q.mul_(softmax_scale), softmax_scale=1.0, **tensors)


def usual_scale(width: int) -> Callable[..., dict[str, Any]]:
    return lambda **tensors: {"softmax_scale": width**-0.5}


def first_layers(name: str) -> Any:
    """Return a call that keeps a tensor of the first layer for all that share the plan."""

    def call(right: Any, batch: Any, **tensors: Any) -> None:
        seen = kept.setdefault(id(batch), (batch, tensors[name].clone()))
        right(**{**tensors, name: seen[1]})

    kept: dict[int, Any] = {}
    return call


def without_lse(base: type, call: Callable[..., None] | None = None) -> Any:
    """Return an op that is right only as long as it is given an lse to write."""

    def choose(right: Any, batch: Any, *, lse: Any, out: Any, **tensors: Any) -> None:
        if lse is not None:
            right(lse=lse, out=out, **tensors)
        elif call is None:  # unnormalised
            right(lse=None, out=out, **tensors)
            out.mul_(1.1)

    return wrong(base, choose, lse_optional=True)


def nothing(*arguments: Any, **tensors: Any) -> None:
    """Leave `out` as it was."""


def waits(spec: Any, batch: Any) -> Any:
    torch.zeros(1).to("cpu", copy=True)
    return batch


# ----------------------------------------------------------------------------------------------- latent


def neighbours_table(spec: Any, batch: Any) -> Any:
    return altered(batch, block_table=batch.block_table.roll(1, 0)[:, : batch.block_table.shape[1]])


def full_page_dropped(spec: Any, batch: Any) -> Any:
    lens = [kv - PAGE if kv % PAGE == 0 and kv > PAGE else kv for kv in batch.kv_lens]
    lens = [max(kv, q) for kv, q in zip(lens, batch.query_lens, strict=True)]
    return altered(batch, kv_lens=tuple(lens))


def last_window(spec: Any, batch: Any) -> Any:
    """Drop all but the last 2048 tokens, as a merge does that keeps the last part only."""
    skip = [max(0, kv - 2048) // PAGE for kv in batch.kv_lens]
    width = batch.block_table.shape[1]
    rows = [row.roll(-pages)[:width] for row, pages in zip(batch.block_table, skip, strict=True)]
    lens = tuple(kv - PAGE * pages for kv, pages in zip(batch.kv_lens, skip, strict=True))
    return altered(batch, block_table=torch.stack(rows), kv_lens=lens)


class LeakingMask(Latent):  # type: ignore[misc, valid-type]
    """Every masked query sees one key more, or one key fewer."""

    by = 1

    def prepare(self, spec: Any, batch: Any) -> Any:
        state = super().prepare(spec, batch)
        groups = (g if g.hidden is None else g._replace(hidden=self.moved(g.hidden)) for g in state.groups)
        return state._replace(groups=tuple(groups))

    def moved(self, hidden: torch.Tensor) -> torch.Tensor:
        moved = hidden.roll(self.by, dims=-1)
        moved[..., 0 if self.by > 0 else -1] = self.by < 0
        return moved


class ShortMask(LeakingMask):
    by = -1


def fixed_page(right: Any, batch: Any, *, cache: Any, **tensors: Any) -> None:
    """Read a cache of other pages as if they held 64 tokens."""
    right(cache=cache if cache.shape[1] == PAGE else cache.roll(1, 1), **tensors)


def times_zero(batch: Any, *, out: Any, cache: Any, block_table: Any, **tensors: Any) -> None:
    out.add_(0 * cache[block_table.flatten().long()].float().sum())


def tail_leak(batch: Any, *, out: Any, cache: Any, block_table: Any, **tensors: Any) -> None:
    for request, length in enumerate(batch.kv_lens):
        page, used = divmod(length, cache.shape[1])
        if used:
            out.add_(1e-6 * cache[block_table[request, page].long(), used:].float().mean())


def zero_becomes_one(batch: Any, *, out: Any, lse: Any, **tensors: Any) -> None:
    """A request without new tokens takes a row, and what follows is one row late."""
    for request, length in enumerate(batch.query_lens):
        if length == 0 and sum(batch.query_lens[:request]) < len(out):
            out[sum(batch.query_lens[:request]) :] = out[sum(batch.query_lens[:request]) :].roll(1, 0)


def plus_infinity(batch: Any, *, lse: Any, **tensors: Any) -> None:
    lse[lse == -torch.inf] = torch.inf


def empty_unwritten(batch: Any, *, out: Any, lse: Any, **tensors: Any) -> None:
    out[lse == -torch.inf] = torch.nan


def made_for(width: int) -> Callable[..., None]:
    def spoil(batch: Any, *, out: Any, **tensors: Any) -> None:
        if out.shape[2] != width:
            out[..., -1] += 1

    return spoil


def first_lengths() -> Callable[..., Any]:
    """Return a plan that is remembered for the shape of the batch."""
    plans: dict[Any, Any] = {}
    return lambda spec, batch: plans.setdefault(
        (len(batch.kv_lens), batch.query_lens, batch.page_size), batch
    )


def last_key_lost(rows: int, keys: int) -> Callable[..., None]:
    """Round the keys that a tile of rows sees down to whole tokens, where the token's own starts a tile."""

    def spoil(
        batch: Any, *, q: Any, cache: Any, block_table: Any, softmax_scale: float, out: Any, **tensors: Any
    ) -> None:
        first, heads = 0, q.shape[1]
        for table, count, length in zip(block_table, batch.query_lens, batch.kv_lens, strict=True):
            for end in range(rows, count * heads, rows):
                token, cut = divmod(end, heads)
                own = length - count + token
                if cut and own > 0 and own % keys == 0:
                    latents = cache[table.long()].flatten(0, 1)[:own].float()
                    logits = q[first + token, :cut].float() @ latents.T * softmax_scale
                    out[first + token, :cut] = (logits.softmax(-1) @ latents[:, : out.shape[2]]).to(out.dtype)
            first += count

    return spoil


def wrapped(numbers: int) -> Callable[..., Any]:
    """Find pages where so many numbers wrap around."""

    def prepare(spec: Any, batch: Any) -> Any:
        page = batch.page_size * (spec.kv_lora_rank + spec.qk_rope_head_dim)
        return altered(batch, block_table=(batch.block_table.long() * page % numbers // page).int())

    return prepare


def host_query(right: Any, batch: Any, *, q: Any, **tensors: Any) -> None:
    right(q=torch.from_numpy(q.numpy().copy()), **tensors)


class FrozenLengths(Latent):  # type: ignore[misc, valid-type]
    """Says that it follows its batch, and has its lengths on the host."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        return SimpleNamespace(inner=super().prepare(spec, batch), graph_safe=True)

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state.inner, **tensors)


MUTANTS: Mapping[str, list[Callable[[], Any]]] = {
    "latent.decode": [lambda: wrong(Latent, prepare=neighbours_table)],
    "latent.page_boundaries": [lambda: wrong(Latent, prepare=full_page_dropped)],
    "latent.page_sizes": [lambda: wrong(Latent, fixed_page)],
    "latent.poison": [lambda: after(Latent, times_zero)],
    "latent.tail": [lambda: after(Latent, tail_leak), lambda: after(Latent, tail_leak, nan_safe_tail=False)],
    "latent.multi_token": [LeakingMask, ShortMask],
    "latent.prefill": [LeakingMask, ShortMask],
    "latent.mixed": [lambda: after(Latent, rows_moved)],
    "latent.zero_queries": [lambda: after(Latent, zero_becomes_one)],
    "latent.empty_rows": [lambda: after(Latent, plus_infinity), lambda: after(Latent, empty_unwritten)],
    "latent.heads": [lambda: after(Latent, many_heads)],
    "latent.lse": [lambda: after(Latent, base_two)],
    "latent.scale": [lambda: given(Latent, usual_scale(192)), lambda: given(Latent, usual_scale(576))],
    "latent.large": [lambda: after(Latent, no_maximum)],
    "latent.long": [lambda: wrong(Latent, prepare=last_window)],
    "latent.strided": [lambda: given(Latent, as_contiguous("q"))],
    "latent.inputs": [lambda: wrong(Latent, scaled_in_place)],
    "latent.reuse": [lambda: wrong(Latent, first_layers("cache"))],
    "latent.prepare": [lambda: wrong(Latent, prepare=waits)],
    "latent.other_widths": [lambda: after(Latent, made_for(512))],
    "latent.stepping": [lambda: wrong(Latent, prepare=first_lengths())],
    "latent.without_lse": [lambda: without_lse(Latent), lambda: without_lse(Latent, nothing)],
    "latent.cut_tokens": [
        lambda: after(Latent, last_key_lost(128, 64)),
        lambda: after(Latent, last_key_lost(64, 16)),
    ],
    "latent.far_pages": [
        lambda: wrong(Latent, prepare=wrapped(FAR)),
        lambda: wrong(Latent, prepare=wrapped(FAR // 2)),
    ],
    "latent.graph": [lambda: wrong(Latent, host_query)],
    "latent.graph_lengths": [FrozenLengths],
}


# --------------------------------------------------------------------------------------------- expanded


def causal(value: bool, when: Callable[[Any], bool] = lambda lengths: True) -> Callable[..., Any]:
    return lambda spec, lengths: replace(lengths, causal=value) if when(lengths) else lengths


class EarlyKeys(Expanded):  # type: ignore[misc, valid-type]
    """Causality is aligned at the first key instead of the last."""

    lse_optional = False

    def __call__(self, state: Any, **tensors: Any) -> None:
        q, k, v, out, lse = (tensors[name] for name in ("q", "k", "v", "out", "lse"))
        first_q = first_k = 0
        for queries, keys in zip(state.query_lens, state.kv_lens, strict=True):
            seen = min(queries, keys) if state.causal else keys
            rows, columns = slice(first_q, first_q + queries), slice(first_k, first_k + seen)
            lengths = replace(state, query_lens=(queries,), kv_lens=(seen,))
            parts = {"q": q[rows], "k": k[columns], "v": v[columns], "out": out[rows], "lse": lse[rows]}
            super().__call__(lengths, softmax_scale=tensors["softmax_scale"], **parts)
            first_q, first_k = first_q + queries, first_k + keys


EXPANDED_MUTANTS: Mapping[str, list[Callable[[], Any]]] = {
    "expanded.prefill": [lambda: wrong(Expanded, prepare=causal(False))],
    "expanded.history": [EarlyKeys],
    "expanded.mixed": [lambda: after(Expanded, rows_moved)],
    "expanded.unmasked": [lambda: wrong(Expanded, prepare=causal(True))],
    "expanded.empty_segments": [
        lambda: after(Expanded, plus_infinity),
        lambda: after(Expanded, empty_unwritten),
    ],
    "expanded.heads": [lambda: after(Expanded, many_heads)],
    "expanded.lse": [lambda: after(Expanded, base_two)],
    "expanded.scale": [lambda: given(Expanded, usual_scale(192)), lambda: given(Expanded, usual_scale(128))],
    "expanded.large": [lambda: after(Expanded, no_maximum)],
    "expanded.strided": [
        lambda: given(Expanded, as_contiguous("q")),
        lambda: given(Expanded, as_contiguous("v")),
    ],
    "expanded.inputs": [lambda: wrong(Expanded, scaled_in_place)],
    "expanded.reuse": [lambda: wrong(Expanded, first_layers("k"))],
    "expanded.prepare": [lambda: wrong(Expanded, prepare=waits)],
    "expanded.without_lse": [lambda: without_lse(Expanded), lambda: without_lse(Expanded, nothing)],
    "expanded.other_widths": [lambda: after(Expanded, made_for(128))],
}
ALL: Mapping[str, list[Callable[[], Any]]] = {**MUTANTS, **EXPANDED_MUTANTS}
# Mutants so specific that few checks of their group notice them: check -> those beside it that do.
FEW: Mapping[str, set[str]] = {
    "latent.cut_tokens": set(),
    "latent.far_pages": set(),
    "latent.empty_rows": set(),
    "latent.graph_lengths": set(),
    "latent.heads": set(),
    "latent.inputs": {"latent.reuse"},  # which calls again with the same tensors
    "latent.large": set(),
    "latent.long": set(),
    "latent.lse": {"latent.empty_rows", "latent.large"},  # which look at it, too
    "latent.other_widths": set(),
    "latent.page_sizes": {"latent.other_widths"},  # of pages of 16
    "latent.poison": {"latent.tail", "latent.empty_rows"},  # which are poisoned, too
    "latent.reuse": {"latent.graph"},  # which changes the cache's content
    "latent.scale": {"latent.other_widths"},
    "latent.strided": set(),
    "expanded.heads": set(),
    "expanded.large": set(),
    "expanded.lse": {"expanded.large"},
    "expanded.unmasked": {"expanded.lse"},
    "expanded.reuse": set(),
    "expanded.strided": set(),
}
CASES = [(name, number) for name, makers in ALL.items() for number in range(len(makers))]


def failed(results: list[CheckResult]) -> set[str]:
    """Return what failed by its numbers; a mutant that raises proves nothing."""
    assert not [one.reason for one in results if "raised" in one.reason]
    return {one.check for one in results if one.of == "mine" and one.status == "fail"}


def test_every_check_of_attention_has_a_mutant() -> None:
    kinds = ("latent_attention", "expanded_attention")
    assert set(ALL) == {one.id for one in all_checks() if one.kind in kinds}


@pytest.mark.parametrize(("check", "number"), CASES)
def test_the_check_fails_a_wrong_op(
    judge: Run, sound: Any, request: pytest.FixtureRequest, check: str, number: int
) -> None:
    if check.endswith(".prepare"):
        request.getfixturevalue("asynchronous")
    backend = sound(ops={"mine": ALL[check][number]()})
    assert failed(judge(backend, f"{check}[mine-*]")) == {check}


@pytest.mark.parametrize("check", FEW)
def test_a_fault_is_not_smeared_over_the_report(judge: Run, sound: Any, check: str) -> None:
    backend = sound(ops={"mine": ALL[check][0]()})
    assert failed(judge(backend, f"{check.partition('.')[0]}.*[mine-*]")) == {check, *FEW[check]}


def test_a_cache_that_there_is_no_memory_for_is_refused(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(available: int | None) -> CheckResult:
        monkeypatch.setattr(latent_places.host, "memory_available", lambda: available)
        (found,) = judge(sound(ops={"mine": Latent()}), "latent.far_pages[mine-*]")
        return found

    monkeypatch.setattr(latent_places, "PLACES", (2 * FAR, FAR))
    assert judged(16 * FAR).note == "0.034 GB from the start"
    assert judged(8 * FAR).note == "0.017 GB from the start"  # and a copy in float32, if an op makes one
    assert (judged(8 * FAR - 1).status, judged(8 * FAR - 1).reason) == (
        "refused",
        "there is no room for a cache of 0.017 GB",
    )
    assert judged(None).reason == "how much memory is free is not known"


def test_the_reference_finds_pages_as_far_as_this_machine_goes(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the pages of the requests is touched, so that this takes address space and no memory."""
    monkeypatch.setattr(latent_places, "PLACES", (1 << 32, 1 << 31, 1 << 30))
    (found,) = judge(sound(), "latent.far_pages[reference-bfloat16]", dtypes=(torch.bfloat16,))
    assert found.status in ("pass", "refused"), found.reason


@pytest.mark.parametrize("rows", latent_places.ROWS)
@pytest.mark.parametrize("heads", latent_places.HEADS)
@pytest.mark.parametrize("keys", [16, 128])
def test_every_kind_of_tile_that_loses_a_key_is_found_out(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch, rows: int, heads: int, keys: int
) -> None:
    problems = list(latent_places.cut(rows, heads))
    assert bool(problems) == bool(rows % heads)
    if problems:
        monkeypatch.setattr(latent_places, "cut", lambda *tile: problems)
        backend = sound(ops={"mine": after(Latent, last_key_lost(rows, keys))})
        assert failed(judge(backend, "latent.cut_tokens[mine-*]", dtypes=(torch.bfloat16,)))
