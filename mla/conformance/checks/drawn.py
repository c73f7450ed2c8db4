"""Cases of every op, drawn over all axes at once: the last checks to run, for as long as there is time."""

from __future__ import annotations

from mla.cases import KINDS
from mla.conformance.drawn import draw
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial

GROUPS = {"latent_attention": "latent", "expanded_attention": "expanded"}  # other kinds have their own name
CATCHES = "combinations of sizes, numbers, memory and sequences of calls that no table has"


def drawn(trial: Trial) -> None:
    """Cases drawn over all axes at once are right; the smallest wrong one is shown."""
    with trial.case("drawn"):
        trial.require  # noqa: B018  # ends a case that is not chosen
        draw(trial)


for _kind in KINDS:
    check(f"{GROUPS.get(_kind, _kind)}.drawn", catches=CATCHES, scope=OP, kind=_kind, fails="drawn")(drawn)
