"""Sections of the conformance suite, as data: steps per dtype and kind of op.

Where kernels are compiled at first use, most of the time goes there. In bfloat16 the small grid needs about
310 specializations of the project's own kernels, and the full one about 640, of which 360 are for the numbers
of heads of absorbed attention. Limits allow 1.2 seconds for each, which is an estimate. Compilers keep what
they have made, so a step that was ended at its limit gets further when it is tried again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.gpu.steps import MOST_SECONDS, OPTIONAL, Machine, Section, Step

# Name of a step -> the patterns that it selects, and its limit.
Parts = Mapping[str, tuple[tuple[str, ...], int]]

_NORMS = ("rms_norm", "rotate_query", "write_latent")
_REST = ("device", "ops", "linear", "batched_linear", "expanded", "layer")
QUICK: Parts = {"latent": (("latent",), 230), "pointwise": (_NORMS, 190), "rest": (_REST, 180)}
HEADS: Parts = {"heads": (("latent.heads",), MOST_SECONDS)}
FULL: Parts = {"latent": (("latent",), 300), "pointwise": (_NORMS, 160), "rest": (_REST, 140)}
SMOKE: Parts = {"device": (("device",), 60)}


def quick(machine: Machine, smoke: bool) -> Section:
    """The contract in the layer's usual dtype, on a small grid of shapes."""
    return _section("conformance", "Conformance, small grid", machine, QUICK, "bfloat16", smoke, small=True)


def others(machine: Machine, smoke: bool) -> tuple[Section, ...]:
    """All shapes in bfloat16, and the small grid in the other dtypes, where the backend claims them."""
    full = ("Conformance, all shapes", machine)
    small = (
        _section(f"conformance-{dtype}", f"Conformance in {dtype}", machine, QUICK, dtype, smoke, small=True)
        for dtype in ("float16", "float32")
    )
    return (
        _section("conformance-heads", *full, HEADS, "bfloat16", smoke),
        _section("conformance-full", *full, FULL, "bfloat16", smoke),  # heads are compiled by now
        *small,
    )


def _section(
    name: str, title: str, machine: Machine, parts: Parts, dtype: str, smoke: bool, small: bool = False
) -> Section:
    grid = ("--quick",) * (small or smoke)
    # A drawn case is compiled anew where its shape is: nothing is drawn within these limits.
    words = ("-m", "mla.conformance", "--backend", machine.backend, *grid, "--draws", "0", "--dtype", dtype)
    return Section(name, title, tuple(_steps(words, SMOKE if smoke else parts)))


def _steps(words: tuple[str, ...], parts: Parts) -> Iterator[Step]:
    for name, (patterns, limit) in parts.items():
        only = tuple(word for pattern in patterns for word in ("--only", pattern))
        # A dtype that the backend does not claim is no failure; the table says so.
        yield Step(name, (*words, *only), limit, "conformance", tolerates=OPTIONAL)
