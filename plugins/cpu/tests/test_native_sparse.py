"""Sparse attention at every level: index keys, selections judged by true scores, and attention to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from float64_attention import attend
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import BF16, FINE, HALF, Canvas, angles, any_bits, bits, draw, laid_out, latent_case
from sparse_problem import SparseBatch, indexer_spec

from mla.cache.index_formats import IndexFp8, index_keys
from mla.reference import REFERENCE
from mla.verify.tolerances import judge
from mla_backend_cpu.library import Library
from mla_backend_cpu.sparse_ops import NativeSelectLatents, NativeSparseAttention, NativeWriteIndexKey

Threads = Callable[[int], contextlib.AbstractContextManager[None]]
requests = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 700)), min_size=1, max_size=3)
formats = st.sampled_from(["", "fp8"])
seeds = st.integers(0, 99)


def lengths(drawn: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the new tokens and all keys of requests that are drawn as new and old tokens."""
    return tuple(new for new, _ in drawn), tuple(new + old for new, old in drawn)


# ------------------------------------------------------------------------------------------- cache write
@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([(128, 64), (64, 0), (16, 16), (48, 6)]),
    st.booleans(),
    st.integers(0, 40),
    st.sampled_from([1, 16, 24]),
    seeds,
)
def test_an_index_key_is_rounded_once_and_encoded_as_the_codec_does(
    kernels: Library, width: tuple[int, int], interleaved: bool, tokens: int, page: int, seed: int
) -> None:
    (width, rotary), pages = width, -(-2 * tokens // page) + 1
    k = draw(tokens, width, seed=seed) * (4 * draw(tokens, 1, seed=seed + 1)).exp() + draw(tokens, 1, seed=2)
    k[::5] = 0
    weight, bias, cos_sin = draw(width, seed=3), draw(width, seed=4), angles(tokens, rotary)
    bias[: width // 2] = 0
    slots = torch.randperm(pages * page, generator=torch.Generator().manual_seed(seed))[:tokens]
    plain = any_bits(pages, page, width, seed=seed)
    codec, before = IndexFp8(width), bits(plain)
    coded = torch.full((pages, page, codec.token_bytes), 0xA5, dtype=torch.uint8)
    expected, op = coded.clone(), NativeWriteIndexKey(kernels)
    given = {"k": laid_out(k, "columns"), "weight": weight, "bias": bias, "eps": 1e-3, "slots": slots}
    given |= {"cos_sin": cos_sin, "interleaved": interleaved}
    op(**given, cache=plain)
    op(**given, cache=coded, cache_format="fp8")
    numbers = {name: x.double() if name in ("k", "weight", "bias") else x for name, x in given.items()}
    numbers["cos_sin"] = cos_sin.double()
    truth = true_keys(numbers, interleaved)
    written = plain.view(-1, width)[slots]
    error = (written.double() - truth).abs()
    assert (error <= HALF * truth.abs() + 40 * FINE * (truth.abs().amax(1, keepdim=True) + 1)).all()
    codec.write(expected, slots, written)
    assert torch.equal(coded, expected)
    untouched = torch.ones(pages * page, dtype=torch.bool).index_fill_(0, slots, False)
    assert torch.equal(bits(plain).view(-1, width)[untouched], before.view(-1, width)[untouched])


def true_keys(given: dict[str, torch.Tensor], interleaved: bool) -> torch.Tensor:
    """Return the keys [T, D] in float64."""
    k, cos_sin = given["k"], given["cos_sin"]
    keys = torch.nn.functional.layer_norm(k, k.shape[1:], given["weight"], given["bias"], 1e-3)
    half = cos_sin.shape[1] // 2
    turned = keys[:, : 2 * half].unflatten(1, (half, 2) if interleaved else (2, half))
    axis = 2 if interleaved else 1
    a, b = turned.unbind(axis)
    cos, sin = cos_sin.split(half, 1) if half else (a, b)
    rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), axis).flatten(1)
    return torch.cat((rotated, keys[:, 2 * half :]), 1)


