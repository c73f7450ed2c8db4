"""Mistakes in the kernels of `latent_attention`."""

from __future__ import annotations

from functools import partial

from mutating import Mutant

_latent = partial(Mutant, room="latent")

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
        old="q_latent, key, there, score",
        new="q_latent, key, place >= 0, score",
    ),
    _latent(
        "upper halves of latents are read behind the last key",
        old="q_upper, key, there, score",
        new="q_upper, key, place >= 0, score",
    ),
    _latent(
        "the product of the upper half is lost",
        old="latent_upper, score = multiply(",
        new="latent_upper, _ = multiply(",
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
        new="target = has_channel[None, :] & (head >= 0)[:, None]",
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
        old=" _, score = multiply(",
        new=" _, _ = multiply(",
    ),
    _latent(
        "the product of the latent part is lost",
        old="latent, score = multiply(",
        new="latent, _ = multiply(",
    ),
    _latent(
        "a product begins anew",
        old="tl.dot(q, tl.trans(keys), score)",
        new="tl.dot(q, tl.trans(keys))",
    ),
    _latent(
        "scores of many rows change where their product is hidden",
        old="never = requests < 1",
        new="never = requests > 0",
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
        old="keys_per_split, max_splits)\n    start",
        new="keys_per_split + 1, max_splits)\n    start",
    ),
    _latent(
        "the merge leaves out the last part",
        old="mask=part < parts, other",
        new="mask=part < parts - 1, other",
    ),
    _latent(
        "the merge reads values behind the last part",
        old="mask=(part < parts)[:, None] & (channel",
        new="mask=(part >= 0)[:, None] & (channel",
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
        old="place = (first.to(tl.int64) * HEADS + row) * max_splits\n",
        new="place = (first.to(tl.int64) * HEADS + row) * parts\n",
    ),
    _latent("the sums stay in powers of two", old="sums * LN2, mask=owned", new="sums, mask=owned"),
    _latent(
        "the merged sums stay in powers of two", old="sums * LN2, mask=tl.prog", new="sums, mask=tl.prog"
    ),
    _latent(
        "all programs of a row merge its first channels",
        old="channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)",
        new="channel = tl.arange(0, CHANNELS)",
    ),
    _latent(
        "programs that share a row leave a gap between their channels",
        old="tl.program_id(1) * CHANNELS +",
        new="tl.program_id(1) * (CHANNELS + 1) +",
    ),
    _latent(
        "no program stores the merged sums", old="mask=tl.program_id(1) == 0", new="mask=tl.program_id(1) < 0"
    ),
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
        old="token < queries, (first + token).to(tl.int64)",
        new="token < queries, first + token",
    ),
    _latent(
        "the 33rd and the 65th part are lost", old="range(0, parts, PARTS)", new="range(0, parts - 1, PARTS)"
    ),
    _latent(
        "parts beyond the memory for them",
        old="tl.minimum(tl.maximum((keys + keys_per_split - 1) // keys_per_split, 1), max_splits)",
        new="tl.maximum((keys + keys_per_split - 1) // keys_per_split, 1)",
    ),
    _latent(
        "value sums are kept in 16 bits",
        old="latent, value * shrink[:, None])",
        new="latent, (value * shrink[:, None]).to(latent.dtype).to(tl.float32))",
    ),
)

SELECTED = (
    _latent("what selects nothing is a key", old="there = place >= 0\n", new="there = place >= -1\n"),
    _latent(
        "selections are taken for contiguous",
        old="first.to(tl.int64) * selection_row",
        new="first.to(tl.int64) * TOPK",
    ),
    _latent(
        "a token selects what the first of all does",
        old="selection + first.to(tl.int64) * selection_row",
        new="selection + first.to(tl.int64) * 0",
    ),
    _latent(
        "a part begins with the first selected key",
        old="tl.load(chosen + place, mask=there",
        new="tl.load(chosen + place - low, mask=there",
    ),
    _latent(
        "the selection is read behind the part",
        old="tl.load(chosen + place, mask=there",
        new="tl.load(chosen + place, mask=place >= 0",
    ),
    _latent(
        "more keys than are selected",
        old="tl.minimum(tl.load(kv_lens + request), TOPK)",
        new="tl.load(kv_lens + request)",
    ),
    _latent(
        "tokens belong to the first request",
        old="last_from(first, cu_q, requests, 1, 1, 0)",
        new="first * 0",
    ),
    _latent(
        "tokens of a request are two requests apart",
        old="last_from(first, cu_q, requests, 1, 1, 0)",
        new="last_from(first, cu_q, requests, 1, 1, 1)",
    ),
    _latent(
        "positions are slots",
        old="pages = tl.load(table + place // PAGE, mask=there, other=0).to(tl.int64)",
        new="pages = (place // PAGE).to(tl.int64)",
    ),
)
