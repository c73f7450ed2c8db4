"""Ops that make a whole layer wrong: check -> makers of ops that it must fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import wrong_sparse as sparse
from wrong_attention.base import Expanded, Latent, after, given, wrong
from wrong_attention.both import base_two, first_layers
from wrong_attention.expanded import causal
from wrong_attention.latent import FrozenLengths, host_query
from wrong_attention.sizes import requests_from

from wrong_ops import extents, formats, habits, layers
from wrong_ops.base import mutant

MUTANTS: Mapping[str, list[Callable[[], Any]]] = {
    "layer.mixed": [
        lambda: after(Latent, layers.moved_if_mixed),
        lambda: wrong(Expanded, prepare=causal(False)),
        layers.unrotated,
        lambda: wrong(Latent, prepare=layers.early_keys),
        layers.unnormed,
    ],
    "layer.decode": [lambda: wrong(Latent, prepare=layers.last_page_dropped)],
    "layer.pages": [lambda: wrong(Latent, prepare=layers.consecutive_pages)],
    "layer.chunks": [lambda: after(Expanded, base_two)],
    "layer.variant": [layers.no_bias, layers.always_interleaved],
    "layer.formats": [
        lambda: formats.Writes("fp8", lambda codec, kv, pe: codec.encode(kv, pe) ^ 1),  # the next codes
        lambda: formats.Reads("fp8", lambda codec, rows: rows & 0xFE),  # two bits of mantissa
        lambda: formats.Reads("fp8_ds_mla_any", formats.truncated),
    ],
    "layer.untouched": [layers.two_slots],
    "layer.shared_plan": [lambda: wrong(Latent, first_layers("cache")), layers.accumulating],
    "layer.two_layers": [
        partial(habits.packs_once, "linear", "shape"),
        partial(habits.packs_once, "batched_linear", "shape"),
        partial(habits.first_weight, "linear", "shape"),
    ],
    "layer.indexer": [
        lambda: sparse.selecting(hide=sparse.later(1)),
        lambda: sparse.selecting(sparse.without_relu),
        lambda: sparse.selecting(sparse.relu_behind),
        lambda: sparse.selecting(sparse.unweighted),
        lambda: sparse.selecting(tail=0),
        lambda: given(sparse.Select, sparse.neighbour_table),
        lambda: given(sparse.Sparse, sparse.everything),
        lambda: given(sparse.Sparse, sparse.neighbour_table),
        *(lambda layout=layout: mutant(sparse.KEY, sparse.always(layout)) for layout in (False, True)),
        layers.always_interleaved,
    ],
    "layer.indexer_steps": [
        layers.key_of_the_step_before,
        layers.keys_of_new_pages,
        lambda: wrong(sparse.Select, prepare=layers.of_the_object()),
    ],
    "layer.indexer_formats": [
        lambda: sparse.stores(sparse.scales_first),
        lambda: sparse.reads_bytes(sparse.neighbour_scales),
        lambda: sparse.of_format(given(sparse.Sparse, sparse.other_format), "fp8_ds_mla"),
    ],
    "layer.shared_selection": [
        lambda: given(sparse.Sparse, sparse.everything),
        lambda: given(sparse.Sparse, sparse.of_the_token_before),
        lambda: given(sparse.Sparse, sparse.minus_one_is(0)),
    ],
    "layer.requests": [
        *(lambda n=n: after(Latent, requests_from(n)) for n in (128, 8)),
        partial(extents.lost_from, "write_latent", 128),
        partial(extents.lost_from, "rotate_query", 100),
    ],
    "layer.rows": [
        partial(extents.lost_from, "linear", 512),
        partial(extents.lost_from, "write_latent", 300),
        partial(extents.lost_from, "rotate_query", 513),
    ],
    "layer.equal": [lambda r=r: after(Latent, layers.ties(r)) for r in (True, False)],
    "layer.no_tokens": [layers.first_slot_if_empty, layers.scratch_of_nothing],
    "layer.weights": [layers.Lossy],
    "layer.update": [lambda: wrong(Latent, prepare=layers.of_the_object())],
    "layer.graph": [layers.on_the_host, lambda: wrong(sparse.Select, host_query)],
    "layer.graph_lengths": [FrozenLengths, sparse.FrozenSelect],
}
