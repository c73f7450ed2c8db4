"""Wrong `expanded_attention`, one fault per check at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from wrong_attention.base import Expanded, Makers, after, given, wrong
from wrong_attention.both import (
    as_contiguous,
    base_two,
    empty_unwritten,
    first_layers,
    made_for,
    many_heads,
    no_maximum,
    nothing,
    plus_infinity,
    rows_moved,
    scaled_in_place,
    usual_scale,
    waits,
    without_lse,
)


def causal(value: bool, when: Callable[[Any], bool] = lambda lengths: True) -> Callable[..., Any]:
    return lambda spec, lengths: replace(lengths, causal=value) if when(lengths) else lengths


class EarlyKeys(Expanded):  # type: ignore[misc, valid-type]
    """Causality is aligned at the first key instead of the last."""

    lse_optional = False

    def __call__(self, state: Any, **tensors: Any) -> None:
        q, k, v, out, lse = (tensors[name] for name in ("q", "k", "v", "out", "lse"))
        first_q = first_k = 0
        for queries, keys in zip(state.query_lens, state.kv_lens, strict=True):
            seen = min(queries, keys) if state.causal else keys
            rows, columns = slice(first_q, first_q + queries), slice(first_k, first_k + seen)
            lengths = replace(state, query_lens=(queries,), kv_lens=(seen,))
            parts = {"q": q[rows], "k": k[columns], "v": v[columns], "out": out[rows], "lse": lse[rows]}
            super().__call__(lengths, softmax_scale=tensors["softmax_scale"], **parts)
            first_q, first_k = first_q + queries, first_k + keys


MUTANTS: Makers = {
    "expanded.prefill": [lambda: wrong(Expanded, prepare=causal(False))],
    "expanded.history": [EarlyKeys],
    "expanded.mixed": [lambda: after(Expanded, rows_moved)],
    "expanded.unmasked": [lambda: wrong(Expanded, prepare=causal(True))],
    "expanded.empty_segments": [
        lambda: after(Expanded, plus_infinity),
        lambda: after(Expanded, empty_unwritten),
    ],
    "expanded.heads": [lambda: after(Expanded, many_heads)],
    "expanded.lse": [lambda: after(Expanded, base_two)],
    "expanded.scale": [lambda: given(Expanded, usual_scale(192)), lambda: given(Expanded, usual_scale(128))],
    "expanded.large": [lambda: after(Expanded, no_maximum)],
    "expanded.strided": [
        lambda: given(Expanded, as_contiguous("q")),
        lambda: given(Expanded, as_contiguous("v")),
    ],
    "expanded.inputs": [lambda: wrong(Expanded, scaled_in_place)],
    "expanded.reuse": [lambda: wrong(Expanded, first_layers("k"))],
    "expanded.prepare": [lambda: wrong(Expanded, prepare=waits)],
    "expanded.without_lse": [lambda: without_lse(Expanded), lambda: without_lse(Expanded, nothing)],
    "expanded.other_widths": [lambda: after(Expanded, made_for(128))],
}
