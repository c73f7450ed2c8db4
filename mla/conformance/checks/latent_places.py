"""`latent_attention`: where a token lies, in a kernel's tiles of rows and keys and in the device's memory."""

from __future__ import annotations

from collections.abc import Iterator

from mla.conformance.checks.latent_attention import MIXED, decode, latent, latent_check
from mla.conformance.problems.attention import AttentionProblem
from mla.conformance.problems.attention_call import Layout, check_out
from mla.conformance.trial import Refused, Trial
from mla_backends import host

# Tiles that kernels cut a request's rows into: all heads of its first token, then of its second, and so on.
ROWS = (16, 32, 64, 128, 256)
HEADS = (12, 20, 40, 48, 96)
# A key that starts a tile of keys, whatever size of tile up to 128 a kernel has.
FIRST_KEY = 128
EVEN = 0.1  # magnitude of queries that give all keys about the same weight, so that none is lost unseen
# Numbers from the start of a cache to its pages: beyond what 32 bits count, unsigned and signed. Beyond the
# last, signed bytes have run out, in a dtype of two.
PLACES = (1 << 32, 1 << 31, 1 << 30)


@latent_check("cut_tokens", "a last key that is lost where a tile of rows ends between the heads of a token")
def cut_tokens(trial: Trial) -> None:
    """A token whose heads are in two tiles of rows sees its own key, which is the first in a tile of keys."""
    rows, heads = ((64, 128), (20, 48)) if trial.quick else (ROWS, HEADS)
    check_out(trial, *(problem for tile in rows for count in heads for problem in cut(tile, count)))


def cut(rows: int, heads: int) -> Iterator[AttentionProblem]:
    """Yield the shortest request whose first tile of `rows` ends within a token, if it does."""
    token, within = divmod(rows, heads)
    if within:
        yield latent((token + 1,), (FIRST_KEY + 1,), heads=heads, magnitude=EVEN)


@latent_check("far_pages", "places of pages that are computed in 32 bits, and lie elsewhere in a large cache")
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


def reach(trial: Trial) -> int:
    """Return the farthest place that there is memory for. Raises `Refused` if there is none."""
    least = 0
    for numbers in PLACES:
        least = numbers * trial.dtype.itemsize
        # Little of a cache on the host is ever touched, unless an op makes a copy of it in float32.
        needed, free = (
            (least + 4 * numbers, host.memory_available())
            if trial.device.type == "cpu"
            else (least + least // 4, trial.backend.memory().free)
        )
        if free is None:
            raise Refused("how much memory is free is not known")
        if needed <= free:
            return numbers
    raise Refused(f"there is no room for a cache of {least / 1e9:.2g} GB")