# --------------------------------------------------------------------------------------------- selection
def check_selection(
    kernels: Library,
    batch: SparseBatch,
    heads: int,
    width: int,
    topk: int,
    index_format: str = "",
    *,
    ties: bool = False,
    rising: bool = False,
) -> torch.Tensor:
    """Select, and hold each choice to its true score: only rounding may make one that is left out better."""
    op = NativeSelectLatents(kernels)
    assert op.unsupported_reasons(indexer_spec(heads, width, 16, topk, dtype=BF16)) == []
    keys = batch.normal(sum(batch.kv_lens), width, dtype=BF16)
    q = batch.normal(batch.tokens, heads, width, dtype=BF16)
    weights = batch.normal(batch.tokens, heads)
    if ties:
        keys, q, weights = keys.abs(), -q.abs(), -weights.abs()
    if rising:
        keys = keys * torch.linspace(0, 1, len(keys))[:, None].to(BF16)
    cache = batch.index_cache(keys, index_format)
    if index_format:
        keys = index_keys(cache, IndexFp8(width)).flatten(0, 1)[batch.pages.slots]
    out = torch.full((batch.tokens, topk + 3), 7, dtype=torch.int32)
    named = {"cache_format": index_format} if index_format else {}
    given = {"q": laid_out(q, "columns"), "weights": laid_out(weights, "columns"), **batch.tables}
    op(None, **given, cache=cache, out=out[:, :topk], **named)
    assert (out[:, topk:] == 7).all()
    sizes = batch.true_scores(q.abs(), weights.abs(), keys.abs())
    for row, true, size in zip(out[:, :topk], batch.true_scores(q, weights, keys), sizes, strict=True):
        count = min(topk, len(true))
        assert (row[count:] == -1).all()
        chosen = row[:count].long()
        assert torch.equal(chosen.sort().values, chosen), "in the order of positions, which is that of pages"
        assert len(chosen.unique()) == count
        assert ((chosen >= 0) & (chosen < len(true))).all()
        if count:
            bound = (width + heads + 8) * FINE * size
            assert (true[chosen] + bound[chosen] >= (true - bound).topk(count).values[-1]).all()
    return out[:, :topk]


@settings(max_examples=20, deadline=None)
@given(
    requests,
    st.sampled_from([1, 3, 16, 17, 40, 64]),
    st.sampled_from([16, 48, 128]),
    st.sampled_from([1, 7, 64, 300, 2048]),
    st.sampled_from([1, 16, 24, 64]),
    formats,
    st.sampled_from(["", "ties", "rising"]),
    st.sampled_from([1, 3]),
    seeds,
)
def test_a_selection_is_the_best_by_true_scores(
    kernels: Library,
    threads: Threads,
    drawn: list[tuple[int, int]],
    heads: int,
    width: int,
    topk: int,
    page: int,
    index_format: str,
    how: str,
    count: int,
    seed: int,
) -> None:
    batch = SparseBatch(*lengths(drawn), page_size=page, seed=seed)
    with threads(count):
        check_selection(kernels, batch, heads, width, topk, index_format, **({how: True} if how else {}))


@pytest.mark.parametrize("index_format", ["", "fp8"])
def test_a_long_request_is_split_over_threads(kernels: Library, threads: Threads, index_format: str) -> None:
    batch = SparseBatch((2, 1), (9001, 40), page_size=64)
    for topk in (50, 2048, 6000):
        batch.draw.manual_seed(topk)
        with threads(1):
            alone = check_selection(kernels, batch, 5, 32, topk, index_format)
        batch.draw.manual_seed(topk)
        with threads(5):
            assert torch.equal(check_selection(kernels, batch, 5, 32, topk, index_format), alone)


def test_infinite_keys_and_scores_of_any_sign_lose_no_position(kernels: Library, threads: Threads) -> None:
    """Their own scores may be NaN; the selection stays complete, and what is finite is in order."""
    batch = SparseBatch((3,), (5000,), page_size=16)
    keys, q = draw(5000, 32), draw(3, 3, 32, seed=1)
    keys[::7] = torch.inf
    keys[1::7, ::2] = -torch.inf
    weights = torch.tensor([[1.0, -1, 0.5], [-1, -1, -1], [torch.inf, 0, -0.0]])
    for count in (1, 3):
        out = torch.empty(3, 1800, dtype=torch.int32)
        with threads(count):
            tensors = {"q": q, "weights": weights, "cache": batch.index_cache(keys), **batch.tables}
            NativeSelectLatents(kernels)(None, **tensors, out=out)
        for t, row in enumerate(out):
            assert len(row.unique()) == 1800
            assert ((row >= 0) & (row < 4998 + t)).all()


