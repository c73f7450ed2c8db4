"""Mistakes in the kernel of `expanded_attention`."""

from mutating import mistakes

EXPANDED = mistakes(
    "expanded",
    {
        "a query sees one key too many": (
            "visible = keys - queries + token",
            "visible = keys - queries + token + 1",
        ),
        "queries start at the first key": ("visible = keys - queries + token", "visible = token"),
        "the mask is dropped": (
            "seen = (place[None, :] <= visible[:, None]) & there[None, :]",
            "seen = (place[None, :] >= 0) & (visible[:, None] >= -start)",
        ),
        "the first queries of a block see what its last sees": (
            "queries + block * ROWS + 1)",
            "queries + block * ROWS + ROWS)",
        ),
        "the last tile of keys is taken for a whole one": (
            "all_see = keys // KEYS * KEYS",
            "all_see = (keys + KEYS - 1) // KEYS * KEYS",
        ),
        "the rest of the channels is lost": ("score = tl.dot(q_back, tl.trans(k_back), score)", "pass"),
        "channels behind the last are read": (
            "has_back = (back < WIDTH)[None, :]",
            "has_back = (back < WIDTH + 3)[None, :]",
        ),
        "keys of the first segment": ("k_row = k + first_k * k_token", "k_row = k"),
        "values of the first segment": ("v_row = v + first_k * v_token", "v_row = v"),
        "all heads see the values of the first": ("v_token + head * v_head", "v_token"),
        "values are read behind the last key": (
            "has_column = has_column & there[:, None]",
            "has_column = has_column & (place >= 0)[:, None]",
        ),
        "keys are read behind the last": (
            "has_front = has_front & there[:, None]",
            "has_front = has_front & (place >= 0)[:, None]",
        ),
        "the scale is lost": ("score = score * scale", "pass"),
        "rows of the next segment are stored": (
            "mask=owned[:, None] & (column < VALUES)[None, :],",
            "mask=(token >= 0)[:, None] & (column < VALUES)[None, :],",
        ),
        "the last block of a segment is left out": ("// ROWS - 1 - block", "// ROWS - 2 - block"),
        "a log-sum-exp is stored for all heads at one": (
            "lse + at * lse_token + head * lse_head",
            "lse + at * lse_token",
        ),
        "places of queries are int32": ("at = (first_q + token).to(tl.int64)", "at = first_q + token"),
        "places of keys are int32": (
            "key = k_row + place.to(tl.int64) * k_token",
            "key = k_row + place * k_token",
        ),
        "places of values are int32": (
            "its_values = v_row + place.to(tl.int64) * v_token",
            "its_values = v_row + place * v_token",
        ),
    },
)
