"""The compiled attention ops against float64, per token and head, at every level this processor has."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_cases import bits, check_attention, expanded_case, latent_case

from mla_backend_cpu.library import Library
from mla_backend_cpu.native_ops import NativeExpandedAttention, NativeLatentAttention

Threads = Callable[[int], Any]


# ---------------------------------------------------------------------------------------------- absorbed


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("queries", "keys"), [([1], [5000]), ([1, 1], [1025, 33]), ([5], [2049])])
def test_long_requests_are_right_however_they_are_split(
    kernels: Library, threads: Threads, count: int, queries: list[int], keys: list[int]
) -> None:
    with threads(count):
        case = latent_case(queries, keys, 17, page_size=64, latent=128)
        check_attention(case, NativeLatentAttention(kernels))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("heads", [2, 20])
def test_a_maximum_that_moves_between_parts_rescales_the_others(
    kernels: Library, threads: Threads, heads: int, count: int, order: int
) -> None:
    """Logits rise, or fall, steadily over the keys, so that every block and part finds another maximum."""
    with threads(count):
        case = latent_case([1], [3000], heads, page_size=64, latent=128, scale=0.5)
        slope = order * torch.linspace(-6, 6, 3000)
        case.owned[0][:, 0] = slope.bfloat16()
        position = torch.arange(3000)
        case.cache[case.table[0][position // 64].long(), position % 64] = case.owned[0]
        case.q[..., 0] = 4
        check_attention(case, NativeLatentAttention(kernels))


@pytest.mark.parametrize("position", [0, 15, 16, 127, 128, 700, 1499])
@pytest.mark.parametrize("heads", [3, 40])
def test_one_dominant_key_is_returned_bit_for_bit(
    kernels: Library, threads: Threads, heads: int, position: int
) -> None:
    """Where its weight is not 1, bf16 rounds it, and the sum that divides must be rounded as well."""
    with threads(2):
        case = latent_case([1], [1500], heads, latent=128, scale=1.0)
        case.q.zero_()
        case.q[..., 0] = torch.arange(200, 200 + heads)
        case.cache[..., 0].clamp_(max=4)
        page, slot = case.table[0][position // 16].long(), position % 16
        case.cache[page, slot, 0] = 16
        out, _ = case.run(NativeLatentAttention(kernels))
        assert torch.equal(out, case.cache[page, slot, :128].expand_as(out))


@pytest.mark.parametrize("position", [0, 15, 63, 127, 128])
@pytest.mark.parametrize(("heads", "keys"), [(3, 129), (20, 129), (40, 160)])
def test_nan_in_an_owned_row_reaches_the_output(
    kernels: Library, heads: int, keys: int, position: int
) -> None:
    for channel in (0, 100, 159):  # of the value, and of the key's rotary part
        case = latent_case([1, 1], [keys, 160], heads, latent=128)
        clean, _ = case.run(NativeLatentAttention(kernels))
        case.cache[case.table[0][position // 16].long(), position % 16, channel] = torch.nan
        out, lse = case.run(NativeLatentAttention(kernels))
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        assert torch.equal(out[1], clean[1])


_BAD_INDICES = [
    ("table", (1, 2), 99, r"block_table names page 99 in column 2 of request 1, but the cache has \d+ pages"),
    ("table", (0, 0), -1, "block_table names page -1 in column 0 of request 0"),
    ("kv_lens", 0, 10_000, "kv_lens names 10000 tokens for request 0, whose row of block_table has room"),
    ("kv_lens", 1, -3, "kv_lens names -3 tokens for request 1"),
    ("cu_q", 2, 400, "cu_q runs from 0 to 400, but q has 3 tokens"),
    ("cu_q", 2, 2, "cu_q runs from 0 to 2, but q has 3 tokens"),  # a row of out would stay as it was
    ("cu_q", 0, 1, "cu_q runs from 1 to 3"),
    ("cu_q", 0, -1, "cu_q runs from -1 to 3"),
    ("cu_q", 1, 4, "cu_q falls from 4 to 3 after request 1"),
]


@pytest.mark.parametrize(("name", "at", "value", "sentence"), _BAD_INDICES)
def test_an_index_that_leads_nowhere_is_a_sentence(
    kernels: Library, name: str, at: Any, value: int, sentence: str
) -> None:
    case, op = latent_case([2, 1], [40, 33], latent=128), NativeLatentAttention(kernels)
    view, table = case.view(), case.table.clone()
    lengths = {"table": table, "kv_lens": view.kv_lens_device, "cu_q": view.cu_q}
    lengths[name][at] = value
    out = torch.full((3, 3, 128), 7.0).bfloat16()
    with pytest.raises(ValueError, match=sentence):
        op(
            op.prepare(case.spec, view),
            q=case.q,
            cache=case.cache,
            block_table=table,
            kv_lens=lengths["kv_lens"],
            cu_q=lengths["cu_q"],
            softmax_scale=1.0,
            out=out,
            lse=torch.empty(3, 3),
        )
    assert (out == 7).all()


# ---------------------------------------------------------------------------------------------- expanded


def test_nan_in_a_later_key_stays_hidden_from_earlier_blocks(kernels: Library) -> None:
    """A query that sees only earlier blocks of keys cannot notice; one that sees the key must."""
    case = expanded_case([300], [300], 2, value=128)
    clean, _ = case.run(NativeExpandedAttention(kernels))
    case.k[250, 1, 3] = torch.nan
    out, _ = case.run(NativeExpandedAttention(kernels))
    assert torch.equal(out[:, 0], clean[:, 0])
    assert torch.equal(out[:100, 1], clean[:100, 1])
    assert out[250:, 1].isnan().all()


@pytest.mark.parametrize(
    ("queries", "keys", "sentence"),
    [
        ((3, 1), (3, 4), r"query_lens adds up to 4 tokens, but q has 5"),
        ((3, 2), (3, 40), r"kv_lens names 40 tokens for segment 1, but k has 7"),
        ((7, -2), (3, 4), r"query_lens names 7 tokens for segment 0, but q has 5"),
    ],
)
def test_lengths_that_do_not_fill_the_tensors_are_a_sentence(
    kernels: Library, queries: tuple[int, ...], keys: tuple[int, ...], sentence: str
) -> None:
    case = expanded_case([3, 2], [3, 4], 2)
    wrong = replace(case, lengths=replace(case.lengths, query_lens=queries, kv_lens=keys))
    with pytest.raises(ValueError, match=sentence):
        wrong.run(NativeExpandedAttention(kernels))


# ---------------------------------------------------------------------------------------------- threads


def test_the_same_number_of_threads_gives_the_same_bits(kernels: Library, threads: Threads) -> None:
    """Parts and their order depend on the lengths and the number of threads, never on who was first."""
    absorbed = latent_case([1, 4, 1], [3000, 50, 700], 17, page_size=64, latent=128)
    expanded = expanded_case([60, 33], [300, 33], 5, value=128)
    cases = ((absorbed, NativeLatentAttention(kernels)), (expanded, NativeExpandedAttention(kernels)))
    for case, op in cases:
        for count in (1, 2, 3):
            with threads(count):
                first = [bits(tensor) for tensor in case.run(op)]
                for _ in range(3):
                    assert all(map(torch.equal, [bits(tensor) for tensor in case.run(op)], first))


def test_calls_from_several_python_threads_do_not_disturb_each_other(
    kernels: Library, threads: Threads
) -> None:
    cases = [latent_case([1, 3], [keys, 50], 17, page_size=64, latent=128, seed=keys) for keys in (1500, 900)]
    op = NativeLatentAttention(kernels)
    with threads(2), ThreadPoolExecutor(2) as pool:
        alone = [bits(case.run(op)[0]) for case in cases]
        for _ in range(10):
            together = [bits(out) for out, _ in pool.map(lambda case: case.run(op), cases)]
            assert all(map(torch.equal, together, alone))
