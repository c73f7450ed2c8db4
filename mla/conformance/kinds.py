"""Why kernels fail: what the cases of every check were chosen by."""

from __future__ import annotations

import fnmatch

KINDS = {
    "contract": "what the device, an op or a layer says of itself, and what it promises",
    "formula": "the formula itself: a scale, a mask, an order of channels",
    "grid": "limits of a launch grid: many requests, rows, segments or heads",
    "index": "widths of an index: slots, pages, bytes and elements beyond what 8 to 32 bits count",
    "tiles": "borders of tiles, pages and splits: of rows, heads and keys",
    "order": "who comes first: equal requests, permuted batches",
    "state": "what is kept between calls: a plan, an output, an input, another layer",
    "memory": "what lies around operands: strides, guard rows, neighbours",
    "emptiness": "nothing at all: no tokens, no keys",
    "numbers": "precision: narrow sums, large and small values",
}
DEFAULT = "formula"

# The kind of checks that do not name one where they are registered.
_OF_CHECKS = {
    "contract": (
        "device.*",
        "ops.*",
        "*.pack",
        "*.prepare",
        "*.other_widths",
        "*.without_lse",
        "layer.weights",
    ),
    "grid": ("rotate_query.heads",),
    "index": ("latent.far_pages",),
    "tiles": (
        "linear.product",
        "batched_linear.product",
        "*_linear.heads",
        "latent.heads",
        "expanded.heads",
        "*.page_sizes",
        "*.page_boundaries",
        "latent.cut_tokens",
        "latent.long",
        "layer.pages",
        "layer.chunks",
    ),
    "state": (
        "*.reuse",
        "*.stepping",
        "*.graph",
        "*.graph_lengths",
        "layer.again",
        "layer.decode",
        "layer.shared_plan",
        "layer.update",
    ),
    "memory": ("*.strided", "*.inputs", "*.in_place", "*.untouched", "*.poison", "*.tail"),
    "emptiness": ("*.zero_queries", "*.empty_rows", "*.empty_segments"),
    "numbers": ("*.large",),
}


def kind_of(check_id: str, named: str = DEFAULT) -> str:
    """Return why kernels fail a check: what it was registered with, or what is listed here.

    Raises ValueError where `named` is none of `KINDS`.
    """
    if named not in KINDS:
        raise ValueError(f"check '{check_id}' fails by '{named}', which is not one of {', '.join(KINDS)}.")
    if named != DEFAULT:
        return named
    for kind, ids in _OF_CHECKS.items():
        if any(fnmatch.fnmatchcase(check_id, one) for one in ids):
            return kind
    return DEFAULT
