"""Mistakes that kernels are made with: each must turn a check red."""

from __future__ import annotations

from functools import partial

from mutating import Mutant

_latent, _expanded = partial(Mutant, room="latent"), partial(Mutant, room="expanded")
_pointwise, _softmax = partial(Mutant, room="pointwise"), partial(Mutant, room="softmax")
_places = partial(Mutant, room="places")

LATENT = (
    _latent(
        "the mask of the last tile is dropped",
        old="seen = there[None, :]\n",
        new="seen = place[None, :] >= 0\n",
    ),
    _latent(
        "keys are one slot too far",
        old="pages * PAGE + place % PAGE",
        new="pages * PAGE + (place + 1) % PAGE",
    ),
    _latent(
        "pages are looked up one key late",
        old="table + place // PAGE, mask=there",
        new="table + (place + 1) // PAGE, mask=there",
    ),
    _latent(
        "the next page of a whole step is the same",
        old="table + following // PAGE",
        new="table + start // PAGE",
    ),
    _latent(
        "the table is read behind the last page",
        old="place // PAGE, mask=there, other=0)",
        new="place // PAGE, mask=place >= 0, other=0)",
    ),
    _latent(
        "the table is read behind the last page of a whole step",
        old="mask=following < high",
        new="mask=following >= 0",
    ),
    _latent(
        "latents are read behind the last key",
        old="key[:, None] + channel[None, :], mask=there[:, None] & has_channel[None, :]",
        new="key[:, None] + channel[None, :], mask=has_channel[None, :]",
    ),
    _latent(
        "upper halves of latents are read behind the last key",
        old="key[:, None] + upper[None, :], mask=there[:, None] & has_upper[None, :]",
        new="key[:, None] + upper[None, :], mask=has_upper[None, :]",
    ),
    _latent(
        "the product of the upper half is lost",
        old="score = tl.dot(q_upper, tl.trans(latent_upper), score)",
        new="pass",
    ),
    _latent(
        "upper halves of earlier steps do not shrink",
        old="latent_upper, value_upper * shrink[:, None])",
        new="latent_upper, value_upper)",
    ),
    _latent(
        "the upper half of a part is not stored",
        old="tl.store(part_row[:, None] + upper[None, :], value_upper, mask=target_upper)",
        new="pass",
    ),
    _latent(
        "columns behind the upper half are stored",
        old="target_upper = owned[:, None] & has_upper[None, :]",
        new="target_upper = owned[:, None] & (upper >= 0)[None, :]",
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
        "values of earlier steps do not shrink",
        old="weight.to(latent.dtype), latent, value * shrink[:, None])",
        new="weight.to(latent.dtype), latent, value)",
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
    _latent(
        "the merge leaves out the last part",
        old="mask=part < parts, other",
        new="mask=part < parts - 1, other",
    ),
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
        old="mask=there, other=0).to(tl.int64)",
        new="mask=there, other=0)",
    ),
    _latent(
        "places in the cache are int32 where a step is within a page",
        old="slot = page.to(tl.int64)",
        new="slot = page",
    ),
    _latent(
        "places of queries are int32",
        old="at = (first + token).to(tl.int64)",
        new="at = first + token",
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
PLACES = (
    _places("the search ends a request early", old="high - low > 1", new="high - low > 2"),
    _places("a request begins one program late", old="if begins <= program:", new="if begins < program:"),
    _places(
        "requests begin where the rows before them end",
        old="rows).to(tl.int32) + middle",
        new="rows).to(tl.int32)",
    ),
    _places("blocks of a request are numbered from the first of all", old="program - begins", new="program"),
    _places(
        "requests and blocks are mixed up", old="program // blocks, program", new="program % blocks, program"
    ),
)
EXPANDED = (
    _expanded(
        "a query sees one key too many",
        old="visible = keys - queries + token",
        new="visible = keys - queries + token + 1",
    ),
    _expanded(
        "queries start at the first key",
        old="visible = keys - queries + token",
        new="visible = token",
    ),
    _expanded(
        "the mask is dropped",
        old="seen = (place[None, :] <= visible[:, None]) & there[None, :]",
        new="seen = (place[None, :] >= 0) & (visible[:, None] >= -start)",
    ),
    _expanded(
        "the first queries of a block see what its last sees",
        old="queries + block * ROWS + 1)",
        new="queries + block * ROWS + ROWS)",
    ),
    _expanded(
        "the last tile of keys is taken for a whole one",
        old="all_see = keys // KEYS * KEYS",
        new="all_see = (keys + KEYS - 1) // KEYS * KEYS",
    ),
    _expanded(
        "the rest of the channels is lost",
        old="score = tl.dot(q_back, tl.trans(k_back), score)",
        new="pass",
    ),
    _expanded(
        "channels behind the last are read",
        old="has_back = (back < WIDTH)[None, :]",
        new="has_back = (back < WIDTH + 3)[None, :]",
    ),
    _expanded("keys of the first segment", old="k_row = k + first_k * k_token", new="k_row = k"),
    _expanded("values of the first segment", old="v_row = v + first_k * v_token", new="v_row = v"),
    _expanded(
        "all heads see the values of the first",
        old="v_token + head * v_head",
        new="v_token",
    ),
    _expanded(
        "values are read behind the last key",
        old="has_column = has_column & there[:, None]",
        new="has_column = has_column & (place >= 0)[:, None]",
    ),
    _expanded(
        "keys are read behind the last",
        old="has_front = has_front & there[:, None]",
        new="has_front = has_front & (place >= 0)[:, None]",
    ),
    _expanded("the scale is lost", old="score = score * scale", new="pass"),
    _expanded(
        "rows of the next segment are stored",
        old="mask=owned[:, None] & (column < VALUES)[None, :],",
        new="mask=(token >= 0)[:, None] & (column < VALUES)[None, :],",
    ),
    _expanded(
        "the last block of a segment is left out", old="// ROWS - 1 - block", new="// ROWS - 2 - block"
    ),
    _expanded(
        "a log-sum-exp is stored for all heads at one",
        old="lse + at * lse_token + head * lse_head",
        new="lse + at * lse_token",
    ),
    _expanded(
        "places of queries are int32",
        old="at = (first_q + token).to(tl.int64)",
        new="at = first_q + token",
    ),
    _expanded(
        "places of keys are int32",
        old="key = k_row + place.to(tl.int64) * k_token",
        new="key = k_row + place * k_token",
    ),
    _expanded(
        "places of values are int32",
        old="its_values = v_row + place.to(tl.int64) * v_token",
        new="its_values = v_row + place * v_token",
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
