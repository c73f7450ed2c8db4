"""Mistakes in the scores of `select_latents`, and in what selects the best."""

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
    _scores("few keys are many", old="seen <= few:", new="seen <= few + 200:"),
    _scores("negative scores are as they are", old="~bits, bits | 0x80000000", new="bits, bits | 0x80000000"),
    _scores("negative scores are above others", old="bits | 0x80000000)", new="bits)"),
    _scores("digits are of all scores", old="there & (leading(key, low) == begins)", new="there"),
    _scores("what is not seen is counted", old="tl.where(there, theirs, 0)", new="theirs"),
    _scores("ranks count from the lowest", old="counts, 0, reverse=True", new="counts, 0"),
    _scores("the last is the best", old="upward >= rest", new="upward > 0"),
    _scores("better ones are taken twice", old="rest -= tl.sum", new="alike += tl.sum"),
    _scores("passes end early", old="(rest < alike)", new="(rest < alike - 1)"),
    _scores("the last bits are not looked at", old="(low > 0) &", new="(low > BITS) &"),
    _scores("none of what is equal is taken", old="(equal & (tie <= rest))", new="(equal & (tie < 0))"),
    _scores("all that is equal is taken", old="(equal & (tie <= rest))", new="equal"),
    _scores("ties of earlier steps are forgotten", old="tie = tied + (sums >> 16)", new="tie = sums >> 16"),
    _scores("better ones of earlier steps are forgotten", old="at = above + (sums", new="at = (sums"),
    _scores("equal ones take no place", old="+ tl.minimum(tie, rest) - 1", new="- 1"),
    _scores("results are taken for contiguous", old="token.to(tl.int64) * out_token", new="token * topk"),
    _scores("nothing is behind the last", old="(behind >= count)", new="(behind > topk)"),
    _scores(
        "the row before is read",
        old="row = scores + tl.program_id(0)",
        new="row = scores + 0 * tl.program_id(0)",
    ),
    _scores("as many as are wanted are there", old="tl.minimum(tl.maximum(seen, 0), topk)", new="topk"),
)
