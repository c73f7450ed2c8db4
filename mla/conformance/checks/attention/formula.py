"""`latent_attention` and `expanded_attention`: the formula itself, and what the contract says of it."""

from __future__ import annotations

from mla.conformance.checks.attention.common import (
    MIXED,
    SEGMENTS,
    decode,
    expanded,
    expanded_check,
    latent,
    latent_check,
)
from mla.conformance.problems.attention import SMALL
from mla.conformance.problems.attention_call import check_out
from mla.conformance.trial import Trial

KIND = "formula"


@latent_check("decode", "a block table row, a length or a head taken from a neighbour", KIND)
def decode_step(trial: Trial) -> None:
    """One new token per request attends histories of different lengths."""
    check_out(trial, decode(33, 7, 100, 64, 3), decode(90))


@latent_check("multi_token", "a mask that is off by one when several tokens follow a history", KIND)
def multi_token(trial: Trial) -> None:
    """Several new tokens per request, as in speculative decoding, are causal after their history."""
    for count in (2, 3) if trial.quick else (2, 3, 4, 5, 8):
        check_out(trial, latent((count,) * 3, (70, count + 1, 64)))


@latent_check("prefill", "a mask that leaks future tokens, which a long history hides", KIND)
def prefill(trial: Trial) -> None:
    """Requests without history see their own tokens up to each query."""
    lengths = (5, 1, 20) if trial.quick else (5, 1, 20, 64, 65, 150)
    check_out(trial, latent(lengths, lengths))


@latent_check("mixed", "tokens of one request that land in the rows of another", KIND)
def mixed(trial: Trial) -> None:
    """Prefill, decode and several tokens after a history share a batch."""
    check_out(trial, latent(*MIXED), latent((1, 12, 1), (65, 40, 9)))


@latent_check("scale", "a scale that is derived from the widths instead of taken from the call", KIND)
def scale(trial: Trial) -> None:
    """The softmax scale is the one that is passed."""
    check_out(trial, *(latent(*MIXED, scale_factor=factor) for factor in (0.4, 1.9)))


@latent_check("other_widths", "a kernel compiled for 512 + 64 that runs on other widths anyway", "contract")
def other_widths(trial: Trial) -> None:
    """Widths other than 512 + 64 are served, or refused with a reason."""
    check_out(trial, latent(*MIXED, dims=SMALL, heads=3, page_size=16))


@expanded_check("prefill", "a mask that leaks future tokens", KIND)
def expanded_prefill(trial: Trial) -> None:
    """Segments without history see their own tokens up to each query."""
    lengths = (5, 1, 40) if trial.quick else (5, 1, 40, 64, 65, 129, 300)
    check_out(trial, expanded(lengths, lengths))


@expanded_check("history", "causality aligned at the first key instead of the last", KIND)
def history(trial: Trial) -> None:
    """The last query of a segment sees the last key, whatever the history before it."""
    check_out(trial, expanded((3, 9), (40, 64)), expanded((1, 2, 5), (65, 129, 6)))


@expanded_check("mixed", "rows of one segment that attend another", KIND)
def expanded_mixed(trial: Trial) -> None:
    """Segments of all kinds lie back to back in one call."""
    check_out(trial, expanded(*SEGMENTS))


@expanded_check("unmasked", "a mask that is applied although the call is not causal", KIND)
def unmasked(trial: Trial) -> None:
    """Without a mask every query sees every key of its segment, even when there are fewer keys."""
    check_out(trial, expanded((5, 1, 20), (3, 9, 20), causal=False))


@expanded_check("scale", "a scale that is derived from the widths instead of taken from the call", KIND)
def expanded_scale(trial: Trial) -> None:
    """The softmax scale is the one that is passed."""
    check_out(trial, *(expanded(*SEGMENTS, scale_factor=factor) for factor in (0.4, 1.9)))


@expanded_check(
    "other_widths", "a kernel compiled for 192 and 128 that runs on other widths anyway", "contract"
)
def expanded_other_widths(trial: Trial) -> None:
    """Widths other than 192 and 128 are served, or refused with a reason."""
    check_out(trial, expanded(*SEGMENTS, dims=SMALL, heads=3))
