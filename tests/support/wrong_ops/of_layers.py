"""Ops that make a whole layer wrong: check -> makers of ops that it must fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import wrong_sparse as sparse
from wrong_attention.base import given, wrong
from wrong_attention.latent import host_query

from wrong_ops import extents, formats, habits, layers
from wrong_ops.base import mutant

MUTANTS: Mapping[str, list[Callable[[], Any]]] = {
    "layer.mixed": [
        *(layers.RowsMoved, layers.FutureLeak, layers.Unrotated, layers.EarlyKeys, layers.Unnormed),
    ],
    "layer.decode": [layers.LastPageDropped],
    "layer.pages": [layers.ConsecutivePages],
    "layer.chunks": [layers.BaseTwo],
    "layer.variant": [layers.NoBias, layers.AlwaysInterleaved],
    "layer.formats": [formats.NextCodes, formats.LastBitLost, formats.AsScaled],
    "layer.untouched": [layers.TwoSlots],
    "layer.shared_plan": [layers.FirstCache, layers.Accumulating],
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
        layers.AlwaysInterleaved,
    ],
    "layer.indexer_steps": [layers.KeyOfTheStepBefore, layers.KeysOfNewPages, layers.SelectsForTheObject],
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
        layers.FewRequests,
        layers.FewerRequests,
        partial(extents.lost_from, "write_latent", 128),
        partial(extents.lost_from, "rotate_query", 100),
    ],
    "layer.rows": [
        partial(extents.lost_from, "linear", 512),
        partial(extents.lost_from, "write_latent", 300),
        partial(extents.lost_from, "rotate_query", 513),
    ],
    "layer.equal": [layers.Ties, layers.ShiftedTies],
    "layer.no_tokens": [layers.FirstSlotIfEmpty, layers.ScratchOfNothing],
    "layer.weights": [layers.Lossy],
    "layer.update": [layers.PlanOfTheObject],
    "layer.graph": [layers.OnTheHost, lambda: wrong(sparse.Select, host_query)],
    "layer.graph_lengths": [layers.FrozenLengths, sparse.FrozenSelect],
}
