"""Why kernels fail: what the cases of every check were chosen by."""

from __future__ import annotations

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
