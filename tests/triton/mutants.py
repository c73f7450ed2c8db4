"""Mistakes that kernels are made with: each must turn a check red."""

from __future__ import annotations

from functools import partial

from mutating import Mutant

_latent, _expanded = partial(Mutant, room="latent"), partial(Mutant, room="expanded")
_pointwise, _softmax = partial(Mutant, room="pointwise"), partial(Mutant, room="softmax")

MASK = "there[:, None] & has_channel[None, :]"

LATENT = (
    _latent(
        "the mask of the last tile is dropped",
        old="seen = there[None, :]\n",
        new="seen = place[None, :] >= 0\n",
    ),
    _latent(
        "the last page is one too far",
        old="page.to(tl.int64) * PAGE + place % PAGE",
        new="page.to(tl.int64) * PAGE + (place + 1) % PAGE",
    ),
    _latent(
        "pages are looked up one key late",
        old="(place + KEYS) // PAGE, mask",
        new="(place + KEYS + 1) // PAGE, mask",
    ),
    _latent(
        "the next page of a whole step is the same",
        old="table + following // PAGE",
        new="table + start // PAGE",
    ),
    _latent(
        "the table is read behind the last page",
        old="mask=place + KEYS < high, other=0)",
        new="other=0, mask=place >= 0)",
    ),
    _latent(
        "the table is read behind the last page of a whole step",
        old="mask=following < high",
        new="mask=following >= 0",
    ),
    _latent(
        "latents are read behind the last key",
        old=f"key[:, None] + channel[None, :], mask={MASK}",
        new="key[:, None] + channel[None, :], mask=has_channel[None, :]",
    ),
    _latent(
        "rows of the next request are stored",
        old="target = owned[:, None] & has_channel[None, :]",
        new="target = has_channel[None, :] & (row >= 0)[:, None]",
    ),
    _latent(
        "columns behind the latent are stored",
        old="target = owned[:, None] & has_channel[None, :]",
        new="target = owned[:, None] & (channel >= 0)[None, :]",
    ),
    _latent(
        "values of earlier steps do not shrink", old="latent, value * shrink[:, None])", new="latent, value)"
    ),
    _latent(
        "the product of the rope part is lost",
        old="score = tl.dot(q_rope, tl.trans(decoded(raw, q_latent.dtype, FORMAT)), score)",
        new="pass",
    ),
    _latent(
        "the product of the latent part is lost",
        old="tl.trans(decoded(raw, q_latent.dtype, FORMAT)), score)",
        new="tl.trans(decoded(raw, q_latent.dtype, FORMAT)))",
    ),
    _latent("the scale is lost", old="score * scale", new="score"),
    _latent(
        "a row sees one key too many",
        old="visible = keys - queries + token",
        new="visible = keys - queries + token + 1",
    ),
    _latent(
        "a row sees one key too few",
        old="place[None, :] <= visible[:, None]",
        new="place[None, :] < visible[:, None]",
    ),
    _latent(
        "rows are counted by tokens, not by heads", old="token = row // HEADS", new="token = row // ROWS"
    ),
    _latent(
        "a tile sees what its first token sees",
        old="(block * ROWS + ROWS - 1) // HEADS",
        new="block * ROWS // HEADS",
    ),
    _latent(
        "parts are rounded down", old="length = ((keys + parts - 1) // parts", new="length = (keys // parts"
    ),
    _latent(
        "a part without keys is not written",
        old="visible = keys - queries + token  # the",
        new="if low >= high:\n        return\n    visible = keys - queries + token  # the",
    ),
    _latent("one part is not written to the output", old="if parts > 1:", new="if parts > 0:"),
    _latent(
        "the merge overwrites what one part has written",
        old="(start >= end) | (parts == 1)",
        new="start >= end",
    ),
    _latent(
        "the merge splits by another rule",
        old="tl.load(kv_lens + request), keys_per_split, max_splits)\n    start",
        new="tl.load(kv_lens + request), keys_per_split + 1, max_splits)\n    start",
    ),
    _latent("the merge leaves out the last part", old="there = part < parts", new="there = part < parts - 1"),
    _latent(
        "the merge does not shrink what it has",
        old="value = value * shrink + tl.sum",
        new="value = value + tl.sum",
    ),
    _latent(
        "the merge starts at the first row of all",
        old="at = (first + row // HEADS).to(tl.int64)",
        new="at = (first - first + row // HEADS).to(tl.int64)",
    ),
    _latent(
        "parts lie elsewhere for the merge",
        old="place = (at * HEADS + head) * max_splits\n",
        new="place = (at * HEADS + head) * parts\n",
    ),
    _latent("the sums stay in powers of two", old="sums * LN2, mask=owned", new="sums, mask=owned"),
    _latent("the merged sums stay in powers of two", old="lse_head, sums * LN2)", new="lse_head, sums)"),
    _latent(
        "outputs are taken for contiguous",
        old="out_row = out + at * out_token + head * out_head",
        new="out_row = out + at * out_token + head * LATENT",
    ),
    _latent(
        "the table is taken for contiguous",
        old="request.to(tl.int64) * table_row",
        new="request.to(tl.int64) * (table_row - 3)",
    ),
    _latent(
        "places in the cache are int32",
        old="key = cache + (page.to(tl.int64) * PAGE",
        new="key = cache + (page * PAGE",
    ),
    _latent(
        "places in the cache are int32 where a step is within a page",
        old="slot = page.to(tl.int64)",
        new="slot = page",
    ),
)
SOFTMAX = (
    _softmax(
        "exponentials are natural",
        old="weight = tl.math.exp2(score - base[:, None])",
        new="weight = tl.exp(score - base[:, None])",
    ),
    _softmax(
        "the maximum is lost",
        old="weight = tl.math.exp2(score - base[:, None])",
        new="weight = tl.math.exp2(score)",
    ),
    _softmax(
        "the maximum of earlier steps is lost",
        old="higher = tl.maximum(top, tl.max(score, 1))",
        new="higher = tl.max(score, 1)",
    ),
    _softmax("sums of earlier steps do not shrink", old="total * shrink + tl.sum", new="total + tl.sum"),
    _softmax(
        "infinity minus infinity",
        old='base = tl.where(higher == float("-inf"), 0.0, higher)',
        new="base = higher",
    ),
    _softmax(
        "rows that see nothing divide by zero", old="whole = tl.where(some, total, 1.0)", new="whole = total"
    ),
)
EXPANDED = (
    _expanded(
        "a query sees one key too many",
        old="visible = keys - queries + token",
        new="visible = keys - queries + token + 1",
    ),
    _expanded(
        "queries start at the first key", old="visible = keys - queries + token", new="visible = token"
    ),
    _expanded(
        "the mask of the last tile is dropped",
        old="(place[None, :] <= visible[:, None]) & there[None, :]",
        new="(place[None, :] >= 0) & (visible[:, None] >= -keys)",
    ),
    _expanded(
        "the rest of the channels is lost", old="score = tl.dot(q_back, tl.trans(k_back), score)", new="pass"
    ),
    _expanded(
        "channels behind the last are read", old="has_back = back < WIDTH", new="has_back = back < WIDTH + 3"
    ),
    _expanded(
        "keys of the first segment",
        old="row = (first_k + place).to(tl.int64)",
        new="row = place.to(tl.int64)",
    ),
    _expanded(
        "all heads see the values of the first",
        old="v_row = v + row * v_token + head * v_head",
        new="v_row = v + row * v_token",
    ),
    _expanded(
        "values are read behind the last key",
        old="mask=there[:, None] & has_column[None, :]",
        new="mask=has_column[None, :]",
    ),
    _expanded("the scale is lost", old="score * scale", new="score"),
    _expanded(
        "rows of the next segment are stored",
        old="mask=owned[:, None] & has_column[None, :]",
        new="mask=(token >= 0)[:, None] & has_column[None, :]",
    ),
    _expanded(
        "blocks of a segment are counted wrongly",
        old="segment = tl.program_id(0) // blocks",
        new="segment = tl.program_id(0) // (blocks + 1)",
    ),
    _expanded(
        "a log-sum-exp is stored for all heads at one",
        old="lse + at * lse_token + head * lse_head",
        new="lse + at * lse_token",
    ),
)
SMALL = (
    _pointwise(
        "eps is lost",
        old="factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)",
        new="factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH)",
    ),
    _pointwise(
        "the mean is over the padded row",
        old="tl.sum(wide * wide, 0) / WIDTH",
        new="tl.sum(wide * wide, 0) / WIDE",
    ),
    _pointwise(
        "rows are taken for contiguous", old="x + row * x_row + column", new="x + row * WIDTH + column"
    ),
    _pointwise(
        "pairs turn the other way", old="(a * cos - b * sin).to(out", new="(a * cos + b * sin).to(out"
    ),
    _pointwise(
        "heads behind the last are rotated",
        old="there = (head < HEADS)[:, None] & has_pair[None, :]",
        new="there = (head >= 0)[:, None] & has_pair[None, :]",
    ),
    _pointwise(
        "slots are taken for tokens",
        old="tl.load(slots + token) * (LATENT + 2 * PAIRS)",
        new="token * (LATENT + 2 * PAIRS)",
    ),
    _pointwise(
        "a latent is written over its whole padded width",
        old="(wide * factor * by).to(cache.dtype.element_ty), mask=there)",
        new="(wide * factor * by).to(cache.dtype.element_ty))",
    ),
    _pointwise("the shared key is not turned", old="(a * cos - b * sin).to(cache", new="a.to(cache"),
)