# --------------------------------------------------------------------------------------------- attention
@settings(max_examples=12, deadline=None)
@given(
    requests.filter(lambda drawn: any(new for new, _ in drawn)),
    st.sampled_from(["", "fp8:0.03", "fp8_ds_mla", "int8", "q8_0"]),
    st.sampled_from([(512, 64), (128, 32), (96, 32)]),
    st.sampled_from([1, 3, 16, 40, 128]),
    st.sampled_from([1, 5, 64, 300]),
    st.sampled_from([1, 16, 64]),
    st.sampled_from([1, 3]),
    seeds,
)
def test_attention_is_to_the_selection(
    kernels: Library,
    threads: Threads,
    drawn: list[tuple[int, int]],
    cache_format: str,
    width: tuple[int, int],
    heads: int,
    topk: int,
    page: int,
    count: int,
    seed: int,
) -> None:
    case = latent_case(*lengths(drawn), heads, page_size=page, latent=width[0], rotary=width[1], seed=seed)
    if cache_format:
        case = case.stored(cache_format)
    selection, truth = selected(case, topk, seed)
    op, spec, view = NativeSparseAttention(kernels), replace(case.spec, topk=topk), case.view()
    assert op.unsupported_reasons(spec) == []
    out = Canvas((*case.q.shape[:2], width[0]), "columns")
    lse = Canvas(case.q.shape[:2], "columns", torch.float32)
    reference = (torch.empty(*case.q.shape[:2], width[0], dtype=BF16), torch.empty(case.q.shape[:2]))
    tensors = {"q": case.q, "cache": case.cache, "block_table": case.table, "kv_lens": view.kv_lens_device}
    tensors |= {"cu_q": view.cu_q, "selection": selection, "softmax_scale": spec.softmax_scale}
    tensors |= {"cache_format": cache_format} if cache_format else {}
    plain = REFERENCE["sparse_latent_attention"]
    plain(plain.prepare(spec, view), **tensors, out=reference[0], lse=reference[1])
    with threads(count):
        op(None, **tensors, out=out.view, lse=lse.view)
    ratio, reason = judge(out.taken(), truth[0], reference[0], BF16)
    assert ratio <= (1 if width[0] >= 128 else 1.5), reason
    torch.testing.assert_close(lse.taken().double(), truth[1], atol=2e-5, rtol=2e-6)


def selected(case, topk: int, seed: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return random selections [T, topk], of no position at times, and out and lse in float64."""
    generator, latent = torch.Generator().manual_seed(seed), case.spec.kv_lora_rank
    selection = torch.full((len(case.q), topk), -1, dtype=torch.int32)
    outs, token = [], 0
    for new, length, rows in zip(case.query_lens, case.kv_lens, case.owned, strict=True):
        for i in range(new):
            chosen = torch.randperm(length - new + i + 1, generator=generator)[: topk // (1 + token % 5 // 4)]
            chosen = chosen[:0] if token % 7 == 5 else chosen
            selection[token, : len(chosen)] = chosen.int()
            picked = rows[chosen].double()
            outs.append(
                attend(case.q[token][None], picked, picked[:, :latent], case.spec.softmax_scale, False)
            )
            token += 1
    return selection, (torch.cat([out for out, _ in outs]), torch.cat([lse for _, lse in outs]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 30, -1], "selection names position 30 for token 1, whose request has 30"),
        ([0, -2, -1], "selection names position -2 for token 1"),
        ([0, -1, 3], "selection of token 1 names a position behind a -1"),
    ],
)
def test_a_selection_that_names_nothing_is_refused(kernels: Library, row: list[int], message: str) -> None:
    case = latent_case([2], [30])
    view, selection = case.view(), torch.tensor([[0, 1, -1], row], dtype=torch.int32)
    tensors = {"q": case.q, "cache": case.cache, "block_table": case.table, "kv_lens": view.kv_lens_device}
    out, lse = torch.empty(2, 3, 64, dtype=BF16), torch.empty(2, 3)
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(kernels)(
            None, **tensors, cu_q=view.cu_q, selection=selection, softmax_scale=0.1, out=out, lse=lse
        )
