"""Checks of the ops of sparse attention: index keys, selections, and attention to a selection.

A selection is judged by true scores, never by indices. Most lengths are beyond top-k: within it every token
is selected, whatever the scores are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from mla.cases.case import OpCase
from mla.cases.sparse import SELECTIONS
from mla.cases.stress import Stress
from mla.conformance.checks import op_cases, op_check
from mla.conformance.checks.attention import PLACES, SMALL_SPEC, SPEC, Lengths, Make, ragged
from mla.conformance.reach import far
from mla.conformance.trial import Trial
from mla_backends.api import IndexerSpec

TOPK = 64
INDEXER = IndexerSpec(16, 128, 64, TOPK, torch.float32, torch.device("cpu"))
WRITE_KEY = OpCase("write_index_key", INDEXER, (9,), (9,), stress=Stress())


def select(query_lens: Lengths, kv_lens: Lengths, heads: int = 16, **changes: Any) -> OpCase:
    """Return a case of a selection."""
    case = OpCase("select_latents", INDEXER, query_lens, kv_lens, stress=Stress())
    return case.but(num_heads=heads, **changes)


def sparse(query_lens: Lengths, kv_lens: Lengths, heads: int = 16, **changes: Any) -> OpCase:
    """Return a case of attention to a selection."""
    case = OpCase("sparse_latent_attention", replace(SPEC, topk=TOPK), query_lens, kv_lens, stress=Stress())
    return case.but(num_heads=heads, **changes)


SELECT: Mapping[str, Make] = {"select_latents": select}
SPARSE: Mapping[str, Make] = {"sparse_latent_attention": sparse}
EITHER = {**SELECT, **SPARSE}
DECODE = (1, 1, 1, 1, 1), (333, 70, 100, 64, 3)
# New tokens and keys: across top-k, beyond it, within it, and after a history.
SEVERAL = (70, 5, 1, 3, 2), (130, 300, 65, 3, 129)
REQUESTS = 300
LONG_CONTEXT = (1 << 17) + 70  # needs more than 17 bits
# Keys whose scores share all leading bits, more than a bin has room for; and a top-k that large models have.
CROWDED_KEYS, LARGE_TOPK = 6000, 2048


# -------------------------------------------------------------------------------------------- selecting


@op_cases("scores", "formula", "scores without ReLU or weights, or of another request's tokens", SELECT)
def scores(make: Make) -> Iterator[OpCase]:
    """Of each request, the tokens with the highest scores are selected."""
    for changes in ({}, {"aimed": True}, {"selection": "clustered"}, {"size": 1.0, "gain": 30.0}):
        yield from (make(*DECODE, **changes), make(*SEVERAL, **changes))


@op_cases("crowded", "numbers", "a bin of candidates that overflows", SELECT)
def crowded(make: Make) -> Iterator[OpCase]:
    """Thousands of tokens whose scores have the same leading bits are told apart."""
    for topk in (TOPK, LARGE_TOPK):
        yield make((1, 2), (CROWDED_KEYS, 700), 4, topk=topk, values=("crowded scores",))


# ------------------------------------------------------------------------------------------- attending


@op_cases("selections", "formula", "a token that is attended to and not selected, or the other way", SPARSE)
def selections(make: Make) -> Iterator[OpCase]:
    """Selected tokens alone are attended to, however they lie and in whatever order."""
    for how in SELECTIONS:
        yield from (make(*DECODE, selection=how, aimed=True), make(*SEVERAL, selection=how))


# --------------------------------------------------------------------------------------------- of either


@op_cases("page_sizes", "memory", "a page size that is assumed, or pages that requests share", EITHER)
def page_sizes(make: Make) -> Iterator[OpCase]:
    """Pages of any size are read where the table says, those of several requests included."""
    for page_size in (1, 16, 128):
        yield make(*SEVERAL, page_size=page_size)
    yield make((1, 2, 1), (300, 310, 290), page_size=16, shared=(0, 8, 4))


@op_cases("requests", "grid", "a table of a fixed number of requests, or a grid that ends early", EITHER)
def requests(make: Make) -> Iterator[OpCase]:
    """Hundreds of requests are served, each by its own row of the tables."""
    lengths = tuple(60 + length for length in ragged(REQUESTS, 70))
    yield make((1,) * len(lengths), lengths, 2)
    yield make((2, 0, 1, 1) * 5, (100, 70, 66, 0) * 5, 2)


@op_check("far_rows", "index", PLACES, EITHER)
def far_rows(trial: Trial, make: Make) -> None:
    """Rows of queries and outputs may lie apart, the last of them beyond 32 bits."""
    with far(trial, tensors=2) as numbers:
        apart = numbers // 33 // 1024 * 1024  # so that the last of 35 rows is beyond, and all are aligned
        trial.check_cases([make((4, 30, 1), (4, 131, 5), 2, apart=apart)])


@op_cases("positions", "index", "positions that are kept in 16 or 17 bits", EITHER)
def positions(make: Make) -> Iterator[OpCase]:
    """Tokens beyond position 2^17 are selected and attended to."""
    narrow = (
        SMALL_SPEC if make is sparse else {"head_dim": 32, "rope_head_dim": 16}
    )  # or wider, for an op that serves no such
    for how in ("recent", "random"):
        yield make((1, 2), (LONG_CONTEXT, 70), 2, selection=how, aimed=how == "random", **narrow)
