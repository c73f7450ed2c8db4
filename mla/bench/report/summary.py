"""What the page says about a file beside charts, its first screen above all; and its tables. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from mla.bench.results.rows import COLUMNS, cell, timing_rows
from mla.bench.results.schema import Case, Run
from mla.bench.terminal import ceilings, run_table, tables, verdict
from mla.bench.terminal.digits import between, number
from mla.bench.terminal.lines import BUSY, of_case
from mla.bench.terminal.tables import NAMES, Table
from mla.bench.terminal.verdict import is_yardstick, mark, why_unreliable
from mla.text import counted, grouped
from mla_backends.outside import escaped

MOST_TILES = 6  # of one file
# Kinds of cases that are not simply right, the worst first, as said of a count.
_WORDS = {
    "wrong": "wrong",
    "doubtful": "doubtful: no number",
    "in-doubt": "with a suspect limit or time",
    "not-run": "not run",
    "not-timed": "not timed",
    "interrupted": "interrupted",
}
# Kinds of warnings about a busy machine, as said of a count, where the kind itself does not do.
_WARNED = {"drifts": "drifting", "outliers": "with outliers"}


@dataclass(frozen=True)
class ResultFile:
    """One result file. `key` is the letter that stands for it; empty for a single file.

    `name` is the end of its path; `config` is "" if the file does not name it.
    """

    key: str
    name: str
    run: Run
    config: str = ""

    @property
    def title(self) -> str:
        """Letter and name."""
        return f"{self.key} {self.name}".strip()

    @property
    def about(self) -> str:
        """Letter, device and config."""
        return ", ".join(filter(None, (f"{self.key} {self.run.backend.device}".strip(), self.config)))


def result_files(paths: Sequence[str], runs: Sequence[Run]) -> list[ResultFile]:
    """Return the files with their letters if there are several: A to Z, A1, B1 and so on."""
    files = []
    for at, (path, run) in enumerate(zip(paths, runs, strict=True)):
        key = f"{ascii_uppercase[at % 26]}{at // 26 or ''}" * (len(runs) > 1)
        config = str(run.config.get("name") or "").removesuffix("/config.json")  # as that of any model
        name = escaped("/".join(path.split("/")[-2:]))
        files.append(ResultFile(key, name, run, config.rpartition("/")[2].removesuffix(".json")))
    return files


class Badge(NamedTuple):
    """Something about cases with one status; `status` is a CSS class."""

    status: str
    text: str


class Tile(NamedTuple):
    """The answer for one scenario: by how much, how far from the limit, how noisy."""

    status: str  # CSS class
    where: str
    value: str  # in the largest letters: how many times as fast as the next, or else the headline
    text: str  # the verdict
    number: str = ""  # the headline of the fastest
    share: float | None = None  # of the limit, in percent
    noise: str = ""
    unsteady: bool = False


def badges(cases: Sequence[Case]) -> list[Badge]:
    """Return what is wrong, the worst first, and what is unsteady; "ok" only if nothing is wrong."""
    kinds = Counter(map(mark, cases))
    yardsticks, judged = kinds["yardstick"], len(cases) - kinds["yardstick"]
    kinds["interrupted"] = sum(case.interrupted for case in cases if not is_yardstick(case))
    of = f"of {counted(judged, 'case')}"
    badges = [Badge(kind, f"{kinds[kind]} {of} {words}") for kind, words in _WORDS.items() if kinds[kind]]
    if not badges:
        agree = f"all {judged} cases agree" if judged > 1 else "the only case agrees"
        badges = [Badge("ok", f"{agree} with the oracle") if judged else Badge("not-run", "no case was run")]
    busy = Counter(kind for case in cases for kind in sorted(_busy(case)))
    told = [f"{n} {_WARNED.get(kind, kind)}" for kind, n in busy.items()]
    badges += [Badge("unsteady", f"{of}: {', '.join(told)}")] * bool(told)
    return badges + [Badge("soft", f"{yardsticks} without a result to check")] * bool(yardsticks)


def _busy(case: Case) -> set[str]:
    """Return the kinds of the warnings about a case that show a busy machine."""
    return {warned.kind for warned in of_case(case)} & set(BUSY)


def tiles(file: ResultFile) -> list[Tile]:
    """Return the answer for every scenario outside of a grid, and for the points of a small grid alone."""
    plain = [case for case in file.run.cases if not case.point]
    cases = plain or file.run.cases * (len(file.run.cases) <= MOST_TILES)
    return [_tile(*group) for group in grouped(cases, lambda case: case.scenario).items()][:MOST_TILES]


def _tile(scenario: str, cases: Sequence[Case]) -> Tile:
    ranking, text = verdict.contest(cases), verdict.of_scenario(scenario, cases).text
    worst = min((mark(case) for case in ranking.without), key=list(_WORDS).index, default="ok")
    if not ranking.leaders:
        return Tile(worst, scenario, "no number", text)
    first, limit = ranking.leaders[0], ranking.leaders[0].roofline
    value = number = run_table.headline(first).rpartition(": ")[2]
    if ranking.lead:
        value, _ = verdict.times_as_fast(ranking.lead)
    unreliable, busy = why_unreliable(first), _busy(first)
    return Tile(
        "in-doubt" if limit.doubt else "unsteady" if unreliable and worst == "ok" else worst,
        f"{scenario}: {first.implementation}",
        value,
        text,
        number * (value != number),
        None if limit.doubt or unreliable or limit.fraction is None else 100 * limit.fraction,
        _noise(first, busy),
        bool(busy),
    )


def _noise(case: Case, busy: set[str]) -> str:
    """Return how far the times of a case lie apart, and how they drifted."""
    latency = case.latency_ms
    assert latency is not None
    spread = between((latency.p10, latency.p90), latency.median, latency.ci95)
    drift = f", drift {100 * latency.drift:+.1f} %" if latency.drift is not None else ""
    return f"{', '.join(kind for kind in BUSY if kind in busy) or 'steady'}: 80 % within {spread} ms{drift}"


def said(file: ResultFile) -> list[str]:
    """Return a sentence for every grid, for scenarios that got no tile, and for the limits."""
    tiled = {tile.where.partition(": ")[0] for tile in tiles(file)}
    sentences = [str(line) for line in verdict.verdicts(file.run) if line.where not in tiled]
    return [*sentences[:MOST_TILES], *ceilings.run_lines(file.run.ceilings)]


def compared(base: ResultFile, new: ResultFile) -> Table:
    """Return every case of a file compared with the base, and what else there is to say of both."""
    return tables.compared(base.run, new.run, f"{new.title} against {base.title}")[0]


def folded(lengths: Sequence[int]) -> str:
    """Return lengths with repeats folded, such as "50 x4, 100 x4"."""
    runs = [(length, sum(1 for _ in same)) for length, same in groupby(lengths)]
    return ", ".join(f"{length} x{count}" if count > 1 else str(length) for length, count in runs)


# ----------------------------------------------------------------------------------------------------- tables


# Columns of the CSV file that are said once, elsewhere on the page: what ran where.
_ELSEWHERE = {*NAMES, *list(COLUMNS)[:9]}


def every_number(file: ResultFile) -> Table:
    """Return the columns of the CSV file that say something, for every way in which a case was timed."""
    rows = timing_rows([(Path(file.name), file.run)])
    names = [*NAMES, *(name for name in COLUMNS if name not in _ELSEWHERE)]
    columns = {name.replace("_", " "): [_cell(cell(row, name)) for row in rows] for name in names}
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return Table(file.title, list(shown), list(zip(*shown.values(), strict=True)))


def _cell(value: object) -> str:
    return number(value) if isinstance(value, float) else "-" if value in (None, "") else str(value)
