#!/usr/bin/env python3
"""Hold right and wrong arithmetic to the bounds, over many seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.rounding.seeds --seeds 200

Prints, by form and dtype, the largest error over its bound of what is right, which must stay below 1, and the
smallest of what is wrong, which must not, in a layer or in the op alone. About eleven minutes on one core
with bfloat16 instructions; exit code 1 if one is on the wrong side.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

from benchmarks.rounding.cases import (
    ATTENTION,
    DECODE,
    LAYERS,
    LONG_CONTEXT,
    layer_ratio,
    new_ratio,
    op_ratio,
    product_ratio,
    roundings,
)
from benchmarks.rounding.forms import BF16, EXACT, F16, F32, ONE_BY_ONE, RIGHT, WRONG
from mla.command.display import markdown

DTYPES = {"bf16": BF16, "fp16": F16, "fp32": F32}
NEW = "as the reference, new inputs"
FEW_ROWS = 7  # rows
Ratios = dict[tuple[str, str], list[float]]  # form, dtype -> ratios, one per seed and case


def right(seeds: range) -> tuple[Ratios, Ratios, Ratios]:
    """Return the ratios of right layers and ops, and errors over that of rounding once of the exact layer."""
    layers: Ratios = defaultdict(list)
    single: Ratios = defaultdict(list)
    once: Ratios = defaultdict(list)
    for name, dtype in DTYPES.items():
        forms = [form for form in RIGHT if dtype == F32 or form is not ONE_BY_ONE]
        for seed in seeds:
            for layer in LAYERS:
                case = layer.drawn(dtype, seed)
                for form in forms[: layer.forms]:
                    layers[form.name, name].append(layer_ratio(case, form))
                layers[NEW, name].append(new_ratio(case))
                if sum(case.query_lens) < FEW_ROWS:  # many rows are never near
                    once[layer.name, name].append(roundings(case, EXACT))
            for op_case in ATTENTION.values():
                for form in forms:
                    single[form.name, name].append(op_ratio(op_case, form, dtype, seed))
            for form in forms:
                single[form.name, name].append(product_ratio(form, dtype, seed))
    return layers, single, once


def wrong(seeds: range) -> tuple[Ratios, Ratios]:
    """Return the ratios of wrong layers of four heads, and of wrong ops."""
    layers: Ratios = defaultdict(list)
    single: Ratios = defaultdict(list)
    for seed in seeds:
        for name, dtype in DTYPES.items():
            forms = [form for form, dtypes in WRONG if dtype in dtypes]
            for form in forms:
                layers[form.name, name].append(layer_ratio(DECODE.drawn(dtype, seed), form))
                single[form.name, name].append(op_ratio(LONG_CONTEXT, form, dtype, seed))
    return layers, single


def table(title: str, ratios: Ratios, pick: Callable[[Iterable[float]], float]) -> str:
    """Return a Markdown table of one figure per form and dtype."""
    forms = dict.fromkeys(form for form, _ in ratios)
    known = {place: f"{pick(several):.2f}" for place, several in ratios.items() if several}
    return markdown(
        (title, *DTYPES), [[form, *(known.get((form, name), "") for name in DTYPES)] for form in forms]
    )


def main() -> int:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds  [200]")
    parser.add_argument("--first", type=int, default=0, help="the first of them  [0]")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.seeds)
    torch.set_num_threads(1)
    layers, single, once = right(seeds)
    wrong_layers, wrong_ops = wrong(seeds)
    for title, ratios, pick in (
        ("right layers, largest error over bound", layers, max),
        ("right ops, largest error over bound", single, max),
        ("exact layers, smallest error over that of rounding once", once, min),
        ("wrong layers, smallest error over bound", wrong_layers, min),
        ("wrong ops, smallest error over bound", wrong_ops, min),
    ):
        print(table(title, ratios, pick))  # noqa: T201
    alarms = max(max(map(max, ratios.values())) for ratios in (layers, single))
    both = [max(min(wrong_layers[form]), min(wrong_ops[form])) for form in wrong_layers]
    return int(alarms > 1 or min(both) <= 1)


if __name__ == "__main__":
    sys.exit(main())
