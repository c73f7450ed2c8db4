"""Mistakes in the kernels of `latent_attention`."""

from mutating import mistakes

LATENT = mistakes(
    "latent",
    {
        "the mask of the last tile is dropped": ("seen = there[None, :]\n", "seen = place[None, :] >= 0\n"),
        "keys are one slot too far": ("pages * PAGE + place % PAGE", "pages * PAGE + (place + 1) % PAGE"),
        "pages are looked up one key late": (
            "table + place // PAGE, mask=there",
            "table + (place + 1) // PAGE, mask=there",
        ),
        "the next page of a whole step is the same": ("table + following // PAGE", "table + start // PAGE"),
        "the table is read behind the last page": (
            "place // PAGE, mask=there, other=0)",
            "place // PAGE, mask=place >= 0, other=0)",
        ),
        "the table is read behind the last page of a whole step": (
            "mask=following < high",
            "mask=following >= 0",
        ),
        "latents are read behind the last key": (
            "q_latent, key, there, score",
            "q_latent, key, place >= 0, score",
        ),
        "upper halves of latents are read behind the last key": (
            "q_upper, key, there, score",
            "q_upper, key, place >= 0, score",
        ),
        "the product of the upper half is lost": (
            "latent_upper, score = multiply(",
            "latent_upper, _ = multiply(",
        ),
        "upper halves of earlier steps do not shrink": (
            "latent_upper, value_upper * shrink[:, None])",
            "latent_upper, value_upper)",
        ),
        "the upper half of a part is not stored": (
            "tl.store(part_row[:, None] + upper[None, :], value_upper, mask=target_upper)",
            "pass",
        ),
        "columns behind the upper half are stored": (
            "target_upper = owned[:, None] & has_upper[None, :]",
            "target_upper = owned[:, None] & (upper >= 0)[None, :]",
        ),
        "rows of the next request are stored": (
            "target = owned[:, None] & has_channel[None, :]",
            "target = has_channel[None, :] & (head >= 0)[:, None]",
        ),
        "columns behind the latent are stored": (
            "target = owned[:, None] & has_channel[None, :]",
            "target = owned[:, None] & (channel >= 0)[None, :]",
        ),
        "values of earlier steps do not shrink": (
            "weight.to(latent.dtype), latent, value * shrink[:, None])",
            "weight.to(latent.dtype), latent, value)",
        ),
        "the product of the rope part is lost": (" _, score = multiply(", " _, _ = multiply("),
        "the product of the latent part is lost": ("latent, score = multiply(", "latent, _ = multiply("),
        "a product begins anew": ("tl.dot(q, tl.trans(keys), score)", "tl.dot(q, tl.trans(keys))"),
        "scores of many rows change where their product is hidden": (
            "never = requests < 1",
            "never = requests > 0",
        ),
        "the scale is lost": ("score * scale", "score"),
        "a row sees one key too many": (
            "visible = keys - queries + token",
            "visible = keys - queries + token + 1",
        ),
        "a row sees one key too few": (
            "place[None, :] <= visible[:, None]",
            "place[None, :] < visible[:, None]",
        ),
        "rows are counted by tokens, not by heads": ("token = row // HEADS", "token = row // ROWS"),
        "a tile sees what its first token sees": (
            "(block * ROWS + ROWS - 1) // HEADS",
            "block * ROWS // HEADS",
        ),
        "parts are rounded down": ("length = ((keys + parts - 1) // parts", "length = (keys // parts"),
        "a part without keys is not written": (
            "visible = keys - queries + token  # the",
            "if low >= high:\n        return\n    visible = keys - queries + token  # the",
        ),
        "one part is not written to the output": ("if parts > 1:", "if parts > 0:"),
        "the merge overwrites what one part has written": ("(start >= end) | (parts == 1)", "start >= end"),
        "the merge splits by another rule": (
            "keys_per_split, max_splits)\n    start",
            "keys_per_split + 1, max_splits)\n    start",
        ),
        "the merge leaves out the last part": ("mask=part < parts, other", "mask=part < parts - 1, other"),
        "the merge reads values behind the last part": (
            "mask=(part < parts)[:, None] & (channel",
            "mask=(part >= 0)[:, None] & (channel",
        ),
        "the merge does not shrink what it has": (
            "value = value * shrink + tl.sum",
            "value = value + tl.sum",
        ),
        "the merge starts at the first row of all": (
            "at = (first + row // HEADS).to(tl.int64)",
            "at = (first - first + row // HEADS).to(tl.int64)",
        ),
        "parts lie elsewhere for the merge": (
            "place = (first.to(tl.int64) * HEADS + row) * max_splits\n",
            "place = (first.to(tl.int64) * HEADS + row) * parts\n",
        ),
        "the sums stay in powers of two": ("sums * LN2, mask=owned", "sums, mask=owned"),
        "the merged sums stay in powers of two": ("sums * LN2, mask=tl.prog", "sums, mask=tl.prog"),
        "all programs of a row merge its first channels": (
            "channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)",
            "channel = tl.arange(0, CHANNELS)",
        ),
        "programs that share a row leave a gap between their channels": (
            "tl.program_id(1) * CHANNELS +",
            "tl.program_id(1) * (CHANNELS + 1) +",
        ),
        "no program stores the merged sums": ("mask=tl.program_id(1) == 0", "mask=tl.program_id(1) < 0"),
        "outputs are taken for contiguous": (
            "out_row = out + at * out_token + head * out_head",
            "out_row = out + at * out_token + head * LATENT",
        ),
        "the table is taken for contiguous": (
            "request.to(tl.int64) * table_row",
            "request.to(tl.int64) * (table_row - 3)",
        ),
        "places in the cache are int32": ("mask=there, other=0).to(tl.int64)", "mask=there, other=0)"),
        "places in the cache are int32 where a step is within a page": (
            "slot = page.to(tl.int64)",
            "slot = page",
        ),
        "places of queries are int32": (
            "token < queries, (first + token).to(tl.int64)",
            "token < queries, first + token",
        ),
        "the 33rd and the 65th part are lost": ("range(0, parts, PARTS)", "range(0, parts - 1, PARTS)"),
        "parts beyond the memory for them": (
            "tl.minimum(tl.maximum((keys + keys_per_split - 1) // keys_per_split, 1), max_splits)",
            "tl.maximum((keys + keys_per_split - 1) // keys_per_split, 1)",
        ),
        "value sums are kept in 16 bits": (
            "latent, value * shrink[:, None])",
            "latent, (value * shrink[:, None]).to(latent.dtype).to(tl.float32))",
        ),
    },
)
SELECTED = mistakes(
    "latent",
    {
        "what selects nothing is a key": ("there = place >= 0\n", "there = place >= -1\n"),
        "selections are taken for contiguous": (
            "first.to(tl.int64) * selection_row",
            "first.to(tl.int64) * TOPK",
        ),
        "a token selects what the first of all does": (
            "selection + first.to(tl.int64) * selection_row",
            "selection + first.to(tl.int64) * 0",
        ),
        "a part begins with the first selected key": (
            "tl.load(chosen + place, mask=there",
            "tl.load(chosen + place - low, mask=there",
        ),
        "the selection is read behind the part": (
            "tl.load(chosen + place, mask=there",
            "tl.load(chosen + place, mask=place >= 0",
        ),
        "more keys than are selected": (
            "tl.minimum(tl.load(kv_lens + request), TOPK)",
            "tl.load(kv_lens + request)",
        ),
        "tokens belong to the first request": ("last_from(first, cu_q, requests, 1, 1, 0)", "first * 0"),
        "tokens of a request are two requests apart": (
            "last_from(first, cu_q, requests, 1, 1, 0)",
            "last_from(first, cu_q, requests, 1, 1, 1)",
        ),
        "positions are slots": (
            "pages = tl.load(table + place // PAGE, mask=there, other=0).to(tl.int64)",
            "pages = (place // PAGE).to(tl.int64)",
        ),
    },
)
