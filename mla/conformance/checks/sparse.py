"""Checks of the ops of sparse attention: index keys, selections, and attention to a selection.

A selection is judged by true scores, never by indices. Most lengths are beyond top-k: within it every token
is selected, whatever the scores are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from mla.cache.formats import codec_of
from mla.cache.index_formats import INDEX_FORMATS
from mla.cases.case import OpCase
from mla.cases.sparse import SELECTIONS
from mla.cases.stress import Stress
from mla.conformance.checks import op_cases, op_check
from mla.conformance.checks.attention import PLACES, SMALL_SPEC, SPEC, Lengths, Make, around, ragged
from mla.conformance.reach import far
from mla.conformance.trial import Trial
from mla_backends.api import IndexerSpec

TOPK = 64
INDEXER = IndexerSpec(16, 128, 64, TOPK, torch.float32, torch.device("cpu"))
WRITE_KEY = OpCase("write_index_key", INDEXER, (9,), (9,), stress=Stress())
FP8 = {"index_format": "fp8", "token_bytes": INDEX_FORMATS["fp8"](INDEXER.head_dim).token_bytes}


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
WRITE = {"write_index_key": WRITE_KEY}
DECODE = (1, 1, 1, 1, 1), (333, 70, 100, 64, 3)
# New tokens and keys: across top-k, beyond it, within it, and after a history.
SEVERAL = (70, 5, 1, 3, 2), (130, 300, 65, 3, 129)
REQUESTS = 300
HEADS = (1, 2, 3, 5, 8, 12, 17, 32, 40, 64, 65, 128)
LONG = (1 << 17) + 70  # keys: more than 17 bits count
# Keys whose scores share all leading bits, more than a bin has room for; and a top-k that large models have.
CROWD, MANY = 6000, 2048


# ------------------------------------------------------------------------------------------- index keys


@op_cases(
    "norm", "formula", "a norm without its mean or bias, of a sample's variance, or with another eps", WRITE
)
def norm(example: OpCase) -> Iterator[OpCase]:
    """LayerNorm of all channels, with bias; then the first channels are turned, in either layout."""
    narrow = example.but(head_dim=16, rope_head_dim=8, eps=1e-2, size=0.1)
    for case in (example, narrow, example.but(values=("all zero",)), example.but(rope_head_dim=0)):
        yield from (case, case.but(interleaved=False, tokens=70))


@op_cases("pages", "formula", "a page of bytes whose scales are where those of another format are", WRITE)
def pages_of_keys(example: OpCase) -> Iterator[OpCase]:
    """A page of bytes holds all values, and then all scales."""
    for page_size in (64, 1, 16):
        yield from (example.but(**FP8, page_size=page_size, tokens=tokens) for tokens in (9, 200))


# -------------------------------------------------------------------------------------------- selecting


@op_cases("scores", "formula", "scores without ReLU or weights, or of another request's tokens", SELECT)
def scores(make: Make) -> Iterator[OpCase]:
    """Of each request, the tokens with the highest scores are selected."""
    for changes in ({}, {"aimed": True}, {"selection": "clustered"}, {"size": 1.0, "gain": 30.0}):
        yield from (make(*DECODE, **changes), make(*SEVERAL, **changes))


@op_cases("causal", "formula", "a mask that is off by one, which a long history hides", SELECT)
def causal(make: Make) -> Iterator[OpCase]:
    """No query selects a token behind its own, where those score highest."""
    yield from (make(*SEVERAL, selection="recent"), make((80, 1), (80, 66), selection="recent"))


@op_cases("negative", "numbers", "a mask of 0 in place of -inf, or padding that scores 0", SELECT)
def negative(make: Make) -> Iterator[OpCase]:
    """Where no score is above 0, neither hidden tokens nor slots past the end are selected."""
    for lengths in (DECODE, SEVERAL, ((1, 2), (65, 66))):
        yield make(*lengths, values=("negative weights",))


@op_cases("ties", "numbers", "a token that is selected twice or left out where scores tie", SELECT)
def ties(make: Make) -> Iterator[OpCase]:
    """Among tokens that score the same, any will do: as many as asked for, and each once."""
    for changes in ({"selection": "tied"}, {"values": ("all zero",)}, {"values": ("equal keys",)}):
        yield from (make(*DECODE, **changes), make(*SEVERAL, **changes))


@op_cases("crowded", "numbers", "a bin of candidates that overflows", SELECT)
def crowded(make: Make) -> Iterator[OpCase]:
    """Thousands of tokens whose scores have the same leading bits are told apart."""
    for topk in (TOPK, MANY):
        yield make((1, 2), (CROWD, 700), 4, topk=topk, values=("crowded scores",))


@op_cases("fp8", "formula", "scales that are read where another format has them, or not at all", SELECT)
def fp8(make: Make) -> Iterator[OpCase]:
    """Keys are read from pages of bytes: all values of a page, and then all scales."""
    for page_size in (64, 16):
        yield from (make(*lens, **FP8, page_size=page_size) for lens in (DECODE, SEVERAL))


# ------------------------------------------------------------------------------------------- attending


@op_cases("selections", "formula", "a token that is attended to and not selected, or the other way", SPARSE)
def selections(make: Make) -> Iterator[OpCase]:
    """Selected tokens alone are attended to, however they lie and in whatever order."""
    for how in SELECTIONS:
        yield from (make(*DECODE, selection=how, aimed=True), make(*SEVERAL, selection=how))


@op_cases("fewer", "emptiness", "-1 that is read as a slot, or ends nothing", SPARSE)
def fewer(make: Make) -> Iterator[OpCase]:
    """Queries that select fewer tokens attend to these; those that select none get 0 and -inf."""
    few = {"values": ("fewer selected",)}
    for lengths in (DECODE, SEVERAL, ((1, 1), (1, 2)), ((0, 3), (0, 3))):
        yield from (make(*lengths, **few), make(*lengths, aimed=True))


@op_cases("formats", "formula", "a format of the cache that is read as another", SPARSE)
def formats(make: Make) -> Iterator[OpCase]:
    """Attention is over the decoded bytes of the cache."""
    for name in ("fp8_ds_mla", "fp8"):
        codec = codec_of(name, SPEC.kv_lora_rank, SPEC.qk_rope_head_dim)
        stored = {"cache_format": name, "token_bytes": codec.token_bytes if codec else 0}
        yield from (make(*lengths, **stored) for lengths in (DECODE, SEVERAL))


# --------------------------------------------------------------------------------------------- of either


@op_cases("borders", "tiles", "a length next to top-k, or a top-k that leaves a rest of a tile", EITHER)
def borders(make: Make) -> Iterator[OpCase]:
    """Lengths and numbers of selected tokens next to each other and to tiles are served, or refused."""
    for topk in (TOPK, 128, 1, 33, 100, 512):
        lengths = around(topk, 2 * topk)
        yield make((1,) * len(lengths), lengths, topk=topk)
        yield make((9, 4, min(3, topk)), (topk + 8, topk + 3, topk), topk=topk)


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


@op_cases("heads", "tiles", "a head count that is padded, cut or grouped", EITHER, exact=True)
def heads(make: Make) -> Iterator[OpCase]:
    """Any number of heads from 1 to 128 is served, or refused with a reason."""
    return (make((2, 1, 3), (100, 70, 3), count) for count in HEADS)


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
        yield make((1, 2), (LONG, 70), 2, selection=how, aimed=how == "random", **narrow)
