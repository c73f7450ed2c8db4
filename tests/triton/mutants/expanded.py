"""Mistakes in the kernel of `expanded_attention`."""

from __future__ import annotations

from functools import partial

from mutating import Mutant

_expanded = partial(Mutant, room="expanded")

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
