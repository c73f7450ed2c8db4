"""Mistakes in the scores of `select_latents`."""

from __future__ import annotations

from functools import partial

from mutating import Mutant

_scores = partial(Mutant, room="selection")

SELECTION = (
    _scores("a token sees the one behind it", old="+ token + 1", new="+ token + 2"),
    _scores("a token does not see itself", old="+ token + 1", new="+ token"),
    _scores("the sign of products counts", old="tl.maximum(said, 0.0)", new="said"),
    _scores("heads weigh the same", old="* weight[:, None]", new="* 1.0"),
    _scores(
        "heads come before signs",
        old="tl.maximum(said, 0.0) * weight[:, None]",
        new="tl.maximum(said * weight[:, None], 0.0)",
    ),
    _scores(
        "hidden keys score 0",
        old='tl.where(there, score, float("-inf"))',
        new="tl.where(there, score, 0.0)",
    ),
    _scores(
        "blocks that nobody sees keep old scores",
        old="mask=place < width)\n        return",
        new="mask=place < 0)\n        return",
    ),
    _scores(
        "scores are written behind their row",
        old='score, float("-inf")), mask=place < width)',
        new='score, float("-inf")), mask=place >= 0)',
    ),
    _scores("keys are of the first page", old="place // PAGE, mask", new="place * 0, mask"),
    _scores(
        "keys are of the first slot", old="(page * PAGE + place % PAGE) * DEPTH", new="page * PAGE * DEPTH"
    ),
    _scores(
        "scales lie behind their tokens",
        old="row = codes + place % PAGE * DEPTH",
        new="row = codes + place % PAGE * (DEPTH + SCALE_BYTES)",
    ),
    _scores(
        "the first scale is everyone's", old="PAGE * DEPTH + place % PAGE * SCALE_BYTES", new="PAGE * DEPTH"
    ),
    _scores("scales are lost", old="score = score * scale", new="pass"),
    _scores("queries are taken for contiguous", old="at * q_token", new="at * (HEADS * DEPTH)"),
    _scores("weights are taken for contiguous", old="at * weights_token", new="at * HEADS"),
)
