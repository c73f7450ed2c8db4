"""Ops that make a whole layer wrong: check -> makers of ops that it must fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from wrong_ops import extents, formats, habits, layers

MUTANTS: Mapping[str, list[Callable[[], Any]]] = {
    "layer.prefill": [layers.FutureLeak, layers.Unrotated],
    "layer.history": [layers.EarlyKeys],
    "layer.mixed": [layers.RowsMoved],
    "layer.decode": [layers.LastPageDropped],
    "layer.pages": [layers.ConsecutivePages],
    "layer.chunks": [layers.BaseTwo],
    "layer.variant": [layers.NoBias, layers.AlwaysInterleaved],
    "layer.cached": [layers.Unrotated, layers.Unnormed],
    "layer.formats": [formats.NextCodes, formats.LastBitLost, formats.AsScaled],
    "layer.untouched": [layers.TwoSlots],
    "layer.again": [layers.Accumulating],
    "layer.shared_plan": [layers.FirstCache],
    "layer.two_layers": [
        partial(habits.packs_once, "linear", "shape"),
        partial(habits.packs_once, "batched_linear", "shape"),
        partial(habits.first_weight, "linear", "shape"),
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
    "layer.graph": [layers.OnTheHost],
    "layer.graph_lengths": [layers.FrozenLengths],
}
