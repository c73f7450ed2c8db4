"""Attention where numbers are large: pages, slots, positions and places that a narrow index cuts off.

Requests are short and their pages lie in a large cache, of which nothing else is ever touched.
"""

from __future__ import annotations

import torch

from mla.cases.memory import Layout
from mla.conformance.checks.attention.common import (
    MIXED,
    decode,
    expanded,
    expanded_check,
    latent,
    latent_check,
)
from mla.conformance.problems.attention_call import check_out
from mla.conformance.problems.reach import reach
from mla.conformance.trial import Trial

KIND = "index"
# Tokens per page, and pages of a cache that has more than 2^16 or 2^17 slots, or 2^16 pages.
CACHES = ((64, 2100), (16, 4400), (1, 70_000))
MORE_CACHES = (*CACHES, (64, 4400), (32, 4400), (128, 1100))


@latent_check(
    "far_pages", "places of pages that are computed in 32 bits, and lie elsewhere in a large cache", KIND
)
def far_pages(trial: Trial) -> None:
    """Pages whose place in memory is beyond 32 bits are read where they are."""
    numbers = reach(trial)
    trial.note = f"{numbers * trial.dtype.itemsize / 1e9:.2g} GB from the start"
    try:
        for problem in (decode(33, 130, 7), latent(*MIXED)):
            pages = -(-numbers // (problem.page_size * problem.dims.latent))
            check_out(trial, problem, layout=Layout(pages_before=pages))
    finally:
        trial.backend.empty_cache()


@expanded_check("far_rows", "places of rows that are computed in 32 bits, and lie elsewhere in memory", KIND)
def far_rows(trial: Trial) -> None:
    """Rows of queries, keys, values and outputs may lie apart, the last of them beyond 32 bits."""
    lengths = (4, 30, 1), (4, 31, 5)
    numbers = reach(trial, tensors=5)  # of q, k, v and out, k and v are longer
    apart = numbers // 33 // 1024 * 1024  # so that the last of 35 rows is beyond, and all are aligned
    trial.note = f"{numbers * trial.dtype.itemsize / 1e9:.2g} GB from first to last"
    try:
        for causal in (True, False):
            check_out(trial, expanded(*lengths, heads=2, causal=causal), layout=Layout(apart=apart))
    finally:
        trial.backend.empty_cache()


@latent_check("far_rows", "places of rows that are computed in 32 bits, and lie elsewhere in memory", KIND)
def latent_far_rows(trial: Trial) -> None:
    """Rows of queries and outputs may lie apart, the last of them beyond 32 bits."""
    numbers = reach(trial, tensors=2)
    apart = numbers // 33 // 1024 * 1024  # so that the last of 35 rows is beyond, and all are aligned
    trial.note = f"{numbers * trial.dtype.itemsize / 1e9:.2g} GB from first to last"
    try:
        check_out(trial, latent((4, 30, 1), (4, 31, 5), heads=2), layout=Layout(apart=apart))
    finally:
        trial.backend.empty_cache()


@latent_check("shared_pages", "a page that belongs to one request alone, or is looked up by its owner", KIND)
def shared_pages(trial: Trial) -> None:
    """Requests with a common beginning may share the pages that hold it."""
    for lengths in (((1, 1), (150, 70)), ((2, 1, 9), (66, 200, 140))):
        check_out(trial, latent(*lengths, heads=4, common=64), layout=Layout(unowned=torch.nan))


@latent_check("slots", "numbers of pages or slots that are kept in 8, 12, 15 or 16 bits", KIND)
def slots(trial: Trial) -> None:
    """Pages next to powers of two, and slots beyond 2^16, are read where they are."""
    for size, pages in CACHES if trial.quick else MORE_CACHES:
        few = min(size, 8)
        lengths = ((1, few + 1, 1, 3), (few + 2, few + 1, 2, few + 3))
        for heads in (4, 16) if trial.quick else (4, 16, 128):
            problem = latent(*lengths, heads=heads, page_size=size)
            check_out(trial, problem, layout=Layout(pages=pages))


@latent_check("positions", "positions, or entries of the block table, that are kept in 15 or 16 bits", KIND)
def positions(trial: Trial) -> None:
    """Keys beyond column 2^15 of a block table are read, and rows that begin beyond its entry 2^16."""
    check_out(trial, latent((1,) * 99, (700, *range(1, 99)), heads=1, page_size=1))
    if not trial.quick:
        check_out(trial, decode(33_000, 7, heads=4, page_size=1, aimed=True))


@expanded_check("positions", "places of keys that are kept in 15 or 16 bits", KIND)
def expanded_positions(trial: Trial) -> None:
    """Segments begin and end beyond key 2^16 and query 2^15."""
    check_out(trial, expanded((2, 3, 40), (33_000, 33_000, 50), heads=1, aimed=True))
