"""The link that a simulation assumes: written out, or from the result of a run over real ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mla.bench import results
from mla.bench.plan.options import RunOptions
from mla.errors import UsageError
from mla.parallel.layout import Layout
from mla.parallel.link import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, IDEAL, Link

_MEASURE = "`torchrun --nproc-per-node 2 -m mla.bench --parallel tp=2 -o real.json`"


def with_link(options: RunOptions) -> RunOptions:
    """Return the options of a simulation with its link in numbers, and where these are from.

    Raises `UsageError` and `ResultError`.
    """
    if not options.simulate or options.parallel is None:
        return options
    link, source = _read(options.link or IDEAL)
    if missing := link.missing(_kinds(options.parallel)):
        raise UsageError(
            f"--link '{options.link}' has no {missing[0]}, which layout '{options.parallel}' needs: add "
            f"'{missing[0]}:alpha=5us,beta=300GB/s' to it."
        )
    return replace(options, link=str(link), link_source=source)


def _kinds(layout: Layout) -> list[str]:
    """Return the kinds of collectives in a forward of this layout."""
    return [ALL_REDUCE] * (layout.head_parts > 1) + [ALL_GATHER, ALL_TO_ALL] * (layout.dcp > 1)


def _read(text: str) -> tuple[Link, str]:
    if text.strip() == IDEAL:
        return Link.parse(text), "none given: collectives take no time"
    if "alpha=" in text:
        return Link.parse(text), "given"
    path = Path(text)
    if not path.exists():
        raise UsageError(
            f"--link takes alpha=5us,beta=300GB/s, the result file of a run over real ranks, or ideal, and "
            f"'{text}' is none of them: {_MEASURE} measures a link."
        )
    return _of_run(path, results.read(path))


def _of_run(path: Path, run: results.Run) -> tuple[Link, str]:
    """Return the link that a run measured: the same for all of its cases."""
    spreads = [case.spread for case in run.cases if case.spread and not case.spread.predicted]
    measured = next((spread for spread in spreads if spread.link), None)
    if measured is None:
        raise UsageError(f"'{path}' holds no measured link, as a run over real ranks does: {_MEASURE}.")
    link = Link({one.collective: one.line() for one in measured.link})
    return link, f"{measured.link_source}, {path.name}"
