"""Mistakes in the scores of `select_latents`, and in what selects the best."""

from mutating import mistakes

SELECTION = mistakes(
    "selection",
    {
        "a token sees the one behind it": ("+ token + 1", "+ token + 2"),
        "a token does not see itself": ("+ token + 1", "+ token"),
        "the sign of products counts": ("tl.maximum(said, 0.0)", "said"),
        "heads weigh the same": ("* weight[:, None]", "* 1.0"),
        "heads come before signs": (
            "tl.maximum(said, 0.0) * weight[:, None]",
            "tl.maximum(said * weight[:, None], 0.0)",
        ),
        "hidden keys score 0": ('tl.where(there, score, float("-inf"))', "tl.where(there, score, 0.0)"),
        "blocks that nobody sees keep old scores": (
            "mask=place < width)\n        return",
            "mask=place < 0)\n        return",
        ),
        "scores are written behind their row": (
            'score, float("-inf")), mask=place < width)',
            'score, float("-inf")), mask=place >= 0)',
        ),
        "keys are of the first page": ("place // PAGE, mask", "place * 0, mask"),
        "keys are of the first slot": ("(page * PAGE + place % PAGE) * DEPTH", "page * PAGE * DEPTH"),
        "scales lie behind their tokens": (
            "row = codes + place % PAGE * DEPTH",
            "row = codes + place % PAGE * (DEPTH + SCALE_BYTES)",
        ),
        "the first scale is everyone's": ("PAGE * DEPTH + place % PAGE * SCALE_BYTES", "PAGE * DEPTH"),
        "scales are lost": ("score = score * scale", "pass"),
        "queries are taken for contiguous": ("at * q_token", "at * (HEADS * DEPTH)"),
        "weights are taken for contiguous": ("at * weights_token", "at * HEADS"),
        "few keys are many": ("seen <= few:", "seen <= few + 200:"),
        "negative scores are as they are": ("~bits, bits | 0x80000000", "bits, bits | 0x80000000"),
        "negative scores are above others": ("bits | 0x80000000)", "bits)"),
        "digits are of all scores": ("there & (leading(key, low) == begins)", "there"),
        "what is not seen is counted": ("tl.where(there, theirs, 0)", "theirs"),
        "ranks count from the lowest": ("counts, 0, reverse=True", "counts, 0"),
        "the last is the best": ("upward >= rest", "upward > 0"),
        "better ones are taken twice": ("rest -= tl.sum", "alike += tl.sum"),
        "passes end early": ("(rest < alike)", "(rest < alike - 1)"),
        "the last bits are not looked at": ("(low > 0) &", "(low > BITS) &"),
        "none of what is equal is taken": ("(equal & (tie <= rest))", "(equal & (tie < 0))"),
        "all that is equal is taken": ("(equal & (tie <= rest))", "equal"),
        "ties of earlier steps are forgotten": ("tie = tied + (sums >> 16)", "tie = sums >> 16"),
        "better ones of earlier steps are forgotten": ("at = above + (sums", "at = (sums"),
        "equal ones take no place": ("+ tl.minimum(tie, rest) - 1", "- 1"),
        "results are taken for contiguous": ("token.to(tl.int64) * out_token", "token * topk"),
        "nothing is behind the last": ("(behind >= count)", "(behind > topk)"),
        "the row before is read": ("row = scores + tl.program_id(0)", "row = scores + 0 * tl.program_id(0)"),
        "as many as are wanted are there": ("tl.minimum(tl.maximum(seen, 0), topk)", "topk"),
    },
)
